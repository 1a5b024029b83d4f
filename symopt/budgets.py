"""Budgets as exact selections: which units of a weight, or of several that share one budget, may live."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from symopt.constraints import Constraint
from symopt.constraints.budget import Budget
from symopt_kernels import native, triton_launch
from symopt_kernels.groups import Groups

__all__ = ["FLOOR", "Member", "Pool", "pools"]

FLOOR = 0.1
"""Share of its even part of a global budget that every tensor keeps, so that no layer can die of the others."""


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


@dataclass(frozen=True)
class Pool:
    """Weights that share one budget: a single one, or all of a ``scope="global"``."""

    members: tuple[Member, ...]

    @property
    def budget(self) -> Budget:
        shared = self.members[0].constraint.budget
        assert shared is not None
        return shared

    @property
    def pattern(self) -> tuple[int, int] | None:
        return self.budget.pattern

    @property
    def units(self) -> int:
        return sum(m.units for m in self.members)

    @property
    def count(self) -> int:
        """Units that may live in the end."""
        return self.budget.count(self.units)

    @property
    def share(self) -> float:
        """The same as a share."""
        return self.count / self.units

    def at(self, full: float) -> int:
        """Units that may live when a share ``full`` of all that are too many has still to go."""
        return self.count + round((self.units - self.count) * full)

    def thresholds(self, keep: int) -> list[float]:
        """Per member the size up to which units are outside if ``keep`` of the pool live; -1 where none is outside.

        Kernels add up a group in another order than torch, so between groups the middle of two sizes is taken.
        """
        limits = self._limits(keep)
        for i, (m, t) in enumerate(zip(self.members, limits, strict=True)):
            if m.groups is not None and t >= 0:
                above = (sizes := m.sizes())[sizes > t]
                limits[i] = (t + float(above.min())) / 2 if above.numel() else t
        return limits

    def _limits(self, keep: int) -> list[float]:
        """The same with the size of a unit itself, the largest that is outside."""
        if self.pattern is not None:
            return [math.inf] * len(self.members)
        if keep >= self.units:
            return [-1.0] * len(self.members)
        floors = [min(m.units, max(1, math.ceil(FLOOR * keep * m.units / self.units))) for m in self.members]
        found: list[float | None] = [None] * len(self.members)
        # Tensors below their floor get it; what is left is shared anew by the others.
        while True:
            shared = [i for i, t in enumerate(found) if t is None]
            left = keep - sum(floors[i] for i, t in enumerate(found) if t is not None)
            sizes = [self.members[i].sizes() for i in shared]
            many = sum(s.numel() for s in sizes)
            t = _kth(sizes, many - left) if left < many else -1.0
            if len(self.members) == 1:
                return [t]
            poor = [i for i, s in zip(shared, sizes, strict=True) if int((s.abs() > t).sum()) < floors[i]]
            if not poor or len(poor) == len(shared):
                return [t if f is None else f for f in found]
            for i in poor:
                m = self.members[i]
                found[i] = _kth([m.sizes()], m.units - floors[i]) if floors[i] < m.units else -1.0

    def outside(self) -> list[Tensor]:
        """Per member which units must go so that exactly the budget lives; one truth value per unit, flat.

        Of units of the same size the first ones live.
        """
        if self.pattern is not None:
            return [m.constraint.outside(m.w, math.inf, m.groups) for m in self.members]
        keep, limits = self.count, self._limits(self.count)
        sizes = [m.sizes().abs().flatten() for m in self.members]
        inside = [s > t for s, t in zip(sizes, limits, strict=True)]
        spare = keep - sum(int(x.sum()) for x in inside)
        for mine, s, t in zip(inside, sizes, limits, strict=True):
            ties = (s == t).nonzero().flatten()[:spare]
            mine[ties] = True
            spare -= ties.numel()
        return [~x for x in inside]


def pools(members: Iterable[Member]) -> list[Pool]:
    """Members with equal constraints of global scope share a budget; every other has its own."""
    shared: dict[Constraint, list[Member]] = {}
    alone: list[Pool] = []
    for m in members:
        budget = m.constraint.budget
        if budget is not None and budget.scope == "global":
            shared.setdefault(m.constraint, []).append(m)
        elif budget is not None:
            alone.append(Pool((m,)))
    return alone + [Pool(tuple(found)) for found in shared.values()]


def _kth(sizes: list[Tensor], k: int) -> float:
    """The ``k``-th smallest absolute value, exactly; natively where it can be, since a step waits for it."""
    (place, *others), plain = (
        {s.device for s in sizes},
        all(s.dtype == torch.float32 and native.layout(s) for s in sizes),
    )
    if plain and not others and place.type == "cpu" and native.UNAVAILABLE is None:
        return native.rank(sizes, k)
    if plain and not others and place.type == "cuda" and triton_launch.UNAVAILABLE is None:
        from symopt_kernels import triton_select

        return float(triton_select.rank(sizes, k))
    return float(torch.cat([s.flatten() for s in sizes]).abs().kthvalue(k).values)
