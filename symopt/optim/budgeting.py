"""Budgets of bindings: what a selection sees of a binding, and how a decision is written to its weights and state."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from symopt.budgets.pools import BudgetedWeight
from symopt.budgets.schedule import Decision, Scheduled, largest_decay
from symopt.budgets.state import BUDGET, BudgetState
from symopt.constraints.planes.plane import parts
from symopt.optim.binding import Binding
from symopt.optim.collapse import metric_scale
from symopt.optim.direction import Direction, Options, State
from symopt.optim.own_step import own_step

__all__ = ["budget_before", "budgeted", "schedule", "unit", "write"]


def budgeted(binding: Binding, states: list[State]) -> BudgetedWeight:
    """The weight of a binding in the precision it is stepped in."""
    constraint, p = binding.constrained_by, binding.parameters[0]
    if (own := own_step(constraint)) is not None:
        return BudgetedWeight(binding.label, own.sizes(constraint, states[0], p), constraint, None)
    w = binding.stepped_weight(states).detach()
    return BudgetedWeight(binding.label, w, constraint, binding.groups(states[0]))


def budget_before(states: list[State]) -> BudgetState:
    """What the last selection has left, on the host or the device where it is."""
    stored = states[0].get(BUDGET)
    return BudgetState(*stored.unbind()) if isinstance(stored, Tensor) else BudgetState()


def schedule(
    binding: Binding,
    direction: Direction,
    options: Options,
    states: list[State],
    weight: BudgetedWeight,
    grad_scale: Tensor | None,
) -> Scheduled:
    """What the strengths of a binding depend on in this step."""
    constraint = binding.constrained_by
    p, count = binding.parameters[0], sum(q.numel() for q in binding.parameters)
    normalised = direction.scaled_by is not None
    scale = torch.ones((), dtype=weight.w.dtype, device=p.device)
    if options["time_scale"] == "saturated":
        scale = metric_scale(binding, options, states[0]).to(scale)
    gain = direction.gain(options, 1.0, None, p.shape, decoupled=True)
    if normalised:
        gain = gain * math.sqrt(count / weight.units)
    given = options["strength"] if options["strength"] is not None else constraint.strength
    found = unit(binding, direction, states, weight.units, grad_scale)
    return Scheduled(weight, found, given, largest_decay(constraint, gain, scale), budget_before(states))


def unit(
    binding: Binding, direction: Direction, states: list[State], units: int, grad_scale: Tensor | None
) -> float | Tensor:
    """What a strength of 1 means to this direction, over all parameters of a binding; gradients are unscaled."""
    found = []
    for p, state in zip(binding.parameters, states, strict=True):
        grad = p.grad if p.grad is None or grad_scale is None else p.grad / grad_scale.to(p.grad.device)
        found.append(direction.strength_unit(p, grad, state, units))
    if len(found) == 1:
        return found[0]
    squares = [torch.as_tensor(x) ** 2 for x in found]
    return torch.stack(squares).sum().sqrt() if any(isinstance(x, Tensor) for x in found) else found[0]


def write(binding: Binding, states: list[State], decision: Decision) -> None:
    """Set pruned units to zero, and give the state its new numbers in place, so that its address stays."""
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
        if "imbalance" in states[0]:
            states[0]["imbalance"].zero_()
    numbers = decision.state.tensor(p.device)
    if BUDGET in states[0]:
        states[0][BUDGET].copy_(numbers)
    else:
        for state in states:
            state[BUDGET] = numbers
