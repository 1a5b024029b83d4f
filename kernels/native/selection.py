"""Order statistics of sizes, by which budgets select: histograms of their upper bits, and exact ranks within a bin."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref, c_float, c_void_p

import torch
from torch import Tensor

from symopt_kernels.native.library import HISTOGRAM_SHIFT, LIBRARY

__all__ = ["histogram", "rank", "shares"]

_NO_MEMORY = "symopt: no memory for a selection"


def histogram(x: Tensor) -> Tensor:
    """How many elements of a dense fp32 tensor have a size with these upper bits; as many counts as there are bits."""
    counts = torch.zeros(1 << (31 - HISTOGRAM_SHIFT), dtype=torch.int64)
    LIBRARY.symopt_histogram(x.data_ptr(), x.numel(), counts.data_ptr())
    return counts


def rank(x: Tensor, k: int, counts: Tensor) -> float:
    """The ``k``-th smallest size, counted from 1, in a dense fp32 tensor, given its :func:`histogram`; NaN is last."""
    found = c_float()
    if LIBRARY.symopt_rank(x.data_ptr(), x.numel(), counts.data_ptr(), k, byref(found)):
        raise MemoryError(_NO_MEMORY)
    return found.value


def shares(counts: Sequence[Tensor], budget: int, far: float, rounding: float) -> Tensor:
    """How many weights live in each of several tensors, from their histograms (``symopt.budgets.selection``)."""
    live = torch.empty(len(counts), dtype=torch.int64)
    table = (c_void_p * len(counts))(*(count.data_ptr() for count in counts))
    if LIBRARY.symopt_shares(table, len(counts), budget, far, rounding, live.data_ptr()):
        raise MemoryError(_NO_MEMORY)
    return live
