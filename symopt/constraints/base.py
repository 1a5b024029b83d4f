"""What a constraint is: factors of the weight, the symmetry between them, and the step that symmetry induces.

A new constraint is one file with one final subclass of :class:`Constraint`, and one line in ``constraints/__init__``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from symopt_kernels.reference import SNAP, Groups

__all__ = ["Constraint", "Factors"]

Factors = tuple[Tensor, ...]


class Constraint(ABC):
    """Abstract base of frozen dataclasses.  The verbs are the same in every constraint, kernel, test and benchmark.

    ============  ==========================================================================================
    ``compose``   factors -> effective weight
    ``split``     effective weight -> factors in the gauge ``imbalance`` (a right inverse of ``compose``)
    ``pullback``  factors, gradient of the effective weight -> gradient of each factor
    ``mirror``    factors -> their mirror image, which ``compose`` cannot tell from the original
    ``retract``   the factor step seen from the effective weight alone
    ``penalty``   min over factors of ``sum ||f||**2 / 2``: what weight decay on the factors charges the weight
    ``violation`` how far the weight is from the structure it has all but reached; 0 once it is exact
    ``fold``      the weight with its structure enforced exactly
    ============  ==========================================================================================
    """

    name: ClassVar[str]
    """Name of the kernel row."""

    strength: float | None
    """Decay of the factors; None is :meth:`default_strength`."""

    def __post_init__(self) -> None:
        check_number(type(self).__name__, "strength", self.strength)

    # -- geometry --------------------------------------------------------------------------------------------------

    @abstractmethod
    def compose(self, factors: Factors) -> Tensor: ...

    @abstractmethod
    def split(self, w: Tensor, imbalance: Tensor | float = 0.0) -> Factors: ...

    @abstractmethod
    def pullback(self, factors: Factors, grad: Tensor) -> Factors: ...

    @abstractmethod
    def mirror(self, factors: Factors) -> Factors: ...

    @abstractmethod
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
    ) -> Tensor: ...

    @abstractmethod
    def penalty(self, w: Tensor) -> Tensor: ...

    @abstractmethod
    def size(self, w: Tensor, groups: Groups | None = None) -> Tensor:
        """Distance of every unit (weight, group, ...) from its own plane: ``|w|``, ``||w_g||``, ...; flat."""

    @abstractmethod
    def default_strength(self, *, decoupled: bool) -> float:
        """The strength that ``strength=None`` means; ``decoupled`` is AdamW's dimensionless one."""

    # -- what most constraints share ---------------------------------------------------------------------------------

    def bind(self, name: str, w: Tensor) -> Constraint:
        """Check that this constraint fits parameter ``name`` and return it ready to be stored beside the weight."""
        return self

    def partition(self, w: Tensor, index: Tensor | None = None) -> Groups | None:
        """The orbits that share one second moment and one zero; None where every weight is its own."""
        return None

    def index(self, w: Tensor) -> Tensor | None:
        """The map from weights to groups as a tensor, where no view of the weight can express it."""
        return None

    def charge(self, w: Tensor, *, decoupled: bool) -> Tensor | float:
        """Relative strength of every unit; not 1 only where several constraints share a weight."""
        return 1.0

    def fold(self, w: Tensor) -> Tensor:
        return w

    def violation(self, w: Tensor) -> Tensor:
        """Relative change of ``w`` if units below 1e-3 of the typical live one were rounded to zero."""
        size = self.size(w.detach()).to(_real(w))
        total = size.square().sum()
        live = size[size > 0]
        if live.numel() == 0:
            return total
        small = live[live <= 1e-3 * live.square().mean().sqrt()]
        return (small.square().sum() / total).sqrt()

    def start(self, w: Tensor, imbalance: float, groups: Groups | None = None) -> tuple[Tensor, Tensor]:
        """Initial ``imbalance`` c and ``metric_scale`` (rms of ``sqrt(c**2 + 4 size**2)``) of a weight.

        ``imbalance`` is in units of the root mean square of ``size``; an all-zero tensor takes ``1/sqrt(fan_in)`` per
        weight instead, because with c = 0 its zeros would never move.
        """
        size = self.size(w, groups)
        rms = size.square().mean().sqrt()
        fan_in = max(1, w.numel() // w.shape[0])
        fallback = math.sqrt(w.numel() / (size.numel() * fan_in))
        c = imbalance * torch.where(rms > 0, rms, fallback)
        return c, (c * c + 4 * rms * rms).sqrt()

    def collapse(self, size: Tensor, metric_scale: Tensor, *, saturated: bool = True) -> Tensor:
        """``strength * sum(lr) * gain`` that a unit of this size needs to reach exact zero at zero gradient.

        ``(size - M/2)_+ + M/2 ln(min(size, M/2) / tol)`` with ``M = metric_scale`` and ``tol = SNAP M``; without the
        time scale ``ln(size / tol) / 2``.  Holds once ``c << size``; against a gradient ``g`` multiply by
        ``strength / (strength - |g|)``.
        """
        tol = SNAP * metric_scale
        if not saturated:
            return (size / tol).clamp(min=1).log() / 2
        half = metric_scale / 2
        return (size - half).clamp(min=0) + half * (torch.minimum(size, half) / tol).clamp(min=1).log()


def _real(w: Tensor) -> torch.dtype:
    return torch.float64 if w.dtype == torch.float64 else torch.float32


def check_number(owner: str, field: str, value: object) -> None:
    """Raise unless ``value`` is None or a finite number >= 0."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{owner}: {field} must be a number or None, got {type(value).__name__}")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{owner}: {field} must be finite and >= 0, got {value}")
