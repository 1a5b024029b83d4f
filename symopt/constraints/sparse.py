"""Sparse: every weight may become exactly zero."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from symopt.constraints.base import Constraint, Factors, Outs, check_depth, heavy_factor, light_factor
from symopt_kernels import reference
from symopt_kernels.groups import Groups

__all__ = ["Sparse"]


@final
@dataclass(frozen=True, repr=False)
class Sparse(Constraint):
    """Exact zeros, by the rescaling symmetry of ``w = u_1 * ... * u_D`` (``u_i -> a u_i, u_j -> u_j / a``).

    Weight decay kappa on the factors charges the weight ``kappa * D/2 * sum |w|**(2/D)``: at depth D = 2
    ``kappa * ||w||_1``, above it a non-convex penalty that shrinks large weights less.  Shapes: any; every weight is
    its own unit.

    Args:
        strength: kappa.  With :class:`symopt.SGD` and :class:`symopt.Adam` the optimum is that of
            ``loss + strength * ||w||_1`` (units of a gradient; default 1e-4).  With :class:`symopt.AdamW` it is a
            dimensionless signal-to-noise threshold: weights whose mean gradient stays below ``strength`` times its
            root mean square die, those above live (default 0.1); it does *not* minimise loss + l1.
            A param group's ``strength`` overrides it.
        depth: number D >= 2 of factors.
        gauge: ``"fixed"``: the weight is the only state; at depth 2 with one imbalance per tensor, above it balanced,
            which locks signs and makes every zero permanent.  ``"free"``: the literal method, factors are optimizer
            state (``factor_0``, ... of the weight's shape) and every weight has its own imbalance; D times the memory.

    Raises:
        TypeError, ValueError: if ``strength`` is not a finite number >= 0, ``depth`` not an integer >= 2, or ``gauge``
            unknown.

    Source: Ziyin & Wang, *spred*, ICML 2023 (arXiv 2210.01212), Theorem 1; Hoff 2017; depth:
    Kolb et al., *Deep Weight Factorization*, ICLR 2025 (arXiv 2502.02496), Section 3; the symmetry: Ziyin, ICML 2024
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

    strength: float | None = None
    depth: int = field(default=2, kw_only=True)
    gauge: str = field(default="fixed", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_depth("Sparse", self.depth)
        if self.gauge not in ("fixed", "free"):
            raise ValueError(f"Sparse: gauge must be 'fixed' or 'free', got {self.gauge!r}")

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name of the kernel row."""
        return "sparse_free" if self.gauge == "free" else "sparse"

    @property
    def carries_factors(self) -> bool:  # type: ignore[override]
        """Whether the factors are optimizer state."""
        return self.gauge == "free"

    def compose(self, factors: Factors, out: Tensor | None = None) -> Tensor:
        return reference.product(factors, out)

    def split(self, w: Tensor, imbalance: Tensor | float = 0.0) -> Factors:
        heavy = heavy_factor(w.abs(), imbalance, self.depth)
        return (heavy,) * (self.depth - 1) + (light_factor(w, heavy, self.depth),)

    def pullback(self, factors: Factors, grad: Tensor, out: Outs | None = None) -> Factors:
        rest = reference.partial_products(factors)
        return tuple(torch.mul(grad, r, out=o) for r, o in zip(rest, out or (None,) * self.depth, strict=True))

    def mirror(self, factors: Factors) -> Factors:
        return (-factors[0], -factors[1], *factors[2:])

    def start(self, w: Tensor, relative: float, groups: Groups | None = None) -> tuple[Tensor, Tensor]:
        if self.gauge == "fixed":
            return super().start(w, relative, groups)
        c = self.imbalance(w, relative)
        metric = reference.sum_of_squares(reference.partial_products(self.split(w, c)))
        return c, metric.square().mean().sqrt()

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
        if self.depth > 2:
            return reference.sparse_deep(w, delta, decay, metric_scale, self.depth, saturated=saturated)
        return reference.sparse(w, delta, decay, imbalance, metric_scale, saturated=saturated)

    def advance(
        self, factors: Factors, delta: Tensor, decay: Tensor | float, metric_scale: Tensor, *, saturated: bool = True
    ) -> tuple[Tensor, Factors]:
        return reference.sparse_free(factors, delta, decay, metric_scale, saturated=saturated)

    def penalty(self, w: Tensor) -> Tensor:
        return self.depth / 2 * (w.abs() ** (2 / self.depth)).sum()

    def size(self, w: Tensor, groups: Groups | None = None) -> Tensor:
        return w.abs().flatten()

    def default_strength(self, *, decoupled: bool) -> float:
        return 0.1 if decoupled else 1e-4
