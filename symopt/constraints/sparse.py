"""Sparse: every weight may become exactly zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from symopt.constraints.base import Constraint, Factors
from symopt_kernels import reference
from symopt_kernels.reference import Groups

__all__ = ["Sparse"]


@final
@dataclass(frozen=True)
class Sparse(Constraint):
    """Exact zeros, by the rescaling symmetry of ``w = u * v`` (``u -> a u, v -> v / a``).

    Weight decay kappa on the factors charges the weight ``kappa * ||w||_1``.  Shapes: any; every weight is its own
    unit.

    Args:
        strength: kappa.  With :class:`symopt.SGD` and :class:`symopt.Adam` the optimum is that of
            ``loss + strength * ||w||_1`` (units of a gradient; default 1e-4).  With :class:`symopt.AdamW` it is a
            dimensionless signal-to-noise threshold: weights whose mean gradient stays below ``strength`` times its
            root mean square die, those above live (default 0.1); it does *not* minimise loss + l1.
            A param group's ``strength`` overrides it.

    Raises:
        TypeError, ValueError: if ``strength`` is not a finite number >= 0.

    Source: Ziyin & Wang, *spred*, ICML 2023 (arXiv 2210.01212), Theorem 1; Hoff 2017; the symmetry: Ziyin, ICML 2024
    (arXiv 2309.16932), Section 4.

    Example:
        >>> import torch
        >>> from symopt import Sparse
        >>> w = torch.tensor([3.0, -4.0, 0.0])
        >>> u, v = Sparse().split(w)
        >>> torch.allclose(u * v, w)
        True
        >>> Sparse().penalty(w)
        tensor(7.)
    """

    name: ClassVar[str] = "sparse"

    strength: float | None = None

    def compose(self, factors: Factors) -> Tensor:
        u, v = factors
        return u * v

    def split(self, w: Tensor, imbalance: Tensor | float = 0.0) -> Factors:
        metric = (imbalance**2 + 4 * w * w).sqrt()
        u = ((metric + imbalance) / 2).sqrt()
        return u, torch.where(u > 0, w / u.clamp(min=torch.finfo(w.dtype).tiny), 0.0)

    def pullback(self, factors: Factors, grad: Tensor) -> Factors:
        u, v = factors
        return grad * v, grad * u

    def mirror(self, factors: Factors) -> Factors:
        u, v = factors
        return -u, -v

    def retract(
        self,
        w: Tensor,
        delta: Tensor,
        decay: Tensor | float,
        imbalance: Tensor,
        metric_scale: Tensor,
        groups: Groups | None,
        *,
        saturated: bool = True,
    ) -> Tensor:
        return reference.sparse(w, delta, decay, imbalance, metric_scale, saturated=saturated)

    def penalty(self, w: Tensor) -> Tensor:
        return w.abs().sum()

    def size(self, w: Tensor, groups: Groups | None = None) -> Tensor:
        return w.abs().flatten()

    def default_strength(self, *, decoupled: bool) -> float:
        return 0.1 if decoupled else 1e-4
