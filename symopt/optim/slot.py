"""A tensor as the native kernel sees it: addresses of weight and state, looked up once and kept while they hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from symopt.constraints import Constraint
from symopt_kernels import native
from symopt_kernels.groups import Groups
from symopt_kernels.reference import math_dtype

__all__ = ["Slot", "gradient"]

_OTHER_STATE = ("step", "imbalance", "metric_scale", "master", "group_index", "factor_0", "factor_1")


class Slot:
    """One entry of a native call.  ``state`` is the parameter's, complete and of the kernel's precision."""

    __slots__ = ("_strength", "_tensors", "_version", "_weight", "constraint", "entry", "key", "p", "state")

    def __init__(
        self,
        p: Tensor,
        constraint: Constraint | None,
        state: dict[str, Any],
        groups: Groups | None,
        key: tuple[Any, ...],
    ) -> None:
        self.p, self.constraint, self.state, self.key = p, constraint, state, key
        moments = key[-1]
        fresh = "momentum_buffer" in moments and state.get("momentum_buffer") is None
        if fresh:
            state["momentum_buffer"] = torch.empty_like(p, dtype=math_dtype(p))
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == p.shape and value.stride() != p.stride():
                state[name] = torch.empty_strided(p.shape, p.stride(), dtype=value.dtype).copy_(value)
        used = {name: state[name] for name in (*moments, *_OTHER_STATE) if name in state}
        self.entry = native.Entry()
        retraction = "plain" if constraint is None else constraint.name
        native.fill(self.entry, p, used, retraction, groups, fresh=fresh)
        self._weight, self._tensors = self.entry.weight, tuple(used.items())
        self._strength: float | None = None
        self._version = -1

    def holds(self, state: dict[str, Any], key: tuple[Any, ...]) -> bool:
        """Whether everything still lies where it lay."""
        if key != self.key or state is not self.state or self.p.data_ptr() != self._weight:
            return False
        for name, tensor in self._tensors:  # noqa: SIM110 (a generator costs three times as much)
            if state.get(name) is not tensor:
                return False
        return True

    def aim(self, grad: Tensor, strength: float) -> None:
        """Set what changes from step to step."""
        self.entry.grad = grad.data_ptr()
        if strength != self._strength:
            self.entry.inside = self.entry.outside = self._strength = strength

    def done(self) -> None:
        """The step has been taken."""
        self.entry.fresh = 0
        self._version = self.p._version

    def zeros(self) -> int | None:
        """Exact zeros as the last step left them; None if somebody has changed the weight since."""
        return int(self.entry.zeros) if self.p._version == self._version else None


def gradient(p: Tensor) -> Tensor:
    """The gradient of ``p`` in its dtype and memory order; a copy only where it is not so already."""
    grad = p.grad
    assert grad is not None
    if grad.dtype == p.dtype and (grad.stride() == p.stride() or p.numel() == 1):
        return grad
    return torch.empty_like(p).copy_(grad)
