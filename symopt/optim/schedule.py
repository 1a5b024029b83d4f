"""Schedule: what a training of known length asks of every step, and what the optimizer does of it inside ``step``.

``begin`` completes the state before anything moves; ``end`` counts the step and does what has come due: selections of
units, their ramp, their commit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from symopt.budgets.schedule import Course
from symopt.budgets.state import BUDGET, is_committed
from symopt.constraints.budget import BudgetPlan
from symopt.optim import advice, biases, budgeting
from symopt.optim.biases import Biases
from symopt.optim.binding import Binding
from symopt.optim.checkpoint import release
from symopt.optim.direction import Direction, Options, ParamGroup, State
from symopt.optim.entry import Clock, Entry
from symopt.optim.membership import GroupBindings
from symopt.optim.options import PROGRESS

__all__ = ["Pairs", "Schedule", "in_force"]

Pairs = list[tuple[ParamGroup, GroupBindings]]
"""Param groups and what they hold."""

States = Mapping[Tensor, State]

_RATE = 25.0  # exp(-25 k / N) passes SNAP after 55 % of training: the rest settles what is left with zeros permanent


def in_force(group: Options, steps: int | None) -> ParamGroup:
    """The options of a param group with what its schedule adds after ``steps`` steps; None: in a step that is none.

    ``imbalance_factor`` multiplies the imbalance in the step (None: the automatic law), and from the commit on
    (``committed``) the structure that a strength has found is final.  ``creates_state``: the step does nothing else.
    """
    if steps is None:
        return {**group, "creates_state": True, "imbalance_factor": 1.0, "committed": False}
    total, commit = group["total_steps"], group["commit"]
    own = {"creates_state": False, "imbalance_factor": None, "committed": False}
    if total is None:
        return {**group, **own}
    committed = commit is not None and steps >= commit * total
    rate = _RATE if commit is None else max(_RATE, math.log(1e7) / commit)
    factor = 0.0 if committed else math.exp(-rate / total)
    return {**group, **own, "imbalance_factor": factor, "committed": committed}


@final
class Schedule:
    """That of one optimizer.  What has to survive is state; this is rebuilt from it whenever it was replaced."""

    def __init__(self, direction: Direction) -> None:
        self.direction = direction
        self.plan: BudgetPlan | None = None
        """Replaces the constraints' own, for studies of plans."""
        self.steps = 0
        """Steps counted."""
        self._read = False
        self._clocks: list[Clock] = []
        self._entries: list[Entry] = []
        self._courses: dict[tuple[Clock, Course], list[Entry]] = {}
        self._seen: list[tuple[GroupBindings, int | None, float | None]] = []
        self._every = 0
        """Steps between two looks for weights that have died; 0 without a length."""
        self._only_creates_state = False
        self._biases = Biases((), ())
        self._advice = advice.Advice(direction)

    @property
    def taken(self) -> int | None:
        """Steps counted, or None in the step that distributed checkpoints take so that state exists."""
        return None if self._only_creates_state else self.steps

    def forget(self) -> None:
        """Read the state again, which has been replaced."""
        self._read = False

    # -- before the step ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def begin(self, pairs: Pairs, states: States, grad_scale: Tensor | None) -> None:
        """Complete the state of every constrained parameter, with a gradient or not."""
        self._begin(pairs, states, grad_scale)
        if self._biases.going:
            self._biases.hold()

    def _begin(self, pairs: Pairs, states: States, grad_scale: Tensor | None) -> None:
        if not self._holds(pairs, states):
            self._resume(pairs, states, grad_scale)
        elif self._only_creates_state:  # as the step before did
            self._only_creates_state = False
            budgeting.begin([e for e in self._entries if e.budgeted], self.direction, grad_scale)
        elif self.steps:
            return
        if not self.steps and not self._only_creates_state:
            self._advice.before(self._entries, grad_scale)

    def _holds(self, pairs: Pairs, states: States) -> bool:
        if not self._read or len(pairs) != len(self._seen):
            return False
        for (group, found), (seen, total, commit) in zip(pairs, self._seen, strict=True):
            if found is not seen or group["total_steps"] != total or group["commit"] != commit:
                return False
        for clock in self._clocks:
            for tensor, version in zip(clock.tensors, clock.versions, strict=True):
                if tensor._version != version:
                    return False
        for entry in self._entries[:1]:  # the others are looked at where they are stepped: see complete
            state = entry.states[0]
            if states.get(entry.binding.parameters[0]) is not state or PROGRESS not in state:
                return False
        return True

    def complete(self, binding: Binding, pairs: Pairs, states: States, grad_scale: Tensor | None) -> None:
        """The same for one binding whose state was found changed."""
        if binding.constraint is None:
            return
        needed = (PROGRESS, *(() if binding.constraint.budget is None else (BUDGET,)))
        if any(key not in states[p] for key in needed for p in binding.parameters):
            self._resume(pairs, states, grad_scale)

    @torch.no_grad()
    def _resume(self, pairs: Pairs, states: States, grad_scale: Tensor | None) -> None:
        """Read the state, complete it, and sort out who shares a clock and a course."""
        bound = [(group, binding) for group, found in pairs for binding in found.bindings]
        own = [[states[p] for p in binding.parameters] for _, binding in bound]
        counts = [_counted(states) for states in own]
        self._only_creates_state = not any(counts) and not self._read and _is_empty(pairs)
        written = [t._version == v for c in self._clocks for t, v in zip(c.tensors, c.versions, strict=True)]
        if not self._read or not all(written):
            self.steps = max((x for found in counts for x in found), default=0)
        main = Clock(self.steps)
        clocks = {self.steps: main}
        self._entries = []
        for (group, binding), state, found in zip(bound, own, counts, strict=True):
            clock = clocks.setdefault(min(found, default=self.steps), Clock(min(found, default=self.steps)))
            entry = Entry(group, binding, state, clock, self._course(group, binding), is_committed(state[0]))
            self._entries.append(entry)
        self._restart(clocks)
        budgeted = [e for e in self._entries if e.budgeted]
        budgeting.begin(budgeted, self.direction, grad_scale, placeholders=self._only_creates_state)
        for entry in self._entries:
            for p, state_of in zip(entry.binding.parameters, entry.states, strict=True):
                on_device = entry.group.get("capturable") or entry.group.get("fused")
                state_of[PROGRESS] = entry.clock.tensor(p.device if on_device else torch.device("cpu"))
        self._clocks = list(dict.fromkeys([main, *(entry.clock for entry in self._entries)]))
        self._seen = [(found, group["total_steps"], group["commit"]) for group, found in pairs]
        lengths = [group["total_steps"] for group, _ in pairs if group["total_steps"] is not None]
        self._every = max(1, min(lengths) // 20) if lengths else 0
        self._courses = {}
        for entry in self._entries:
            if entry.course is not None:
                self._courses.setdefault((entry.clock, entry.course), []).append(entry)
        self._read = True
        self._biases = Biases(self._entries, [b.parameters[0] for _, found in pairs for b in found.unconstrained])

    def _course(self, group: ParamGroup, binding: Binding) -> Course | None:
        constraint = binding.constrained_by
        if constraint.budget is None or group["total_steps"] is None:
            return None
        return Course(self.plan or constraint.plan, group["total_steps"], group["commit"])

    def _restart(self, clocks: dict[int, Clock]) -> None:
        """Start anew where a state has committed another budget than the constraint asks for now."""
        changed = [e for e in self._entries if e.committed and e.budgeted and budgeting.has_changed(e)]
        for entry in changed:
            entry.committed, entry.clock = False, clocks.setdefault(0, Clock(0))
            for p, state in zip(entry.binding.parameters, entry.states, strict=True):
                release(entry.binding, self.direction, state, p)
        advice.restarted(changed)

    # -- after the step ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def end(self, states: States, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Count the step, and do what has come due."""
        if self._only_creates_state:
            return
        self.steps += 1
        for clock in self._clocks:
            clock.steps += 1
            for i, tensor in enumerate(clock.tensors):
                # Steps that GradScaler skips on a device are not counted; the host does not wait to know.
                tensor.add_(1 if found_inf is None else 1 - found_inf.to(tensor).reshape(()))
                clock.versions[i] = tensor._version
        if self._biases.going:
            self._biases.settle(states)
        if not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()):
            self._do_due(grad_scale)

    @torch.no_grad()
    def replayed(self) -> None:
        """What :meth:`end` could not do inside a captured graph."""
        for clock in self._clocks:
            for tensor in clock.tensors:
                clock.steps = int(tensor)
        self.steps = max((clock.steps for clock in self._clocks), default=0)
        self._do_due(None)

    def _do_due(self, grad_scale: Tensor | None) -> None:
        for (clock, course), entries in self._courses.items():
            step, last = clock.steps, course.last
            if step < last:
                if course.is_due(step):
                    budgeting.select([e for e in entries if not e.committed], self.direction, grad_scale)
                continue
            if any(not e.committed and not e.frozen for e in entries):
                budgeting.commit(entries, self.direction)
                self._biases.look()
            elif step % course.plan.every == 0:
                budgeting.restore(entries, self.direction)
            if step == last:
                advice.frozen_at_commit([e for e in entries if not e.committed])
        if self.steps % biases.EVERY == 0:
            self._biases.look()
        if self._every and (self.steps == 1 or self.steps % self._every == 0):
            self._advice.after(self._entries, self.steps, grad_scale)


def _counted(states: list[State]) -> list[int]:
    return [int(x) for state in states if isinstance(x := state.get(PROGRESS), Tensor)]


def _is_empty(pairs: Pairs) -> bool:
    """Whether this is the step that distributed checkpoints take so that state exists: lr 0, all gradients zero."""
    if any(float(group["lr"]) != 0 for group, _ in pairs):
        return False
    grads = [p.grad for _, found in pairs for p in found.params if p.grad is not None]
    return bool(grads) and not any(bool(grad.any()) for grad in grads)
