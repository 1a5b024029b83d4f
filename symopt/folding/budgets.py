"""What is over a budget becomes zero, and how much that was."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from symopt.budgets.pools import BudgetedWeight, Pool, pools
from symopt.constraints import Constraint, LowRank
from symopt.constraints.planes.plane import flat, parts
from symopt_kernels.groups import Groups

__all__ = ["Excess", "described", "excess_rank", "living", "meet_budgets"]

Bound = Sequence[tuple[tuple[str, ...], Constraint]]


@final
@dataclass(frozen=True)
class Excess:
    """How much of a weight its budget had room for; all zeros but ``live`` and ``budget`` where that was all of it."""

    name: str
    constraint: str
    kind: str
    """What a unit is: ``"weights"``, ``"units"`` or ``"singular values"``."""
    live: int
    """Units that lived before."""
    budget: str
    """How many may."""
    cut: int
    """Live units that became zero."""
    weights: int
    """Nonzero weights (or singular values) among them."""
    share: float
    """Of the squared weight: what was in them."""

    def __str__(self) -> str:
        constraint = textwrap.shorten(self.constraint, 80, placeholder=" ...")  # an index tensor has many lines
        single = f" ({self.weights:,} weights)" if self.kind == "units" else ""
        return (
            f"{self.name}: {self.live:,} {self.kind} live, the budget is {self.budget} ({constraint}): "
            f"{self.cut:,}{single} cut, {_percent(self.share)} of the squared weight"
        )


def described(missed: Sequence[Excess]) -> str:
    """All of them in one message, a line for each."""
    many = "a budget was" if len(missed) == 1 else f"{len(missed)} budgets were"
    return "\n  ".join([f"{many} not met, so live weights have to become zero:", *map(str, missed)])


def _percent(share: float) -> str:
    """Two digits at least, and never a 0 or 100 that is none."""
    percent = 100 * share
    return f"{percent:.1f} %" if 1 <= percent < 99.95 or percent in (0, 100) else f"{percent:.3g} %"


def living(constraint: Constraint, w: Tensor, groups: Groups | None) -> Tensor:
    """Which units are not exactly zero, flat; of a plane, which are off it.

    The square of a small weight underflows, so a unit of such weights has size 0 and lives.
    """
    if constraint.is_plane or constraint.is_matrix:
        return constraint.size(w, groups).bool()
    if groups is None and constraint.spanning_units is None:
        return w.bool().flatten()
    return constraint.size(w.bool().to(w.dtype), groups).bool()


def excess_rank(name: str, constraint: LowRank, w: Tensor) -> Excess | None:
    """Of a weight of low rank; None if its rank has no bound."""
    if constraint.most is None:
        return None
    square = constraint.size(w).double().square().sort(descending=True).values
    live = int((square > 0).sum())
    gone = square[constraint.most :]
    cut = int((gone > 0).sum())
    share = float(gone.sum() / square.sum()) if cut else 0.0
    return Excess(name, str(constraint), "singular values", live, f"{constraint.most:,}", cut, cut, share)


def meet_budgets(module: nn.Module, bound: Bound) -> list[Excess]:
    """Set to zero, in place, the units that are over budget."""
    weights: dict[str, tuple[Tensor, ...]] = {}
    candidates: list[BudgetedWeight] = []
    for names, constraint in bound:
        if constraint.budget is not None and not constraint.is_matrix:
            name = ", ".join(names)
            weights[name] = tuple(module.get_parameter(n).detach() for n in names)
            w = flat(weights[name])
            candidates.append(BudgetedWeight(name, w, constraint, constraint.partition(w)))
    found = []
    for pool in pools(_over_budget(candidates)):
        live = [living(m.constraint, m.w, m.groups) for m in pool.weights]
        # Of weights that are zero everywhere a selection keeps a unit, which must not cost the others one.
        fits = pool.pattern is None and _taken(pool, live) <= pool.count
        over = [torch.zeros_like(x) for x in live] if fits else pool.pruned()
        for m, alive, gone in zip(pool.weights, live, over, strict=True):
            pruned = m.constraint.units(gone, m.w, m.groups) & (m.w != 0)
            found.append(_excess(pool, m, alive, gone, pruned))
            for w, mask in zip(weights[m.name], parts(pruned, weights[m.name]), strict=True):
                w.masked_fill_(mask, 0.0)
    return found


def _over_budget(candidates: list[BudgetedWeight]) -> list[BudgetedWeight]:
    """Without those that share a count larger than what is left of them in this module, which may be a part of one."""
    units: dict[Constraint, int] = {}
    for m in candidates:
        shared = m.constraint.shared_budget()
        units[shared] = units.get(shared, 0) + m.units
    left = [units[m.constraint.shared_budget()] for m in candidates]
    return [m for m, count in zip(candidates, left, strict=True) if m.budget.count(count) <= count]


def _taken(pool: Pool, live: list[Tensor]) -> int:
    """What the living units take of the budget."""
    return sum(int(alive.sum()) * m.cost for m, alive in zip(pool.weights, live, strict=True))


def _excess(pool: Pool, m: BudgetedWeight, alive: Tensor, gone: Tensor, pruned: Tensor) -> Excess:
    cut = int((alive & gone).sum())
    share = 0.0
    if cut:
        share = float(m.w[pruned].double().square().sum() / m.w.double().square().sum())
    amount = f"{pool.pattern[0]} of {pool.pattern[1]}" if pool.pattern is not None else f"{int(pool.count):,}"
    amount += " multiply-adds" if pool.budget.scope == "flops" else ""
    amount += f" for {len(pool.weights)} weights in all" if len(pool.weights) > 1 else ""
    kind = "weights" if m.single else "units"
    return Excess(m.name, str(m.constraint), kind, int(alive.sum()), amount, cut, int(pruned.sum()), share)
