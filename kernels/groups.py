"""A partition of a tensor's elements into groups, and what one does with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Groups", "Segment", "segments"]

_TILES = (128, 16, 8)
"""Sides of the squares, one in the other, in which groups follow one another: a number of pages that the processor
remembers, whole cache lines, and as many lines as fit where rows of 4 kB put them into one set.  ns per weight and step
of Symmetric on the plane, 1024 x 1024: 16 alone 15, 8 in 16 14, these 11; larger or smaller outer ones 13."""


@dataclass(frozen=True, eq=False)
class Groups:
    """A partition of a tensor's elements.

    Regular partitions are a view plus the dimensions of it that lie inside a group; irregular ones an int64 ``index``
    with the tensor's shape that names each element's group.  Group values are flat vectors of length ``count``.
    """

    count: int
    view: tuple[int, ...]
    dims: tuple[int, ...]
    index: Tensor | None = None

    def sum(self, x: Tensor) -> Tensor:
        """Sum over each group: shape of the weight -> ``(count,)``."""
        if self.index is not None:
            return x.new_zeros(self.count).index_add_(0, self.index.flatten(), x.flatten())
        return x.reshape(self.view).sum(self.dims).flatten() if self.dims else x.flatten()

    def expand(self, v: Tensor) -> Tensor:
        """Give every element its group's value: ``(count,)`` -> ``view``, or the index's shape if there is one."""
        if self.index is not None:
            return v[self.index]
        return v.reshape([1 if d in self.dims else n for d, n in enumerate(self.view)]).expand(self.view)

    def first(self, x: Tensor) -> Tensor:
        """One member of each group: shape of the weight -> ``(count,)``."""
        if self.index is not None:
            return x.new_zeros(self.count).scatter_(0, self.index.flatten(), x.flatten())
        x = x.reshape(self.view)
        for d in sorted(self.dims, reverse=True):
            x = x.select(d, 0)
        return x.flatten()

    def size(self, like: Tensor) -> Tensor:
        """Number of elements in each group, ``(count,)``."""
        if self.index is not None:
            ones = like.new_ones(self.index.shape, dtype=torch.float64)
            return self.sum(ones).to(like.dtype)  # bincount would wait for the device
        return like.new_full((self.count,), like.numel() / self.count)

    def scale(self, v: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Multiply every element of ``x`` by its group's value; keeps the shape of ``x``."""
        if out is not None:
            torch.mul(self.expand(v), x.reshape(self.view), out=out.view(self.view))
            return out
        return (self.expand(v) * x.reshape(self.view)).reshape(x.shape)


@dataclass(frozen=True, eq=False)
class Segment:
    """Groups of equally many elements: copy j of the i-th is element ``places[j, i]`` of tensor ``of[j]``."""

    of: Tensor
    places: Tensor
    ids: Tensor
    """Which groups they are."""


def segments(groups: Groups, shapes: Sequence[tuple[int, ...]]) -> list[Segment]:
    """The groups of several tensors, whose elements ``groups.index`` counts one after the other, as int32 on the CPU.

    Groups whose first elements lie in one square tile of their matrix follow one another, so that whichever way the
    others are turned, what is gathered for a few hundred of them has been fetched for few cache lines.
    """
    assert groups.index is not None
    label, order = groups.index.flatten().cpu().sort(stable=True)
    numels = torch.tensor([math.prod(shape) for shape in shapes])
    ends = numels.cumsum(0)
    tensor = torch.bucketize(order, ends, right=True)
    kind = torch.zeros(groups.count, dtype=torch.int64)
    for t in range(len(shapes)):  # which groups have as many elements as each other of every tensor
        own = torch.bincount(label[tensor == t], minlength=groups.count)
        kind = torch.unique(kind * (int(own.max()) + 1) + own, return_inverse=True)[1]
    counts = torch.bincount(label, minlength=groups.count)
    begin = counts.cumsum(0) - counts
    starts = ends - numels
    columns = torch.tensor([shape[-1] if len(shape) > 1 else 1 for shape in shapes])[tensor[begin]]
    first = order[begin] - starts[tensor[begin]]
    row, column = first // columns, first % columns
    tile, per_side = torch.zeros_like(first), int(max(row.max(), column.max())) + 1
    for size in _TILES:
        per_side = -(-per_side // size)
        tile = (tile * per_side + row // size) * per_side + column // size
        row, column, per_side = row % size, column % size, size
    found = []
    for k in range(int(kind.max()) + 1):
        ids = (kind == k).nonzero().flatten()
        ids = ids[tile[ids].sort(stable=True).indices]
        which = begin[ids] + torch.arange(int(counts[ids[0]]))[:, None]
        of = tensor[which[:, 0]]
        places = order[which] - starts[of][:, None]
        found.append(Segment(of.int(), places.int().contiguous(), ids.int()))
    return found
