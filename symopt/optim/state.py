"""The state of a binding: made lazily in its first step, and fitted to what a checkpoint brings."""

from __future__ import annotations

import torch
from torch import Tensor

from symopt.budgets.state import BUDGET, is_committed
from symopt.constraints import Constraint
from symopt.optim.binding import Binding, shared_moment
from symopt.optim.direction import Direction, Options, State
from symopt.optim.options import PROGRESS, ROWS
from symopt.optim.own_step import own_step
from symopt_kernels.reference.gauge import math_dtype

__all__ = ["OWN_STATE", "fit_plain", "flat_state", "pack_moments", "prepare", "refresh", "write_back"]

OWN_STATE = ("imbalance", "metric_scale", "master", "group_index", BUDGET, "critical", PROGRESS, ROWS)
"""State keys of the constraint, which torch.optim does not have."""

_SHARED = ("step", "imbalance", "metric_scale", "critical", BUDGET)
"""What a binding has one of, beside second moments."""


def prepare(binding: Binding, direction: Direction, options: Options, states: list[State]) -> None:
    """Complete ``states`` of the binding's parameters: what is missing is made, what does not fit is fitted."""
    constraint, state = binding.constraint, states[0]
    if binding.units is not None:
        _check_alike(binding)
    if constraint is not None and "group_index" not in state and not binding.several:
        index = constraint.index(binding.parameters[0])
        if index is not None:
            state["group_index"] = index
    for own, p in zip(states, binding.parameters, strict=True):
        _fit(own, p, constraint)
    if constraint is None:
        direction.init(options, state, binding.parameters[0], None)
        return
    _share(binding, direction, states)
    _begin(binding, options, states)
    if (steps := own_step(constraint)) is not None:
        steps.ready(binding, direction, options, state)
        return
    if constraint.carries_factors:
        _ready_factors(state, binding.parameters[0], constraint)
    shared, count = _shared_keys(direction), binding.moment_count(state)
    for own, p in zip(states, binding.parameters, strict=True):
        if own is not state:
            own.update({key: state[key] for key in shared if key in state})
        direction.init(options, own, p, count)


def _check_alike(binding: Binding) -> None:
    """Raise if the parameters of units, which were of one dtype when they were bound, are so no longer."""
    kinds = {(p.dtype, p.device): name for name, p in zip(binding.names[::-1], binding.parameters[::-1], strict=True)}
    if len(kinds) > 1:
        found = ", ".join(sorted(f"{name} {dtype} on {device}" for (dtype, device), name in kinds.items()))
        raise ValueError(
            f"parameters that share units must be of one dtype and on one device, but {found}; change all of them "
            "alike, or release them (symopt.release) and constrain them anew"
        )


def _shared_keys(direction: Direction) -> tuple[str, ...]:
    return (*_SHARED, *(moment.key for moment in direction.table if moment.per_unit))


def _fit(state: State, p: Tensor, constraint: Constraint | None) -> None:
    """Give what a checkpoint brought the precision it is stepped in."""
    dtype = math_dtype(p)
    for key, value in state.items():
        if key == PROGRESS:
            continue
        if key == "step":
            if not isinstance(value, Tensor) or value.dtype not in (torch.float32, torch.float64):
                state[key] = torch.tensor(float(value), dtype=torch.float32)  # as old checkpoints have it
        elif key == BUDGET:
            state[key] = value.to(device=p.device, dtype=torch.float64)
        elif isinstance(value, Tensor) and value.is_floating_point() and value.dtype != dtype:
            state[key] = value.to(dtype)
    if constraint is None:
        return
    if p.dtype != dtype and not constraint.carries_factors:
        # Half precision cannot hold the small shrink of a step: without an fp32 copy weights would stop short of
        # zero.  Wherever the weight was changed from outside, it and not the copy is right.
        master = state.get("master")
        state["master"] = p.to(dtype) if master is None else torch.where(master.to(p.dtype) == p, master, p)
    else:
        state.pop("master", None)


def fit_plain(state: State, p: Tensor) -> None:
    """Undo what a fused step makes of the state of an unconstrained parameter in half precision."""
    if p.dtype != math_dtype(p):
        for key, value in state.items():
            if key != "step" and isinstance(value, Tensor) and value.dtype == torch.float32:
                state[key] = value.to(p.dtype)


def pack_moments(binding: Binding, direction: Direction, states: list[State], *, per_weight: bool) -> None:
    """Make one number per unit of second moments per weight, as checkpoints and unconstrained parameters have them.

    Without ``per_weight``, those whose shape does not tell them apart are numbers per unit.
    """
    count, groups, units = binding.moment_count(states[0]), binding.groups(states[0]), binding.units
    shapes = [p.shape for p in binding.parameters]
    if count is None or (not per_weight and all(shape == (count,) for shape in shapes)):
        return
    for key in [moment.key for moment in direction.table if moment.per_unit]:
        found = [state.get(key) for state in states]
        tensors = [x.to(math_dtype(p)) for x, p in zip(found, binding.parameters, strict=True) if isinstance(x, Tensor)]
        if [x.shape for x in tensors] != shapes:
            continue
        if units is not None:
            value = units.read_in(tensors)
        else:
            assert groups is not None
            whole = torch.cat([x.flatten() for x in tensors]) if binding.several else tensors[0]
            value = shared_moment(whole, groups)
        for state in states:
            state[key] = value


def _share(binding: Binding, direction: Direction, states: list[State]) -> None:
    """Make everything shared one tensor again: a checkpoint brings each parameter its own."""
    # What the constraint has stepped before has an imbalance, and its moments are per unit since.
    pack_moments(binding, direction, states, per_weight="imbalance" not in states[0])
    if not binding.several:
        return
    for key in _shared_keys(direction):
        found = [state[key] for state in states if key in state]
        if not found or (len(found) == len(states) and all(value is found[0] for value in found)):
            continue
        value = max(found, key=float) if key == "step" else found[0]
        for state in states:
            state[key] = value


def _begin(binding: Binding, options: Options, states: list[State]) -> None:
    """Create what the constraint itself keeps, in the first of ``states``."""
    constraint, state = binding.constraint, states[0]
    assert constraint is not None
    automatic = binding.automatic(options)
    if "imbalance" not in state or "metric_scale" not in state:
        w = binding.stepped_weight(states).detach().to(math_dtype(binding.parameters[0]))
        # What is known to lie above the critical strength never has to come back.
        # What is committed must not come back either.
        locked = automatic or (constraint.budget is not None and is_committed(state))
        c, scale = constraint.start(w, 0.0 if locked else options["imbalance"], binding.groups(state))
        # The step of a distributed checkpoint that only creates state sees the weights of one that is being loaded.
        if (locked and not automatic) or options.get("creates_state", False):
            scale = torch.where(scale > 0, scale, 1.0)
        if not bool(scale > 0):
            raise ValueError(
                f"{binding.label} is zero everywhere, and without imbalance zeros are permanent, so it could "
                "never train; give the optimizer imbalance > 0 or initialise the weight (at depth > 2 only "
                "gauge='free' has an imbalance, LowRank has none)"
            )
        state["imbalance"], state["metric_scale"] = c, scale
    if constraint.budget is None:
        state.pop(BUDGET, None)
    if not automatic:
        state.pop("critical", None)
    elif "critical" not in state:
        state["critical"] = torch.zeros_like(state["imbalance"])


def refresh(binding: Binding, states: list[State]) -> None:
    """Let complete states follow weights that were changed from outside since the last step."""
    for p, state in zip(binding.parameters, states, strict=True):
        if (master := state.get("master")) is not None:
            master.copy_(torch.where(master.to(p.dtype) == p, master, p))
    if binding.constraint is not None and binding.constraint.carries_factors:
        _ready_factors(states[0], binding.parameters[0], binding.constraint)


def _ready_factors(state: State, p: Tensor, constraint: Constraint) -> None:
    """Factors that compose to the weight; entries of it that were changed from outside are split anew."""
    w, keys = p.detach().to(math_dtype(p)), [f"factor_{i}" for i in range(constraint.depth)]
    if any(key not in state for key in keys):
        state.update(zip(keys, (f.clone() for f in constraint.split(w, state["imbalance"])), strict=True))
        return
    factors = tuple(state[key] for key in keys)
    stale = constraint.compose(factors).to(p.dtype) != p
    # No look whether there are any: nothing may wait for the device.
    for factor, value in zip(factors, constraint.split(w, state["imbalance"]), strict=True):
        factor.copy_(torch.where(stale, value, factor))


def flat_state(binding: Binding, direction: Direction, states: list[State]) -> State:
    """The state of the flat vector: what is shared, and each parameter's own moments one after the other."""
    if not binding.several:
        return states[0]
    joined: State = {key: states[0][key] for key in _shared_keys(direction) if key in states[0]}
    for moment in direction.table:
        found = [state.get(moment.key) for state in states]
        if not moment.per_unit and any(value is not None for value in found):
            own = zip(found, binding.parameters, strict=True)
            pieces = [torch.zeros_like(p, dtype=math_dtype(p)) if v is None else v for v, p in own]
            joined[moment.key] = torch.cat([piece.flatten() for piece in pieces])
    return joined


def write_back(
    new: tuple[Tensor, ...],
    joined: State,
    binding: Binding,
    direction: Direction,
    states: list[State],
    options: Options,
) -> None:
    """Write new weights to the parameters, and what the step made of a :func:`flat_state` to their states."""
    for p, value, state in zip(binding.parameters, new, states, strict=True):
        p.copy_(value)
        if "master" in state:
            state["master"].copy_(value)
    if joined is states[0]:
        return
    differentiable = options.get("differentiable", False)
    if differentiable:  # state was replaced, not written to
        for state in states:
            state.update({key: joined[key] for key in _shared_keys(direction) if key in joined})
    sizes = [p.numel() for p in binding.parameters]
    for moment in direction.table:
        if moment.per_unit or joined.get(moment.key) is None:
            continue
        pieces = joined[moment.key].split(sizes)
        for p, state, piece in zip(binding.parameters, states, pieces, strict=True):
            value = piece.reshape(p.shape)
            if state.get(moment.key) is None or differentiable:
                state[moment.key] = value if differentiable else value.clone()
            else:
                state[moment.key].copy_(value)
