"""Which backend steps which binding, and the call of a fused kernel for all of a param group that it steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from symopt.backends import BACKENDS, FUSED, check_backend, choose, why_not
from symopt.optim.binding import Binding
from symopt.optim.direction import Direction, Options, State
from symopt.optim.fused import FusedStep
from symopt.optim.membership import Members
from symopt.optim.reference_step import step as step_reference
from symopt.optim.slot import Slot
from symopt.optim.state import fit_plain
from symopt_kernels.backend import Request
from symopt_kernels.native import binding as native
from symopt_kernels.triton import launch as triton

__all__ = ["Slots", "explained", "step_group", "zeros"]

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


def step_group(
    members: Members,
    direction: Direction,
    options: Options,
    states: Mapping[Tensor, State],
    slots: Slots,
    step_plain: Callable[[dict[str, Any]], None],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """One step of a param group: its unconstrained parameters by ``step_plain``, unless a fused backend is named."""
    fused = options["backend"] in FUSED
    bindings = members.bindings + members.unconstrained if fused else members.bindings
    plain = [] if fused else [b.parameters[0] for b in members.unconstrained if b.parameters[0].grad is not None]
    reference: list[Slot] = []
    native_steps: list[FusedStep] = []
    triton_steps: list[FusedStep] = []
    check_backend(members.owner, options["backend"])
    key = _key(direction, options)
    for binding in bindings:
        if not _has_gradient(binding.parameters):
            continue
        found = slots.get(binding.parameters[0])
        slot = found.slot if isinstance(found, FusedStep) else found
        if found is None or slot is None or slot.binding is not binding or not slot.holds(states, key):
            found = slots[binding.parameters[0]] = _looked_up(binding, direction, options, states, key)
        _check_layout(binding)
        if isinstance(found, Slot):
            reference.append(found)
        else:
            (native_steps if found.slot.backend == "native" else triton_steps).append(found)
    # The kernels on the device look at found_inf themselves; for all others the host has to wait for it.
    if (native_steps or reference or plain) and (found_inf is None or not bool(found_inf)):
        if plain:
            for p in plain:
                fit_plain(states.get(p, {}), p)
            step_plain(options)
        for slot in reference:
            step_reference(slot, options, grad_scale)
        if native_steps:
            _step_fused("native", native_steps, direction, options, grad_scale, None)
    if triton_steps:
        _step_fused("triton", triton_steps, direction, options, grad_scale, found_inf)


def explained(
    binding: Binding, p: Tensor, direction: Direction, options: Options, state: State
) -> tuple[str, str, dict[str, str | None]]:
    """Name, backend and, per backend, why not that one, of a parameter."""
    name = binding.name(p)
    if binding.constraint is None and options["backend"] not in FUSED:
        return name, "torch", {"no constraint": None}
    found = reasons(binding, direction, options, state)
    return name, choose(options["backend"], name, found), found


def zeros(step: Slot | FusedStep | None, p: Tensor) -> int:
    """Exact zeros of ``p``, as its last step counted them or counted now."""
    counted = step.zeros(p) if isinstance(step, FusedStep) else None
    return int((p == 0).sum()) if counted is None else counted


def _key(direction: Direction, options: Options) -> object:
    """What a slot depends on, beside state."""
    keys = [moment.key for moment in direction.moments(options)]
    given = (options["backend"], options.get("differentiable", False), options["strength"] is None)
    return (*given, direction.row(options), keys)


def _check_layout(binding: Binding) -> None:
    for p, name in zip(binding.parameters, binding.names, strict=True):
        if p.grad is not None and p.grad.layout is not torch.strided:
            fix = "leave backend at None" if binding.constraint is None else "leave it out of symopt.constrain"
            raise RuntimeError(f"{name}: sparse gradients are not supported here; use sparse=False or {fix}")


def _has_gradient(parameters: tuple[Tensor, ...]) -> bool:
    for p in parameters:  # noqa: SIM110 (a generator costs three times as much)
        if p.grad is not None:
            return True
    return False


def _looked_up(
    binding: Binding, direction: Direction, options: Options, states: Mapping[Tensor, State], key: object
) -> Slot | FusedStep:
    own = [states[p] for p in binding.parameters]
    backend = choose(options["backend"], binding.label, reasons(binding, direction, options, own[0]))
    slot = Slot(binding, direction, options, own, backend, key)
    if backend == "reference":
        return slot
    try:
        return FusedStep(slot, options)
    except ValueError as error:
        raise ValueError(f"{binding.label}: {error}") from None


def _step_fused(
    kernel: str,
    steps: list[FusedStep],
    direction: Direction,
    options: Options,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """One call of a fused kernel; on a GPU, what is a tensor there stays one, and nothing waits for it."""
    device = steps[0].slot.binding.parameters[0].device

    def number(x: Tensor | float) -> Tensor | float:
        on_device = kernel == "triton" and isinstance(x, Tensor) and x.device == device
        return x.to(torch.float32) if on_device and isinstance(x, Tensor) else float(x)

    grads: list[Tensor] = []
    for step in steps:
        slot = step.slot
        stored = slot.binding.constraint is None or slot.has_budget or "critical" in slot.states[0]
        grads += step.aim(0.0 if stored else number(slot.strength(options)))
    entries = [step.entry for step in steps]
    call: dict[str, Any] = {
        "lr": number(options["lr"]),
        "weight_decay": float(options.get("weight_decay", 0.0)),
        "maximize": options.get("maximize", False),
        "saturated": options["time_scale"] == "saturated",
        "imbalance_factor": options["imbalance_factor"],
        "grad_scale": None if grad_scale is None else grad_scale.float(),
        **direction.settings(options),
    }
    if kernel == "native":
        native.step(entries, direction.row(options), **call)
    else:
        triton.step(entries, direction.row(options), found_inf=None if found_inf is None else found_inf.float(), **call)
    # Autograd must see that the weights changed under it.
    torch.autograd.graph.increment_version([p for step in steps for p in step.slot.binding.parameters])
    for step in steps:
        step.done()
