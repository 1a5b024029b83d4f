"""What the native step has, and what it cannot do with some tensors."""

from __future__ import annotations

from typing import final

from torch import Tensor

from symopt_kernels.backend import Backend, Request
from symopt_kernels.groups import Groups
from symopt_kernels.native import binding

__all__ = ["NATIVE"]

_CONTIGUOUS = ("units", "orbit", "centred", "basis")
"""Retractions of several tensors at once, which are read in row-major order."""


@final
class _Native(Backend):
    name = "native"
    rows = binding.ROWS
    dtypes = binding.DTYPES

    @property
    def unavailable(self) -> str | None:
        return binding.UNAVAILABLE

    def refuses(self, request: Request) -> str | None:
        groups = request.groups if len(request.weights) == 1 else None
        for w in request.weights:
            if w.device.type != "cpu":
                return f"it runs on CPUs, the tensor is on {w.device}"
            if reason := _misplaced(request, w, groups):
                return reason
        return None


def _misplaced(request: Request, w: Tensor, groups: Groups | None) -> str | None:
    """What about the memory of a tensor it cannot read."""
    if request.retraction in _CONTIGUOUS and not w.is_contiguous():
        return f"strides {w.stride()} of shape {tuple(w.shape)} are not those of a contiguous tensor"
    if request.pattern and w.stride(1) != 1:
        n, m = request.pattern
        return f"the {n}:{m} neighbours do not lie side by side (channels_last would place them so)"
    if request.retraction == "orbit" and request.groups and request.groups.index is not None and w.numel() >= 2**31:
        return f"its index of equal weights ends at 2**31, the tensor has {w.numel()}"
    if w.data_ptr() % w.element_size():
        return "the tensor's memory is not aligned to its element size"
    if binding.layout(w) is None:
        return f"strides {w.stride()} of shape {tuple(w.shape)} are not those of a dense tensor"
    if groups is not None and binding.layout(w, groups) is None:
        return f"strides {w.stride()} interleave the groups in memory"
    return None


NATIVE = _Native()
"""The backend."""
