"""SpanningGroups: units that span several parameters; what GroupSparse becomes when its groups are a mapping."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from symopt.constraints.base import Constraint, Factors, Outs
from symopt.constraints.budget import Budget
from symopt.constraints.gauge import heavy_factor
from symopt_kernels.groups import Groups
from symopt_kernels.reference import units as kernel
from symopt_kernels.units import Units

__all__ = ["SpanningGroups"]


@final
@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class SpanningGroups(Constraint):
    """``w_t[slice_t(g)] = a_t s_g d_t[slice_t(g)]`` for all parameters t: one gate ``s_g`` per unit, exact zeros of it.

    Its verbs see the parameters as one flat vector.  Weight decay kappa on gate and directions charges
    ``kappa sum_g (sum_t ||w_t[slice_t(g)]||**2 / a_t**2)**(1/2)``.  Weights in no unit are free: they are not charged
    and take the plain step.  Factors are ``(base, gate, direction)``, where ``base`` holds the free weights and does
    not decay; without free weights ``(gate, direction)``.
    """

    retraction = "units"
    binds_many = True

    label: str = field(kw_only=False)
    """The call that made it."""
    units_: Units
    strength: float | None = None
    keep: float | int | None = None

    def __repr__(self) -> str:
        """The call that made it."""
        return self.label

    @property
    def spanning_units(self) -> Units:
        return self.units_

    @property
    def budget(self) -> Budget | None:
        return None if self.keep is None else Budget(self.keep)

    @property
    def free_factors(self) -> int:
        """One if there are free weights."""
        return 1 if self.units_.unbound else 0

    def _units(self, like: Tensor) -> Units:
        return self.units_.to(like.device)

    # -- the flat vector ---------------------------------------------------------------------------------------------

    def _parts(self, x: Tensor) -> list[Tensor]:
        """The parameters in a flat vector; a single one keeps its shape."""
        pieces = x.flatten().split([part.numel for part in self.units_.parts])
        return [piece.reshape(part.shape) for piece, part in zip(pieces, self.units_.parts, strict=True)]

    def _factors_of_parts(self, x: Tensor) -> Tensor:
        """``a_t`` for every weight, in the shape of ``x``."""
        pieces = [torch.full((part.numel,), part.factor, dtype=x.dtype) for part in self.units_.parts]
        return torch.cat(pieces).to(x.device).reshape(x.shape)

    def _bound(self, x: Tensor) -> Tensor:
        """Whether a weight belongs to a unit, in the shape of ``x``."""
        bound = [part.bound.expand(part.shape).flatten() for part in self._units(x).parts]
        return torch.cat(bound).reshape(x.shape)

    def _given(self, v: Tensor, like: Tensor) -> Tensor:
        """A value per unit for each of its weights, 0 for free ones, in the shape of ``like``."""
        return self._units(like).flat(v).reshape(like.shape)

    def _sum(self, x: Tensor) -> Tensor:
        return self._units(x).sum(self._parts(x))

    # -- units -------------------------------------------------------------------------------------------------------

    def size(self, w: Tensor, groups: Groups | None = None) -> Tensor:
        return self.inner(w, w).sqrt()

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        return self._sum(x * y / self._factors_of_parts(x) ** 2)

    def dual(self, grad: Tensor) -> Tensor:
        """Per unit its norm is ``(sum_t a_t**2 ||g_t||**2)**(1/2)``."""
        return grad * self._factors_of_parts(grad) ** 2

    def units(self, truth: Tensor, w: Tensor, groups: Groups | None) -> Tensor:
        return self._given(truth.to(torch.uint8), w).bool()

    def imbalance(self, w: Tensor, relative: float, groups: Groups | None = None) -> Tensor:
        size = self.size(w)
        rms = size.square().mean().sqrt()
        # As of other constraints where everything is zero: each weight counts as 1 / sqrt(fan_in) of its slice.
        typical = self.units_.sizes(size).mean().sqrt() / max(part.inner for part in self.units_.parts) ** 0.5
        return relative * torch.where(rms > 0, rms, typical)

    # -- the verbs ---------------------------------------------------------------------------------------------------

    def compose(self, factors: Factors, out: Tensor | None = None) -> Tensor:
        *base, gate, direction = factors
        w = self._given(gate, direction) * self._factors_of_parts(direction) * direction
        return torch.where(self._bound(w), w, base[0]) if base else w

    def split(self, w: Tensor, imbalance: Tensor | float = 0.0) -> Factors:
        gate = heavy_factor(self.size(w), imbalance, 2)
        inverse = torch.where(gate > 0, 1 / gate.clamp(min=torch.finfo(w.dtype).tiny), 0.0)
        direction = self._given(inverse, w) * w / self._factors_of_parts(w)
        return (torch.where(self._bound(w), 0.0, w), gate, direction) if self.free_factors else (gate, direction)

    def pullback(self, factors: Factors, grad: Tensor, out: Outs | None = None) -> Factors:
        *_, gate, direction = factors
        scaled = grad * self._factors_of_parts(grad)
        own = (self._sum(scaled * direction), self._given(gate, grad) * scaled)
        return (torch.where(self._bound(grad), 0.0, grad), *own) if self.free_factors else own

    def mirror(self, factors: Factors) -> Factors:
        *base, gate, direction = factors
        return (*base, -gate, -direction)

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
        """``delta`` is the step in ``w``, so free weights move by it; the others by survey, combine and move."""
        units, weights = self._units(w), self._parts(w)
        factor = self._factors_of_parts(w)
        leads = self._parts(delta / factor**2)  # whose step in w is a_t**2 times the lead
        sums = kernel.survey(units, leads, leads, weights)
        shrink, shift, _ = kernel.combine(sums, 1.0, decay, imbalance, metric_scale, saturated=saturated, snaps=snaps)
        new = [
            kernel.move(units, part, x, lead, shrink, shift)
            for part, x, lead in zip(units.parts, weights, leads, strict=True)
        ]
        moved = torch.cat([x.flatten() for x in new]).reshape(w.shape)
        return torch.where(self._bound(w), moved, w - delta)

    def penalty(self, w: Tensor) -> Tensor:
        return self.size(w).sum()

    def default_strength(self, *, decoupled: bool) -> float:
        return 0.06 if decoupled else 1e-4
