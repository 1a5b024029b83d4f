"""Exact selections of the largest units: among weights by their thresholds, among groups by a sort."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from symopt_kernels.native import binding as native
from symopt_kernels.native import selection as native_selection
from symopt_kernels.native.library import HISTOGRAM_SHIFT
from symopt_kernels.triton import launch as triton_launch

__all__ = ["Threshold", "largest_groups", "largest_weights"]

Threshold = float | Tensor
"""A number, or one on the device of what it belongs to."""

_FAR, _ROUNDING = 1e6, 1e-5


def largest_weights(tensors: list[Tensor], keep: int) -> list[Threshold]:
    """Per tensor the absolute value up to which its weights are not among the ``keep`` that live; -1: all are.

    Those of one tensor are compared by size, those of several by :func:`_shares`.  Of equal values at the threshold
    fewer than ``keep`` may be left.  On a CUDA device thresholds stay there, and the host does not wait for them.
    """
    sizes = [w.numel() for w in tensors]
    if keep >= sum(sizes):
        return [-1.0] * len(tensors)
    if len(tensors) == 1:
        return [_kth(tensors[0], sizes[0] - keep)]
    counts = [_histogram(w) for w in tensors]
    live = _shares(counts, keep)
    if live.is_cpu:
        gone = [size - n for size, n in zip(sizes, live.tolist(), strict=True)]
        return [_kth(w, k, c) if k > 0 else -1.0 for w, k, c in zip(tensors, gone, counts, strict=True)]
    rest = [size - n for size, n in zip(sizes, live.unbind(), strict=True)]
    return [torch.where(k > 0, _kth(w, k.clamp(min=1), c), -1.0) for w, k, c in zip(tensors, rest, counts, strict=True)]


def _shares(counts: list[Tensor], keep: int) -> Tensor:
    """How many weights of each tensor live: the ``keep`` with the largest ``w**2 / sum of w'**2 over |w'| >= |w|``.

    This is the layer-adaptive score of Lee et al. (ICLR 2021, arXiv 2010.07611): what cutting a weight would change of
    its layer, relative to what would be left of it.  The scale of a tensor, which means nothing behind a normalisation,
    drops out, and no tensor dies, as the score of its largest weight is 1.  No weights are sorted: all of a histogram's
    bin count as its middle, so the j-th of them scores ``1 / (above / middle**2 + j)``.
    """
    if native.UNAVAILABLE is None and all(c.is_cpu for c in counts):
        return native_selection.shares(counts, keep, _FAR, _ROUNDING)
    return _sorted_shares(counts, keep)


def _sorted_shares(counts: list[Tensor], keep: int) -> Tensor:
    """:func:`_shares` in torch, by sorting the ends of what every bin may give."""
    table = torch.stack(counts)
    size = torch.arange(table.shape[1], device=table.device)
    if table.is_cpu:  # few bins are in use; a device would have to tell the host how many
        size = table.any(0).nonzero().flatten()
        table = table[:, size]
    middle = ((size << HISTOGRAM_SHIFT) + (1 << (HISTOGRAM_SHIFT - 1))).int().view(torch.float32).double()
    square = middle.nan_to_num(math.inf).clamp(max=torch.finfo(torch.float32).max).square()
    mass = table * square
    first = ((mass.flip(1).cumsum(1).flip(1) - mass) / square).flatten()
    many = table.flatten()
    owner = torch.arange(len(counts), device=table.device).repeat_interleave(len(size), output_size=len(many))
    if table.is_cpu:
        used = many.nonzero().flatten()
        first, many, owner = first[used], many[used], owner[used]
    # As a function of x = 1 / score, x - first of a bin live: piecewise linear in sum, solved for keep.  Far out, where
    # a double does not tell x from x + 1, weights are only ranked.
    near = torch.where(first < _FAR, many, 0)
    x, order = torch.cat([first.clamp(max=_FAR), first.clamp(max=_FAR) + near]).sort()
    slope = torch.ones_like(x).copysign(len(first) - 0.5 - order).cumsum(0)
    reached = (x.diff() * slope[:-1]).cumsum(0)
    i = torch.searchsorted(reached, keep).clamp(max=len(reached) - 1)
    limit = x[1:].take(i) - (reached.take(i) - keep) / slope.take(i)
    live = (limit - first - _ROUNDING).floor().clamp(min=0).maximum(first == 0).minimum(near).long()
    # What rounding down has left goes to the best of the rest.
    order = first.argsort(stable=True)
    spare = (many - live)[order]
    more = (keep - live.sum() - (spare.cumsum(0) - spare)).clamp(min=0).minimum(spare)
    live = live.scatter_add(0, order, more)
    return owner.new_zeros(len(counts)).index_add(0, owner, live)


def largest_groups(sizes: list[Tensor], costs: list[int], keep: float) -> list[Tensor]:
    """Per tensor which of its groups live: the largest, then those of all with the most layer-adaptive score per cost.

    That is :func:`_shares`' score, of groups; in its order, while their cost fits into ``keep``.
    """
    scores = []
    for s, cost in zip(sizes, costs, strict=True):
        square, order = s.double().square().sort(descending=True, stable=True)
        score = torch.where(square > 0, square / square.cumsum(0), 0.0) / cost
        score[:1].fill_(math.inf)
        scores.append(torch.empty_like(score).scatter_(0, order, score))
    order = torch.cat(scores).sort(descending=True, stable=True).indices
    cost_of = torch.cat([torch.full_like(s, cost, dtype=torch.int64) for s, cost in zip(sizes, costs, strict=True)])
    chosen = torch.zeros_like(cost_of, dtype=torch.bool)
    chosen.scatter_(0, order, cost_of[order].cumsum(0) <= keep)
    return list(chosen.split([s.numel() for s in sizes]))


def _histogram(w: Tensor) -> Tensor:
    """How many weights have a size with these upper bits, which order floats as the sizes do."""
    if _native(w):
        return native_selection.histogram(w)
    bits = (w.flatten().float().view(torch.int32) & 0x7FFFFFFF).long() >> HISTOGRAM_SHIFT
    counts = bits.new_zeros(1 << (31 - HISTOGRAM_SHIFT))
    return counts.scatter_add_(0, bits, bits.new_ones(()).expand_as(bits))


def _kth(w: Tensor, k: int | Tensor, counts: Tensor | None = None) -> Threshold:
    """The ``k``-th smallest absolute value, exactly; by a kernel where it can be, since a step waits for it."""
    if _native(w):
        return native_selection.rank(w, int(k), native_selection.histogram(w) if counts is None else counts)
    fast = w.dtype == torch.float32 and w.device.type == "cuda" and native.layout(w) is not None
    if fast and triton_launch.UNAVAILABLE is None:
        from symopt_kernels.triton import selection as triton_select

        return triton_select.rank([w], k)
    return w.flatten().abs().kthvalue(int(k)).values


def _native(w: Tensor) -> bool:
    dense = w.dtype == torch.float32 and w.device.type == "cpu" and native.layout(w) is not None
    return dense and native.UNAVAILABLE is None
