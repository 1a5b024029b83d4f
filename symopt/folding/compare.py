"""Example inputs, and whether the smaller network computes on them what the original does."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["Examples", "Inputs", "check_equal", "deterministic_outputs", "examples_of"]

Inputs = tuple[object, ...]
"""Positional arguments of ``forward``."""

T = TypeVar("T")


@final
@dataclass(frozen=True)
class Examples:
    """The arguments of one call of a model."""

    args: Inputs
    kwargs: Mapping[str, object]

    def __str__(self) -> str:
        """The call, for messages."""
        return "model(*example_inputs, **example_kwargs)" if self.kwargs else "model(*example_inputs)"

    def run(self, module: nn.Module) -> object:
        """What ``module`` returns for clones of them, because a ``forward`` may write to its arguments."""
        args, kwargs = _copied((self.args, dict(self.kwargs)))
        return module(*args, **kwargs)

    def arguments(self, module: nn.Module) -> dict[str, object] | None:
        """Value of every argument of ``forward``, in its order, defaults included; None if it takes any keyword."""
        bound = inspect.signature(module.forward).bind(*self.args, **self.kwargs)
        bound.apply_defaults()
        kinds = {name: p.kind for name, p in bound.signature.parameters.items()}
        if any(bound.arguments[name] for name, kind in kinds.items() if kind is inspect.Parameter.VAR_KEYWORD):
            return None
        return {
            f"*{name}" if kinds[name] is inspect.Parameter.VAR_POSITIONAL else name: value
            for name, value in _copied(dict(bound.arguments)).items()
            if kinds[name] is not inspect.Parameter.VAR_KEYWORD
        }

    @property
    def batch(self) -> int:
        """The length of the first tensor, or 1."""
        first = next((x for x in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(x, Tensor)), None)
        return 1 if first is None or first.dim() == 0 else max(1, len(first))


def examples_of(
    owner: str,
    model: nn.Module,
    inputs: Tensor | Inputs | Mapping[str, object] | None,
    kwargs: Mapping[str, object] | None,
) -> Examples | None:
    """The arguments that a caller of ``owner`` gave; None if there are none.

    Raises:
        TypeError: for inputs that are no arguments.
    """
    given: object = kwargs
    if given is not None and not (isinstance(given, Mapping) and all(isinstance(key, str) for key in given)):
        raise TypeError(
            f"{owner}: example_kwargs must be a dict of the keyword arguments of forward, got {type(given).__name__}"
        )
    named = dict(kwargs or {})
    if isinstance(inputs, Mapping):
        # One dict may be meant as model(batch) or as model(**batch): its keys say which.
        if inputs and set(inputs) <= set(inspect.signature(model.forward).parameters) - named.keys():
            return Examples((), {**inputs, **named})
        inputs = (inputs,)
    if isinstance(inputs, Tensor):
        inputs = (inputs,)
    if inputs is None:
        inputs = ()
    if not isinstance(inputs, tuple):
        raise TypeError(
            f"{owner}: example_inputs must be a tensor or a tuple of the arguments of forward, or a dict, got "
            f"{type(inputs).__name__}"
        )
    return Examples(inputs, named) if inputs or named else None


def _copied(values: T) -> T:
    result: T = pytree.tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, values)
    return result


def outputs_of(module: nn.Module, examples: Examples) -> list[Tensor]:
    """Every tensor that ``module`` returns in eval mode."""
    with torch.no_grad():
        outputs = examples.run(copy.deepcopy(module).eval())
    return [out for out in pytree.tree_leaves(outputs) if isinstance(out, Tensor)]


def deterministic_outputs(owner: str, module: nn.Module, examples: Examples) -> list[Tensor] | str:
    """The same; or why they cannot be compared with others."""
    with torch.random.fork_rng(devices=[]):
        try:
            one, two = outputs_of(module, examples), outputs_of(module, examples)
        except Exception as error:
            fix = "give the arguments that forward takes"
            state = (*module.named_parameters(), *module.named_buffers())
            if (name := next((name for name, x in state if x.is_meta), None)) is not None:
                fix = f"{name} is on the meta device: load its values first, or give inputs on that device"
            raise ValueError(f"{owner}: {examples} failed: {error}; {fix}") from error
    if any(out.is_meta for out in one):
        return "outputs are on the meta device"
    return one if all(map(_close, one, two)) else "outputs are random even in eval mode"


def check_equal(expected: list[Tensor], small: nn.Module, examples: Examples) -> None:
    """Raise unless the smaller network's outputs are the expected ones, up to rounding."""
    outputs = outputs_of(small, examples)
    if len(expected) != len(outputs) or not all(map(_close, expected, outputs)):
        raise RuntimeError(
            "fold: the smaller network does not reproduce the outputs on example_inputs, so it is not returned; please "
            "report this with the model's forward"
        )


def _close(one: Tensor, two: Tensor) -> bool:
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    if not (one.is_floating_point() or one.is_complex()):
        return torch.equal(one, two)
    # On CUDA, float32 convolutions round like TF32, and differently for every shape.
    eps = max(torch.finfo(one.dtype).eps, 2**-11 if one.is_cuda and one.dtype == torch.float32 else 0)
    scale = one.abs().nan_to_num(posinf=0).max().item() if one.numel() else 0.0
    return torch.allclose(one, two, rtol=0, atol=eps**0.5 * max(scale, 1), equal_nan=True)
