"""A model without its constraints, whose weights obey them exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar, final

import torch
from torch import nn

from symopt.constraints import Constraint, LowRank
from symopt.constraints.planes.plane import flat, parts
from symopt.folding.budgets import Excess, excess_rank, meet_budgets
from symopt.folding.recomputed import copy_of, settle_hooks, settle_parametrized
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
    constrained: frozenset[str]
    """Names of the parameters that a constraint binds."""
    budgets: tuple[Excess, ...]
    """What each of them cut."""
    thin: dict[str, Thin]
    """By parameter: how a weight that is a product of two matrices factors."""

    @property
    def cut(self) -> dict[str, int]:
        """By parameter: how many nonzero weights (singular values) its budget had no room for."""
        return {excess.name: excess.weights for excess in self.budgets}

    @property
    def missed(self) -> list[Excess]:
        """The budgets that were not met."""
        return [excess for excess in self.budgets if excess.cut]


@torch.no_grad()
def enforce(model: M) -> Enforced[M]:
    """A copy of ``model`` in plain parameters: structure exact, budgets met, identical parameters shared."""
    plain = copy_of(model)
    settle_hooks(plain, constrained=False)
    settle_parametrized(plain)
    bound = bindings(plain)
    release(plain)
    _check_values(plain, bound)
    budgets: list[Excess] = []
    for names, constraint in bound:
        weights = [plain.get_parameter(name).detach() for name in names]
        if isinstance(constraint, LowRank) and (excess := excess_rank(names[0], constraint, weights[0])) is not None:
            budgets.append(excess)
        for w, part in zip(weights, parts(constraint.fold(flat(weights)), weights), strict=True):
            w.copy_(part)
    budgets += meet_budgets(plain, bound)
    thin: dict[str, Thin] = {names[0]: constraint.thin for names, constraint in bound if constraint.is_matrix}
    settle_hooks(plain, constrained=True)
    count = sum(p.numel() for p in plain.parameters())
    for names, constraint in bound:
        if constraint.parameters_identical:
            _share(plain, names)
    return Enforced(plain, count, frozenset(name for names, _ in bound for name in names), tuple(budgets), thin)


def _check_values(plain: nn.Module, bound: list[tuple[tuple[str, ...], Constraint]]) -> None:
    for names, constraint in bound:
        for name in names:
            if plain.get_parameter(name).is_meta and (constraint.budget is not None or constraint.is_matrix):
                raise ValueError(
                    f"fold: {name} is on the meta device, so there are no values to choose from for {constraint}; load "
                    "them first, model.load_state_dict(state_dict, assign=True), or give a folded network's sizes to "
                    "this one with symopt.resize"
                )


def _share(module: nn.Module, names: tuple[str, ...]) -> None:
    """Put the first of these parameters in the place of the others."""
    for name in names[1:]:
        parent, _, child = name.rpartition(".")
        module.get_submodule(parent).register_parameter(child, module.get_parameter(names[0]))
