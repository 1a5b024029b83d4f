"""Symmetric: undirected interactions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from symopt.constraints.base import Constraint
from symopt.constraints.planes.orbits import OrbitPlane, labelled
from symopt_kernels.groups import Groups

__all__ = ["Symmetric", "check_square"]


@final
@dataclass(frozen=True, kw_only=True, repr=False)
class Symmetric(OrbitPlane):
    """A square matrix becomes symmetric, ``w = w.T``: undirected interactions, energies, metrics.

    Args:
        strength: kappa, as in :class:`symopt.Mirror`; None: automatic.  The critical one is
            ``||g - g.T||_F / 2``.

    Raises:
        TypeError, ValueError: for a bad ``strength`` or a weight that is no square matrix.

    Source: L. Ziyin, ICML 2024 (arXiv 2309.16932), Section 4.

    Example:
        >>> import torch, symopt
        >>> w = torch.tensor([[1.0, 2.0], [4.0, 3.0]])
        >>> symopt.Symmetric().onto(w)
        tensor([[1., 3.],
                [3., 3.]])
        >>> symopt.Symmetric().penalty(w)  # the distance from the symmetric matrices
        tensor(1.4142)
    """

    strength: float | None = None

    def bind(self, name: str, w: Tensor) -> Constraint:
        check_square(f"Symmetric on {name}", w)
        return self

    def orbits(self, shape: tuple[int, ...]) -> Groups:
        labels = torch.arange(math.prod(shape)).reshape(shape)
        return labelled(torch.minimum(labels, labels.T))


def check_square(owner: str, w: Tensor) -> None:
    """Raise unless ``w`` is a square matrix."""
    if w.dim() != 2 or w.shape[0] != w.shape[1]:
        raise ValueError(f"{owner}: needs a square matrix, got shape {tuple(w.shape)}")
