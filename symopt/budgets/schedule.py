"""The schedule of a budget: when units are selected, how strongly the pruned ones decay, when the support is final.

Pure functions of the step: they decide, and the optimizer writes the decisions to the weights and their state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from symopt.budgets.pools import BudgetedWeight, Pool
from symopt.budgets.selection import Threshold
from symopt.budgets.state import BudgetState
from symopt.constraints import Constraint
from symopt.constraints.budget import BudgetPlan
from symopt_kernels.reference.gauge import SNAP

__all__ = ["Course", "Decision", "Scheduled", "commit", "committed", "largest_decay", "ramp"]

MAX_RELATIVE_DECAY = 0.1
"""The largest decay of a pruned unit per step, relative to the metric, in a budget above LARGE_BUDGET: (1 - .1)**(2 *
20) is 1.5 %."""

LARGE_BUDGET = 0.05
"""Smaller budgets are met as they are, and half a percent of a ResNet lost 20 points by such a bound."""


@final
@dataclass(frozen=True)
class Course:
    """A plan over a training of known length, in steps."""

    plan: BudgetPlan
    total_steps: int
    commit: float | None
    """Share of training at which the support becomes final; None: the plan's."""

    @property
    def last(self) -> int:
        """The step after which pruned units are set to zero."""
        return max(1, round((self.plan.commit if self.commit is None else self.commit) * self.total_steps))

    def is_due(self, step: int) -> bool:
        """Whether units are selected after this step."""
        return step % self.plan.every == 0 or step in (1, self.last)

    def remaining(self, step: int) -> float:
        """Of the units that are too many, the share that may still live: the cubic ramp (Zhu & Gupta, 2017)."""
        first, full = (self.last * share / self.plan.commit for share in (self.plan.begin, self.plan.ramp))
        return min(1.0, max(0.0, 1 - (step - first) / (full - first))) ** 3


@final
@dataclass(frozen=True, eq=False)
class Scheduled:
    """A weight with a budget, and what its strengths depend on."""

    weight: BudgetedWeight
    unit: float | Tensor
    """What a strength of 1 means (:meth:`symopt.optim.direction.Direction.strength_unit`)."""
    strength: float | Tensor | None
    """Given for the units kept, or None."""
    largest_decay: Tensor | None
    """Bound from :func:`largest_decay`; None: no bound."""
    metric_scale: Tensor
    """What sizes are measured by: a unit that falls below SNAP times this dies."""
    before: BudgetState
    """As the last selection left it."""


@final
@dataclass(frozen=True, eq=False)
class Decision:
    """What a step decides for one weight: its new state, and at the commit which units become zero."""

    scheduled: Scheduled
    state: BudgetState
    pruned: Tensor | None = None
    """One truth value per unit, flat; None where all stay."""
    commits: bool = False
    """Whether the support is final from now on."""


def ramp(pool: Pool, items: list[Scheduled], course: Course, step: int) -> Iterator[Decision]:
    """What the weights of a pool, one of ``items`` each, decay by until the next selection."""
    left = course.remaining(step)
    limits, enough = pool.thresholds(pool.at(left)), _enough(pool, items, course)
    for item, limit in zip(items, limits, strict=True):
        if enough is not None:
            size = limit if isinstance(limit, Tensor) else torch.tensor(limit, dtype=torch.float64)
            limit = torch.where(enough.to(size.device), size, -1.0)
        yield Decision(item, _strengths(item, pool, course, limit, left))


def _enough(pool: Pool, items: list[Scheduled], course: Course) -> Tensor | None:
    """Whether the budget is filled by units that outlive the steps until the next selection, even if all decay.

    Else no unit is pruned for so long: units without a gradient would die together, and the budget would be missed.
    None where decay is not bounded.
    """
    if not all(_bounded(item, pool) for item in items):
        return None
    least = SNAP * (1 - MAX_RELATIVE_DECAY) ** (-2 * course.plan.every)
    found = [(item.weight.sizes().abs() > least * item.metric_scale).sum() * item.weight.cost for item in items]
    return torch.stack([n.to(found[0].device) for n in found]).sum() >= pool.count


def commit(pool: Pool, items: list[Scheduled]) -> Iterator[Decision]:
    """The support of a pool, whose weights are one of ``items`` each, becomes final."""
    for item, pruned in zip(items, pool.pruned(), strict=True):
        yield Decision(item, committed(item.weight), pruned, commits=True)


def committed(weight: BudgetedWeight) -> BudgetState:
    """The state from the commit on."""
    return BudgetState(imbalance_factor=0.0, target=weight.target, run=weight.run)


def _strengths(item: Scheduled, pool: Pool, course: Course, limit: Threshold, left: float) -> BudgetState:
    plan = course.plan
    kept = plan.strength_kept * math.log(1 / pool.share) if item.strength is None else item.strength
    # A pattern has no threshold that could prune one weight after the other: the strength grows instead.
    factor = plan.strength_pruned * (1 - left) if pool.pattern else plan.strength_pruned
    kept, pruned = kept * item.unit, factor * item.unit
    if isinstance(item.unit, Tensor):  # of a gradient that overflowed or is missing it says nothing
        known = item.unit.isfinite() & (item.unit > 0)
        kept, pruned = (
            torch.where(known, now, torch.as_tensor(before, dtype=item.unit.dtype, device=item.unit.device))
            for now, before in ((kept, item.before.strength_kept), (pruned, item.before.strength_pruned))
        )
    elif item.unit == 0:
        kept, pruned = item.before.strength_kept, item.before.strength_pruned
    # Units without a gradient fill a large budget, and do not come back: what drifts over the threshold must be alive
    # when the next selection looks.
    most = item.largest_decay if _bounded(item, pool) and item.largest_decay is not None else math.inf
    factor = math.exp(-plan.plasticity / course.last)
    return BudgetState(kept, pruned, limit, factor, most, item.weight.target, item.weight.run)


def _bounded(item: Scheduled, pool: Pool) -> bool:
    """Whether a pruned unit decays by no more than its bound."""
    return not pool.pattern and item.largest_decay is not None and pool.share > LARGE_BUDGET


def largest_decay(constraint: Constraint, gain: float | Tensor, metric_scale: Tensor) -> Tensor | None:
    """The ``lr * strength`` at which a pruned unit decays by MAX_RELATIVE_DECAY per step; None: without such a bound.

    ``gain`` is what multiplies it in the step of such a unit.
    """
    return None if constraint.is_matrix else MAX_RELATIVE_DECAY * metric_scale / gain
