"""How many steps a unit needs to become exactly zero if no gradient holds it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from symopt.optim.binding import Binding
from symopt.optim.direction import Direction, Options, State
from symopt.optim.own_step import own_step

__all__ = ["collapse_steps", "known_gain", "metric_scale"]


def known_gain(
    binding: Binding, direction: Direction, options: Options, state: State, *, decoupled: bool | None = None
) -> Tensor | float | None:
    """What multiplies ``lr * strength`` in the step; None if it depends on a gradient and there was none yet."""
    constraint = binding.constrained_by
    if (own := own_step(constraint)) is not None:
        return own.known_gain(binding, direction, options, state)
    decoupled = direction.decoupled(options) if decoupled is None else decoupled
    scale = binding.preconditioner(direction, options, state)
    return direction.known_gain(options, scale, binding.size(state), binding.parameters[0].shape, decoupled=decoupled)


def metric_scale(binding: Binding, options: Options, state: State) -> Tensor:
    """The state's, or before the first step what it will be."""
    found = state.get("metric_scale")
    if isinstance(found, Tensor):
        return found
    return binding.constrained_by.start(binding.weight().float(), options["imbalance"], binding.groups(state))[1]


SAMPLE = 2**14
"""So many units tell the median of all, whose selection would take longer than all else."""


@torch.no_grad()
def collapse_steps(
    binding: Binding,
    direction: Direction,
    options: Options,
    state: State,
    *,
    strength: float | Tensor | None = None,
    decoupled: bool | None = None,
) -> float | None:
    """Steps at the current rate until the median live unit is zero if no gradient holds it.

    ``strength`` is the one in force unless given.  None while the preconditioner or an automatic strength is unknown
    (before the first step), 0 if nothing lives.
    """
    constraint = binding.constrained_by
    gain = known_gain(binding, direction, options, state, decoupled=decoupled)
    if gain is None:
        return None
    strength = binding.strength(direction, options, state) if strength is None else strength
    if math.isnan(strength):
        return None
    w, groups = binding.weight().float(), binding.groups(state)
    size = constraint.size(w, groups)
    live = size > 0
    if not bool(live.any()):
        return 0.0
    decoupled = direction.decoupled(options) if decoupled is None else decoupled
    multiplier = torch.as_tensor(constraint.strength_multiplier(w, decoupled=decoupled)).flatten()
    rate = constraint.per_unit(options["lr"] * strength * torch.as_tensor(gain).flatten() * multiplier, w)
    scale = metric_scale(binding, options, state)
    need = constraint.collapse(size, scale, saturated=options["time_scale"] == "saturated") / rate
    found = need[live]
    return float(found[:: max(1, found.numel() // SAMPLE)].median())
