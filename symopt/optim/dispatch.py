"""Which backend steps which binding, and the call of a fused kernel for all of a param group that it steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from symopt.backends import BACKENDS, FUSED, check_backend, choose, why_not
from symopt.optim.binding import Binding
from symopt.optim.direction import Direction, Options, ParamGroup, State
from symopt.optim.fused import FusedStep, step_fused
from symopt.optim.membership import GroupBindings, Membership
from symopt.optim.reference_step import step as step_reference
from symopt.optim.schedule import Schedule, in_force
from symopt.optim.slot import Slot
from symopt.optim.state import fit_plain
from symopt_kernels.backend import Request
from symopt_kernels.triton.table import INTERPRETED

__all__ = ["Slots", "explained", "step_groups", "zeros"]

Slots = dict[Tensor, "Slot | FusedStep"]
"""First parameter of a binding -> what its last step looked up."""


def reasons(binding: Binding, direction: Direction, options: Options, state: State) -> dict[str, str | None]:
    """Per backend why it cannot step a binding, or None."""
    constraint = binding.constraint
    budget = None if constraint is None else constraint.budget
    request = Request(
        direction=direction.row(options),
        retraction="plain" if constraint is None else constraint.retraction,
        weights=binding.parameters,
        groups=binding.groups(state),
        units=binding.units,
        pattern=None if budget is None else budget.pattern,
        depth=2 if constraint is None else constraint.depth,
        differentiable=bool(options.get("differentiable", False)),
    )
    return {backend: why_not(backend, request) for backend in BACKENDS}


def step_groups(
    param_groups: list[ParamGroup],
    membership: Membership,
    schedule: Schedule,
    states: Mapping[Tensor, State],
    slots: Slots,
    step_plain: Callable[[ParamGroup], None],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """One step of all param groups; none where GradScaler has found an overflow."""
    if found_inf is not None and found_inf.device.type == "cpu" and not INTERPRETED and bool(found_inf):
        return  # nothing moves, and no count either
    pairs = [(group, membership.of(group, param_groups)) for group in param_groups]
    schedule.begin(pairs, states, grad_scale)
    for group, of_group in pairs:

        def look_up(binding: Binding, options: ParamGroup, key: object) -> Slot | FusedStep:
            schedule.complete(binding, pairs, states, grad_scale)
            return _looked_up(binding, membership.direction, options, states, key)

        options = in_force(group, schedule.taken)
        _step_group(
            of_group, membership.direction, group, options, states, slots, look_up, step_plain, grad_scale, found_inf
        )
    schedule.end(states, grad_scale, found_inf)


def _step_group(
    of_group: GroupBindings,
    direction: Direction,
    group: ParamGroup,
    options: ParamGroup,
    states: Mapping[Tensor, State],
    slots: Slots,
    look_up: Callable[[Binding, ParamGroup, object], Slot | FusedStep],
    step_plain: Callable[[ParamGroup], None],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """One step of a param group: its unconstrained parameters by ``step_plain``, unless a fused backend is named."""
    fused = options["backend"] in FUSED
    bindings = of_group.bindings + of_group.unconstrained if fused else of_group.bindings
    plain = [] if fused else [b.parameters[0] for b in of_group.unconstrained if b.parameters[0].grad is not None]
    reference: list[Slot] = []
    native_steps: list[FusedStep] = []
    triton_steps: list[FusedStep] = []
    # What a slot depends on, beside state.
    given = (options["backend"], options.get("differentiable", False), options["strength"] is None)
    key = (*given, *map(options.get, direction.switches))
    for binding in bindings:
        if not _has_gradient(binding):
            continue
        first = binding.parameters[0]
        found = slots.get(first)
        slot = found.slot if isinstance(found, FusedStep) else found
        if found is None or slot is None or slot.binding is not binding or not slot.holds(states, key):
            found = slots[first] = look_up(binding, options, key)
        if isinstance(found, Slot):
            reference.append(found)
        else:
            (native_steps if found.slot.backend == "native" else triton_steps).append(found)
    # The kernels on the device look at found_inf themselves; for all others the host has to wait for it.
    if (native_steps or reference or plain) and (found_inf is None or not bool(found_inf)):
        if plain:
            for p in plain:
                fit_plain(states.get(p, {}), p)
            step_plain(group)
        for slot in reference:
            step_reference(slot, options, grad_scale)
        if native_steps:
            step_fused("native", native_steps, direction, options, grad_scale, None)
    if triton_steps:
        step_fused("triton", triton_steps, direction, options, grad_scale, found_inf)


def explained(
    binding: Binding, p: Tensor, direction: Direction, options: Options, state: State
) -> tuple[str, str, dict[str, str | None]]:
    """Name, backend and, per backend, why not that one, of a parameter."""
    name = binding.name(p)
    if binding.constraint is None and options["backend"] not in FUSED:
        return name, "torch", {"no constraint": None}
    found = reasons(binding, direction, options, state)
    return name, choose(options["backend"], name, found), found


def zeros(bindings: Iterable[Binding], slots: Slots) -> dict[str, int]:
    """Exact zeros of every parameter by name, as its last step counted them or counted now."""
    found = {}
    for binding in bindings:
        step = slots.get(binding.parameters[0])
        for p, name in zip(binding.parameters, binding.names, strict=True):
            counted = step.zeros(p) if isinstance(step, FusedStep) else None
            found[name] = int((p == 0).sum()) if counted is None else counted
    return found


def _has_gradient(binding: Binding) -> bool:
    """Whether any of its parameters has one; raises for a layout that no step knows."""
    found = False
    for p in binding.parameters:
        if (grad := p.grad) is None:
            continue
        found = True
        if grad.layout is not torch.strided:
            fix = "leave backend at None" if binding.constraint is None else "leave it out of symopt.constrain"
            raise RuntimeError(f"{binding.name(p)}: sparse gradients are not supported here; use sparse=False or {fix}")
    return found


def _looked_up(
    binding: Binding, direction: Direction, options: Options, states: Mapping[Tensor, State], key: object
) -> Slot | FusedStep:
    check_backend(binding.label, options["backend"])
    own = [states[p] for p in binding.parameters]
    backend = choose(options["backend"], binding.label, reasons(binding, direction, options, own[0]))
    slot = Slot(binding, direction, options, own, backend, key)
    if backend == "reference":
        return slot
    try:
        return FusedStep(slot, options)
    except ValueError as error:
        raise ValueError(f"{binding.label}: {error}") from None
