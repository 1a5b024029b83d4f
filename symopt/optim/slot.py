"""A tensor as a fused kernel sees it: addresses of weight and state, looked up once and kept while they hold."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from symopt.constraints import Constraint
from symopt.optim.options import TRIM
from symopt_kernels.groups import Groups
from symopt_kernels.native import binding as native
from symopt_kernels.reference.gauge import math_dtype
from symopt_kernels.triton import launch as triton_launch

__all__ = ["Slot", "check_shapes", "gradient"]

_OTHER_STATE = ("step", "imbalance", "metric_scale", "master", "group_index", "factor_0", "factor_1", "budget")

_FIX = "load state that belongs to this weight"


class Slot:
    """One entry of a fused call.  ``state`` is the parameter's, complete and of the kernel's precision."""

    __slots__ = (
        *("_first", "_place", "_strength", "_tensors", "_version"),
        *("backend", "constraint", "entry", "key", "p", "state"),
    )

    def __init__(
        self,
        p: Tensor,
        constraint: Constraint | None,
        state: dict[str, Any],
        groups: Groups | None,
        key: tuple[Any, ...],
        backend: str,
    ) -> None:
        self.p, self.constraint, self.state, self.key, self.backend = p, constraint, state, key, backend
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == p.shape and value.stride() != p.stride():
                state[name] = torch.empty_strided(p.shape, p.stride(), dtype=value.dtype, device=p.device).copy_(value)
        if backend == "triton" and "step" in state:  # counted on the device, as torch's fused step does
            state["step"] = state["step"].to(device=p.device, dtype=torch.float32)
        moments = key[-1]
        # torch's first momentum is the first gradient itself: until the step has written it, the state has none.
        self._first: Tensor | None = None
        if "momentum_buffer" in moments and state.get("momentum_buffer") is None:
            # Zeros on a device: a first step that found_inf skips leaves them there, and the host does not know.
            make = torch.zeros_like if backend == "triton" else torch.empty_like
            self._first = make(p, dtype=math_dtype(p))
        used = {name: state[name] for name in (*moments, *_OTHER_STATE) if state.get(name) is not None}
        self._tensors = tuple(used.items())
        if self._first is not None:
            used["momentum_buffer"] = self._first
        _check_groups(p, groups)
        check_shapes(p, used, None if groups is None else groups.count)
        retraction = "plain" if constraint is None else constraint.name
        budget = None if constraint is None else constraint.budget
        self.entry: Any
        if backend == "native":
            self.entry = native.Entry()
            native.fill(self.entry, p, used, retraction, groups, fresh=self._first is not None)
            if budget is not None:
                self.entry.decoupled = 1
                self.entry.pattern_n, self.entry.pattern_m = budget.pattern or (0, 0)
        else:
            self.entry = triton_launch.Entry()
            depth, pattern = 2 if constraint is None else constraint.depth, None if budget is None else budget.pattern
            triton_launch.fill(
                self.entry, p, used, retraction, groups, depth=depth, pattern=pattern, fresh=self._first is not None
            )
        self._place = (p.data_ptr(), p.shape, p.stride())
        self._strength: float | Tensor | None = None
        self._version = -1

    def holds(self, state: dict[str, Any], key: tuple[Any, ...]) -> bool:
        """Whether everything still lies where it lay."""
        p = self.p
        if key != self.key or state is not self.state or self._first is not None:
            return False
        if (p.data_ptr(), p.shape, p.stride()) != self._place:
            return False
        for name, tensor in self._tensors:  # noqa: SIM110 (a generator costs three times as much)
            if state.get(name) is not tensor:
                return False
        return True

    @property
    def members(self) -> tuple[Tensor, ...]:
        """What it steps."""
        return (self.p,)

    def aim(self, strength: float | Tensor) -> list[Tensor]:
        """Set what changes from step to step; what is returned must live until the step is over."""
        grad = gradient(self.p)
        self.entry.grad = grad.data_ptr()
        if isinstance(strength, Tensor) or strength != self._strength:
            self.entry.strength_kept = self.entry.strength_pruned = self._strength = strength
        return [grad]

    def done(self) -> None:
        """The step has been taken."""
        if self._first is not None:
            self.state["momentum_buffer"] = self._first
            self._tensors = (*self._tensors, ("momentum_buffer", self._first))
            self._first, self.entry.fresh = None, 0
        self._version = self.p._version

    def zeros(self) -> int | None:
        """Exact zeros as the last step left them; None if the weight has changed since."""
        same = self.p._version == self._version and self.p.data_ptr() == self._place[0]
        return int(self.entry.zeros) if same else None


def _check_groups(p: Tensor, groups: Groups | None) -> None:
    """Raise unless the groups are those of ``p``."""
    if groups is not None and math.prod(groups.view) != p.numel():
        raise ValueError(f"the groups are those of shape {groups.view}, the weight has {tuple(p.shape)}; {_FIX}")
    if groups is not None and groups.index is not None:
        index = groups.index
        if index.shape != p.shape or index.dtype != torch.int64:
            raise ValueError(
                f"group_index is {index.dtype} of {tuple(index.shape)}, the weight has {tuple(p.shape)}; {_FIX}"
            )
        if not bool(((index >= 0) & (index < groups.count)).all()):
            raise ValueError(f"group_index must lie in 0 ... {groups.count - 1}; {_FIX}")


def check_shapes(p: Tensor, used: dict[str, Tensor], shared: int | None) -> None:
    """Raise unless the kernel stays inside every tensor: a checkpoint or a changed weight may bring other sizes.

    ``shared`` is the number of second moments where a group or an orbit has one, or None where every weight has.
    """
    for name, value in used.items():
        if name == "budget":
            fits = value.shape == (len(TRIM),) and value.dtype == torch.float64
        elif name in ("step", "imbalance", "metric_scale", "critical"):
            fits = value.numel() == 1
        elif name in ("exp_avg_sq", "max_exp_avg_sq") and shared is not None:
            fits = value.shape == (shared,)
        else:
            fits = value.shape == p.shape
        if not fits:
            sizes = f"{tuple(value.shape)}, which does not fit {tuple(p.shape)}"
            raise ValueError(f"state {name!r} has shape {sizes}; {_FIX}")


def gradient(p: Tensor) -> Tensor:
    """The gradient of ``p`` in its dtype and memory order; a copy only where it is not so already."""
    grad = p.grad
    assert grad is not None
    if grad.dtype == p.dtype and (grad.stride() == p.stride() or p.numel() == 1) and not grad.is_neg():
        return grad
    return torch.empty_like(p).copy_(grad)
