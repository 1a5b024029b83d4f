"""The parameters of a plane as a fused kernel sees them: :class:`symopt.optim.slot.Slot` for equal weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from symopt.optim import joint
from symopt.optim.slot import check_shapes, gradient
from symopt_kernels.groups import Groups
from symopt_kernels.native import binding as native
from symopt_kernels.reference.gauge import math_dtype
from symopt_kernels.triton import launch as triton_launch

__all__ = ["JointSlot"]

_OWN = ("exp_avg", "momentum_buffer", "master")


class JointSlot:
    """One entry of a fused call.  ``states`` are the members', complete and of the kernel's precision."""

    __slots__ = ("_fresh", "_none", "_places", "_tensors", "backend", "constraint", "entry", "key", "members", "states")

    def __init__(
        self,
        members: tuple[Tensor, ...],
        constraint: Any,
        states: list[dict[str, Any]],
        groups: Groups | None,
        key: tuple[Any, ...],
        backend: str,
    ) -> None:
        self.members, self.constraint, self.states, self.key, self.backend = members, constraint, states, key, backend
        assert groups is not None  # a plane has orbits
        shapes, index = tuple(tuple(p.shape) for p in members), groups.index
        same = not constraint.parameters_identical or len(set(shapes)) == 1
        whole = index is None or index.numel() == sum(p.numel() for p in members)
        if len({(p.dtype, p.device) for p in members}) > 1 or not same or not whole:  # changed since they were bound
            kinds = ", ".join(f"{p.dtype} {tuple(p.shape)} on {p.device}" for p in members)
            raise ValueError(
                f"tied weights must be of one dtype, of the shape they were tied in and on one device, not {kinds}; "
                "change all of them alike, or release them (symopt.release) and constrain them anew"
            )
        if backend == "triton" and "step" in states[0]:  # counted on the device, as torch's fused step does
            step = states[0]["step"].to(device=members[0].device, dtype=torch.float32)
            for state in states:
                state["step"] = step
        moments = key[-1]
        # torch's first momentum is the first gradient itself: until the step has written it, the states have none.
        self._fresh: list[Tensor] = []
        if "momentum_buffer" in moments:
            self._fresh = [torch.zeros_like(p, dtype=math_dtype(p)) for p in members]
            if any(state.get("momentum_buffer") is not None for state in states):
                for state, zeros in zip(states, self._fresh, strict=True):
                    if state.get("momentum_buffer") is None:
                        state["momentum_buffer"] = zeros
                self._fresh = []
        used: list[dict[str, Tensor]] = []
        for i, (p, state) in enumerate(zip(members, states, strict=True)):
            for name in _OWN:
                if state.get(name) is not None:
                    state[name] = state[name].contiguous()
            names = (*moments, "step", "imbalance", "metric_scale", "critical", "master")
            used.append({name: state[name] for name in names if state.get(name) is not None})
            if self._fresh:
                used[i]["momentum_buffer"] = self._fresh[i]
            check_shapes(p, used[i], groups.count)
        self._tensors = [tuple(part.items()) for part in used]
        self._places = [(p.data_ptr(), p.shape, p.stride()) for p in members]
        self._none: dict[int, Tensor] = {}
        kernel: Any = native if backend == "native" else triton_launch
        self.entry = kernel.PlaneEntry()
        template = joint.template(members)
        spread = constraint.sqrt_dim_per_gate(template)
        spread = float(spread.max()) if isinstance(spread, Tensor) else spread
        options: dict[str, Any] = {"gate_per_orbit": constraint.gate_per_orbit, "fresh": bool(self._fresh)}
        options |= {"segments": constraint.segments(template), "basis": constraint.rows(template)}
        options["centred"] = groups if constraint.centred else None
        kernel.fill_plane(self.entry, members, used, sqrt_dim_per_gate=spread, **options)

    @property
    def state(self) -> dict[str, Any]:
        """That of the first member, which holds what all share."""
        return self.states[0]

    def holds(self, states: list[dict[str, Any]], key: tuple[Any, ...]) -> bool:
        """Whether everything still lies where it lay."""
        if key != self.key or self._fresh or any(a is not b for a, b in zip(states, self.states, strict=True)):
            return False
        if any((p.data_ptr(), p.shape, p.stride()) != q for p, q in zip(self.members, self._places, strict=True)):
            return False
        pairs = zip(states, self._tensors, strict=True)
        return all(state.get(name) is tensor for state, tensors in pairs for name, tensor in tensors)

    def aim(self, strength: float | Tensor) -> list[Tensor]:
        """Set what changes from step to step; what is returned must live until the step is over."""
        grads = []
        for i, (p, entry) in enumerate(zip(self.members, self.entry.entries, strict=True)):
            if p.grad is None:  # the others move it all the same
                grad = self._none[i] = self._none.get(i, torch.zeros(()))
                if grad.shape != p.shape:
                    grad = self._none[i] = torch.zeros_like(p)
            else:
                grad = gradient(p)
            entry.grad, entry.strength_kept, entry.strength_pruned = grad.data_ptr(), strength, strength
            grads.append(grad)
        return grads

    def done(self) -> None:
        """The step has been taken."""
        for i, buffer in enumerate(self._fresh):
            self.states[i]["momentum_buffer"] = buffer
            self._tensors[i] = (*self._tensors[i], ("momentum_buffer", buffer))
            self.entry.entries[i].fresh = 0
        self._fresh = []

    def zeros(self) -> None:
        """Exact zeros are not counted: they are not what a tie is for."""
