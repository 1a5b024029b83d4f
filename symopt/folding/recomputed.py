"""Copies of modules whose weights hooks compute anew in every forward pass; in the copy they are plain Parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm, remove_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm
from torch.utils import _pytree as pytree

from symopt.module.annotation import annotated
from symopt.module.bindings import annotated_bindings

__all__ = ["copy_of", "settle_hooks", "settle_parametrized"]

M = TypeVar("M", bound=nn.Module)
Remove = Callable[[nn.Module, str], object]


def copy_of(model: M) -> M:
    """A deep copy; what a forward pass has left in attributes is copied without its graph, which torch refuses."""
    memo: dict[int, object] = {}
    for module in model.modules():
        for value in pytree.tree_leaves(vars(module)):
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def settle_hooks(model: nn.Module, *, constrained: bool) -> None:
    """Make plain Parameters, in place, of what ``torch.nn.utils.prune`` and the old weight and spectral norm compute.

    Where a constraint binds what these hooks compute it from, only if ``constrained``: it has to be enforced before.
    """
    for module in model.modules():
        for hook in list(module._forward_pre_hooks.values()):
            found = _recomputed(hook)
            if found is None:
                continue
            name, sources, remove = found
            if constrained or not any(source in sources for source, _, _ in annotated(module)):
                trains = any(p.requires_grad for key in sources if (p := module._parameters.get(key)) is not None)
                with torch.no_grad():
                    remove(module, name)
                module.get_parameter(name).requires_grad_(trains)


def _recomputed(hook: object) -> tuple[str, tuple[str, ...], Remove] | None:
    """Name of the weight that a hook computes, the Parameters it does so from, and what ends it."""
    if isinstance(hook, prune.BasePruningMethod):
        name = str(hook._tensor_name)
        return name, (f"{name}_orig",), prune.remove
    if isinstance(hook, WeightNorm):
        return hook.name, (f"{hook.name}_g", f"{hook.name}_v"), remove_weight_norm
    if isinstance(hook, SpectralNorm):
        return hook.name, (f"{hook.name}_orig",), remove_spectral_norm
    return None


def settle_parametrized(model: nn.Module) -> None:
    """Make a plain Parameter, in place, of a constrained one that has been parametrized since.

    Raises:
        ValueError: if a parameter that a constraint binds is no longer there.
    """
    for binding in annotated_bindings(model):
        for i, (owner, attribute) in enumerate(zip(binding.owners, binding.attributes, strict=True)):
            if binding.parameter(i) is None and parametrize.is_parametrized(owner, attribute):
                training = owner.training
                owner.eval()  # in which spectral norms do not iterate
                kind = type(owner)  # torch removes the weight from the class, which a copy shares with the original
                owner.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
                with torch.enable_grad():  # or torch takes it for a constant
                    parametrize.remove_parametrizations(owner, attribute)
                owner.training = training
            if binding.parameter(i) is None:
                raise ValueError(
                    f"fold: {binding.names[i]} is constrained, but {type(owner).__name__} has no parameter "
                    f"{attribute!r} any more; give it one again, or remove the constraint with symopt.release(model)"
                )
