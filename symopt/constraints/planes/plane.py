"""Plane: what every constraint to a fixed plane shares; its symmetry is the reflection through the plane."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from symopt.constraints.base import Constraint, Factors, Outs
from symopt.constraints.gauge import heavy_factor
from symopt_kernels.groups import Groups
from symopt_kernels.orbits import PlaneLayout, Segment
from symopt_kernels.reference import plane as kernel

__all__ = ["Plane", "flat", "parts", "whole"]


def flat(weights: Sequence[Tensor]) -> Tensor:
    """Several weights as the one vector that a joint constraint sees; a single one as it is."""
    return weights[0] if len(weights) == 1 else torch.cat([w.flatten() for w in weights])


def parts(x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The inverse of :func:`flat`: the pieces of ``x``, in the shapes of ``weights``."""
    if len(weights) == 1:
        return (x.reshape(weights[0].shape),)
    return tuple(part.reshape(w.shape) for part, w in zip(x.split([w.numel() for w in weights]), weights, strict=True))


def whole(x: Tensor) -> Groups:
    """All weights as one group."""
    return Groups(1, (x.numel(),), (0,))


class Plane(Constraint):
    """Abstract.  Factors are ``(base, gate, direction)``: ``w = P base + gate * (I - P) direction``.

    Only gate and direction decay, so what lies on the plane is never shrunk, and any strength above the critical one,
    ``||(I - P) grad||`` at the minimum on the plane, puts the weight on it exactly.  The penalty is
    ``||w - P w||_2``.  A joint constraint over several parameters sees them as one flat vector.

    Subclasses give the projection and the orbits that share one second moment: the preconditioner has to commute with
    P.  Where the gate is not one number for the whole plane, they override :meth:`gates`.
    """

    @property
    def retraction(self) -> str:
        """Of a plane that no fused kernel knows."""
        return "plane"

    uniform_strength: ClassVar[bool] = False
    is_plane: ClassVar[bool] = True
    free_factors = 1
    centred: ClassVar[bool] = False
    """Whether what is off the plane is the mean of each group of :meth:`partition`."""

    # -- the plane ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def off(self, x: Tensor) -> Tensor:
        """``(I - P) x``, in the shape of ``x``."""

    def onto(self, x: Tensor) -> Tensor:
        """``P x``, in the shape of ``x``."""
        return x - self.off(x)

    def coordinates(self, x: Tensor) -> Tensor | None:
        """Those of ``(I - P) x`` in an orthonormal basis, flat; None of a plane that is given otherwise."""
        return None

    def lift(self, z: Tensor, like: Tensor) -> Tensor:
        """What lies off the plane with these :meth:`coordinates`, in the shape of ``like``."""
        raise TypeError(f"{self} has no coordinates")

    @abstractmethod
    def codimension(self, w: Tensor) -> float:
        """Number of directions that leave the plane."""

    def gates(self, w: Tensor) -> Groups:
        """Which weights share a gate."""
        return whole(w)

    def partition(self, w: Tensor, index: Tensor | None = None) -> Groups:
        return whole(w)

    @property
    def gate_per_orbit(self) -> bool:
        """Whether every orbit has a gate of its own, and not the plane one."""
        return False

    def segments(self, w: Tensor) -> list[Segment] | None:
        """Groups of ``w`` that a fused kernel gathers; None if they are its members' weights at one place."""
        return None

    def rows(self, like: Tensor) -> Tensor | None:
        """An orthonormal basis of what is off the plane for a fused kernel, one direction per row; or None."""
        return None

    def plane_layout(self, like: Tensor) -> PlaneLayout:
        root = self.sqrt_dim_per_gate(like)
        return PlaneLayout(
            sqrt_dim_per_gate=float(root.max()) if isinstance(root, Tensor) else root,
            gate_per_orbit=self.gate_per_orbit,
            identical=self.parameters_identical,
            segments=self.segments(like),
            basis=self.rows(like),
            centred=self.partition(like) if self.centred else None,
        )

    # -- strength ----------------------------------------------------------------------------------------------------

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = self.coordinates(x), self.coordinates(y)
        return self.gates(x).sum(self.off(x) * y) if a is None or b is None else whole(a).sum(a * b)

    def sqrt_dim_per_gate(self, w: Tensor) -> Tensor | float:
        """What turns a strength per coordinate into one per unit: the root of the number of directions it gates."""
        return math.sqrt(self.codimension(w))

    def needed(self, x: Tensor, running: Tensor | None, *, per_coordinate: bool) -> Tensor:
        """Running estimate of the critical strength, ``x`` being the smoothed gradient or AdamW's update."""
        sqrt_dim = torch.as_tensor(self.sqrt_dim_per_gate(x), dtype=x.dtype, device=x.device)
        critical, typical = self.critical(x), x.square().mean().sqrt() * sqrt_dim.max()
        if per_coordinate:  # AdamW's update of a steady gradient is 1
            critical, typical = critical / sqrt_dim.max(), torch.ones_like(typical)
        return kernel.needed(torch.zeros_like(critical) if running is None else running, critical, typical)

    def strength_multiplier(self, w: Tensor, *, decoupled: bool) -> Tensor | float:
        if not decoupled:
            return 1.0
        return self.sqrt_dim_per_gate(w) / self.partition(w).size(w).sqrt()

    def per_unit(self, rate: Tensor, w: Tensor) -> Tensor:
        groups, gates = self.partition(w), self.gates(w)
        return rate if rate.numel() == 1 else kernel.gate_decay(groups.expand(rate).reshape(w.shape), gates)

    def default_strength(self, *, decoupled: bool) -> float:
        raise ValueError(f"{self} has an automatic strength, which only symopt's optimizers know; give strength=")

    # -- the verbs ---------------------------------------------------------------------------------------------------

    def compose(self, factors: Factors, out: Tensor | None = None) -> Tensor:
        base, gate, direction = factors
        return self.onto(base) + self.gates(base).scale(gate, self.off(direction))

    def split(self, w: Tensor, imbalance: Tensor | float = 0.0) -> Factors:
        gates, off = self.gates(w), self.off(w)
        gate = heavy_factor(gates.sum(off * off).sqrt(), imbalance, 2)
        inverse = torch.where(gate > 0, 1 / gate.clamp(min=torch.finfo(w.dtype).tiny), 0.0)
        return self.onto(w), gate, gates.scale(inverse, off)

    def pullback(self, factors: Factors, grad: Tensor, out: Outs | None = None) -> Factors:
        _, gate, direction = factors
        gates, off = self.gates(grad), self.off(grad)
        return self.onto(grad), gates.sum(off * direction), gates.scale(gate, off)

    def mirror(self, factors: Factors) -> Factors:
        base, gate, direction = factors
        return base, -gate, -direction

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
        if isinstance(decay, Tensor) and decay.dim() > 0 and decay.numel() == 1:
            decay = decay.reshape(())
        if (z := self.coordinates(w)) is not None:  # the same step, of a few numbers and the plane 0
            d, zero = self.coordinates(delta), torch.zeros_like(z)
            assert d is not None
            new = kernel.plane_step(
                z, zero, zero, d, decay, imbalance, metric_scale, whole(z), saturated=saturated, snaps=snaps
            )
            return w - delta + self.lift(new - z + d, w)
        if isinstance(decay, Tensor) and decay.dim() > 0:
            decay = (groups or self.partition(w)).expand(decay).reshape(w.shape)
        along = self.onto(delta)
        return kernel.plane_step(
            w,
            self.onto(w),
            along,
            delta - along,
            decay,
            imbalance,
            metric_scale,
            self.gates(w),
            saturated=saturated,
            snaps=snaps,
        )

    def penalty(self, w: Tensor) -> Tensor:
        return self.size(w).sum()

    def size(self, w: Tensor, groups: Groups | None = None) -> Tensor:
        if (z := self.coordinates(w)) is not None:
            return whole(z).sum(z * z).sqrt()
        off = self.off(w)
        return self.gates(w).sum(off * off).sqrt()

    def start(self, w: Tensor, relative: float, groups: Groups | None = None) -> tuple[Tensor, Tensor]:
        """As of other constraints, from what is off the plane.

        A weight on it, up to rounding, needs no imbalance to be where it is, and has the scale of a random one of its
        norm: that of what rounding leaves would be no scale for anything.
        """
        sizes, norm = self.size(w), w.norm()
        size = torch.where(sizes.norm() <= self.rounding(w) * norm, 0.0, sizes.square().mean().sqrt())
        random = 2 * norm * math.sqrt(self.codimension(w) / (w.numel() * sizes.numel()))
        c = relative * size
        scale = (c * c + 4 * size * size).sqrt()
        return c, torch.where(size > 0, scale, torch.where(random > 0, random, 1.0))

    def fold(self, w: Tensor) -> Tensor:
        return self.onto(w)

    def violation(self, w: Tensor) -> Tensor:
        """Distance from the plane, relative to the weight."""
        z, norm = self.coordinates(w), w.norm()
        off = (self.off(w) if z is None else z).norm()
        return torch.where(norm > 0, off / norm.clamp(min=torch.finfo(w.dtype).tiny), off)

    def rounding(self, w: Tensor) -> float:
        """Largest :meth:`violation` of a weight that lies on the plane as exactly as its precision can say."""
        return 64 * torch.finfo(w.dtype).eps
