"""What a budget sees of a binding: its weight, what a strength means to it, and what the last selection has left."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from symopt.budgets.pools import BudgetedWeight
from symopt.budgets.schedule import Scheduled, largest_decay
from symopt.budgets.state import BUDGET, BudgetState
from symopt.optim.binding import Binding
from symopt.optim.collapse import metric_scale
from symopt.optim.direction import Direction, State
from symopt.optim.entry import Entry
from symopt.optim.own_step import own_step

__all__ = ["before", "scheduled", "unit", "weight_of"]


def weight_of(binding: Binding, states: list[State]) -> BudgetedWeight:
    """The weight of a binding in the precision it is stepped in."""
    constraint, p = binding.constrained_by, binding.parameters[0]
    if (own := own_step(constraint)) is not None:
        return BudgetedWeight(binding.label, own.sizes(constraint, states[0], p), constraint, None)
    w = binding.stepped_weight(states).detach()
    return BudgetedWeight(binding.label, w, constraint, binding.groups(states[0]))


def before(states: list[State]) -> BudgetState:
    """What the last selection has left, on the host or the device where it is."""
    stored = states[0].get(BUDGET)
    return BudgetState.of(stored) if isinstance(stored, Tensor) else BudgetState()


def scheduled(
    entry: Entry, weight: BudgetedWeight, direction: Direction, grad_scale: Tensor | None = None
) -> Scheduled:
    """What the strengths of a binding depend on in this step."""
    binding, options, states = entry.binding, entry.group, entry.states
    constraint = binding.constrained_by
    p, count = binding.parameters[0], sum(q.numel() for q in binding.parameters)
    normalised = direction.scaled_by is not None
    scale = metric_scale(binding, options, states[0]).to(dtype=weight.w.dtype, device=p.device)
    of_step = scale if options["time_scale"] == "saturated" else torch.ones_like(scale)
    gain = direction.gain(options, 1.0, None, p.shape, decoupled=True)
    if normalised:
        gain = gain * math.sqrt(count / weight.units)
    given = options["strength"] if options["strength"] is not None else constraint.strength
    found = unit(binding, direction, states, weight.units, grad_scale)
    most = largest_decay(constraint, gain, of_step)
    return Scheduled(weight, found, given, most, scale, before(states))


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
