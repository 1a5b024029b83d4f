"""Budgets as exact selections: which units of a weight, or of several that share one budget, may live."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from symopt.constraints import Constraint, GroupSparse
from symopt.constraints.budget import Budget
from symopt_kernels import native
from symopt_kernels.groups import Groups

__all__ = ["FLOOR", "Member", "Pool", "pools"]

FLOOR = 0.5
"""Share of its Erdos-Renyi part (Mocanu et al., 2018; kernels: Evci et al., 2020) of a global budget that every tensor
keeps beside one unit, so that no small layer is starved by the large ones."""


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
    def cost(self) -> int:
        """What a unit takes of the budget: 1, or its multiply-adds per example."""
        budget = self.constraint.budget
        assert budget is not None
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
        shared = self.members[0].constraint.budget
        assert shared is not None
        return shared

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

    def thresholds(self, keep: float) -> list[float]:
        """Per member the size up to which units are outside if the pool may keep ``keep``; -1 where none is outside.

        Kernels add up a group in another order than torch, so between groups the middle of two sizes is taken.
        """
        if self.pattern is not None:
            return [math.inf] * len(self.members)
        if self.members[0].groups is None:
            return self._limits(int(keep))
        limits = []
        for m, inside in zip(self.members, self._inside(keep), strict=True):
            sizes = m.sizes()
            below, above = sizes[~inside], sizes[inside]
            limits.append(float(below.max() + above.min()) / 2 if below.numel() else -1.0)
        return limits

    def _limits(self, keep: int) -> list[float]:
        """The thresholds of weights that are units themselves: the largest size that is outside."""
        if keep >= self.total:
            return [-1.0] * len(self.members)
        floors = self._floors(keep)
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

    def _floors(self, keep: float) -> list[int]:
        """Units of every member that live whatever their sizes."""
        wanted = [sum(m.w.shape) if m.groups is None else m.units * m.cost for m in self.members]
        share = FLOOR * (keep - self._least) / sum(wanted)
        return [min(m.units, 1 + int(share * w / m.cost)) for m, w in zip(self.members, wanted, strict=True)]

    def _inside(self, keep: float) -> list[Tensor]:
        """Per member which groups live: its floor, then the largest of all, per weight, as long as ``keep`` lasts."""
        sizes = [m.sizes() for m in self.members]
        floors = self._floors(keep) if len(sizes) > 1 else [0]
        inside = [torch.zeros_like(s, dtype=torch.bool) for s in sizes]
        for mine, s, n in zip(inside, sizes, floors, strict=True):
            mine[s.sort(descending=True, stable=True).indices[:n]] = True
        left = keep - sum(n * m.cost for n, m in zip(floors, self.members, strict=True))
        rms = [s * (m.units / m.w.numel()) ** 0.5 for s, m in zip(sizes, self.members, strict=True)]
        # What is inside already is put first and costs nothing; the rest is taken in order while it fits.
        order = torch.cat([r.masked_fill(i, math.inf) for r, i in zip(rms, inside, strict=True)])
        order = order.sort(descending=True, stable=True).indices
        costs = torch.cat([torch.where(i, 0, m.cost) for i, m in zip(inside, self.members, strict=True)])
        chosen = torch.zeros_like(costs, dtype=torch.bool)
        chosen[order] = costs[order].cumsum(0) <= left
        return list(chosen.split([m.units for m in self.members]))

    def outside(self) -> list[Tensor]:
        """Per member which units must go so that exactly the budget lives; one truth value per unit, flat.

        Of units of the same size the first ones live.
        """
        if self.pattern is not None:
            return [m.constraint.outside(m.w, math.inf, m.groups) for m in self.members]
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


def _kth(sizes: list[Tensor], k: int) -> float:
    """The ``k``-th smallest absolute value, exactly; natively where it can be, since a step waits for it."""
    fast = native.UNAVAILABLE is None and all(
        s.device.type == "cpu" and s.dtype == torch.float32 and native.layout(s) is not None for s in sizes
    )
    if fast:
        return native.rank(sizes, k)
    return float(torch.cat([s.flatten() for s in sizes]).abs().kthvalue(k).values)
