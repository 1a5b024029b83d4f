"""Circulant: circular convolutions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from symopt.constraints.base import Constraint
from symopt.constraints.planes.orbits import OrbitPlane, labelled
from symopt.constraints.planes.symmetric import check_square
from symopt_kernels.groups import Groups

__all__ = ["Circulant"]


@final
@dataclass(frozen=True, kw_only=True, repr=False)
class Circulant(OrbitPlane):
    """A square matrix becomes circulant: ``w[i, j]`` depends on ``(j - i) mod n`` alone, a circular convolution.

    Args:
        strength: kappa, as in :class:`symopt.Mirror`; None: automatic.

    Raises:
        TypeError, ValueError: for a bad ``strength`` or a weight that is no square matrix.

    Source: L. Ziyin, ICML 2024 (arXiv 2309.16932), Section 4.

    Example:
        >>> import torch, symopt
        >>> symopt.Circulant().onto(torch.tensor([[1.0, 2.0], [4.0, 3.0]]))
        tensor([[2., 3.],
                [3., 2.]])
    """

    strength: float | None = None

    def bind(self, name: str, w: Tensor) -> Constraint:
        check_square(f"Circulant on {name}", w)
        return self

    def orbits(self, shape: tuple[int, ...]) -> Groups:
        i = torch.arange(shape[0])
        return labelled((i[None, :] - i[:, None]) % shape[0])
