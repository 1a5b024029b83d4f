"""One row of a report: a constrained tensor in numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from symopt.budgets.pools import BudgetedWeight, pools
from symopt.budgets.state import BUDGET, BudgetState, is_committed
from symopt.constraints import Constraint
from symopt.constraints.planes.plane import flat
from symopt.folding.budgets import living
from symopt.optim import ConstrainedOptimizer
from symopt.optim.binding import Binding
from symopt.optim.collapse import collapse_steps
from symopt.optim.direction import Options
from symopt.optim.schedule import in_force
from symopt.report.progress import progress

__all__ = ["Row", "Shares", "rows_of", "shares_of"]

Shares = tuple[float, float]
"""Of a budget: the share that lives now, and the share that may."""


@final
@dataclass(frozen=True)
class Row:
    """One constrained tensor."""

    name: str
    constraint: str
    shape: tuple[int, ...]
    zeros: int
    """Weights that are exactly zero."""
    live: int
    """Units (weights, groups, singular values) that are not exactly zero; of a plane, those that are off it."""
    units: int
    is_plane: bool
    penalty: float
    """``||w||_1``, ``sum ||w_g||_2``, ..., of all parameters that the constraint binds."""
    violation: float
    """Relative change of the tensor if its nearly-zero units were rounded to zero; relative distance from a plane."""
    share: float | None
    """Of a budget: the share of all it is for that lives now; None without one."""
    target: float | None
    """The share that may live in the end."""
    strength: float | None
    committed: bool
    """Whether the support is final: the strength is 0 from then on."""
    imbalance: float | None
    """Plasticity c; zeros are permanent once it is 0.  None before the first step."""
    collapse_steps: float | None
    """Steps at the current rate until the median live unit is zero if no gradient holds it; None if unknown."""
    step: int | None
    """Steps that its schedule has counted; None without one."""
    total_steps: int | None
    """Length of the schedule; None if it was not given."""

    @property
    def lives(self) -> str:
        """What lives, in a table: of a plane, whether it is reached."""
        if not self.is_plane:
            return f"{self.live}/{self.units}"
        if self.live == 0:
            return "on plane"
        return "off plane" if self.units == 1 else f"{self.live}/{self.units} off plane"

    @property
    def budget(self) -> str:
        """What lives of the budget, in a table."""
        if self.share is None or self.target is None:
            return "-"
        return f"{100 * self.share:.3g} % of {100 * self.target:.3g} %"


def shares_of(found: Sequence[tuple[str, tuple[Tensor, ...], Constraint]]) -> dict[str, Shares]:
    """By the names of what they are for, how far budgets are met; those that share one have the same."""
    shares: dict[str, Shares] = {}
    pooled: list[BudgetedWeight] = []
    for label, weights, constraint in found:
        if (budget := constraint.budget) is None:
            continue
        w = flat(weights)
        if constraint.is_matrix:
            alive = living(constraint, w, None)
            shares[label] = int(alive.count_nonzero()) / len(alive), budget.count(len(alive)) / len(alive)
        else:
            pooled.append(BudgetedWeight(label, w, constraint, constraint.partition(w)))
    try:
        joined = pools(pooled)
    except ValueError:  # a budget of less than its tensors need, which training refuses
        joined = []
    for pool in joined:
        live = sum(int(living(m.constraint, m.w, m.groups).count_nonzero()) * m.cost for m in pool.weights)
        shares |= dict.fromkeys((m.name for m in pool.weights), (live / pool.total, pool.share))
    return shares


def rows_of(
    names: tuple[str, ...],
    weights: tuple[Tensor, ...],
    constraint: Constraint,
    shares: Shares | None,
    optimizer: ConstrainedOptimizer | None,
    stepped: Mapping[int, tuple[Options, Binding]],
) -> list[Row]:
    """A row per parameter of one constraint; ``stepped`` is by ``id`` how each is stepped, if it is."""
    w = flat(weights)
    alive = living(constraint, w, constraint.partition(w))
    live, penalty, violation = int(alive.count_nonzero()), float(constraint.penalty(w)), float(constraint.violation(w))
    rows = []
    for name, p in zip(names, weights, strict=True):
        strength = imbalance = steps = step = total = None
        committed = False
        if optimizer is not None and id(p) in stepped:
            group, binding = stepped[id(p)]
            state = optimizer.state.get(p, {})
            step, total = progress(group, state)
            group = in_force(group, optimizer.schedule.steps)
            committed = bool(group["committed"])
            strength = float(binding.strength(optimizer.direction, group, state))
            imbalance = float(state["imbalance"]) if "imbalance" in state else None
            if BUDGET in state:  # the strength of what is kept
                strength = float(BudgetState.read(state, state[BUDGET]).strength_kept)
                committed = is_committed(state)
            if constraint.budget is None:  # no collapse to wait for
                steps = collapse_steps(binding, optimizer.direction, group, state)
        rows.append(
            Row(
                name=name,
                constraint=str(constraint),
                shape=tuple(p.shape),
                zeros=p.numel() - int(p.bool().count_nonzero()),
                live=live,
                units=alive.numel(),
                is_plane=constraint.is_plane,
                penalty=penalty,
                violation=violation,
                share=None if shares is None else shares[0],
                target=None if shares is None else shares[1],
                strength=strength,
                committed=committed,
                imbalance=imbalance,
                collapse_steps=steps,
                step=step,
                total_steps=total,
            )
        )
    return rows
