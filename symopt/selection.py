"""Exact selections of the largest units: among weights by their thresholds, among groups by a sort."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from symopt_kernels import native, triton_launch

__all__ = ["largest_groups", "largest_weights"]


def largest_weights(tensors: list[Tensor], keep: int, floors: list[int]) -> list[float]:
    """Per tensor the absolute value up to which its weights are not among the ``keep`` largest of all; -1: all are.

    Of every tensor at least its floor is kept.  Of equal values at the threshold fewer than ``keep`` may be left.
    """
    sizes = [w.numel() for w in tensors]
    if keep >= sum(sizes):
        return [-1.0] * len(tensors)
    if len(tensors) == 1:
        return [_kth(tensors, sizes[0] - keep)]
    found: list[float | None] = [None] * len(tensors)
    # Tensors below their floor get it; what is left is shared anew by the others.
    while True:
        shared = [i for i, t in enumerate(found) if t is None]
        left = keep - sum(floors[i] for i, t in enumerate(found) if t is not None)
        many = sum(sizes[i] for i in shared)
        t = _kth([tensors[i] for i in shared], many - left) if left < many else -1.0
        poor = [i for i in shared if int((tensors[i].abs() > t).sum()) < floors[i]]
        if not poor or len(poor) == len(shared):
            return [t if f is None else f for f in found]
        for i in poor:
            found[i] = _kth([tensors[i]], sizes[i] - floors[i]) if floors[i] < sizes[i] else -1.0


def largest_groups(sizes: list[Tensor], costs: list[int], keep: float, floors: list[int]) -> list[Tensor]:
    """Per tensor which of its groups are kept: its floor, then the largest of all in order, while their cost fits."""
    inside = [torch.zeros_like(s, dtype=torch.bool) for s in sizes]
    for mine, s, n in zip(inside, sizes, floors, strict=True):
        mine[s.sort(descending=True, stable=True).indices[:n]] = True
    left = keep - sum(n * cost for n, cost in zip(floors, costs, strict=True))
    # What is inside already is put first and costs nothing.
    order = torch.cat([s.masked_fill(i, math.inf) for s, i in zip(sizes, inside, strict=True)])
    order = order.sort(descending=True, stable=True).indices
    each = torch.cat([torch.where(i, 0, cost) for i, cost in zip(inside, costs, strict=True)])
    chosen = torch.zeros_like(each, dtype=torch.bool)
    chosen[order] = each[order].cumsum(0) <= left
    return list(chosen.split([s.numel() for s in sizes]))


def _kth(tensors: list[Tensor], k: int) -> float:
    """The ``k``-th smallest absolute value, exactly; natively where it can be, since a step waits for it."""
    place, *others = {w.device for w in tensors}
    if not others and all(w.dtype == torch.float32 and native.layout(w) is not None for w in tensors):
        if place.type == "cpu" and native.UNAVAILABLE is None:
            return native.rank(tensors, k)
        if place.type == "cuda" and triton_launch.UNAVAILABLE is None:
            from symopt_kernels import triton_select

            return float(triton_select.rank(tensors, k))
    return float(torch.cat([w.flatten() for w in tensors]).abs().kthvalue(k).values)
