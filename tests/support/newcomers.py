"""Two optimizers and a constraint that the library does not have, made by CONTRIBUTING's recipes, and their rows.

``pytest -p support.newcomers --case newcomer`` runs the suite on them as if they stood in the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

import symopt
from support import directions, table
from symopt.constraints.base import Constraint, Factors, Outs
from symopt.optim.base import ConstrainedOptimizer
from symopt.optim.direction import Direction, Moment, Moments, Options, State
from symopt_kernels.groups import Groups

# -- optimizers -------------------------------------------------------------------------------------------------------


@final
class SignumDirection(Direction):
    """The mean gradient, divided by its root mean square over the unit."""

    table = (Moment("mean", "first"),)
    scaled_by = "lead"

    def lead(self, options: Options, state: State, grad: Tensor) -> tuple[Tensor, Moments]:
        buffer = options["momentum"] * state["mean"] + (1 - options["momentum"]) * grad
        return buffer, {"mean": buffer}

    def scale(self, options: Options, state: State, mean_square: Tensor) -> tuple[Tensor, Moments]:
        return torch.where(mean_square == 0, 0.0, mean_square.rsqrt()), {}


@final
class ScaledDirection(Direction):
    """The gradient over the root of its mean square so far; the strength passes that scale, too."""

    table = (Moment("square", "second", per_unit=True),)
    scaled_by = "gradient"

    def decoupled(self, options: Options) -> bool:
        return False

    def lead(self, options: Options, state: State, grad: Tensor) -> tuple[Tensor, Moments]:
        return grad, {}

    def scale(self, options: Options, state: State, mean_square: Tensor) -> tuple[Tensor, Moments]:
        square = options["memory"] * state["square"] + (1 - options["memory"]) * mean_square
        return 1 / (square.sqrt() + 1e-8), {"square": square}

    def preconditioner(
        self, options: Options, state: State, average: Callable[[Tensor], Tensor] = lambda moment: moment
    ) -> Tensor | None:
        return None if "square" not in state else 1 / (average(state["square"]).sqrt() + 1e-8)


SHARED = ("strength", "time_scale", "imbalance", "backend")


@final
class Signum(ConstrainedOptimizer):
    """J. Bernstein et al., *signSGD*, ICML 2018 (arXiv 1802.04434), Algorithm 2."""

    direction = SignumDirection()

    def __init__(
        self, params: Any, lr: float = 1e-3, momentum: float = 0.9, weight_decay: float = 0.0, **options: Any
    ) -> None:
        shared = {key: options.pop(key) for key in SHARED if key in options}
        given = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "maximize": False, **options}
        super().__init__(params, given, **shared)

    def _step_plain(self, group: dict[str, Any]) -> None:
        step_alone(self, group)


@final
class Scaled(ConstrainedOptimizer):
    """T. Tieleman & G. Hinton, *RMSProp*, 2012."""

    direction = ScaledDirection()

    def __init__(
        self, params: Any, lr: float = 1e-3, memory: float = 0.9, weight_decay: float = 0.0, **options: Any
    ) -> None:
        shared = {key: options.pop(key) for key in SHARED if key in options}
        given = {"lr": lr, "memory": memory, "weight_decay": weight_decay, "maximize": False, **options}
        super().__init__(params, given, **shared)

    def _step_plain(self, group: dict[str, Any]) -> None:
        step_alone(self, group)


def step_alone(opt: ConstrainedOptimizer, group: dict[str, Any]) -> None:
    """Parameters without a constraint, each weight its own unit."""
    for p in opt.unconstrained(group):
        if p.grad is not None:
            opt.direction.init(group, opt.state[p], p, None)
            grad = -p.grad if group["maximize"] else p.grad
            update, _ = opt.direction.update(group, opt.state[p], grad, None, decoupled=True)
            p.mul_(1 - group["lr"] * group["weight_decay"]).sub_((group["lr"] * update).to(p.dtype))


def signum(
    g: Tensor, state: directions.State, options: directions.Options, units: directions.Units
) -> tuple[Tensor, Tensor | float]:
    """The direction, written out once more."""
    state["mean"] = m = torch.lerp(g, state.get("mean", 0 * g), options["momentum"])
    return m / units.spread(units.rms(m)), 1.0


def scaled(
    g: Tensor, state: directions.State, options: directions.Options, units: directions.Units
) -> tuple[Tensor, Tensor | float]:
    """The same."""
    square = units.mean(g * g)
    state["square"] = v = torch.lerp(square, state.get("square", 0 * square), options["memory"])
    scale = 1 / (v.sqrt() + 1e-8)
    return units.spread(scale) * g, scale


SIGNUM = table.OptimizerRow(
    "newcomer-signum", Signum, directions.plain(signum, momentum=0.9), 3e-3, formula=signum, decoupled=True
)

SCALED = table.OptimizerRow(
    "newcomer-scaled", Scaled, directions.plain(scaled, memory=0.9), 3e-3, formula=scaled, decoupled=False
)

# -- a constraint ------------------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True, repr=False)
class Columns(Constraint):
    """What ``GroupSparse("in")`` is, under a name that nothing else knows."""

    retraction = "columns"

    strength: float | None = None

    @property
    def same(self) -> symopt.GroupSparse:
        return symopt.GroupSparse("in", strength=self.strength)

    def partition(self, w: Tensor, index: Tensor | None = None) -> Groups:
        found = self.same.partition(w)
        assert found is not None
        return found

    def compose(self, factors: Factors, out: Tensor | None = None) -> Tensor:
        return self.same.compose(factors, out)

    def split(self, w: Tensor, imbalance: Tensor | float = 0.0) -> Factors:
        return self.same.split(w, imbalance)

    def pullback(self, factors: Factors, grad: Tensor, out: Outs | None = None) -> Factors:
        return self.same.pullback(factors, grad, out)

    def mirror(self, factors: Factors) -> Factors:
        return -factors[0], -factors[1]

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
        return self.same.retract(w, delta, decay, imbalance, metric_scale, groups, saturated=saturated, snaps=snaps)

    def penalty(self, w: Tensor) -> Tensor:
        return self.same.penalty(w)

    def size(self, w: Tensor, groups: Groups | None = None) -> Tensor:
        return self.same.size(w, groups)

    def default_strength(self, *, decoupled: bool) -> float:
        return 0.06 if decoupled else 1e-4


COLUMNS = table.ConstraintRow("newcomer-columns", lambda k: Columns(k), (6, 5), lambda place: place[1])


def pytest_configure() -> None:
    """As a plugin: the rows enter the table before any test reads it."""
    for rows in (table.OTHERS, table.ANY_SHAPE, table.EVERY_OPTIMIZER):
        rows += [SIGNUM, SCALED]
    for listed in (table.CONSTRAINTS, table.EVERY):
        listed.append(COLUMNS)
