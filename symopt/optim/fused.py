"""Entries of a fused kernel: addresses of weights and state, looked up once and kept while they hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch import Tensor

from symopt.budgets.state import BUDGET, BudgetState
from symopt.optim.binding import Binding
from symopt.optim.direction import Direction, Moment, Options
from symopt.optim.slot import Slot
from symopt_kernels.groups import Groups
from symopt_kernels.native import binding as native
from symopt_kernels.orbits import PlaneLayout
from symopt_kernels.reference.gauge import math_dtype
from symopt_kernels.triton import launch as triton

__all__ = ["FusedStep", "step_fused"]

_OTHER_STATE = ("step", "imbalance", "metric_scale", "critical", "master", "group_index", "factor_0", "factor_1")

_FIX = "load state that belongs to this weight"


@final
class FusedStep:
    """What a fused kernel knows of a slot: one entry per parameter, held by one of the binding where it has several."""

    __slots__ = (
        "_aimed",
        "_fresh",
        "_strength",
        "_versions",
        "_zero_grads",
        "entries",
        "entry",
        "slot",
        "stored_strength",
    )

    def __init__(self, slot: Slot, options: Options) -> None:
        self.slot = slot
        binding, states = slot.binding, slot.states
        count = binding.moment_count(states[0])
        _lay_out(slot)
        moments = slot.direction.moments(options)
        new = [_fresh_moments(slot, options, i) for i in range(len(states))]
        self._fresh = new if all(new) else []
        """Moments of the first step; some parameters that have stepped mean that all of them have."""
        if not self._fresh:
            for state, fresh in zip(states, new, strict=True):
                state.update(fresh)
        slot.note()
        used = []
        for p, state, fresh in zip(binding.parameters, states, new, strict=True):
            found = {key: state[key] for key in (*_OTHER_STATE, BUDGET) if state.get(key) is not None}
            for moment in moments:
                value = fresh.get(moment.key, state.get(moment.key))
                if value is not None:
                    found[moment.role] = value
            used.append(found)
            _check_shapes(p, found, {moment.role: moment for moment in moments}, count)
        _check_groups(slot)
        self.entry, self.entries = _filled(slot, used, fresh=bool(self._fresh))
        self._aimed = [
            (p, entry, p.dtype, p.stride()) for p, entry in zip(binding.parameters, self.entries, strict=True)
        ]
        self.stored_strength = binding.constraint is None or slot.has_budget or "critical" in states[0]
        """Whether the kernel finds the strength in the state, or needs none."""
        self._strength: float | Tensor | None = None
        self._versions = [-1] * len(self.entries)
        self._zero_grads: dict[Tensor, Tensor] = {}

    def aim(self, strength: float | Tensor) -> list[Tensor]:
        """Set what changes from step to step; what is returned must live until the step is over."""
        grads = []
        for p, entry, dtype, stride in self._aimed:
            if (grad := p.grad) is None:
                grad = self._zero_grad(p)
            elif grad.dtype != dtype or (grad.stride() != stride and p.numel() > 1) or grad.is_neg():
                grad = torch.empty_like(p).copy_(grad)
            entry.grad = grad.data_ptr()
            grads.append(grad)
        if isinstance(strength, Tensor) or strength != self._strength:
            for entry in self.entries:
                entry.strength_kept = entry.strength_pruned = strength
            self._strength = strength
        return grads

    def _zero_grad(self, p: Tensor) -> Tensor:
        """For a parameter without a gradient, which the others move all the same."""
        found = self._zero_grads.get(p)
        if found is None or found.shape != p.shape:
            found = self._zero_grads[p] = torch.zeros_like(p)
        return found

    def done(self) -> None:
        """The step has been taken."""
        if self._fresh:
            for state, fresh, entry in zip(self.slot.states, self._fresh, self.entries, strict=True):
                state.update(fresh)
                entry.fresh = 0
            self._fresh = []
            self.slot.note()
        self._versions = [aimed[0]._version for aimed in self._aimed]

    def zeros(self, p: Tensor) -> int | None:
        """Exact zeros of a parameter as the last step left them; None if it has changed since, or nobody counts."""
        constraint, parameters = self.slot.binding.constraint, self.slot.binding.parameters
        i = next(i for i, q in enumerate(parameters) if q is p)
        if constraint is not None and constraint.is_plane:
            return None  # exact zeros are not what a plane is for
        if p._version != self._versions[i] or not self.slot.lies(i):
            return None
        return int(self.entries[i].zeros)


def _lay_out(slot: Slot) -> None:
    """Give state the memory order of its weight, and the step count the device that counts it."""
    binding, states = slot.binding, slot.states
    for p, state in zip(binding.parameters, states, strict=True):
        for name, value in state.items():
            if not isinstance(value, Tensor) or value.shape != p.shape or value.stride() == p.stride():
                continue
            laid_out = torch.empty_strided(p.shape, p.stride(), dtype=value.dtype, device=p.device)
            state[name] = laid_out.copy_(value)
    if slot.backend == "triton" and "step" in states[0]:  # counted on the device, as torch's fused step does
        step = states[0]["step"].to(device=binding.parameters[0].device, dtype=torch.float32)
        for state in states:
            state["step"] = step


def _fresh_moments(slot: Slot, options: Options, i: int) -> dict[str, Tensor]:
    """Moments that the first step makes: until it has written them, the state has none."""
    p, found = slot.binding.parameters[i], dict[str, Tensor]()
    for moment in slot.direction.moments(options):
        if moment.lazy and slot.states[i].get(moment.key) is None:
            # Zeros on a device: a first step that found_inf skips leaves them there, and the host does not know.
            zeros = slot.backend == "triton" or slot.binding.several
            found[moment.key] = (torch.zeros_like if zeros else torch.empty_like)(p, dtype=math_dtype(p))
    return found


def _filled(slot: Slot, used: list[dict[str, Tensor]], *, fresh: bool) -> tuple[Any, list[Any]]:
    """The entry of a binding, and those of its parameters."""
    binding, groups = slot.binding, slot.groups
    constraint, parameters = binding.constraint, binding.parameters
    kernel: Any = native if slot.backend == "native" else triton
    plane = None if constraint is None else constraint.plane_layout(binding.template())
    if plane is not None:
        assert groups is not None  # a plane has orbits
        _check_plane(binding, groups, plane)
        entry = kernel.PlaneEntry()
        kernel.fill_plane(
            entry,
            parameters,
            used,
            sqrt_dim_per_gate=plane.sqrt_dim_per_gate,
            gate_per_orbit=plane.gate_per_orbit,
            segments=plane.segments,
            basis=plane.basis,
            centred=plane.centred,
            fresh=fresh,
        )
        return entry, entry.entries
    if (units := binding.units) is not None:
        entry = kernel.UnitsEntry()
        kernel.fill_units(entry, parameters, used, units, fresh=fresh)
        entry.entries[0].decoupled = slot.has_budget
        return entry, entry.entries
    budget = None if constraint is None else constraint.budget
    entry, pattern = kernel.Entry(), None if budget is None else budget.pattern
    row, depth = ("plain", 2) if constraint is None else (constraint.retraction, constraint.depth)
    if slot.backend == "native":
        native.fill(entry, parameters[0], used[0], row, groups, fresh=fresh)
        entry.decoupled = slot.has_budget
        entry.pattern_n, entry.pattern_m = pattern or (0, 0)
    else:
        row = "sparse" if row in ("nm", "sparse_deep") else row
        triton.fill(entry, parameters[0], used[0], row, groups, depth=depth, pattern=pattern, fresh=fresh)
    return entry, [entry]


def _check_plane(binding: Binding, groups: Groups, plane: PlaneLayout) -> None:
    """Raise unless the parameters are what was bound."""
    parameters, index = binding.parameters, groups.index
    same = not plane.identical or len({p.shape for p in parameters}) == 1
    complete = index is None or index.numel() == sum(p.numel() for p in parameters)
    if len({(p.dtype, p.device) for p in parameters}) > 1 or not same or not complete:
        kinds = ", ".join(f"{p.dtype} {tuple(p.shape)} on {p.device}" for p in parameters)
        raise ValueError(
            f"tied weights must be of one dtype, of the shape they were tied in and on one device, not {kinds}; "
            "change all of them alike, or release them (symopt.release) and constrain them anew"
        )


def _check_groups(slot: Slot) -> None:
    """Raise unless the groups are those of the parameter."""
    groups, p = slot.groups, slot.binding.parameters[0]
    if groups is None or slot.binding.several:
        return
    if math.prod(groups.view) != p.numel():
        raise ValueError(f"the groups are those of shape {groups.view}, the weight has {tuple(p.shape)}; {_FIX}")
    if (index := groups.index) is not None:
        if index.shape != p.shape or index.dtype != torch.int64:
            raise ValueError(
                f"group_index is {index.dtype} of {tuple(index.shape)}, the weight has {tuple(p.shape)}; {_FIX}"
            )
        if not bool(((index >= 0) & (index < groups.count)).all()):
            raise ValueError(f"group_index must lie in 0 ... {groups.count - 1}; {_FIX}")


def _check_shapes(p: Tensor, used: Mapping[str, Tensor], moments: Mapping[str, Moment], count: int | None) -> None:
    """Raise unless the kernel stays inside every tensor: a checkpoint or a changed weight may bring other sizes.

    ``count`` is the number of second moments where units share them; ``moments`` are by role, as in ``used``.
    """
    for name, value in used.items():
        if name == BUDGET:
            fits = BudgetState.fits(value) and value.dtype == torch.float64
        elif name in ("step", "imbalance", "metric_scale", "critical"):
            fits = value.numel() == 1
        elif name in moments and moments[name].per_unit and count is not None:
            fits = value.shape == (count,)
        else:
            fits = value.shape == p.shape
        if not fits:
            sizes = f"{tuple(value.shape)}, which does not fit {tuple(p.shape)}"
            key = moments[name].key if name in moments else name
            raise ValueError(f"state {key!r} has shape {sizes}; {_FIX}")


def step_fused(
    kernel: str,
    steps: list[FusedStep],
    direction: Direction,
    options: Options,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """One call of a fused kernel, and one for each binding whose sums other processes have to see.

    On a GPU, what is a tensor there stays one, and nothing waits for it.
    """
    device = steps[0].slot.binding.parameters[0].device

    def number(x: Tensor | float) -> Tensor | float:
        on_device = kernel == "triton" and isinstance(x, Tensor) and x.device == device
        return x.to(torch.float32) if on_device and isinstance(x, Tensor) else float(x)

    grads: list[Tensor] = []
    calls: list[tuple[list[Any], Callable[[Tensor], None] | None]] = [([], None)]
    for step in steps:
        slot = step.slot
        strength: float | Tensor | None = slot.default if options["strength"] is None else options["strength"]
        if step.stored_strength:
            strength = 0.0
        elif strength is None or options["committed"]:
            strength = slot.strength(options)
        grads += step.aim(number(strength))
        if (combine := slot.binding.combine) is None:
            calls[0][0].append(step.entry)
        else:
            calls.append(([step.entry], combine))
    call: dict[str, Any] = {
        "lr": number(options["lr"]),
        "weight_decay": float(options.get("weight_decay", 0.0)),
        "maximize": options.get("maximize", False),
        "saturated": options["time_scale"] == "saturated",
        "imbalance_factor": options["imbalance_factor"],
        "grad_scale": None if grad_scale is None else grad_scale.float(),
        **direction.settings(options),
    }
    for entries, combine in calls:
        if not entries:
            continue
        if kernel == "native":
            native.step(entries, direction.row(options), combine=combine, **call)
        else:
            overflow = None if found_inf is None else found_inf.float()
            triton.step(entries, direction.row(options), found_inf=overflow, combine=combine, **call)
    # Autograd must see that the weights changed under it.
    torch.autograd.graph.increment_version([p for step in steps for p in step.slot.binding.parameters])
    for step in steps:
        step.done()
