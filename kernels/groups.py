"""A partition of a tensor's elements into groups, and what one does with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Groups"]


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
