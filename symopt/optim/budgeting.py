"""Budgets of bindings: selections, commits, and how what they decide is written to weights and state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set

from torch import Tensor

from symopt.budgets import schedule as rules
from symopt.budgets.pools import BudgetedWeight, Pool, pools
from symopt.budgets.schedule import Course, Decision
from symopt.budgets.state import BUDGET, BudgetState
from symopt.constraints.planes.plane import parts
from symopt.optim import advice
from symopt.optim.budgeted import before, scheduled, weight_of
from symopt.optim.direction import Direction
from symopt.optim.entry import Entry
from symopt.optim.own_step import own_step

__all__ = ["begin", "commit", "has_changed", "restore", "select"]

Entries = Mapping[BudgetedWeight, Entry]


def has_changed(entry: Entry) -> bool:
    """Whether the state has committed another budget than the constraint asks for now."""
    weight, old = weight_of(entry.binding, entry.states), before(entry.states)
    return (float(old.target), int(old.run)) != (weight.target, weight.run)


def begin(
    entries: Iterable[Entry], direction: Direction, grad_scale: Tensor | None, *, placeholders: bool = False
) -> None:
    """Give budgets that have no numbers yet their first ones; a weight that meets its budget is committed.

    ``entries`` are all that have a budget; ``placeholders``, which change nothing, stand until the first step.
    """
    weights = {weight_of(e.binding, e.states): e for e in entries}
    ramped = []
    for pool in _pools(weights):
        sharing = [weights[weight] for weight in pool.weights]
        begun = [BUDGET in e.states[0] and e.clock.steps > 0 for e in sharing]
        if all(begun):
            continue
        finished = pool.met and not any(begun)
        for e in sharing:
            if e.course is None and not finished:
                raise ValueError(advice.no_length(e.binding))
        ramped.append((pool, sharing, finished))
    for pool, sharing, finished in ramped:  # nothing is written before all is known to be right
        if not finished and not placeholders:
            _ramp(pool, sharing, direction, grad_scale)
            continue
        for weight, e in zip(pool.weights, sharing, strict=True):
            numbers = rules.committed(weight) if finished else BudgetState(target=weight.target, run=weight.run)
            _write(e, Decision(scheduled(e, weight, direction), numbers, commits=finished))


def select(entries: Iterable[Entry], direction: Direction, grad_scale: Tensor | None) -> None:
    """Choose anew which units decay until the next selection."""
    weights = _aligned(entries)
    for pool in _pools(weights):
        _ramp(pool, [weights[weight] for weight in pool.weights], direction, grad_scale)


def commit(entries: Iterable[Entry], direction: Direction) -> None:
    """The support of everything that trains becomes final; what is frozen is left alone until it does."""
    weights = _aligned(entries)
    found = _pools(weights, {weight for weight, e in weights.items() if e.committed})
    advice.short(
        (pool.live, int(pool.count), [weights[w].binding for w in pool.weights]) for pool in found if pool.short
    )
    for pool in found:
        _prune(pool, [weights[weight] for weight in pool.weights], direction)


def restore(entries: Iterable[Entry], direction: Direction) -> None:
    """Meet committed budgets again where weights were loaded that do not; what is frozen stays as it is."""
    weights = {weight_of(e.binding, e.states): e for e in entries}
    settled = {weight for weight, e in weights.items() if e.committed and e.frozen}
    waiting = {weight for weight, e in weights.items() if not e.committed}
    exceeded = [pool for pool in _pools(weights, settled, waiting) if pool.exceeded]
    found = [(weights[weight], weight.live, weight.units) for pool in exceeded for weight in pool.weights]
    for pool in exceeded:
        _prune(pool, [weights[weight] for weight in pool.weights], direction)
    advice.restored(found)


def _aligned(entries: Iterable[Entry]) -> dict[BudgetedWeight, Entry]:
    found = {}
    for e in entries:
        if not e.committed and (own := own_step(e.binding.constrained_by)) is not None:
            own.align(e.group, e.states[0], e.binding.parameters[0])
        found[weight_of(e.binding, e.states)] = e
    return found


def _pools(
    weights: Entries, settled: Set[BudgetedWeight] = frozenset(), waiting: Set[BudgetedWeight] = frozenset()
) -> list[Pool]:
    found = pools(weights, settled, waiting)
    for pool in found:
        sharing = [weights[weight] for weight in (*pool.weights, *pool.settled, *pool.waiting)]
        if len({e.course for e in sharing}) > 1:
            raise ValueError(advice.different_lengths([e.binding for e in sharing]))
    return found


def _course(entry: Entry) -> Course:
    assert entry.course is not None
    return entry.course


def _ramp(pool: Pool, sharing: list[Entry], direction: Direction, grad_scale: Tensor | None) -> None:
    items = [scheduled(e, weight, direction, grad_scale) for e, weight in zip(sharing, pool.weights, strict=True)]
    course = _course(sharing[0])
    step = min(sharing[0].clock.steps, course.last)
    for e, decision in zip(sharing, rules.ramp(pool, items, course, step), strict=True):
        _write(e, decision)


def _prune(pool: Pool, sharing: list[Entry], direction: Direction) -> None:
    items = [scheduled(e, weight, direction) for e, weight in zip(sharing, pool.weights, strict=True)]
    for e, decision in zip(sharing, rules.commit(pool, items), strict=True):
        if not e.frozen:
            _write(e, decision)


def _write(entry: Entry, decision: Decision) -> None:
    """Set pruned units to zero, and give the state its new numbers in place, so that its address stays."""
    binding, states = entry.binding, entry.states
    p, constraint = binding.parameters[0], binding.constrained_by
    if decision.pruned is not None:
        if (own := own_step(constraint)) is not None:
            own.prune(constraint, states[0], p, decision.pruned)
        else:
            weight = decision.scheduled.weight
            pruned = constraint.units(decision.pruned, weight.w, weight.groups)
            for q, state, mask in zip(binding.parameters, states, parts(pruned, binding.parameters), strict=True):
                for w in (q, state.get("master")):
                    if w is not None:
                        w.masked_fill_(mask, 0.0)
    entry.committed = decision.commits
    if entry.committed and "imbalance" in states[0]:
        states[0]["imbalance"].zero_()
    numbers = decision.state.tensor(p.device)
    if BUDGET in states[0]:
        states[0][BUDGET].copy_(numbers)
    else:
        for state in states:
            state[BUDGET] = numbers
