"""Warnings and errors of the schedule: what a run will not reach, or has had to do, with numbers and what to change."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor

from symopt.constraints import Composed
from symopt.optim.binding import Binding
from symopt.optim.budgeted import unit as unit_of
from symopt.optim.budgeted import weight_of
from symopt.optim.callers import callers_level
from symopt.optim.collapse import collapse_steps
from symopt.optim.direction import Direction
from symopt.optim.entry import Entry

__all__ = [
    "Advice",
    "different_lengths",
    "frozen_at_commit",
    "no_length",
    "restarted",
    "restored",
    "short",
    "truncated",
]


def no_length(binding: Binding) -> str:
    """The error of a budget without a length."""
    return (
        f"{binding.label}: {binding.constraint} is a budget, which is imposed over the training; give the optimizer "
        "its length, total_steps=N (optimizer steps), or call opt.reschedule(total_steps=N) before the first step"
    )


def different_lengths(bindings: list[Binding]) -> str:
    """The error of weights that share a budget, in param groups with other lengths."""
    return (
        f"{_names(b.label for b in bindings)} share one budget, so their param groups must have the same total_steps "
        "and commit"
    )


def restarted(changed: Sequence[Entry]) -> None:
    """Another budget than the one a state has committed."""
    if changed:
        entry = changed[0]
        _warn(
            f"{_names(e.binding.label for e in changed)}: the state has committed another budget than "
            f"{entry.binding.constraint} asks for; the schedule of these weights starts again at step 0, so they need "
            f"{'another total_steps' if entry.course is None else entry.course.last} steps until the commit"
        )


def frozen_at_commit(entries: Sequence[Entry]) -> None:
    """Weights that nothing trains keep what they have."""
    if entries:
        _warn(
            f"{_names(e.binding.label for e in entries)}: frozen (requires_grad=False) at the commit, so the budget is "
            "not imposed; it will be in the first step after they are trained again, and symopt.fold imposes it"
        )


def short(found: Iterable[tuple[int, int, list[Binding]]]) -> None:
    """Budgets that are committed with fewer units than they may keep."""
    rows = list(found)
    if rows:
        live, count, bindings = rows[0]
        names = _names(b.label for _, _, sharing in rows for b in sharing)
        _warn(
            f"{names}: fewer live at the commit than the budget keeps ({bindings[0].label}: {live}, the budget is "
            f"{count}), because the others were zero already; start from weights that are not zero, and let lr rise "
            "less from one selection (every 20 steps) to the next"
        )


def restored(found: Sequence[tuple[Entry, int, int]]) -> None:
    """Committed weights that were over their budget again."""
    if found:
        entry, live, units = found[0]
        _warn(
            f"{_names(e.binding.label for e, _, _ in found)}: more lives than the committed budget has room for "
            f"({entry.binding.label}: {live} of {units} units), as after loading other weights; the smallest were set "
            "to zero again"
        )


def truncated(binding: Binding, live: int, rank: int) -> None:
    """A committed rank that was exceeded again."""
    _warn(
        f"{binding.label}: more lives than the committed budget has room for (rank {live}, the budget is {rank}), as "
        "after loading other weights; the smallest singular directions were removed again"
    )


@final
class Advice:
    """Warns once of each cause."""

    def __init__(self, direction: Direction) -> None:
        self._direction = direction
        self._judged: set[Tensor] = set()
        self._dead: set[Tensor] = set()

    def before(self, entries: Sequence[Entry], grad_scale: Tensor | None) -> None:
        """Warn where the steps are too few for what is asked, as far as it is known before a step."""
        found = [(e, x) for e in entries if (x := self._too_few(e, grad_scale)) is not None]
        for budgets in (True, False):
            _too_few_steps([(e, x) for e, x in found if (e.course is not None) == budgets], self._direction)

    def after(self, entries: Sequence[Entry], steps: int, grad_scale: Tensor | None) -> None:
        """Warn of what shows after a step."""
        if steps == 1:
            self.before(entries, grad_scale)  # Adam's preconditioner is known only now
        dead = []
        for e in entries:
            if e.group["total_steps"] is None:
                continue
            imbalance = e.states[0].get("imbalance")
            final_ = isinstance(imbalance, Tensor) and not bool(imbalance.any())
            if final_ and e.binding.parameters[0] not in self._dead and not any(map(torch.any, e.binding.parameters)):
                self._dead.add(e.binding.parameters[0])
                dead.append(e.binding.label)
        if dead:
            _warn(
                f"{_names(dead)}: all of {_its(dead)} weights have become zero and stay zero; give a smaller "
                "strength, or a budget, which every tensor survives"
            )

    def _too_few(self, entry: Entry, grad_scale: Tensor | None) -> _Lack | None:
        """None if all is well, not known yet or judged before."""
        group, binding, state, course = entry.group, entry.binding, entry.states[0], entry.course
        constraint, total, p = binding.constrained_by, group["total_steps"], binding.parameters[0]
        if total is None or p in self._judged:
            return None
        lr = max(float(group[key]) for key in ("lr", "initial_lr", "max_lr") if key in group)
        if lr == 0 and constraint.budget is not None:
            return None  # it will not stay so
        options = {**group, "lr": lr}
        share, own, decoupled = 1.0 if group["commit"] is None else group["commit"], None, None
        rounding, active = 0.0, float(share * total)
        if constraint.budget is not None:
            assert course is not None
            # What leaves the budget last has from the end of the ramp to the commit.
            plan = course.plan
            commit, last = plan.commit if course.commit is None else course.commit, 1 - plan.ramp / plan.commit
            share, rounding, active = commit * last, 0.5 / commit, max(1.0, course.last * last)
            units = weight_of(binding, entry.states).units
            unit = float(unit_of(binding, self._direction, entry.states, units, grad_scale))
            if unit == 0 or not math.isfinite(unit):
                return None
            own, decoupled = course.plan.strength_pruned * unit, True
        needed = collapse_steps(binding, self._direction, options, state, strength=own, decoupled=decoupled)
        if needed is None:
            return None
        self._judged.add(p)
        if needed <= active:
            return None
        return _Lack(needed / active, active, lr, needed / share + rounding)


@final
class _Lack(NamedTuple):
    """What a training lacks for what is asked of it."""

    factor: float
    """Steps needed over those there are."""
    active: float
    """Steps there are."""
    lr: float
    enough: float
    """``total_steps`` that would do."""


def _too_few_steps(found: list[tuple[Entry, _Lack]], direction: Direction) -> None:
    if not found:
        return
    names = _names(e.binding.label for e, _ in found)
    entry, (factor, active, lr, enough) = max(found, key=lambda x: x[1].factor)
    group, constraint, total = entry.group, entry.binding.constrained_by, entry.group["total_steps"]
    if entry.course is not None and not math.isinf(factor):
        _warn(
            f"{names}: {total} steps at lr {lr:.4g} are too few to ramp {_its(found)} budget in; what is cut will not "
            f"have decayed; use lr >= {_up(lr * factor)} or {math.ceil(enough)} steps"
        )
        return
    listed = isinstance(constraint, Composed)  # its strength multiplies those in the list
    strength = float(entry.binding.strength(direction, group, entry.states[0]))
    if math.isinf(factor):
        fix = "give an lr > 0" if lr == 0 else "give a strength > 0"
    else:
        more = f"strengths {_up(factor)} times as large" if listed else f"strength >= {_up(strength * factor)}"
        fix = f"use lr >= {_up(lr * factor)}, {more}, or {math.ceil(enough)} steps"
    at = f"lr {lr:.4g}" if listed else f"lr {lr:.4g} and strength {strength:.4g}"
    before = "" if group["commit"] is None else " before the commit"
    _warn(
        f"{names}: {math.floor(active)} steps{before} at {at} are too few to bring even {_its(found)} median weight to "
        f"zero without a gradient; {fix}"
    )


def _up(x: float) -> str:
    """Rounded up to three digits, so that following the advice is enough."""
    if x == 0 or not math.isfinite(x):
        return f"{x:g}"
    unit = 10.0 ** (math.floor(math.log10(x)) - 2)
    return f"{math.ceil(x / unit * (1 - 1e-9)) * unit:.3g}"


def _its(several: Sequence[object]) -> str:
    return "its" if len(several) == 1 else "their"


def _names(labels: Iterable[str], most: int = 3) -> str:
    found = list(labels)
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more


def _warn(message: str) -> None:
    """As seen from the code that called the optimizer."""
    warnings.warn(message, stacklevel=callers_level())
