"""What a constraint is: factors of the weight, the symmetry between them, and the step that symmetry induces.

A new constraint is one file with one final subclass of :class:`Constraint`; ``CONTRIBUTING.md`` has the recipe.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import fields
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from symopt.constraints.arguments import check_positional, shown
from symopt.constraints.budget import Budget, BudgetPlan
from symopt_kernels.groups import Groups
from symopt_kernels.orbits import PlaneLayout
from symopt_kernels.reference.gauge import SNAP, weight_scale
from symopt_kernels.units import Units

__all__ = ["Constraint", "Factors", "Outs", "check_depth", "check_number"]

C = TypeVar("C", bound="Constraint")
Factors = tuple[Tensor, ...]
Outs = tuple[Tensor | None, ...]


class Constraint(ABC):
    """Abstract base of frozen dataclasses, whose fields are keyword-only except for a first one that is no number.

    The verbs are the same in every constraint, kernel, test and benchmark.

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

    ``out`` is memory to write to, as in torch: a tensor for ``compose``, one or None per factor for ``pullback``.
    """

    @property
    @abstractmethod
    def retraction(self) -> str:
        """Name under which fused backends list its step; one that none lists is stepped by the reference."""

    strength: float | None
    """Decay of the factors; None is :meth:`default_strength`."""

    depth: int = 2
    """Number of factors of a weight."""

    @property
    def carries_factors(self) -> bool:
        """Whether the factors themselves are optimizer state (free gauge)."""
        return False

    @property
    def binds_many(self) -> bool:
        """Whether everything one key matches is bound into one: :meth:`bind_all` instead of :meth:`bind`."""
        return False

    is_plane: ClassVar[bool] = False
    """Whether the structure is known beforehand, so that any large enough strength will do: None is automatic."""

    @property
    def parameters_identical(self) -> bool:
        """Whether the tensors of a joint constraint end up equal, so that one can serve as all."""
        return False

    plan: ClassVar[BudgetPlan] = BudgetPlan()
    """How its budget is imposed."""

    is_product: ClassVar[bool] = False
    """Whether ``compose`` is the elementwise product of factors of the weight's shape."""

    uniform_strength: ClassVar[bool] = True
    """Whether :meth:`strength_multiplier` is 1."""

    is_matrix: ClassVar[bool] = False
    """Whether a weight is a product of two matrices, which ``thin`` gives, and not of factors of its own shape."""

    @property
    def free_factors(self) -> int:
        """How many factors, the first ones, do not decay."""
        return 0

    def __new__(cls: type[C], *args: object, **given: object) -> C:
        check_positional(cls, args, given)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check_number(type(self).__name__, "strength", self.strength)

    def __repr__(self) -> str:
        """The call that makes it: fields that differ from their defaults."""
        own = shown(fields(self), self)  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(own)})"

    # -- geometry --------------------------------------------------------------------------------------------------

    @abstractmethod
    def compose(self, factors: Factors, out: Tensor | None = None) -> Tensor: ...

    @abstractmethod
    def split(self, w: Tensor, imbalance: Tensor | float = 0.0) -> Factors: ...

    @abstractmethod
    def pullback(self, factors: Factors, grad: Tensor, out: Outs | None = None) -> Factors: ...

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
        snaps: Tensor | bool = True,
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

    def bind_all(self, names: tuple[str, ...], weights: tuple[Tensor, ...]) -> Constraint:
        """:meth:`bind` of a joint constraint: one for all; with several weights its verbs see them as a flat vector."""
        raise TypeError(f"{self} binds one parameter at a time")

    def selects(self, name: str) -> bool | None:
        """Whether it is meant for parameter ``name``, whatever its shape; None: the patterns alone decide."""
        return None

    def partition(self, w: Tensor, index: Tensor | None = None) -> Groups | None:
        """The orbits that share one second moment and one zero; None where every weight is its own."""
        return None

    def index(self, w: Tensor) -> Tensor | None:
        """The map from weights to groups as a tensor, where no view of the weight can express it."""
        return None

    @property
    def spanning_units(self) -> Units | None:
        """Units that span several parameters, of a constraint that has been bound to such; else None."""
        return None

    def plane_layout(self, like: Tensor) -> PlaneLayout | None:
        """How a fused kernel sees a plane; None of other constraints."""
        return None

    def one_sided(self, w: Tensor) -> bool:
        """Whether its mirrors multiply the matrix ``w`` from one side: reflections of rows, or of columns."""
        return False

    def strength_multiplier(self, w: Tensor, *, decoupled: bool) -> Tensor | float:
        """Relative strength of every unit; not 1 only where several constraints share a weight."""
        return 1.0

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        """Inner product of two weights in every unit, flat; ``inner(w, w)`` is ``size(w)**2``."""
        groups = self.partition(x)
        return (x * y).flatten() if groups is None else groups.sum(x * y)

    def dual(self, grad: Tensor) -> Tensor:
        """The gradient for :meth:`inner`: ``inner(dual(grad), x)`` is the sum of ``grad * x`` over each unit."""
        return grad

    def critical(self, grad: Tensor) -> Tensor:
        """The strength above which a unit without weight stays so against ``grad``: the penalty's dual norm of it."""
        dual = self.dual(grad)
        return self.inner(dual, dual).clamp(min=0).sqrt().max()

    def needed(self, x: Tensor, running: Tensor | None, *, per_coordinate: bool) -> Tensor:
        """The automatic strength's running estimate of the critical one, if the structure is ``fixed``."""
        raise TypeError(f"{self} has no automatic strength")

    def per_unit(self, rate: Tensor, w: Tensor) -> Tensor:
        """A rate of decay per orbit that shares a second moment, as one per unit."""
        return rate

    # -- budgets -----------------------------------------------------------------------------------------------------

    @property
    def budget(self) -> Budget | None:
        """How many units may live, or None where the strength decides."""
        return None

    def shared_budget(self) -> Constraint:
        """Weights for which this is equal share a budget whose scope is not a tensor."""
        return self

    def pruned(self, w: Tensor, threshold: Tensor | float, groups: Groups | None) -> Tensor:
        """Which units have no place in the budget: those up to the threshold; one truth value per unit, flat."""
        return self.size(w, groups) <= threshold

    def units(self, truth: Tensor, w: Tensor, groups: Groups | None) -> Tensor:
        """A value per unit, given to each of its weights."""
        return truth.reshape(w.shape) if groups is None else groups.expand(truth).reshape(w.shape)

    def fold(self, w: Tensor) -> Tensor:
        return w

    def thin(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Two factors with as few columns as the structure of ``w`` needs, of a :attr:`product`."""
        raise TypeError(f"{self} has no thin factors")

    def rounding(self, w: Tensor) -> float:
        """Largest :meth:`violation` of a weight whose structure is exact."""
        return 0.0

    def violation(self, w: Tensor) -> Tensor:
        """Relative change of ``w`` if units below 1e-3 of the typical live one were rounded to zero."""
        size = self.size(w.detach()).to(_real(w))
        square = size.square()
        total, live = square.sum(), size.bool().count_nonzero()
        if live == 0:
            return total
        small = size <= 1e-3 * (total / live).sqrt()
        if small.count_nonzero() == size.numel() - live:  # the zeros alone, which is quick to see
            return total * 0
        return (square[small].sum() / total).sqrt()

    def imbalance(self, w: Tensor, relative: float, groups: Groups | None = None) -> Tensor:
        """Initial imbalance c of factors, ``relative * rms(size)**(2/depth)``.

        An all-zero tensor takes ``1/sqrt(fan_in)`` per weight for the size, because with c = 0 it would never move.
        """
        size = self.size(w, groups)
        fan_in = max(1, w.numel() // w.shape[0])
        rms = size.square().mean().sqrt()
        typical = torch.where(rms > 0, rms, math.sqrt(w.numel() / (size.numel() * fan_in)))
        return relative * typical ** (2 / self.depth)

    def start(self, w: Tensor, relative: float, groups: Groups | None = None) -> tuple[Tensor, Tensor]:
        """Initial ``imbalance`` c and ``metric_scale`` (root mean square of the metric over the units) of a weight."""
        size = self.size(w, groups)
        if self.depth > 2:  # the balanced gauge has no imbalance
            metric = self.depth * size ** (2 * (self.depth - 1) / self.depth)
            return torch.zeros_like(metric[0]), metric.square().mean().sqrt()
        c = self.imbalance(w, relative, groups)
        return c, (c * c + 4 * size.square().mean()).sqrt()

    def advance(
        self, factors: Factors, delta: Tensor, decay: Tensor | float, metric_scale: Tensor, *, saturated: bool = True
    ) -> tuple[Tensor, Factors]:
        """The step of a constraint that ``carries_factors``: returns ``w', factors'``."""
        raise TypeError(f"{self} has no factors to carry")

    def collapse(self, size: Tensor, metric_scale: Tensor, *, saturated: bool = True) -> Tensor:
        """``strength * sum(lr) * gain`` that a unit of this size needs to reach exact zero at zero gradient.

        With ``M = metric_scale`` at depth 2: ``(size - M/2)_+ + M/2 ln(min(size, M/2) / tol)``, ``tol = SNAP M``.  At
        depth D, with ``m = D size**(2(D-1)/D)`` and the knee k where ``m = M``:
        ``(m - M)_+ / (2(D-1)) + M/D ln(min(size, k) / tol)``; without the time scale ``ln(size / tol) / D``.  Holds
        once ``c << size``; against a gradient ``g`` (depth 2) multiply by ``strength / (strength - |g|)``.
        """
        depth = self.depth
        tol = SNAP * weight_scale(metric_scale, depth)
        if not saturated:
            return (size / tol).clamp(min=1).log() / depth
        far = (depth * size ** (2 * (depth - 1) / depth) - metric_scale).clamp(min=0) / (2 * (depth - 1))
        knee = torch.minimum(size, weight_scale(metric_scale, depth) / 2)
        return far + metric_scale / depth * (knee / tol).clamp(min=1).log()


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


def check_depth(owner: str, depth: object) -> None:
    """Raise unless ``depth`` is an integer >= 2."""
    if isinstance(depth, bool) or not isinstance(depth, int):
        raise TypeError(f"{owner}: depth must be an integer, got {type(depth).__name__}")
    if depth < 2:
        raise ValueError(f"{owner}: depth must be >= 2 (one factor has no symmetry), got {depth}")
