"""Schedule: what a training of known length asks of every step, and what the optimizer does of it inside ``step``.

``begin`` completes the state before anything moves; ``end`` counts the step and does what has come due: selections of
units, their ramp, their commit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from symopt.budgets import schedule as rules
from symopt.budgets.pools import BudgetedWeight, Pool, pools
from symopt.budgets.schedule import Course
from symopt.budgets.state import BUDGET, is_committed
from symopt.constraints.budget import BudgetPlan
from symopt.optim import advice, budgeting
from symopt.optim.binding import Binding
from symopt.optim.checkpoint import release
from symopt.optim.clock import PROGRESS, Clock
from symopt.optim.direction import Direction, ParamGroup, State
from symopt.optim.membership import GroupBindings
from symopt.optim.own_step import own_step

__all__ = ["Entry", "Pairs", "Schedule", "in_force"]

Pairs = list[tuple[ParamGroup, GroupBindings]]
States = Mapping[Tensor, State]

_RATE = 25.0  # exp(-25 k / N) passes SNAP after 55 % of training: the rest settles what is left with zeros permanent


def in_force(group: ParamGroup, steps: int) -> ParamGroup:
    """The options of a param group with what its schedule adds after ``steps`` steps.

    ``imbalance_factor`` multiplies the imbalance in the step (None: the automatic law), and from the commit on
    (``committed``) the structure that a strength has found is final.
    """
    total, commit = group["total_steps"], group["commit"]
    if total is None:
        return {**group, "imbalance_factor": None, "committed": False}
    committed = commit is not None and steps >= commit * total
    rate = _RATE if commit is None else max(_RATE, math.log(1e7) / commit)
    return {**group, "imbalance_factor": 0.0 if committed else math.exp(-rate / total), "committed": committed}


@final
@dataclass(eq=False)
class Entry:
    """A constrained binding under way."""

    group: ParamGroup
    binding: Binding
    states: list[State]
    clock: Clock
    course: Course | None
    """None without a budget or a length."""
    committed: bool = False

    @property
    def budgeted(self) -> bool:
        """Whether it has a budget."""
        return self.binding.constrained_by.budget is not None

    @property
    def frozen(self) -> bool:
        """Whether nothing of it trains."""
        return not any(p.requires_grad for p in self.binding.parameters)


@final
class Schedule:
    """That of one optimizer.  What has to survive is state; this is rebuilt from it whenever it was replaced."""

    def __init__(self, direction: Direction) -> None:
        self.direction = direction
        self.plan: BudgetPlan | None = None
        """Replaces the constraints' own, for studies of plans."""
        self._clock: Clock | None = None
        self._clocks: list[Clock] = []
        self._entries: list[Entry] = []
        self._courses: dict[tuple[Clock, Course], list[Entry]] = {}
        self._seen: list[tuple[GroupBindings, object]] = []
        self._only_creates_state = False
        self._advice = advice.Advice(direction)

    @property
    def steps(self) -> int:
        """Steps counted."""
        return 0 if self._clock is None else self._clock.steps

    def forget(self) -> None:
        """Read the state again, which has been replaced."""
        self._clock, self._seen = None, []

    # -- before the step ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def begin(self, pairs: Pairs, states: States, grad_scale: Tensor | None) -> None:
        """Complete the state of every constrained parameter, with a gradient or not."""
        if not self._holds(pairs, states):
            self._resume(pairs, states, grad_scale)
        elif self._only_creates_state:  # as the step before did
            self._only_creates_state = False
            self._first_decisions([e for e in self._entries if e.clock.steps == 0 and not e.committed], grad_scale)
        if self.steps == 0 and not self._only_creates_state:
            self._advice.before(self._entries)

    def _holds(self, pairs: Pairs, states: States) -> bool:
        if self._clock is None or len(pairs) != len(self._seen) or not all(clock.holds for clock in self._clocks):
            return False
        for (group, found), (seen, length) in zip(pairs, self._seen, strict=True):
            if found is not seen or (group["total_steps"], group["commit"]) != length:
                return False
        for entry in self._entries[:1]:  # the others are looked at where they are stepped: see complete
            state = entry.states[0]
            if states.get(entry.binding.parameters[0]) is not state or PROGRESS not in state:
                return False
        return True

    def complete(self, binding: Binding, pairs: Pairs, states: States, grad_scale: Tensor | None) -> None:
        """The same for one binding whose state was found changed."""
        if any(PROGRESS not in states[p] or (BUDGET not in states[p] and binding.constrained_by.budget is not None) for p in binding.parameters):
            self._resume(pairs, states, grad_scale)

    @torch.no_grad()
    def _resume(self, pairs: Pairs, states: States, grad_scale: Tensor | None) -> None:
        """Read the state, complete it, and sort out who shares a clock and a course."""
        bound = [(group, binding) for group, found in pairs for binding in found.bindings]
        counts = [
            int(x) for _, b in bound for p in b.parameters if isinstance(x := states.get(p, {}).get(PROGRESS), Tensor)
        ]
        self._only_creates_state = not counts and self._clock is None and _only_creates_state(pairs)
        known = self._clock is not None and all(clock.holds for clock in self._clocks)
        steps = self.steps if known else max(counts, default=0)
        self._clock = Clock(steps)
        clocks = {steps: self._clock}
        self._entries = []
        for group, binding in bound:
            own = [states[p] for p in binding.parameters]
            found = [int(x) for state in own if isinstance(x := state.get(PROGRESS), Tensor)]
            count = min(found, default=steps)
            clock = clocks.setdefault(count, Clock(count))
            self._entries.append(Entry(group, binding, own, clock, self._course(group, binding), is_committed(own[0])))
        self._restart_changed(clocks)
        for entry in self._entries:
            for p, state in zip(entry.binding.parameters, entry.states, strict=True):
                on_device = entry.group.get("capturable") or entry.group.get("fused")
                state[PROGRESS] = entry.clock.tensor(p.device if on_device else torch.device("cpu"))
        self._clocks = list({entry.clock: None for entry in self._entries} | {self._clock: None})
        self._seen = [(found, (group["total_steps"], group["commit"])) for group, found in pairs]
        self._courses = {}
        for entry in self._entries:
            if entry.course is not None:
                self._courses.setdefault((entry.clock, entry.course), []).append(entry)
        open_ = [e for e in self._entries if e.budgeted and not e.committed and (e.clock.steps == 0 or BUDGET not in e.states[0])]
        self._first_decisions(open_, grad_scale)

    def _course(self, group: ParamGroup, binding: Binding) -> Course | None:
        constraint = binding.constrained_by
        if constraint.budget is None or group["total_steps"] is None:
            return None
        return Course(self.plan or constraint.plan, group["total_steps"], group["commit"])

    def _restart_changed(self, clocks: dict[int, Clock]) -> None:
        """Start anew where a state has committed another budget than the constraint asks for now."""
        changed = []
        for entry in self._entries:
            if not entry.committed:
                continue
            weight, before = budgeting.budgeted(entry.binding, entry.states), budgeting.budget_before(entry.states)
            if (float(before.target), int(before.run)) != (weight.target, weight.run):
                changed.append((entry, float(before.target)))
        for entry, _ in changed:
            entry.committed, entry.clock = False, clocks.setdefault(0, Clock(0))
            for p, state in zip(entry.binding.parameters, entry.states, strict=True):
                release(entry.binding, self.direction, state, p)
        advice.restarted(changed)

    def _first_decisions(self, entries: list[Entry], grad_scale: Tensor | None) -> None:
        """Give budgets that have no numbers yet their first ones; a weight that meets its budget is committed."""
        if not entries:
            return
        weights = {budgeting.budgeted(e.binding, e.states): e for e in self._entries if e.budgeted}
        for pool in self._pools(weights):
            members = [weights[weight] for weight in pool.weights]
            if not any(entry in entries for entry in members):
                continue
            if pool.met and not any(BUDGET in entry.states[0] and entry.clock.steps for entry in members):
                for weight, entry in zip(pool.weights, members, strict=True):
                    self._hold(entry, weight)
                continue
            for entry in members:
                if entry.course is None:
                    raise ValueError(advice.no_length(entry.binding))
            self._ramp(pool, members, grad_scale)

    def _hold(self, entry: Entry, weight: BudgetedWeight) -> None:
        """Commit a weight to the support that it has."""
        item = budgeting.schedule(entry.binding, self.direction, entry.group, entry.states, weight, None)
        budgeting.write(entry.binding, entry.states, rules.Decision(item, rules.committed(weight)))
        entry.committed = True
        if "imbalance" in entry.states[0]:
            entry.states[0]["imbalance"].zero_()

    def _pools(self, weights: Mapping[BudgetedWeight, Entry], settled: Iterable[BudgetedWeight] = ()) -> list[Pool]:
        found = pools(weights, set(settled))
        for pool in found:
            members = [weights[weight] for weight in (*pool.weights, *pool.settled)]
            if len({entry.course for entry in members}) > 1:
                raise ValueError(advice.different_lengths([entry.binding for entry in members]))
        return found

    # -- after the step ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def end(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Count the step, and do what has come due."""
        if self._only_creates_state or self._clock is None:
            return
        for clock in self._clocks:
            clock.advance(found_inf)
        if not _capturing():
            self._do_due(grad_scale)

    def replayed(self) -> None:
        """What :meth:`end` could not do inside a captured graph."""
        for clock in self._clocks:
            clock.read()
        self._do_due(None)

    def _do_due(self, grad_scale: Tensor | None) -> None:
        for (clock, course), entries in self._courses.items():
            if clock.steps < course.last:
                if course.is_due(clock.steps):
                    self._select([e for e in entries if not e.committed], grad_scale)
                continue
            if any(not e.committed and not e.frozen for e in entries):
                self._commit(entries, course)
            elif clock.steps == course.last or clock.steps % course.plan.every == 0:
                if clock.steps == course.last:
                    advice.frozen_at_commit([e for e in entries if not e.committed])
                self._restore([e for e in entries if e.committed and not e.frozen])
        self._advice.after(self._entries, self.steps)

    def _weights(self, entries: list[Entry]) -> dict[BudgetedWeight, Entry]:
        for entry in entries:
            if (own := own_step(entry.binding.constrained_by)) is not None:
                own.align(entry.group, entry.states[0], entry.binding.parameters[0])
        return {budgeting.budgeted(entry.binding, entry.states): entry for entry in entries}

    def _select(self, entries: list[Entry], grad_scale: Tensor | None) -> None:
        weights = self._weights(entries)
        for pool in self._pools(weights):
            self._ramp(pool, [weights[weight] for weight in pool.weights], grad_scale)

    def _ramp(self, pool: Pool, members: list[Entry], grad_scale: Tensor | None) -> None:
        items = [
            budgeting.schedule(e.binding, self.direction, e.group, e.states, weight, grad_scale)
            for e, weight in zip(members, pool.weights, strict=True)
        ]
        course = members[0].course
        assert course is not None
        step = min(members[0].clock.steps, course.last)
        for entry, decision in zip(members, rules.ramp(pool, items, course, step), strict=True):
            budgeting.write(entry.binding, entry.states, decision)

    def _commit(self, entries: list[Entry], course: Course) -> None:
        """Commit what trains; what is frozen is left alone until it does."""
        weights = self._weights(entries)
        settled = [weight for weight, entry in weights.items() if entry.committed]
        for pool in self._pools(weights, settled):
            self._prune(pool, [weights[weight] for weight in pool.weights])
        advice.frozen_at_commit([e for e in entries if not e.committed and e.clock.steps == course.last])

    def _prune(self, pool: Pool, members: list[Entry]) -> None:
        items = [
            budgeting.schedule(e.binding, self.direction, e.group, e.states, weight, None)
            for e, weight in zip(members, pool.weights, strict=True)
        ]
        for entry, decision in zip(members, rules.commit(pool, items), strict=True):
            if not entry.frozen:
                budgeting.write(entry.binding, entry.states, decision)
                entry.committed = True

    def _restore(self, entries: list[Entry]) -> None:
        """A committed budget is met again where weights were loaded that do not."""
        weights = {budgeting.budgeted(entry.binding, entry.states): entry for entry in entries}
        exceeded = [pool for pool in self._pools(weights) if pool.exceeded]
        found = [(weights[weight], weight.live, weight.units) for pool in exceeded for weight in pool.weights]
        for pool in exceeded:
            self._prune(pool, [weights[weight] for weight in pool.weights])
        advice.restored(found)


def _only_creates_state(pairs: Pairs) -> bool:
    """Whether this is the step that distributed checkpoints take so that state exists: lr 0, all gradients zero."""
    if any(float(group["lr"]) != 0 for group, _ in pairs):
        return False
    grads = [p.grad for _, found in pairs for p in found.params if p.grad is not None]
    return bool(grads) and not any(bool(grad.any()) for grad in grads)


def _capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
