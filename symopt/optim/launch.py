"""One call of a fused kernel for all tensors of a group that it steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from symopt.optim.joint_slot import JointSlot
from symopt.optim.slot import Slot
from symopt_kernels.native import binding as native
from symopt_kernels.triton import launch as triton_launch

__all__ = ["step_native", "step_triton"]


def step_native(optimizer: Any, group: dict[str, Any], slots: Sequence[Slot | JointSlot]) -> None:
    """Step tensors on the CPU."""

    def number(x: Tensor | float) -> float:
        return float(x)

    grads = _aim(optimizer, group, slots, number)
    native.step([slot.entry for slot in slots], lr=float(group["lr"]), **_shared(optimizer, group))
    _done(slots, grads)


def step_triton(optimizer: Any, group: dict[str, Any], slots: Sequence[Slot | JointSlot]) -> None:
    """Step tensors on a GPU, without waiting for it: what is a tensor there stays one."""
    device = slots[0].members[0].device

    def number(x: Tensor | float) -> Tensor | float:
        return float(x) if not isinstance(x, Tensor) or x.device != device else x.to(torch.float32)

    grads = _aim(optimizer, group, slots, number)
    found_inf = getattr(optimizer, "found_inf", None)
    triton_launch.step(
        [slot.entry for slot in slots],
        lr=number(group["lr"]),
        found_inf=None if found_inf is None else found_inf.float(),
        **_shared(optimizer, group),
    )
    _done(slots, grads)


def _aim(optimizer: Any, group: dict[str, Any], slots: Sequence[Slot | JointSlot], number: Any) -> list[Tensor]:
    """Point every slot at its gradients; the list keeps them alive until the call is over."""
    grads = []
    for slot in slots:
        constraint, state = slot.constraint, slot.state
        if constraint is None or "budget" in state or "critical" in state:  # the strengths are in the state
            grads += slot.aim(0.0)
        else:
            grads += slot.aim(number(optimizer.strength(group, constraint, state)))
    return grads


def _shared(optimizer: Any, group: dict[str, Any]) -> dict[str, Any]:
    """What all tensors of a call share, beside the learning rate."""
    scale = getattr(optimizer, "grad_scale", None)
    return {
        "weight_decay": float(group["weight_decay"]),
        "maximize": group["maximize"],
        "saturated": group["time_scale"] == "saturated",
        "imbalance_factor": group["imbalance_factor"],
        "grad_scale": None if scale is None else scale.float(),
        **optimizer._settings(group),
    }


def _done(slots: Sequence[Slot | JointSlot], grads: list[Tensor]) -> None:
    # Autograd must see that the weights changed under it.
    torch.autograd.graph.increment_version([p for slot in slots for p in slot.members])
    for slot in slots:
        slot.done()
