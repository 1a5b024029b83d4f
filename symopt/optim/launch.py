"""One call of a fused kernel for all tensors of a group that it steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from symopt.optim.slot import Slot, gradient
from symopt_kernels import native, triton_launch

__all__ = ["step_native", "step_triton"]


def step_native(optimizer: Any, group: dict[str, Any], slots: Sequence[Slot]) -> None:
    """Step tensors on the CPU."""

    def number(x: Tensor | float) -> float:
        return float(x)

    grads = _aim(optimizer, group, slots, number)
    native.step([slot.entry for slot in slots], lr=float(group["lr"]), **_shared(optimizer, group))
    _done(slots, grads)


def step_triton(optimizer: Any, group: dict[str, Any], slots: Sequence[Slot]) -> None:
    """Step tensors on a GPU, without waiting for it: what is a tensor there stays one."""
    device = slots[0].p.device

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


def _aim(optimizer: Any, group: dict[str, Any], slots: Sequence[Slot], number: Any) -> list[Tensor]:
    """Point every slot at its gradient; the list keeps them alive until the call is over."""
    grads = [gradient(slot.p) for slot in slots]
    for slot, grad in zip(slots, grads, strict=True):
        constraint = slot.constraint
        if constraint is None or "trim" in slot.state:  # a budget's strengths are in its state
            slot.aim(grad, 0.0)
        else:
            slot.aim(grad, number(optimizer.strength(group, constraint, slot.state)))
    return grads


def _shared(optimizer: Any, group: dict[str, Any]) -> dict[str, Any]:
    """What all tensors of a call share, beside the learning rate."""
    scale = getattr(optimizer, "grad_scale", None)
    return {
        "weight_decay": float(group["weight_decay"]),
        "maximize": group["maximize"],
        "saturated": group["time_scale"] == "saturated",
        "imbalance_decay": group["imbalance_decay"],
        "grad_scale": None if scale is None else scale.float(),
        **optimizer._settings(group),
    }


def _done(slots: Sequence[Slot], grads: list[Tensor]) -> None:
    # Autograd must see that the weights changed under it.
    torch.autograd.graph.increment_version([slot.p for slot in slots])
    for slot in slots:
        slot.done()
