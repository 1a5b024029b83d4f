"""Direction: what an optimizer makes of a gradient, with the table of its moments.

The only place outside of an optimizer's own file that knows about moments knows them through this table.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from symopt.constraints import Constraint
from symopt_kernels.groups import Groups
from symopt_kernels.reference.gauge import math_dtype

__all__ = ["Direction", "Moment", "Moments", "Options", "ParamGroup", "State"]

ParamGroup = dict[str, Any]
"""One of ``param_groups``."""

Options = Mapping[str, Any]
"""The same, read only."""

State = MutableMapping[str, Any]
"""State of one parameter."""

Moments = dict[str, Tensor]
"""New values of state keys."""


@final
@dataclass(frozen=True)
class Moment:
    """One moment that a direction keeps, starting from zero, in the precision a weight is stepped in."""

    key: str
    """Its name in the state, torch's where torch has one."""
    role: str
    """Which moment it is to a fused kernel: ``"first"``, ``"second"`` or ``"peak"`` (largest second moment so far)."""
    per_unit: bool = False
    """One number per unit that shares it instead of one per weight."""
    lazy: bool = False
    """The first step makes it from the first gradient, instead of from zeros."""


class Direction(ABC):
    """Abstract, stateless: ``lead`` per parameter, then ``scale`` per unit; the update is ``scale * lead``.

    A direction that only the reference can step keeps :meth:`row` as it is: no fused backend lists that name.
    """

    table: ClassVar[tuple[Moment, ...]] = ()
    """Every moment that it may keep, whatever the options."""

    counts_steps: ClassVar[bool] = False
    """Whether the state has a counter ``step``."""

    scaled_by: ClassVar[Literal["gradient", "lead"] | None] = None
    """Of what :meth:`scale` takes the mean square over a unit; None: the scale is 1."""

    switches: ClassVar[tuple[str, ...]] = ()
    """Names of the options that :meth:`row` and :meth:`moments` depend on."""

    sided: ClassVar[bool] = False
    """Whether the update of a matrix commutes with reflections of its rows and columns only (orthogonalised ones)."""

    def row(self, options: Options) -> str:
        """Name under which fused backends list it."""
        return type(self).__name__

    def moments(self, options: Options) -> tuple[Moment, ...]:
        """Those of the table that these options keep."""
        return self.table

    def decoupled(self, options: Options) -> bool:
        """Whether the strength bypasses :meth:`scale`, which makes it dimensionless, as AdamW's weight decay does."""
        return True

    def settings(self, options: Options) -> dict[str, float | bool]:
        """Its numbers, as the fused kernels take them."""
        return {}

    def why_not(self, options: Options, constraint: Constraint) -> str | None:
        """Why these options cannot step a parameter under ``constraint``, and what to do; None if they can."""
        return None

    @abstractmethod
    def lead(self, options: Options, state: State, grad: Tensor) -> tuple[Tensor, Moments]:
        """The update of one parameter up to one factor per unit, and its new first moment."""

    def scale(self, options: Options, state: State, mean_square: Tensor) -> tuple[Tensor, Moments]:
        """What multiplies the lead of every unit, and new second moments."""
        raise TypeError(f"{type(self).__name__}: scaled_by is {self.scaled_by!r}, so it must define scale")

    def gain(
        self,
        options: Options,
        scale: Tensor | float,
        size: Tensor | None,
        shape: torch.Size,
        *,
        decoupled: bool,
    ) -> Tensor | float:
        """What multiplies ``lr * strength`` for the units of a parameter of this ``shape``.

        Decoupled: the :meth:`typical` update, for groups times the square root of their ``size`` (weights per unit),
        which makes the strength a signal-to-noise ratio per coordinate.  Coupled: the scale itself, so that fixed
        points are those of loss + penalty.
        """
        if decoupled:
            typical = self.typical(options, shape)
            return typical if size is None else typical * size.sqrt()
        return scale

    def typical(self, options: Options, shape: torch.Size) -> float:
        """Root mean square of the update of a steady gradient, for a parameter of this ``shape``; if decoupled."""
        return 1.0

    def preconditioner(
        self, options: Options, state: State, average: Callable[[Tensor], Tensor] = lambda moment: moment
    ) -> Tensor | None:
        """The :meth:`scale` as of the last step; None if it has none, or before a first step.

        ``average`` makes one number per unit of second moments that a checkpoint brought per weight.
        """
        return None

    @final
    def known_gain(
        self,
        options: Options,
        scale: Tensor | None,
        size: Tensor | None,
        shape: torch.Size,
        *,
        decoupled: bool,
    ) -> Tensor | float | None:
        """:meth:`gain` as of the last step, ``scale`` being the :meth:`preconditioner`; None if it is not known yet."""
        if scale is None and self.scaled_by is not None and not decoupled:
            return None
        return self.gain(options, 1.0 if scale is None else scale, size, shape, decoupled=decoupled)

    def strength_unit(self, p: Tensor, grad: Tensor | None, state: State, units: int) -> float | Tensor:
        """What a budget's strength of 1 means: 1 where updates are normalised."""
        return 1.0

    @final
    def init(self, options: Options, state: State, like: Tensor, count: int | None) -> None:
        """Create whatever is missing from ``state``; ``count`` units share the moments that are per unit."""
        dtype = math_dtype(like)
        if self.counts_steps and "step" not in state:
            wide = torch.get_default_dtype() == torch.float64  # as torch's, which must not be half precision
            device = like.device if options.get("capturable") or options.get("fused") else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float64 if wide else torch.float32, device=device)
        for moment in self.moments(options):
            if moment.lazy or moment.key in state:
                continue
            if moment.per_unit and count is not None:
                state[moment.key] = torch.zeros(count, dtype=dtype, device=like.device)
            else:
                state[moment.key] = torch.zeros_like(like, dtype=dtype, memory_format=torch.preserve_format)

    @final
    def advance(self, options: Options, state: State, grad: Tensor) -> Tensor:
        """Advance the first moment in ``state``; the lead."""
        lead, moments = self.lead(options, state, grad)
        _keep(options, state, moments)
        return lead

    @final
    def rescale(self, options: Options, state: State, mean_square: Tensor) -> Tensor:
        """Advance second moments in ``state``; the scale."""
        scale, moments = self.scale(options, state, mean_square)
        _keep(options, state, moments)
        return scale

    @final
    def update(
        self, options: Options, state: State, grad: Tensor, groups: Groups | None, *, decoupled: bool
    ) -> tuple[Tensor, Tensor | float]:
        """Update and gain of a parameter that is alone and whole."""
        if self.counts_steps:
            state["step"] += 1
        lead = self.advance(options, state, grad)
        size = None if groups is None else groups.size(grad)
        if self.scaled_by is None:
            return lead, self.gain(options, 1.0, size, grad.shape, decoupled=decoupled)
        square = grad * grad if self.scaled_by == "gradient" else lead * lead
        if groups is not None and size is not None:
            scale = self.rescale(options, state, groups.sum(square) / size)
            update = groups.scale(scale, lead)
        else:
            scale = self.rescale(options, state, square)
            update = scale * lead
        return update, self.gain(options, scale, size, grad.shape, decoupled=decoupled)


def _keep(options: Options, state: State, moments: Moments) -> None:
    """Write moments in place, so that their addresses stay; out of place where a graph goes through the step."""
    for key, value in moments.items():
        if options.get("differentiable", False) or key not in state:
            state[key] = value
        else:
            state[key].copy_(value)
