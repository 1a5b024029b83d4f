"""LowRank: singular values may become exactly zero."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from symopt.constraints.base import Constraint, Factors, Outs
from symopt.constraints.budget import Budget, BudgetPlan
from symopt_kernels.groups import Groups
from symopt_kernels.reference.gauge import math_dtype
from symopt_kernels.reference.lowrank import factorize, singular_values

__all__ = ["LowRank"]


@final
@dataclass(frozen=True, kw_only=True, repr=False)
class LowRank(Constraint):
    """Exactly low rank, by the rotation symmetry of ``W = U V^T`` (``U -> U R, V -> V R``).

    Weight decay kappa on both factors charges ``kappa * ||W||_*``, the sum of the singular values.  Shapes: a weight of
    shape ``(m, ...)`` is the m x n matrix ``W.flatten(1)``, so a convolution's kernel has one row per filter;
    U is ``(m, r)`` and V ``(..., r)``.

    The factors are the optimizer's state, the weight stays a plain parameter.  A step is three products with m x r and
    n x r matrices and no decomposition of W; every 20 steps an r x r eigenproblem turns the columns into singular
    directions and drops those that have died, for good, so that steps become cheaper as the rank falls.

    Args:
        strength: kappa.  With :class:`symopt.SGD` and :class:`symopt.Adam` the optimum is that of
            ``loss + strength * ||W||_*`` (units of a gradient; default 1e-4).  With :class:`symopt.AdamW` it is a
            dimensionless signal-to-noise threshold per coordinate (default 0.1), and nothing is minimised.
            A param group's ``strength`` overrides it.
        rank: a budget instead of a strength: exactly this many singular values live in the end (fewer only if more
            died by themselves).  The optimizer ramps it in and commits it, for which it needs ``total_steps``;
            ``strength`` is then that of the directions inside the budget until the commit.
        max_rank: columns to start with: from the first step on W is the best approximation of this rank to what it was,
            and the rank never exceeds it.  It bounds memory and the cost of early steps.

    Raises:
        TypeError, ValueError: if ``strength`` is not a finite number >= 0, ``rank`` or ``max_rank`` not an integer >= 1
            or ``rank > max_rank``; on binding, for a weight of fewer than two dimensions, one that is zero everywhere
            (its factors could never move), or whose smaller side is less than ``rank``.

    Source: the nuclear norm as least decay of the factors: Srebro, Rennie & Jaakkola, NeurIPS 2004; the symmetry:
    Ziyin, ICML 2024 (arXiv 2309.16932), Section 4; steps that divide by the singular values: ScaledGD (Tong, Ma & Chi,
    JMLR 2021), of which the time scale is the damped form.

    Example:
        >>> import torch
        >>> from symopt import LowRank
        >>> w = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
        >>> u, v = LowRank().split(w)
        >>> torch.allclose(u @ v.T, w)
        True
        >>> LowRank().penalty(w)
        tensor(7.)
        >>> LowRank(max_rank=1).fold(w).abs()
        tensor([[0., 0.],
                [0., 4.]])
    """

    retraction = "lowrank"
    carries_factors = True
    is_matrix: ClassVar[bool] = True
    # Directions show early, once what is learned stands out of the random start, and want long training at the end.
    plan: ClassVar[BudgetPlan] = BudgetPlan(
        begin=0.1, ramp=0.12, commit=0.14, strength_kept=0.006, strength_pruned=6.0, plasticity=2.0
    )

    strength: float | None = None
    rank: int | None = None
    max_rank: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, value in (("rank", self.rank), ("max_rank", self.max_rank)):
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"LowRank: {key} must be an integer or None, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"LowRank: {key} must be >= 1, got {value}")
        if self.rank is not None and self.max_rank is not None and self.rank > self.max_rank:
            raise ValueError(
                f"LowRank: rank={self.rank} is more than max_rank={self.max_rank} lets live; raise max_rank"
            )

    @property
    def budget(self) -> Budget | None:
        return None if self.rank is None else Budget(self.rank)

    @property
    def most(self) -> int | None:
        """Rank that the weight may have in the end, or None for any."""
        return self.max_rank if self.rank is None else self.rank

    def bind(self, name: str, w: Tensor) -> Constraint:
        shape = tuple(w.shape)
        if w.dim() < 2:
            raise ValueError(f"LowRank on {name}: shape {shape} is no matrix; leave it out")
        side = min(shape[0], math.prod(shape[1:]))
        if self.rank is not None and self.rank > side:
            raise ValueError(
                f"LowRank(rank={self.rank}) on {name}: as a matrix of {shape[0]} x {math.prod(shape[1:])} its rank is "
                f"at most {side} anyway; leave it out or give a smaller rank"
            )
        if w.device.type != "meta" and not bool(w.any()):
            raise ValueError(
                f"LowRank on {name}: the weight is zero everywhere, where both factors are zero and never move; "
                "initialise it first, with a small random matrix if it shall start near zero"
            )
        return self

    # -- geometry ----------------------------------------------------------------------------------------------------

    def compose(self, factors: Factors, out: Tensor | None = None) -> Tensor:
        u, v = factors
        return (u @ v.flatten(0, -2).mT).reshape(u.shape[0], *v.shape[:-1])

    def split(self, w: Tensor, imbalance: Tensor | float = 0.0) -> Factors:
        u, v = factorize(w.flatten(1), imbalance, self.max_rank)
        return u, v.reshape(*w.shape[1:], u.shape[1])

    def pullback(self, factors: Factors, grad: Tensor, out: Outs | None = None) -> Factors:
        u, v = factors
        g = grad.flatten(1)
        return g @ v.flatten(0, -2), (g.mT @ u).reshape(v.shape)

    def mirror(self, factors: Factors) -> Factors:
        return (-factors[0], -factors[1])

    def retract(self, *args: Any, **kwargs: Any) -> Tensor:
        raise TypeError(f"{self} steps its factors, which are optimizer state (symopt_kernels.reference.lowrank)")

    def start(self, w: Tensor, relative: float, groups: Groups | None = None) -> tuple[Tensor, Tensor]:
        side = min(w.shape[0], w[0].numel())
        return torch.zeros_like(w.flatten()[0]), 2 * w.norm() / math.sqrt(side)

    def penalty(self, w: Tensor) -> Tensor:
        total: Tensor = singular_values(w.flatten(1)).sum()
        return total

    def size(self, w: Tensor, groups: Groups | None = None) -> Tensor:
        """Singular values; those that only rounding makes nonzero are 0."""
        matrix = w.flatten(1).to(math_dtype(w))
        sizes = singular_values(matrix)
        # A product of factors is rounded along its sums, and once more to the weight's own precision, entry by entry:
        # independent errors of eps |W_ij| / 4 have singular values of about eps |W|_F / (2 sqrt(min(m, n))).
        relative = max(4 * math.sqrt(max(matrix.shape)) * torch.finfo(matrix.dtype).eps, 2 * torch.finfo(w.dtype).eps)
        return torch.where(sizes > relative * sizes[:1], sizes, 0.0)

    def fold(self, w: Tensor) -> Tensor:
        """The best approximation of the rank allowed, without what rounding adds to it."""
        u, v = self.thin(w)
        return (u @ v.mT).reshape(w.shape).to(w.dtype)

    def thin(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Balanced factors of ``w.flatten(1)`` with exactly as many columns as it has live singular values."""
        live = int((self.size(w) > 0).sum())
        most = live if self.most is None else min(live, self.most)
        u, v = factorize(w.detach().flatten(1).double(), 0.0, most)
        return u, v

    def default_strength(self, *, decoupled: bool) -> float:
        return 0.1 if decoupled else 1e-4

    def per_coordinate_factor(self, w: Tensor) -> float:
        """``(sqrt(m) + sqrt(n)) / 2``: what makes AdamW's strength count per coordinate.

        Every row of what is pulled back has unit variance, so a direction in which all coordinates have the signal r
        pulls its column of U by ``r sqrt(m)`` and that of V by ``r sqrt(n)``.
        """
        return (math.sqrt(w.shape[0]) + math.sqrt(w[0].numel())) / 2
