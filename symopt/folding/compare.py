"""Whether the smaller network computes what the original does, on inputs that the caller gave."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["Inputs", "check_equal", "copied", "deterministic_outputs", "outputs_of"]

Inputs = tuple[object, ...]
"""Positional arguments of ``forward``."""

T = TypeVar("T")


def copied(inputs: T) -> T:
    """Every tensor in ``inputs`` cloned, because a ``forward`` may write to its arguments."""
    result: T = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, inputs)
    return result


def outputs_of(module: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Every tensor that ``module`` returns in eval mode."""
    with torch.no_grad():
        outputs = copy.deepcopy(module).eval()(*copied(inputs))
    return [out for out in pytree.tree_leaves(outputs) if isinstance(out, Tensor)]


def deterministic_outputs(module: nn.Module, inputs: Inputs) -> list[Tensor] | None:
    """The same; None if two calls differ."""
    with torch.random.fork_rng(devices=[]):
        try:
            one, two = outputs_of(module, inputs), outputs_of(module, inputs)
        except Exception as error:
            raise ValueError(f"fold: model(*example_inputs) failed: {error}") from error
    return one if all(map(_close, one, two)) else None


def check_equal(expected: list[Tensor], outputs: list[Tensor]) -> None:
    """Raise unless the smaller network's outputs are the expected ones, up to rounding."""
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
