"""OrbitPlane: planes on which weights of one orbit are equal."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from symopt.constraints.planes.derived import derived
from symopt.constraints.planes.plane import Plane
from symopt_kernels.groups import Groups
from symopt_kernels.orbits import Segment, ordered, ranked

__all__ = ["OrbitPlane", "labelled"]


def labelled(labels: Tensor) -> Groups:
    """Orbits from labels, integers from 0 on that are about as many as weights, of the shape of the weight."""
    index = ranked(labels.flatten()).reshape(labels.shape)
    return Groups(int(index.max()) + 1, tuple(labels.shape), (), index)


class OrbitPlane(Plane):
    """Abstract: weights of one orbit are equal; P replaces each by its orbit's mean, exactly where they are."""

    retraction = "orbit"

    @abstractmethod
    def orbits(self, shape: tuple[int, ...]) -> Groups:
        """The partition of a weight of this shape into orbits, on the CPU if it has an index."""

    def members(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Shapes of the parameters that are seen as one weight of this shape."""
        return (shape,)

    def _ordered(self, shape: tuple[int, ...]) -> tuple[Groups, list[Segment] | None]:
        def make() -> tuple[Groups, list[Segment] | None]:
            groups = self.orbits(shape)
            return (groups, None) if groups.index is None else ordered(groups, self.members(shape))

        return derived(self, ("ordered", shape), make)

    def _known(self, w: Tensor, *, named: bool = False) -> tuple[Groups, Tensor]:
        """Orbits in the order of the segments, that of the optimizer's state, or ``named`` as :meth:`orbits` does."""
        shape = tuple(w.shape)

        def make() -> tuple[Groups, Tensor]:
            groups = self.orbits(shape) if named else self._ordered(shape)[0]
            if groups.index is not None:
                groups = Groups(groups.count, groups.view, groups.dims, groups.index.to(w.device))
            return groups, groups.size(w)

        return derived(self, ("known", shape, w.device, w.dtype, named), make)

    def partition(self, w: Tensor, index: Tensor | None = None) -> Groups:
        return self._known(w)[0]

    def segments(self, w: Tensor) -> list[Segment] | None:
        return self._ordered(tuple(w.shape))[1]

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
