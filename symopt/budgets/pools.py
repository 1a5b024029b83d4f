"""Budgets as exact selections: which units of a weight, or of several that share one budget, may live."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from symopt.budgets.selection import Threshold, largest_groups, largest_weights
from symopt.constraints import Constraint, GroupSparse
from symopt.constraints.budget import Budget
from symopt_kernels.groups import Groups

__all__ = ["Member", "Pool", "pools"]


@dataclass(frozen=True, eq=False)
class Member:
    """A weight with a budget, in the precision it is stepped in."""

    name: str
    w: Tensor
    constraint: Constraint
    groups: Groups | None

    def sizes(self) -> Tensor:
        """Size of every unit, flat; a weight itself where its size is its absolute value."""
        return self.w if self.groups is None else self.constraint.size(self.w, self.groups)

    @property
    def units(self) -> int:
        return self.w.numel() if self.groups is None else self.groups.count

    @property
    def budget(self) -> Budget:
        found = self.constraint.budget
        assert found is not None
        return found

    @property
    def cost(self) -> int:
        """What a unit takes of the budget: 1, or its multiply-adds per example."""
        budget = self.budget
        return self.w.numel() // self.units * budget.positions if budget.scope == "flops" else 1


@dataclass(frozen=True)
class Pool:
    """Weights that share one budget: a single one, or all of a scope that is not ``"tensor"``."""

    members: tuple[Member, ...]

    def __post_init__(self) -> None:
        if self.pattern is None and self.count < self._least:
            names = ", ".join(m.name for m in self.members)
            raise ValueError(
                f"{self.members[0].constraint!r}: the budget ({self.count:g}) is less than one unit of each of {names} "
                f"takes ({self._least}); give a larger one or constrain fewer weights"
            )

    @property
    def budget(self) -> Budget:
        return self.members[0].budget

    @property
    def pattern(self) -> tuple[int, int] | None:
        return self.budget.pattern

    @property
    def total(self) -> int:
        """What all units take."""
        return sum(m.units * m.cost for m in self.members)

    @property
    def _least(self) -> int:
        """What one unit of each member takes."""
        return sum(m.cost for m in self.members)

    @property
    def count(self) -> float:
        """What the units that live in the end may take: their number, or multiply-adds."""
        return self.budget.count(self.total)

    @property
    def share(self) -> float:
        """The same as a share."""
        return self.count / self.total

    def at(self, full: float) -> float:
        """The budget when a share ``full`` of all that is too much has still to go."""
        return self.count + round((self.total - self.count) * full)

    def thresholds(self, keep: float) -> list[Threshold]:
        """Per member the size up to which units are outside if the pool may keep ``keep``; -1 where none is outside.

        Kernels add up a group in another order than torch, so between groups the middle of two sizes is taken.
        """
        if self.pattern is not None:
            return [math.inf] * len(self.members)
        if self.members[0].groups is None:
            return self._limits(int(keep))
        limits: list[Threshold] = []
        for m, inside in zip(self.members, self._inside(keep), strict=True):
            sizes = m.sizes()
            middle = (sizes.masked_fill(inside, 0.0).max() + sizes.masked_fill(~inside, math.inf).min()) / 2
            limits.append(torch.where(inside.all(), -1.0, middle))
        return limits

    def _limits(self, keep: int) -> list[Threshold]:
        return largest_weights([m.w.detach() for m in self.members], keep)

    def _inside(self, keep: float) -> list[Tensor]:
        """Per member which groups live."""
        return largest_groups([m.sizes() for m in self.members], [m.cost for m in self.members], keep)

    def pruned(self) -> list[Tensor]:
        """Per member which units must go so that exactly the budget lives; one truth value per unit, flat.

        Of units of the same size the first ones live.
        """
        if self.pattern is not None:
            return [m.constraint.pruned(m.w, math.inf, m.groups) for m in self.members]
        if self.members[0].groups is not None:
            return [~inside for inside in self._inside(self.count)]
        limits = self._limits(int(self.count))
        sizes = [m.sizes().abs().flatten() for m in self.members]
        inside = [s > t for s, t in zip(sizes, limits, strict=True)]
        spare = int(self.count) - sum(int(x.sum()) for x in inside)
        for mine, s, t in zip(inside, sizes, limits, strict=True):
            ties = (s == t).nonzero().flatten()[:spare]
            mine[ties] = True
            spare -= ties.numel()
        return [~x for x in inside]


def pools(members: Iterable[Member]) -> list[Pool]:
    """Members with equal constraints share a budget if its scope is not a tensor; every other has its own."""
    shared: dict[Constraint, list[Member]] = {}
    alone: list[Pool] = []
    for m in members:
        budget = m.constraint.budget
        if budget is not None and budget.scope != "tensor":
            # Where it is applied how often is a weight's own affair, not the budget's.
            same = replace(m.constraint, positions=None) if isinstance(m.constraint, GroupSparse) else m.constraint
            shared.setdefault(same, []).append(m)
        elif budget is not None:
            alone.append(Pool((m,)))
    return alone + [Pool(tuple(found)) for found in shared.values()]
