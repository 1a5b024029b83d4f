"""A model without its constraints, whose weights obey them exactly."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Generic, TypeVar, final

import torch
from torch import Tensor, nn

from symopt.budgets.pools import BudgetedWeight, pools
from symopt.constraints import Constraint
from symopt.constraints.planes.plane import flat, parts
from symopt.folding.thin import Thin
from symopt.module.bindings import bindings
from symopt.module.constrain import release

__all__ = ["Enforced", "enforce"]

M = TypeVar("M", bound=nn.Module)


@final
@dataclass(frozen=True)
class Enforced(Generic[M]):
    """What :func:`enforce` returns."""

    module: M
    parameters: int
    """Their number before identical ones became one."""
    cut: dict[str, int]
    """By parameter: how many nonzero weights (singular values) its budget had no room for."""
    thin: dict[str, Thin]
    """By parameter: how a weight that is a product of two matrices factors."""


@torch.no_grad()
def enforce(model: M) -> Enforced[M]:
    """A copy of ``model`` in plain parameters: structure exact, budgets met, identical parameters shared."""
    plain = copy.deepcopy(model)
    bound = bindings(plain)
    release(plain)
    count = sum(p.numel() for p in plain.parameters())
    cut: dict[str, int] = {}
    for names, constraint in bound:
        weights = [plain.get_parameter(name).detach() for name in names]
        if constraint.is_matrix and constraint.budget is not None:
            live = int((constraint.size(weights[0]) > 0).sum())
            cut[names[0]] = max(0, live - int(constraint.budget.amount))
        for w, part in zip(weights, parts(constraint.fold(flat(weights)), weights), strict=True):
            w.copy_(part)
        if constraint.parameters_identical:
            _share(plain, names)
    cut |= _meet_budgets(plain, bound)
    thin: dict[str, Thin] = {names[0]: constraint.thin for names, constraint in bound if constraint.is_matrix}
    return Enforced(plain, count, cut, thin)


def _share(module: nn.Module, names: tuple[str, ...]) -> None:
    """Put the first of these parameters in the place of the others."""
    for name in names[1:]:
        parent, _, child = name.rpartition(".")
        module.get_submodule(parent).register_parameter(child, module.get_parameter(names[0]))


def _meet_budgets(module: nn.Module, bound: list[tuple[tuple[str, ...], Constraint]]) -> dict[str, int]:
    """Set to zero the units that are over budget; returns how many of their weights were not zero, by parameter."""
    weights: dict[str, tuple[Tensor, ...]] = {}
    candidates: list[BudgetedWeight] = []
    for names, constraint in bound:
        if constraint.budget is not None and not constraint.is_matrix:
            name = ", ".join(names)
            weights[name] = tuple(module.get_parameter(n).detach() for n in names)
            w = flat(weights[name])
            candidates.append(BudgetedWeight(name, w, constraint, constraint.partition(w)))
    cut: dict[str, int] = {}
    for pool in pools(_over_budget(candidates)):
        for m, over in zip(pool.weights, pool.pruned(), strict=True):
            pruned = m.constraint.units(over, m.w, m.groups)
            cut[m.name] = int((pruned & (m.w != 0)).sum())
            for w, gone in zip(weights[m.name], parts(pruned, weights[m.name]), strict=True):
                w.masked_fill_(gone, 0.0)
    return cut


def _over_budget(candidates: list[BudgetedWeight]) -> list[BudgetedWeight]:
    """Without those that share a count larger than what is left of them in this module, which may be a part of one."""
    units: dict[Constraint, int] = {}
    for m in candidates:
        shared = m.constraint.shared_budget()
        units[shared] = units.get(shared, 0) + m.units
    left = [units[m.constraint.shared_budget()] for m in candidates]
    return [m for m, count in zip(candidates, left, strict=True) if m.budget.count(count) <= count]
