"""What the Triton step has: directions times retractions, formats, and what stands in the way of one request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from symopt_kernels.backend import Backend, Request
from symopt_kernels.native.binding import layout
from symopt_kernels.triton import table

__all__ = ["BACKEND", "DIRECTIONS", "DTYPES", "LARGEST_ORBIT", "PATTERNS", "ROWS", "DirectionRow", "why_not"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

PATTERNS = (2, 4, 8, 16)
"""The M of N:M."""

LARGEST_ORBIT = 64
"""Weights of an orbit, on average, that a thread goes through one after the other, at most."""


@final
@dataclass(frozen=True)
class DirectionRow:
    """What a launch must know of a direction.  Its device functions are ``directions.<name>`` and ``<name>_lead``."""

    moments: bool = False
    """Whether it has second moments and a step count."""
    buffer: bool = False
    """Whether its first moment is torch's momentum, which the first step makes from the first gradient."""
    decoupled: bool = False
    """Whether strength and weight decay bypass the second moments because they are dimensionless."""
    coupled: bool = False
    """Whether the strength passes the second moments as the gradient does."""
    lead: str | None = None
    """The device function for weights that share a second moment, if there is one."""


DIRECTIONS = {
    "sgd": DirectionRow(buffer=True, lead="sgd_lead"),
    "adam": DirectionRow(moments=True, coupled=True, lead="adam_lead"),
    "adamw": DirectionRow(moments=True, decoupled=True, lead="adam_lead"),
    "lion": DirectionRow(decoupled=True),
}

_ELEMENTWISE = ("plain", "sparse", "nm")
_OTHERS = ("sparse_deep", "sparse_free", "group", "units", "orbit", "centred", "basis")

ROWS = frozenset(
    [
        *((direction, retraction) for direction in ("sgd", "adam", "adamw") for retraction in _ELEMENTWISE + _OTHERS),
        *(("lion", retraction) for retraction in _ELEMENTWISE),
    ]
)
"""Pairs of direction and retraction."""


@final
class TritonBackend(Backend):
    """The fused step on GPUs."""

    name, rows, dtypes = "triton", ROWS, DTYPES

    @property
    def unavailable(self) -> str | None:
        return table.UNAVAILABLE

    def refuses(self, request: Request) -> str | None:
        for w in request.weights:
            if reason := _refuses_tensor(request, w):
                return reason
        groups, weights = request.groups, request.weights
        if request.retraction == "units":
            return _refuses_units(weights)
        if request.retraction == "orbit" and groups is not None and groups.index is not None:
            numel = sum(w.numel() for w in weights)
            if numel >= 2**31:
                return f"its index of equal weights ends at 2**31, the parameters have {numel}"
            if numel > LARGEST_ORBIT * groups.count:
                return f"orbits of more than {LARGEST_ORBIT} weights leave a GPU too few to step side by side"
        elif len(weights) > 1 or groups is None:
            return None
        elif groups.index is not None:
            return "it knows groups that are a view of the weight, not an index map"
        elif layout(weights[0], groups) is None:
            return f"strides {weights[0].stride()} interleave the groups in memory"
        return None


def _refuses_tensor(request: Request, w: Tensor) -> str | None:
    if w.device.type != ("cpu" if table.INTERPRETED else "cuda"):
        return f"it runs on GPUs, the tensor is on {w.device}"
    if request.retraction in ("units", "orbit", "centred", "basis") and not w.is_contiguous():
        return f"strides {w.stride()} of shape {tuple(w.shape)} are not those of a contiguous tensor"
    if (pattern := request.pattern) is not None:
        if w.stride(1) != 1:
            return (
                f"the {pattern[0]}:{pattern[1]} neighbours do not lie side by side (channels_last would place them so)"
            )
        if pattern[1] not in PATTERNS:
            return f"it knows N:M with M in {PATTERNS}, not {pattern[0]}:{pattern[1]}"
    if w.data_ptr() % w.element_size():
        return "the tensor's memory is not aligned to its element size"
    if layout(w) is None:
        return f"strides {w.stride()} of shape {tuple(w.shape)} are not those of a dense tensor"
    return None


def _refuses_units(weights: tuple[Tensor, ...]) -> str | None:
    kinds = {(w.dtype, w.device) for w in weights}
    if len(kinds) > 1:
        named = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        return f"parameters whose slices make up units must be of one format on one device, not {named}"
    return None


BACKEND = TritonBackend()

why_not = BACKEND.why_not
"""Why the Triton step cannot step a request, or None if it can."""
