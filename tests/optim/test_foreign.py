"""A direction and a constraint that the library does not know, each one class of CONTRIBUTING's recipes.

The reference steps them, alone and with everything that the library has, and the fused backends say which pair they
lack.  The direction keeps its moments under Adam's names, so that whoever looks at a state would take it for Adam.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, final

import pytest
import torch
from torch import Tensor

import symopt
from support.cases import cases
from support.directions import Units, plain
from support.oracles import STRENGTH, Explicit
from support.runs import gradients, optimizer
from support.table import (
    CONSTRAINTS,
    EVERY,
    EVERY_OPTIMIZER,
    ConstraintRow,
    OptimizerRow,
    Row,
    bound_module,
    constrained_parameter,
    taken,
)
from support.tolerances import tolerance
from symopt.backends import FUSED
from symopt.constraints.base import Constraint, Factors, Outs
from symopt.constraints.gauge import heavy_factor
from symopt.optim.base import ConstrainedOptimizer
from symopt.optim.direction import Direction, Moment, Moments, Options, State
from symopt_kernels.groups import Groups
from symopt_kernels.triton import table as triton_table

# -- a direction -----------------------------------------------------------------------------------------------------


@final
class DriftDirection(Direction):
    """Adam's without bias corrections and without a step count: ``m / (sqrt(v) + eps)``, one v per unit."""

    table = (Moment("exp_avg", "first"), Moment("exp_avg_sq", "second", per_unit=True))
    scaled_by = "gradient"
    switches = ("decoupled",)

    def decoupled(self, options: Options) -> bool:
        return bool(options["decoupled"])

    def lead(self, options: Options, state: State, grad: Tensor) -> tuple[Tensor, Moments]:
        beta = options["betas"][0]
        exp_avg = beta * state["exp_avg"] + (1 - beta) * grad
        return exp_avg, {"exp_avg": exp_avg}

    def scale(self, options: Options, state: State, mean_square: Tensor) -> tuple[Tensor, Moments]:
        beta = options["betas"][1]
        exp_avg_sq = beta * state["exp_avg_sq"] + (1 - beta) * mean_square
        return 1 / (exp_avg_sq.sqrt() + options["eps"]), {"exp_avg_sq": exp_avg_sq}

    def preconditioner(
        self, options: Options, state: State, average: Callable[[Tensor], Tensor] = lambda moment: moment
    ) -> Tensor | None:
        found = state.get("exp_avg_sq")
        return None if found is None else 1 / (average(found).sqrt() + options["eps"])


@final
class Drift(ConstrainedOptimizer):
    """An optimizer that torch does not have either."""

    direction = DriftDirection()

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 0.0,
        decoupled: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "decoupled": decoupled}, **options)

    def _step_plain(self, group: dict[str, Any]) -> None:
        for p in self.unconstrained(group):
            if p.grad is not None:
                self.direction.init(group, self.state[p], p, None)
                update, _ = self.direction.update(group, self.state[p], p.grad, None, decoupled=True)
                p.sub_(group["lr"] * update)


# -- a constraint ----------------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True, repr=False)
class RowMax(Constraint):
    """Rows of zeros by ``w_g = s_g d_g``, where the direction decays by its largest weight: charges ``max_i |w_gi|``.

    Decay of ``s**2 / 2 + max_i d_i**2 / 2`` at its least is ``||w_g||_inf``.  A step is the proximal one of that
    penalty, which clips a row at the level where what it cuts off is ``decay`` in all.
    """

    retraction: ClassVar[str] = "row_max"

    strength: float | None = None

    def partition(self, w: Tensor, index: Tensor | None = None) -> Groups:
        return Groups(w.shape[0], tuple(w.shape), tuple(range(1, w.dim())))

    def compose(self, factors: Factors, out: Tensor | None = None) -> Tensor:
        return self.partition(factors[1]).scale(*factors, out)

    def split(self, w: Tensor, imbalance: Tensor | float = 0.0) -> Factors:
        gate = heavy_factor(self.size(w), imbalance, 2)
        return gate, self.partition(w).scale(torch.where(gate > 0, 1 / gate, 0.0), w)

    def pullback(self, factors: Factors, grad: Tensor, out: Outs | None = None) -> Factors:
        rows = self.partition(grad)
        return rows.sum(grad * factors[1]), rows.scale(factors[0], grad)

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
        moved = w - delta
        size, cut = moved.flatten(1).abs(), decay.reshape(-1, 1) if isinstance(decay, Tensor) else decay
        sorted_ = size.sort(1, descending=True).values
        levels = (sorted_.cumsum(1) - cut) / torch.arange(1, size.shape[1] + 1)
        level = levels.amax(1, keepdim=True).clamp(min=0)  # as a function of how many are cut, it rises, then falls
        return (moved.flatten(1).sign() * torch.minimum(size, level)).reshape(w.shape)

    def penalty(self, w: Tensor) -> Tensor:
        return self.size(w).sum()

    def size(self, w: Tensor, groups: Groups | None = None) -> Tensor:
        return w.flatten(1).abs().amax(1)

    def default_strength(self, *, decoupled: bool) -> float:
        return 0.06 if decoupled else 1e-4


# -- the foreign direction with everything that the library has ------------------------------------------------------


def drift(g: Tensor, state: dict[str, Any], options: Any, units: Units) -> tuple[Tensor, Tensor | float]:
    """The direction, written out once more."""
    state["exp_avg"] = 0.9 * state.get("exp_avg", 0 * g) + 0.1 * g
    square = units.mean(g * g)
    state["exp_avg_sq"] = 0.99 * state.get("exp_avg_sq", 0 * square) + 0.01 * square
    scale = 1 / state["exp_avg_sq"].sqrt()
    return state["exp_avg"] * units.spread(scale), 1.0 if options["decoupled"] else scale


PLAIN = plain(drift, decoupled=False)
DRIFT = OptimizerRow("drift", Drift, PLAIN, 0.01, formula=drift, decoupled=False)
DECOUPLED = OptimizerRow("drift-decoupled", Drift, PLAIN, 0.01, {"decoupled": True}, formula=drift, decoupled=True)
ROW_MAX = ConstraintRow("row-max", RowMax, (6, 5))

BACKENDS = [None, "reference"]


@cases(row=CONSTRAINTS, opt_row=[DRIFT, DECOUPLED], time_scale=["none", "saturated"], backend=BACKENDS)
def test_the_direction_under_every_constraint_is_the_factor_step(
    row: ConstraintRow, opt_row: OptimizerRow, time_scale: str, backend: str | None
) -> None:
    p = (module := constrained_parameter(row)).weight
    opt = optimizer(module, opt_row, strength=STRENGTH, time_scale=time_scale, backend=backend)
    oracle = Explicit(row, opt_row, p, time_scale=time_scale)
    for g in gradients(row.shape, 6):
        p.grad = g
        opt.step()
        oracle.step(g)
        oracle.compare(p, opt)


def drift_like_adam(opt: Any, k: int, lr: float, *, decoupled: bool) -> None:
    """Bias corrections as a schedule, with which step k of the foreign direction is that of Adam or AdamW at ``lr``."""
    first, second = 1 - 0.9**k, (1 - 0.99**k) ** 0.5
    strength = STRENGTH / (second / first) if decoupled else STRENGTH * first
    opt.param_groups[0] |= {"lr": lr * second / first, "strength": strength}


@cases(row=EVERY, opt_row=[DRIFT, DECOUPLED], time_scale=["none", "saturated"])
def test_the_direction_is_never_taken_for_adam(row: Row, opt_row: OptimizerRow, time_scale: str) -> None:
    """On every row, planes, low rank and free factors included, it is Adam exactly where its formula says so."""
    decoupled, cls = bool(opt_row.options), symopt.AdamW if opt_row.options else symopt.Adam
    ours, theirs, other = (bound_module(row) for _ in range(3))
    drift = optimizer(ours, opt_row, time_scale=time_scale)
    adam = cls(theirs, lr=0.01, betas=(0.9, 0.99), eps=0.0, strength=STRENGTH, time_scale=time_scale)
    unscheduled = optimizer(other, opt_row, strength=STRENGTH, time_scale=time_scale)
    for k in range(1, 7):
        drift_like_adam(drift, k, 0.01, decoupled=decoupled)
        for p, q, r in zip(ours.parameters(), theirs.parameters(), other.parameters(), strict=True):
            p.grad, q.grad, r.grad = (gradients(p.shape, 1, seed=k)[0] for _ in range(3))
        for opt in (drift, adam, unscheduled):
            opt.step()
        for p, q, r in zip(ours.parameters(), theirs.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=tolerance("backends"), atol=tolerance("backends"))
            assert k == 1 or not torch.allclose(r, q, rtol=1e-4)  # the corrections of the first step happen to be equal


# -- the foreign constraint under every optimizer --------------------------------------------------------------------


class ExplicitRowMax(Explicit):
    """Rows clipped one by one at the level that cuts off ``decay``, found by bisection."""

    def step(self, grad: Tensor) -> None:
        d, gain = self.direction(grad)
        decay = self.lr * self.strength * gain
        moved = (self.w - self.lr * d).reshape(self.shape)
        self.w = torch.cat([self.clipped(row, float(cut)) for row, cut in zip(moved, decay, strict=True)])

    @staticmethod
    def clipped(row: Tensor, cut: float) -> Tensor:
        sizes = [abs(x) for x in row.tolist()]
        if sum(sizes) <= cut:
            return torch.zeros_like(row)
        low, high = 0.0, max(sizes)
        for _ in range(100):
            level = (low + high) / 2
            low, high = (level, high) if sum(max(x - level, 0.0) for x in sizes) > cut else (low, level)
        return row.clamp(-high, high)


OUT = next(row for row in CONSTRAINTS if row.id == "group-out")
"""Whose units are rows, too."""


@cases(
    lambda opt_row, **_: taken(ROW_MAX, opt_row),
    opt_row=[*EVERY_OPTIMIZER, DRIFT, DECOUPLED],
    backend=BACKENDS,
    imbalance=[1.0, 0.0],
)
def test_the_constraint_under_every_optimizer(opt_row: OptimizerRow, backend: str | None, imbalance: float) -> None:
    p = (module := constrained_parameter(ROW_MAX)).weight
    opt = optimizer(module, opt_row, strength=5.0, backend=backend, imbalance=imbalance)
    oracle = ExplicitRowMax(OUT, opt_row, p, strength=5.0)
    close = {"rtol": tolerance("factor step"), "atol": tolerance("factor step"), "check_dtype": False}
    for g in gradients(ROW_MAX.shape, 12):
        p.grad = g
        opt.step()
        oracle.step(g)
        torch.testing.assert_close(p.detach().flatten(), oracle.w, **close)
        for key in oracle.state.keys() - {"imbalance", "metric_scale"}:
            torch.testing.assert_close(opt.state[p][key].flatten(), oracle.state[key].flatten(), **close)
    largest = p.detach().abs().amax(1, keepdim=True)
    assert bool(((p.detach().abs() == largest).sum(1) > 1).any())  # something was clipped


# -- everything else that an optimizer and a constraint do ------------------------------------------------------------


@cases(
    lambda row, opt_row: (opt_row.cls is Drift or row is ROW_MAX) and taken(row, opt_row),
    row=[*EVERY, ROW_MAX],
    opt_row=[*EVERY_OPTIMIZER, DRIFT, DECOUPLED],
)
def test_a_checkpoint_changes_no_bit(row: Row, opt_row: OptimizerRow) -> None:
    module, other = (bound_module(row) for _ in range(2))
    opt = optimizer(module, opt_row)

    def steps(opt: Any, first: int) -> None:
        for k in range(first, first + 4):
            for p in (p for group in opt.param_groups for p in group["params"]):
                p.grad = gradients(p.shape, 1, seed=k)[0]
            opt.step()

    steps(opt, 0)
    loaded = optimizer(other, opt_row)
    other.load_state_dict(module.state_dict())
    loaded.load_state_dict(opt.state_dict())
    copied = copy.deepcopy((module, opt))[1]
    for each in (opt, loaded, copied):
        steps(each, 4)
    for p, q, group in zip(module.parameters(), other.parameters(), copied.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q) and torch.equal(p, group)
    shown = str(symopt.report(module, opt))
    assert all(name in shown for name, _ in module.named_parameters())


def test_a_budget_under_the_direction_is_met_to_the_unit() -> None:
    torch.manual_seed(0)
    net = symopt.constrain(torch.nn.Linear(8, 6).double(), {"weight": symopt.GroupSparse("out", keep=2)})
    opt = Drift(net, lr=1e-2, total_steps=200)
    x, y = torch.randn(32, 8).double(), torch.randn(32, 6).double()
    for _ in range(200):
        opt.zero_grad()
        (net(x) - y).square().mean().backward()
        opt.step()
    assert int((net.weight != 0).any(1).sum()) == 2


# -- what the fused backends say --------------------------------------------------------------------------------------


def missing(direction: str, retraction: str) -> str:
    return f"it has no step for the direction {direction!r} with the retraction {retraction!r}"


def foreign(row: Row, opt_row: OptimizerRow, **_: Any) -> bool:
    return (opt_row is DRIFT or row is ROW_MAX) and taken(row, opt_row)


@cases(foreign, row=[*EVERY, ROW_MAX], opt_row=[*EVERY_OPTIMIZER, DRIFT])
def test_explain_names_the_pair_that_is_missing(
    row: Row, opt_row: OptimizerRow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_table, "UNAVAILABLE", None)  # whatever is installed here
    module = bound_module(row, dtype=torch.float32)
    opt = optimizer(module, opt_row)
    direction = opt.direction.row(opt.param_groups[0])
    assert opt_row is not DRIFT or direction == "DriftDirection"
    retraction = next(iter(symopt.constraints(module).values())).retraction
    for _, backend, reasons in opt.backends():
        assert backend == "reference"
        assert reasons == {**dict.fromkeys(FUSED, missing(direction, retraction)), "reference": None}
    assert symopt.explain(opt).count(missing(direction, retraction)) == len(FUSED) * len(list(module.parameters()))


@cases(foreign, row=[*EVERY, ROW_MAX], opt_row=[*EVERY_OPTIMIZER, DRIFT], backend=FUSED)
def test_a_backend_that_is_named_raises_before_anything_moves(
    row: Row, opt_row: OptimizerRow, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_table, "UNAVAILABLE", None)
    module = bound_module(row, dtype=torch.float32)
    module.register_parameter("free", torch.nn.Parameter(torch.ones(3)))  # which the same call would step
    opt = optimizer(module, opt_row, backend=backend)
    before = [p.detach().clone() for p in module.parameters()]
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    retraction = next(iter(symopt.constraints(module).values())).retraction
    with pytest.raises(ValueError, match=r"w\w*: backend=") as error:
        opt.step()
    assert missing(opt.direction.row(opt.param_groups[0]), retraction) in str(error.value)
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))
    assert all(set(state) <= {"progress"} for state in opt.state.values())


def test_unconstrained_weights_of_a_named_backend_are_refused_too() -> None:
    opt = Drift(torch.nn.Linear(3, 2), backend="native")
    opt.param_groups[0]["params"][0].grad = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"weight: backend='native' .*'DriftDirection' with the retraction 'plain'"):
        opt.step()


def test_an_orthogonalising_optimizer_refuses_the_constraint_by_name() -> None:
    with pytest.raises(ValueError, match=r"weight: Muon .* RowMax\(strength=0.3\) is none; .* use symopt.AdamW"):
        symopt.Muon(constrained_parameter(ROW_MAX))


def test_the_comparison_notices_a_constraint_that_is_off_by_1e_9(monkeypatch: pytest.MonkeyPatch) -> None:
    original = RowMax.retract
    monkeypatch.setattr(RowMax, "retract", lambda *args, **kwargs: original(*args, **kwargs) * (1 + 1e-9))
    with pytest.raises(AssertionError, match="failed for"):
        test_the_constraint_under_every_optimizer()
