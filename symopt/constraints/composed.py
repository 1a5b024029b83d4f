"""Composed: several constraints on one weight; what a list in the patterns of ``constrain`` becomes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, final

import torch
from torch import Tensor

from symopt.constraints.base import Constraint, Factors, Outs
from symopt.constraints.group import GroupSparse
from symopt.constraints.sparse import Sparse
from symopt_kernels.groups import Groups
from symopt_kernels.reference import elementwise

__all__ = ["Composed"]


@final
@dataclass(frozen=True, kw_only=True, repr=False)
class Composed(Constraint):
    """The sum of the penalties of ``parts``, with the zeros of every part exact: ``[Sparse(), GroupSparse("out")]``.

    Every weight is a pair ``u * v`` as in :class:`symopt.Sparse`, so each zero attracts and absorbs by itself; the
    penalty of a group enters in its reweighted l1 form, a decay of ``strength * |w_i| / ||w_g||`` on weight i (times
    the root of the group's size with AdamW).  With SGD and Adam the optimum is that of the loss plus all penalties, the
    sparse-group Lasso (Simon et al., 2013) among them.  The order of the list does not matter.

    Args:
        parts: two or more of ``Sparse`` and ``GroupSparse`` with named groups; strengths are the parts' own.
        strength: multiplies them all (default 1); so does the param group's ``strength``.

    Raises:
        TypeError, ValueError: for fewer than two parts, other constraints, or groups given by an index tensor.
    """

    retraction = "composed"
    uniform_strength: ClassVar[bool] = False

    parts: tuple[Constraint, ...] = field(kw_only=False)
    strength: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.parts) < 2:
            raise ValueError(f"a list of constraints must have two or more, got {len(self.parts)}")
        for part in self.parts:
            if not isinstance(part, (Sparse, GroupSparse)):
                raise TypeError(f"a list may hold Sparse and GroupSparse constraints, got {part!r}")
            if part.depth != 2 or part.carries_factors:
                raise ValueError(f"a list may hold constraints of depth 2 in the fixed gauge, got {part!r}")
            if part.budget is not None:
                raise ValueError(f"a list may not hold budgets, got {part!r}; give strengths")
            if isinstance(part, GroupSparse) and not isinstance(part.groups, str):
                raise ValueError("in a list, GroupSparse takes named groups ('out', 'in', 'head:<n>', 'block:<r>x<c>')")

    def bind(self, name: str, w: Tensor) -> Constraint:
        for part in self.parts:
            part.bind(name, w)
        return self

    def strength_multiplier(self, w: Tensor, *, decoupled: bool) -> Tensor:
        total = torch.zeros_like(w)
        for part in self.parts:
            own = part.default_strength(decoupled=decoupled) if part.strength is None else part.strength
            groups = part.partition(w)
            if groups is None:
                total = total + own
                continue
            norm = groups.sum(w * w).sqrt()
            inverse = own * torch.where(norm > 0, 1 / norm.clamp(min=torch.finfo(w.dtype).tiny), 0.0)
            total = total + groups.scale(inverse * groups.size(w).sqrt() if decoupled else inverse, w.abs())
        return total

    def compose(self, factors: Factors, out: Tensor | None = None) -> Tensor:
        return Sparse().compose(factors, out)

    def split(self, w: Tensor, imbalance: Tensor | float = 0.0) -> Factors:
        return Sparse().split(w, imbalance)

    def pullback(self, factors: Factors, grad: Tensor, out: Outs | None = None) -> Factors:
        return Sparse().pullback(factors, grad, out)

    def mirror(self, factors: Factors) -> Factors:
        return Sparse().mirror(factors)

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
        return elementwise.sparse(w, delta, decay, imbalance, metric_scale, saturated=saturated, snaps=snaps)

    def penalty(self, w: Tensor) -> Tensor:
        """Sum of the parts' penalties, each times its strength (its coupled default if None)."""
        own = [p.default_strength(decoupled=False) if p.strength is None else p.strength for p in self.parts]
        return torch.stack([s * p.penalty(w) for s, p in zip(own, self.parts, strict=True)]).sum()

    def size(self, w: Tensor, groups: Groups | None = None) -> Tensor:
        return w.abs().flatten()

    def default_strength(self, *, decoupled: bool) -> float:
        return 1.0
