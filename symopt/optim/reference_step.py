"""The step of one binding in readable torch: survey, combine, move.

A parameter that is alone and whole needs no sums of others, so direction and retraction follow each other; units that
span several parameters are surveyed parameter by parameter, their sums are combined, and every parameter moves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from symopt.budgets.state import BudgetState
from symopt.constraints.planes.plane import parts
from symopt.optim.binding import Binding
from symopt.optim.direction import Options, State
from symopt.optim.slot import Slot
from symopt.optim.state import flat_state, write_back
from symopt_kernels.reference import elementwise, gauge
from symopt_kernels.reference import units as units_kernel
from symopt_kernels.units import Units

__all__ = ["step"]


def step(slot: Slot, options: Options, grad_scale: Tensor | None) -> None:
    """One step of the parameters of a binding and of their states, in place."""
    if slot.own is not None:
        slot.own.step(slot.binding, slot.direction, options, slot.states[0], grad_scale)
    elif slot.binding.units is not None:
        _step_units(slot, slot.binding.units, options, grad_scale)
    else:
        _step_whole(slot, options, grad_scale)


def _step_whole(slot: Slot, options: Options, grad_scale: Tensor | None) -> None:
    """Direction, then retraction, of one parameter or of the flat vector of several."""
    binding, direction, groups, states = slot.binding, slot.direction, slot.groups, slot.states
    constraint, saturated = binding.constraint, options["time_scale"] == "saturated"
    assert constraint is not None
    if binding.several:
        state, w = flat_state(binding, direction, states), binding.stepped_weight(states)
        grad = binding.gradient(w.dtype)
    else:
        (p,), (state,) = binding.parameters, states
        assert p.grad is not None
        w = state.get("master", p)
        grad = p.grad.to(w.dtype if "factor_0" not in state else state["factor_0"].dtype)
    grad = _minimised(grad, options, grad_scale)
    if options.get("differentiable", False):
        w = w.clone()  # the step saves it for backward and then overwrites it
    lr, strength = _rates(slot, options, grad.dtype)
    update, gain = direction.update(options, state, grad, groups, decoupled=slot.decoupled)
    if binding.automatic(options) if constraint.is_plane else False:  # for the steps to come
        decoupled = direction.decoupled(options)
        if decoupled:
            smooth = update / direction.typical(options, update.shape)
        else:
            smooth = groups.scale(1 / gain, update) if isinstance(gain, Tensor) and groups else update / gain
        needed = constraint.needed(smooth, state["critical"], per_coordinate=decoupled)
        state["critical"] = _kept(options, state["critical"], needed)
    factor: float | Tensor | None = options["imbalance_factor"]
    snaps: Tensor | bool = True
    if slot.has_budget:
        budget = BudgetState.read(state, update)
        pruned = constraint.pruned(w, budget.threshold, groups).reshape(w.shape if groups is None else (-1,))
        snaps = pruned  # and no branch on a tensor: nothing may wait for the device
        strength, factor = torch.where(pruned, budget.pruned_within(lr), budget.strength_kept), budget.imbalance_factor
    delta, decay = lr * update, lr * strength * gain
    if not constraint.uniform_strength:
        decay = decay * constraint.strength_multiplier(w, decoupled=direction.decoupled(options))
    if "factor_0" in state:
        _step_factors(binding, options, state, delta, decay, factor)
        return
    c, scale = state["imbalance"], state["metric_scale"]
    new = constraint.retract(w, delta, decay, c, scale, groups, saturated=saturated, snaps=snaps)
    size = constraint.size(new, groups)
    c = gauge.next_imbalance(c, factor, decay, scale, size, saturated=saturated)
    if binding.several or options.get("differentiable", False):
        write_back(parts(new, binding.parameters), state, binding, direction, states, options)
        states[0]["imbalance"] = _kept(options, states[0]["imbalance"], c)
        return
    p.copy_(new)
    if "master" in state:
        state["master"].copy_(new)
    state["imbalance"].copy_(c)


def _step_factors(
    binding: Binding,
    options: Options,
    state: State,
    delta: Tensor,
    decay: Tensor | float,
    factor: float | Tensor | None,
) -> None:
    """The step of a constraint whose factors are state."""
    constraint, p = binding.constraint, binding.parameters[0]
    assert constraint is not None
    stored = tuple(state[f"factor_{i}"] for i in range(constraint.depth))
    factors = stored
    if factor is not None:
        # Before the step: at a commit the strength is 0 from here on, and a zero must not start with a partner.
        factors = elementwise.rebalance(stored, float(factor))
    saturated = options["time_scale"] == "saturated"
    new, moved = constraint.advance(factors, delta, decay, state["metric_scale"], saturated=saturated)
    # A product rounds, so where no factor moved the weight is left alone: a step with lr 0 changes no bit.
    still = torch.stack([f == m for f, m in zip(factors, moved, strict=True)]).all(0)
    p.copy_(torch.where(still, p, new.to(p.dtype)))
    for i, (before, value) in enumerate(zip(stored, moved, strict=True)):
        state[f"factor_{i}"] = _kept(options, stored[i], torch.where(still, before, value))


def _step_units(slot: Slot, units: Units, options: Options, grad_scale: Tensor | None) -> None:
    """Units that span several parameters."""
    binding, direction, states = slot.binding, slot.direction, slot.states
    constraint, state, saturated = binding.constraint, states[0], options["time_scale"] == "saturated"
    assert constraint is not None
    # survey
    if direction.counts_steps:
        state["step"] += 1
    weights, grads, leads = [], [], []
    for p, own in zip(binding.parameters, states, strict=True):
        w = own.get("master", p)
        weights.append(w.clone() if options.get("differentiable", False) else w)
        grad = (torch.zeros_like(p) if p.grad is None else p.grad).to(w.dtype)
        grads.append(_minimised(grad, options, grad_scale))
        leads.append(direction.advance(options, own, grads[-1]))
    sums = units_kernel.survey(units, grads, leads, weights)
    # combine
    if binding.combine is not None:
        binding.combine(sums)
    sizes = units.sizes(sums)
    scale: Tensor | float = 1.0
    if direction.scaled_by is not None:
        by_gradient = direction.scaled_by == "gradient"
        squares = [x * x for x in (grads if by_gradient else leads)]
        scale = direction.rescale(options, state, units.pack(sums[0 if by_gradient else 1] / sizes, squares))
    of_units = scale[: units.count] if isinstance(scale, Tensor) else scale
    gain = direction.gain(options, of_units, sizes, binding.parameters[0].shape, decoupled=slot.decoupled)
    lr, strength = _rates(slot, options, sums.dtype)
    factor: float | Tensor | None = options["imbalance_factor"]
    snaps: Tensor | bool = True
    if slot.has_budget:
        budget = BudgetState.read(state, sums)
        snaps = sums[3].sqrt() <= budget.threshold
        strength, factor = torch.where(snaps, budget.pruned_within(lr), budget.strength_kept), budget.imbalance_factor
    decay = lr * strength * gain
    c, metric_scale = state["imbalance"], state["metric_scale"]
    shrink, shift, size = units_kernel.combine(
        sums, lr * of_units, decay, c, metric_scale, saturated=saturated, snaps=snaps
    )
    # move
    new = []
    for i, (part, w, lead) in enumerate(zip(units.parts, weights, leads, strict=True)):
        moved = units_kernel.move(units, part, w, lead, shrink, shift)
        if part.unbound:
            own_scale = units.unpack(scale, i) if isinstance(scale, Tensor) else scale
            unbound = part.unbound_weights(w) - lr * own_scale * part.unbound_weights(lead)
            moved = part.with_unbound(moved, unbound)
        new.append(moved)
    write_back(tuple(new), state, binding, direction, states, options)
    c = gauge.next_imbalance(c, factor, decay, metric_scale, size, saturated=saturated)
    state["imbalance"] = _kept(options, state["imbalance"], c)


def _rates(slot: Slot, options: Options, dtype: torch.dtype) -> tuple[float | Tensor, float | Tensor]:
    """``lr`` and the strength in force, in the precision of the step: 0-dim tensors are often narrower."""
    lr, strength = options["lr"], slot.default if options["strength"] is None else options["strength"]
    if strength is None or options["committed"]:
        strength = slot.strength(options)
    return (
        lr.to(dtype) if isinstance(lr, Tensor) else lr,
        strength.to(dtype) if isinstance(strength, Tensor) else strength,
    )


def _minimised(grad: Tensor, options: Options, grad_scale: Tensor | None) -> Tensor:
    """The gradient without GradScaler's scale, of what is minimised."""
    if grad_scale is not None:
        grad = grad / grad_scale
    return -grad if options.get("maximize", False) else grad


def _kept(options: Options, stored: Tensor, value: Tensor) -> Tensor:
    """State in its old place, so that its address stays; a new tensor where a graph goes through the step."""
    return value if options.get("differentiable", False) else stored.copy_(value)
