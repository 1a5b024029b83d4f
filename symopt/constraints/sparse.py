"""Sparse: every weight may become exactly zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from symopt.constraints.base import Constraint, Factors, Outs, check_depth
from symopt.constraints.budget import Budget, check_scope, check_share, parse_pattern
from symopt.constraints.gauge import heavy_factor, light_factor
from symopt_kernels.groups import Groups
from symopt_kernels.reference import elementwise, gauge

__all__ = ["Sparse"]


@final
@dataclass(frozen=True, kw_only=True, repr=False)
class Sparse(Constraint):
    """Exact zeros, by the rescaling symmetry of ``w = u_1 * ... * u_D`` (``u_i -> a u_i, u_j -> u_j / a``).

    Weight decay kappa on the factors charges the weight ``kappa * D/2 * sum |w|**(2/D)``: at depth D = 2
    ``kappa * ||w||_1``, above it a non-convex penalty that shrinks large weights less.  Shapes: any; every weight is
    its own unit.

    Args:
        strength: kappa.  With :class:`symopt.SGD` and :class:`symopt.Adam` the optimum is that of
            ``loss + strength * ||w||_1`` (units of a gradient; default 1e-4; scikit-learn's ``alpha`` of a Lasso if the
            loss is half the mean squared error).  With :class:`symopt.AdamW` it is a dimensionless signal-to-noise
            threshold: weights whose mean gradient stays below ``strength`` times its root mean square die, those above
            live (default 0.1); it does *not* minimise loss + l1.
            A param group's ``strength`` overrides it.
        density: a budget instead of a strength: exactly ``round(density * numel)`` weights live in the end, in (0, 1].
            The optimizer ramps it in and commits it, for which it needs ``total_steps``, and chooses the strengths;
            ``strength`` is then that of the weights inside the budget until the commit.
        scope: whose budget it is: of each ``"tensor"``, or ``"global"``, one for all weights with an equal constraint,
            chosen by their layer-adaptive score, ``w**2`` over the sum of all in the tensor that are at least as large:
            scales of tensors do not matter, and none dies.
        pattern: ``"N:M"``: of every M neighbouring inputs (dimension 1) the N largest live, like ``"2:4"``; a budget,
            too.
        depth: number D >= 2 of factors; a budget needs 2.
        gauge: ``"fixed"``: the weight is the only state; at depth 2 with one imbalance per tensor, above it balanced,
            which locks signs and makes every zero permanent.  ``"free"``: the literal method, factors are optimizer
            state (``factor_0``, ... of the weight's shape) and every weight has its own imbalance; D times the memory.

    Raises:
        TypeError, ValueError: if ``strength`` is not a finite number >= 0, ``depth`` not an integer >= 2, ``gauge`` or
            ``scope`` unknown, or a budget is impossible.

    Source: Ziyin & Wang, *spred*, ICML 2023 (arXiv 2210.01212), Theorem 1; Hoff 2017; depth:
    Kolb et al., *Deep Weight Factorization*, ICLR 2025 (arXiv 2502.02496), Section 3; the symmetry: Ziyin, ICML 2024
    (arXiv 2309.16932), Section 4; the budget is the trimmed l1 penalty (Yun et al., ICML 2019; Amir et al., 2021) in
    the gauge's decay.

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
    density: float | None = None
    scope: str = "tensor"
    depth: int = 2
    pattern: str | None = None
    gauge: str = "fixed"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_depth("Sparse", self.depth)
        if self.gauge not in ("fixed", "free"):
            raise ValueError(f"Sparse: gauge must be 'fixed' or 'free', got {self.gauge!r}")
        check_share("Sparse", "density", self.density)
        check_scope("Sparse", self.scope, ("tensor", "global"), self.density, "density")
        if (self.density is not None or self.pattern is not None) and (self.depth != 2 or self.gauge != "fixed"):
            raise ValueError(
                "Sparse: a budget needs depth=2 and gauge='fixed', where no weight inside it becomes zero by itself; "
                f"got depth={self.depth}, gauge={self.gauge!r}"
            )
        if self.pattern is not None:
            parse_pattern("Sparse", self.pattern)
            if self.density is not None:
                raise ValueError("Sparse: density and pattern are two budgets for one weight; give one of them")

    is_product: ClassVar[bool] = True

    @property
    def retraction(self) -> str:
        """By gauge, depth and pattern."""
        if self.pattern is not None:
            return "nm"
        return ("sparse_free" if self.gauge == "free" else "sparse") + ("" if self.depth == 2 else "_deep")

    @property
    def carries_factors(self) -> bool:
        """Whether the factors are optimizer state."""
        return self.gauge == "free"

    @property
    def budget(self) -> Budget | None:
        if self.pattern is not None:
            n, m = parse_pattern("Sparse", self.pattern)
            return Budget(n / m, pattern=(n, m))
        return None if self.density is None else Budget(float(self.density), self.scope)

    def bind(self, name: str, w: Tensor) -> Constraint:
        if self.pattern is not None:
            n, m = parse_pattern("Sparse", self.pattern)
            if w.dim() < 2 or w.shape[1] % m:
                raise ValueError(
                    f"Sparse(pattern={self.pattern!r}) on {name}: dimension 1 of shape {tuple(w.shape)} (the inputs) "
                    f"does not split into runs of {m}; leave this weight out or give it a density of {n / m:.3g}"
                )
        return self

    def pruned(self, w: Tensor, threshold: Tensor | float, groups: Groups | None) -> Tensor:
        budget = self.budget
        if budget is not None and budget.pattern is not None:
            return elementwise.nm_pruned_mask(w, *budget.pattern).flatten()
        return super().pruned(w, threshold, groups)

    def compose(self, factors: Factors, out: Tensor | None = None) -> Tensor:
        return gauge.product(factors, out)

    def split(self, w: Tensor, imbalance: Tensor | float = 0.0) -> Factors:
        heavy = heavy_factor(w.abs(), imbalance, self.depth)
        return (heavy,) * (self.depth - 1) + (light_factor(w, heavy, self.depth),)

    def pullback(self, factors: Factors, grad: Tensor, out: Outs | None = None) -> Factors:
        rest = gauge.partial_products(factors)
        return tuple(torch.mul(grad, r, out=o) for r, o in zip(rest, out or (None,) * self.depth, strict=True))

    def mirror(self, factors: Factors) -> Factors:
        return (-factors[0], -factors[1], *factors[2:])

    def start(self, w: Tensor, relative: float, groups: Groups | None = None) -> tuple[Tensor, Tensor]:
        if self.gauge == "fixed":
            return super().start(w, relative, groups)
        c = self.imbalance(w, relative)
        metric = gauge.sum_of_squares(gauge.partial_products(self.split(w, c)))
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
        snaps: Tensor | bool = True,
    ) -> Tensor:
        if self.depth > 2:
            return elementwise.sparse_deep(w, delta, decay, metric_scale, self.depth, saturated=saturated, snaps=snaps)
        return elementwise.sparse(w, delta, decay, imbalance, metric_scale, saturated=saturated, snaps=snaps)

    def advance(
        self, factors: Factors, delta: Tensor, decay: Tensor | float, metric_scale: Tensor, *, saturated: bool = True
    ) -> tuple[Tensor, Factors]:
        return elementwise.sparse_free(factors, delta, decay, metric_scale, saturated=saturated)

    def penalty(self, w: Tensor) -> Tensor:
        size = w.abs()
        return size.sum() if self.depth == 2 else self.depth / 2 * (size ** (2 / self.depth)).sum()

    def size(self, w: Tensor, groups: Groups | None = None) -> Tensor:
        return w.abs().flatten()

    def default_strength(self, *, decoupled: bool) -> float:
        return 0.1 if decoupled else 1e-4
