"""The schedule of a budget: when units are selected, how strongly the pruned ones decay, when the support is final.

Pure functions of the step: they decide, and whoever trains writes the decisions to the weights and their state.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from symopt.budgets.pools import BudgetedWeight, Pool, pools
from symopt.budgets.selection import Threshold
from symopt.budgets.state import BudgetState
from symopt.constraints import Constraint
from symopt.constraints.budget import BudgetPlan

__all__ = ["Decision", "Scheduled", "commit_step", "decide", "is_due", "largest_strength"]

MAX_RELATIVE_DECAY = 0.1
"""The largest decay of a pruned unit per step, relative to the metric, in a budget above LARGE_BUDGET: (1 - .1)**(2 *
20) is 1.5 %."""

LARGE_BUDGET = 0.05
"""Smaller budgets are met as they are, and half a percent of a ResNet lost 20 points by such a bound."""


@final
@dataclass(frozen=True, eq=False)
class Scheduled:
    """A weight with a budget, and what its strengths depend on."""

    weight: BudgetedWeight
    unit: float | Tensor
    """What a strength of 1 means (:meth:`symopt.optim.direction.Direction.strength_unit`)."""
    strength: float | Tensor | None
    """Given for the units kept, or None."""
    most: Tensor | None
    """Bound on the strength of pruned units from :func:`largest_strength`; None: no bound."""


@final
@dataclass(frozen=True, eq=False)
class Decision:
    """What a step decides for one weight: its new state, and at the commit which units become zero."""

    scheduled: Scheduled
    state: BudgetState
    pruned: Tensor | None = None
    """One truth value per unit, flat; None before the commit."""


def commit_step(plan: BudgetPlan, total_steps: int, commit: float | None) -> int:
    """The step after which pruned units are set to zero."""
    return max(1, round((plan.commit if commit is None else commit) * total_steps))


def is_due(plan: BudgetPlan, step: int, last: int) -> bool:
    """Whether units are selected after this step."""
    return step % plan.every == 0 or step in (1, last)


def remaining(plan: BudgetPlan, step: int, last: int) -> float:
    """Of the units that are too many, the share that may still live: the cubic ramp (Zhu & Gupta, 2017)."""
    first, full = (last * share / plan.commit for share in (plan.begin, plan.ramp))
    return min(1.0, max(0.0, 1 - (step - first) / (full - first))) ** 3


def decide(
    scheduled: Iterable[Scheduled], step: int, total_steps: int, commit: float | None, plan: BudgetPlan | None
) -> Iterator[Decision]:
    """The decisions of a step for the weights that are due; those that share a budget must come together.

    ``plan`` replaces the constraints' own.
    """
    by_weight = {item.weight: item for item in scheduled}
    for pool in pools(by_weight):
        own = plan or pool.weights[0].constraint.plan
        last = commit_step(own, total_steps, commit)
        if step >= last:
            for weight, pruned in zip(pool.weights, pool.pruned(), strict=True):
                yield Decision(by_weight[weight], BudgetState(imbalance_factor=0.0), pruned)
            continue
        left = remaining(own, step, last)
        for weight, limit in zip(pool.weights, pool.thresholds(pool.at(left)), strict=True):
            yield Decision(by_weight[weight], _strengths(by_weight[weight], pool, own, last, limit, left))


def _strengths(item: Scheduled, pool: Pool, plan: BudgetPlan, last: int, limit: Threshold, left: float) -> BudgetState:
    kept = plan.strength_kept * math.log(1 / pool.share) if item.strength is None else item.strength
    pruned = plan.strength_pruned * item.unit
    if not pool.pattern and item.most is not None and pool.share > LARGE_BUDGET:
        # Units without a gradient fill a large budget, and do not come back: what drifts over the threshold must be
        # alive when the next selection looks.
        pruned = torch.as_tensor(pruned, device=item.most.device).minimum(item.most)
    # A pattern has no threshold that could prune one weight after the other: the strength grows instead.
    pruned = pruned * (1 - left) if pool.pattern else pruned
    return BudgetState(kept * item.unit, pruned, limit, math.exp(-plan.plasticity / last))


def largest_strength(
    constraint: Constraint, lr: float | Tensor, metric_scale: Tensor, weights: int, units: int
) -> Tensor | None:
    """The strength at which a pruned unit of ``weights / units`` weights decays by MAX_RELATIVE_DECAY per step.

    None where the step of the constraint has no such bound.
    """
    if constraint.is_matrix:
        return None
    rate = torch.as_tensor(lr) * math.sqrt(weights / units)
    return (MAX_RELATIVE_DECAY * metric_scale / rate).to(metric_scale.device)
