"""OrbitPlane: planes on which weights of one orbit are equal."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from symopt.constraints.plane import Plane
from symopt_kernels.groups import Groups, Segment, segments

__all__ = ["OrbitPlane", "labelled"]


def labelled(labels: Tensor) -> Groups:
    """Orbits from any labels, of the shape of the weight."""
    index = torch.unique(labels, return_inverse=True)[1]
    return Groups(int(index.max()) + 1, tuple(labels.shape), (), index)


class OrbitPlane(Plane):
    """Abstract: weights of one orbit are equal; P replaces each by its orbit's mean, exactly where they are."""

    @abstractmethod
    def orbits(self, shape: tuple[int, ...]) -> Groups:
        """The partition of a weight of this shape into orbits, on the CPU if it has an index."""

    def _known(self, w: Tensor) -> tuple[Groups, Tensor]:
        key = (tuple(w.shape), w.device, w.dtype)
        found = vars(self)["_cache"].get(key)
        if found is None:
            groups = self.orbits(tuple(w.shape))
            if groups.index is not None:
                groups = Groups(groups.count, groups.view, groups.dims, groups.index.to(w.device))
            found = vars(self)["_cache"][key] = groups, groups.size(w)
        return found  # type: ignore[no-any-return]

    def partition(self, w: Tensor, index: Tensor | None = None) -> Groups:
        return self._known(w)[0]

    def segments(self, groups: Groups, shapes: tuple[tuple[int, ...], ...]) -> list[Segment] | None:
        """The orbits of weights of these shapes, ``groups`` of their flat vector; None if those are their indices."""
        if groups.index is None:
            return None
        cache: dict[Any, Any] = vars(self)["_cache"]
        if shapes not in cache:
            cache[shapes] = segments(groups, shapes)
        return cache[shapes]  # type: ignore[no-any-return]

    def no_kernel(self, backend: str) -> str | None:
        return None

    def onto(self, x: Tensor) -> Tensor:
        groups, sizes = self._known(x)
        first = groups.first(x)
        mean = first + groups.sum(x - groups.expand(first).reshape(x.shape)) / sizes
        return groups.expand(mean).reshape(x.shape).contiguous()

    def off(self, x: Tensor) -> Tensor:
        return x - self.onto(x)

    def rounding(self, w: Tensor) -> float:
        return 0.0

    def codimension(self, w: Tensor) -> float:
        return float(w.numel() - self.partition(w).count)
