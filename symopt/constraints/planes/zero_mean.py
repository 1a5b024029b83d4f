"""ZeroMean: centred weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from symopt.constraints.base import Constraint
from symopt.constraints.planes.plane import Plane
from symopt_kernels.groups import Groups

__all__ = ["ZeroMean"]


@final
@dataclass(frozen=True, kw_only=True, repr=False)
class ZeroMean(Plane):
    """Means over ``dim`` become zero: every neuron's incoming weights sum to 0, so it cannot see a constant input.

    Args:
        strength: kappa, as in :class:`symopt.Mirror`; None: automatic.
        dim: dimension or dimensions of the mean; default: all but the first (of a vector, its only one).

    Zero means here up to the rounding of the sum.

    Raises:
        TypeError, ValueError: for a bad ``strength`` or a ``dim`` that the weight does not have.

    Source: L. Ziyin, ICML 2024 (arXiv 2309.16932), Section 4; centred weights: Qiao et al., 2019 (arXiv 1903.10520).

    Example:
        >>> import torch, symopt
        >>> symopt.ZeroMean().onto(torch.tensor([[1.0, 3.0], [2.0, 2.0]]))
        tensor([[-1.,  1.],
                [ 0.,  0.]])
    """

    retraction = "centred"
    centred: ClassVar[bool] = True

    strength: float | None = None
    dim: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        given: object = self.dim
        dims: tuple[object, ...] = given if isinstance(given, tuple) else () if given is None else (given,)
        if not all(isinstance(d, int) and not isinstance(d, bool) for d in dims):
            raise TypeError(f"ZeroMean: dim must be an integer, a tuple of them or None, got {self.dim!r}")

    def bind(self, name: str, w: Tensor) -> Constraint:
        dims = self.dim if isinstance(self.dim, tuple) else () if self.dim is None else (self.dim,)
        if not all(-w.dim() <= d < w.dim() for d in dims):
            raise ValueError(f"ZeroMean on {name}: shape {tuple(w.shape)} has no dimension {self.dim}")
        return self

    def partition(self, w: Tensor, index: Tensor | None = None) -> Groups:
        if self.dim is None:
            dims = tuple(range(min(1, w.dim() - 1), w.dim()))
        else:
            dims = tuple(d % w.dim() for d in (self.dim if isinstance(self.dim, tuple) else (self.dim,)))
        shape = tuple(w.shape)
        return Groups(math.prod([n for d, n in enumerate(shape) if d not in dims]), shape, dims)

    def off(self, x: Tensor) -> Tensor:
        groups = self.partition(x)
        return groups.expand(groups.sum(x) / groups.size(x)).reshape(x.shape)

    def coordinates(self, x: Tensor) -> Tensor:
        groups = self.partition(x)
        return groups.sum(x) / groups.size(x).sqrt()

    def lift(self, z: Tensor, like: Tensor) -> Tensor:
        groups = self.partition(like)
        return groups.expand(z / groups.size(like).sqrt()).reshape(like.shape)

    def codimension(self, w: Tensor) -> float:
        return float(self.partition(w).count)

    def one_sided(self, w: Tensor) -> bool:
        return w.dim() == 2 and len(self.partition(w).dims) == 1
