"""The Triton kernels on numbers: on a GPU where there is one, else interpreted; run by ``test_triton.py``.

The oracle is the native step's: ``reference`` in fp64 on the same numbers, errors in ulps of the terms that are added.
Tiles are tiny, so that small tensors already have several blocks, tails, parts and lags.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import symopt
from support.cases import cases, some
from support.interpreter import DEVICE, poisoned, pytestmark
from support.kernel_cases import (
    DIRECTIONS,
    FORMATS,
    GRADIENT,
    OUTSIDE,
    RETRACTIONS,
    STEP,
    STRENGTH,
    THRESHOLD,
    Case,
    Problem,
    applies,
    arguments,
    make,
)
from support.kernel_oracle import distances, expect, same
from support.roles import roles
from support.table import CONSTRAINTS, OPTIMIZERS, OptimizerRow, constrained_parameter
from support.tolerances import tolerance
from symopt_kernels.backend import Request
from symopt_kernels.reference import elementwise, gauge
from symopt_kernels.triton import launch as triton_launch
from symopt_kernels.triton import product as triton_explicit
from symopt_kernels.triton import selection as triton_select

__all__ = ["poisoned", "pytestmark"]

# ---------------------------------------------------------------------------------------------- one step, every variant


def on_device(problem: Problem) -> dict[str, Tensor]:
    """Weight, gradient and state there, in the same memory order."""
    return problem.all() if DEVICE == "cpu" else {k: v.to(DEVICE) for k, v in problem.all().items()}


def run(case: Case, problem: Problem, **changes: Any) -> int:
    there = on_device(problem)
    state = {k: v for k, v in there.items() if k not in ("w", "g")}
    if case.budgeted:
        budget = [STRENGTH, OUTSIDE, THRESHOLD, case.imbalance_factor, math.inf]
        state["budget"] = torch.tensor(budget, dtype=torch.float64, device=DEVICE)
    entry = triton_launch.Entry()
    triton_launch.fill(
        entry, there["w"], roles(state), case.retraction, problem.groups, fresh=bool(case.option("fresh"))
    )  # fmt: skip
    entry.grad, entry.strength_kept = there["g"].data_ptr(), changes.pop("strength", STRENGTH)
    options = {k: v for k, v in arguments(case).items() if k != "instructions"}
    if options["grad_scale"] is not None:
        options["grad_scale"] = options["grad_scale"].to(DEVICE)
    triton_launch.step([entry], case.kind, **{**options, **changes})
    zeros = entry.zeros
    for key, value in problem.all().items():
        value.copy_(there[key])
    return zeros


def check(case: Case, **changes: Any) -> None:
    problem = make(case)
    expected = expect(case, problem)
    zeros = run(case, problem, **changes)
    errors = distances(case, problem, expected)
    weights = ("w", "master", "factor_0", "factor_1")
    bad = {
        key: f"{error:.1f} ulp"
        for key, error in errors.items()
        if not error <= tolerance("triton weight" if key in weights else "triton state")
    }
    assert not bad, f"{case}: {bad}"
    if case.retraction != "plain":
        assert zeros == int((problem.w == 0).sum()), f"{case}: zeros"
    for key, value in problem.all().items():
        if key == "step":
            assert value == STEP + 1, f"{case}: step"
        elif key not in expected and not (key == "imbalance" and case.retraction == "sparse_free"):
            assert same(value, problem.start[key]), f"{case}: {key} was written to"
    for guard in (part for pair in problem.guards for part in pair):
        assert bool((guard == 77).all()), f"{case}: wrote beyond a tensor"


SINGLES = [(1,), (7,), (127,), (128,), (129,), (300,)]
# Rows and columns in one piece, tails, lines, parts; heads, blocks, convolutions.
GROUPS = [
    ((1,), "out"), ((7, 5), "out"), ((19,), "out"), ((6, 64), "out"), ((3, 300), "out"), ((2, 700), "out"),
    ((5, 7), "in"), ((1, 70), "in"), ((40, 16), "in"), ((70, 9), "in"), ((20, 3, 3, 2), "in"), ((90, 24), "in"),
    ((8, 6), "head:2"), ((12, 4), "head:2"), ((4, 6), "block:2x3"), ((8, 32), "block:4x16"),
    ((6, 4, 3, 3), "block:3x2"),
]  # fmt: skip
FORMS = [name for name in FORMATS if name != "fp64"]


def combined(retraction: str) -> Iterator[Case]:
    """Every direction with every shape; all other choices rotate with prime steps."""
    shapes: list[Any] = GROUPS if retraction == "group" else [(shape, None) for shape in SINGLES]
    i = 0
    for k, direction in enumerate(DIRECTIONS):
        for j in range(3 if retraction == "group" else 2):
            shape, groups = shapes[(3 * k + 5 * j) % len(shapes)]
            i += 1
            budgeted = i % 3 == 0 and DIRECTIONS[direction][0] != "adam" and retraction != "plain"
            case = Case(
                direction, retraction, shape, groups,
                format=FORMS[i % len(FORMS)], saturated=i % 4 != 1, budgeted=budgeted, imbalance=(0.02, 0.0)[i % 2],
                imbalance_factor=0.99 if budgeted or i % 5 == 0 else None, maximize=i % 7 == 3,
                grad_scale=(None, 4.0)[i % 6 == 1], poison=i % 8 == 5 and math.prod(shape) > 6, seed=i,
            )  # fmt: skip
            if retraction == "plain":
                case = replace(case, weight_decay=(0.0, 0.1)[i % 2])
            if applies(case):
                yield case


@cases(case=[c for r in RETRACTIONS for c in combined(r)])
def test_a_step_is_the_references(case: Case) -> None:
    check(case)


@given(
    direction=st.sampled_from(list(DIRECTIONS)),
    retraction=st.sampled_from(["sparse", "sparse_free", "group"]),
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    kind=st.sampled_from(["out", "in"]),
    form=st.sampled_from(FORMS),
    seed=st.integers(0, 1000),
)
@settings(max_examples=10, deadline=None, derandomize=True, database=None)
def test_any_shape(
    direction: str, retraction: str, rows: int, columns: int, kind: str, form: str, seed: int
) -> None:  # fmt: skip
    groups = kind if retraction == "group" else None
    case = Case(direction, retraction, (rows, columns), groups, format=form, seed=seed)
    if applies(case):
        check(case)


@cases(change=[{"lr": 0.01 * (1 + 1e-4)}, {"strength": STRENGTH * 1.001}, {"beta1": 0.9001}])
def test_the_comparison_notices(change: dict[str, float]) -> None:
    for case in (Case(imbalance_factor=0.99), Case(retraction="group", shape=(5, 7), groups="in", seed=3)):
        with pytest.raises(AssertionError, match="ulp"):
            check(replace(case, shape=case.shape), **change)


# ------------------------------------------------------------------------------------- what test_native has no case for


def numbers(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, generator=generator)
    w[::7] *= 1e-5
    w[::11] = 0
    return w, torch.randn(n, generator=generator)


def one_step(w: Tensor, g: Tensor, retraction: str, *, lr: Any = 0.01, inside: Any = 0.3, **options: Any) -> Any:
    """SGD on copies; returns the weight."""
    state = {"imbalance": torch.tensor(0.02), "metric_scale": torch.tensor(1.5)}
    state = {k: v.to(DEVICE) for k, v in (state | options.pop("state", {})).items()}
    w, g = w.clone().to(DEVICE), g.to(DEVICE)
    entry = triton_launch.Entry()
    own = {k: options.pop(k) for k in ("depth", "pattern") if k in options}
    triton_launch.fill(entry, w, roles(state), retraction, None, **own)
    entry.grad, entry.strength_kept = g.data_ptr(), inside
    triton_launch.step([entry], "sgd", lr=lr, **GRADIENT, **options)
    return w.cpu()


@cases(depth=[3, 4, 5], saturated=[True, False])
def test_deep(depth: int, saturated: bool) -> None:
    w, g = numbers(300)
    args = (w.double(), 0.01 * g.double(), 0.003, torch.tensor(1.5).double(), depth)
    expected = elementwise.sparse_deep(*args, saturated=saturated)
    found = one_step(w, g, "sparse", depth=depth, saturated=saturated)
    assert torch.equal(found == 0, expected == 0)
    # Powers by log2 and exp2: a few ulp of the weight and of the step's own size.
    assert bool(((found - expected).abs() <= 16 * 2**-23 * (w.abs() + 0.02 * g.abs())).all())


@cases(pattern=[(2, 4), (1, 4), (1, 2), (5, 8)])
def test_patterns(pattern: tuple[int, int]) -> None:
    w, g = numbers(256)
    w[8:12] = 0.5  # of equals the first stay
    keep, of = pattern
    outer = elementwise.nm_pruned_mask(w.reshape(2, 128), keep, of).flatten()
    decay = 0.01 * torch.where(outer, OUTSIDE, STRENGTH).double()
    c, scale = torch.tensor(0.02).double(), torch.tensor(1.5).double()
    expected = elementwise.sparse(w.double(), 0.01 * g.double(), decay, c, scale, snaps=outer)
    budget = torch.tensor([STRENGTH, OUTSIDE, math.inf, 0.99, math.inf], dtype=torch.float64)
    found = one_step(w, g, "sparse", pattern=pattern, state={"budget": budget})
    assert bool(((found - expected).abs() <= 8 * 2**-23 * (w.abs() + 0.02 * g.abs() + 0.02)).all())
    budget[2] = -1.0  # nothing is outside yet
    expected = elementwise.sparse(w.double(), 0.01 * g.double(), 0.01 * STRENGTH, c, scale)
    found = one_step(w, g, "sparse", pattern=pattern, state={"budget": budget})
    assert bool(((found - expected).abs() <= 8 * 2**-23 * (w.abs() + 0.02 * g.abs() + 0.02)).all())


@cases(retraction=["plain", "sparse", "nm"], dtype=[torch.float32, torch.bfloat16])
def test_lion(retraction: str, dtype: torch.dtype) -> None:
    w, g = (x.to(dtype) for x in numbers(256))
    m = numbers(256, seed=1)[1]
    g[3] = m[3] = 0.0
    g[5], g[7] = math.nan, math.inf
    lr, beta1, beta2, c, scale = 0.01, 0.9, 0.99, torch.tensor(0.02).double(), torch.tensor(1.5).double()
    lead = beta1 * m.double() + (1 - beta1) * g.double()
    assert lead.abs().sort().values[1] > 1e-6  # the sign of no other hangs on rounding
    delta = lr * torch.where(lead.isfinite(), lead.sign(), math.nan)
    state = {"imbalance": torch.tensor(0.02), "metric_scale": torch.tensor(1.5)}
    options: dict[str, Any] = {"pattern": (2, 4) if retraction == "nm" else None}
    if retraction == "plain":
        state, expected = {}, elementwise.plain(w.double(), delta, lr * 0.1)
    elif retraction == "sparse":
        expected = elementwise.sparse(w.double(), delta, lr * STRENGTH, c, scale)
    else:
        state["budget"] = torch.tensor([STRENGTH, OUTSIDE, math.inf, 0.99, math.inf], dtype=torch.float64)
        pruned = elementwise.nm_pruned_mask(w.reshape(2, 128), 2, 4).flatten()
        decay = lr * torch.where(pruned, OUTSIDE, STRENGTH).double()
        expected = elementwise.sparse(w.double(), delta, decay, c, scale, snaps=pruned)
    there = {k: v.to(DEVICE) for k, v in {"w": w.clone(), "g": g, "exp_avg": m.clone(), **state}.items()}
    entry = triton_launch.Entry()
    own = {k: v for k, v in there.items() if k not in ("w", "g")}
    triton_launch.fill(entry, there["w"], roles(own), "plain" if retraction == "plain" else "sparse", **options)
    entry.grad, entry.strength_kept = there["g"].data_ptr(), STRENGTH
    triton_launch.step([entry], "lion", lr=lr, beta1=beta1, beta2=beta2, weight_decay=0.1)
    found, rounding = there["w"].cpu().double(), torch.finfo(dtype).eps / 2 * (dtype != torch.float32)
    close = (found - expected).abs() <= 8 * 2**-23 * (w.double().abs() + lr + 0.02) + rounding * expected.abs()
    assert bool((close | (found.isnan() & expected.isnan())).all()) and bool(found[[5, 7]].isnan().all())
    moved = beta2 * m.double() + (1 - beta2) * g.double()
    near = {"rtol": tolerance("fp32"), "atol": tolerance("fp32") / 10}
    torch.testing.assert_close(there["exp_avg"].cpu().double(), moved, **near, equal_nan=True)


@pytest.mark.parametrize(("direction", "retraction"), [("lion", "group"), ("foreign", "sparse"), ("foreign", "plain")])
def test_a_direction_that_is_not_listed_never_runs_as_another(direction: str, retraction: str) -> None:
    w, g = (x.reshape(30, 10).to(DEVICE) for x in numbers(300))
    groups = symopt.GroupSparse("out").partition(w) if retraction == "group" else None
    request = Request(direction, retraction, (w,), groups=groups)
    assert f"no step for the direction {direction!r} with the retraction {retraction!r}" in str(
        triton_launch.why_not(request)
    )
    assert triton_launch.why_not(replace(request, direction="adamw")) is None
    # As if it were Adam: it has Adam's state.
    numbers_of_all = {"imbalance": torch.tensor(0.02), "metric_scale": torch.tensor(1.5), "step": torch.tensor(3.0)}
    state = {key: x.to(DEVICE) for key, x in numbers_of_all.items()}
    state |= {key: torch.zeros_like(w) if groups is None else w.new_zeros(30) for key in ("exp_avg", "exp_avg_sq")}
    before, entry = w.clone(), triton_launch.Entry()
    triton_launch.fill(entry, w, roles(state), retraction, groups)
    entry.grad = g.data_ptr()
    with pytest.raises(ValueError, match=f"no direction '{direction}' with the retraction '{retraction}'"):
        triton_launch.step([entry], direction, lr=0.01, beta1=0.9, beta2=0.99)
    assert torch.equal(w, before)


def test_what_it_cannot_step_it_refuses_by_name() -> None:
    w = torch.zeros(8, 6, device=DEVICE)
    rows, index = (symopt.GroupSparse(by).partition(w) for by in ("out", torch.arange(48).reshape(8, 6) % 5))
    wrapped = torch.nn.Buffer(w).as_subclass(torch.Tensor)
    assert triton_launch.why_not(Request("sgd", "group", (wrapped,), groups=rows)) is None
    other = "meta" if DEVICE == "cpu" else "cpu"
    for request, reason in (
        (Request("sgd", "plain", (w.to(other),)), "runs on GPUs"),
        (Request("sgd", "plain", (w.double(),)), "not torch.float64"),
        (Request("sgd", "plain", (w,), differentiable=True), "differentiable=True"),
        (Request("sgd", "plain", (w[:, ::2],)), "not those of a dense tensor"),
        (Request("sgd", "nm", (w.T,), pattern=(2, 4)), "do not lie side by side"),
        (Request("sgd", "nm", (w,), pattern=(1, 3)), "M in (2, 4, 8, 16), not 1:3"),
        (Request("sgd", "group", (w,), groups=index), "not an index map"),
        (Request("sgd", "orbit", (w.T,)), "not those of a contiguous tensor"),
        (Request("sgd", "units", (w, w.half())), "of one format on one device"),
    ):
        assert reason in str(triton_launch.why_not(request)), request


def test_errors_are_at_most_twice_those_of_torch() -> None:
    w, g = numbers(3000)
    c, scale = torch.tensor(0.02), torch.tensor(1.5)
    exact = elementwise.sparse(w.double(), 0.01 * g.double(), 0.003, c.double(), scale.double())
    plain = elementwise.sparse(w, 0.01 * g, 0.003, c, scale)
    found = one_step(w, g, "sparse")
    for norm in (torch.linalg.vector_norm, lambda x: x.abs().max()):
        assert norm(found - exact) <= tolerance("triton over torch") * norm(plain - exact)


def test_numbers_may_be_tensors() -> None:
    w, g = numbers(300)
    lr, strength = (torch.tensor(x, device=DEVICE) for x in (0.01, 0.3))
    assert torch.equal(one_step(w, g, "sparse", lr=lr, inside=strength), one_step(w, g, "sparse"))


@cases(retraction=["sparse", "group"])
def test_an_overflow_moves_nothing(retraction: str) -> None:
    groups = "in" if retraction == "group" else None
    case = Case("nesterov-fresh", retraction, (9, 40), groups)
    problem = make(case)
    problem.state["momentum_buffer"].zero_()
    problem.start["momentum_buffer"].zero_()
    before = copy.deepcopy(problem.all())
    run(case, problem, found_inf=torch.ones((), device=DEVICE))
    assert all(same(value, before[key]) for key, value in problem.all().items())


def test_stochastic_rounding_has_the_right_mean_and_keeps_what_fits() -> None:
    n = 1024
    w = torch.full((n,), 1.0, dtype=torch.bfloat16)
    for g, fits in ((0.0, True), (0.2 * 2**-7, False)):
        found = torch.stack([
            one_step(w, torch.full((n,), -g, dtype=torch.bfloat16), "plain", lr=1.0, inside=0.0, seed=s).float()
            for s in range(2)
        ])  # fmt: skip
        assert set(found.unique().tolist()) <= {1.0, 1 + 2**-7}
        share = float((found > 1).float().mean())
        assert share == 0 if fits else abs(share - 0.2) < 5 * math.sqrt(0.16 / (2 * n))
    assert not torch.equal(found[0], found[1])


def test_many_tensors_are_few_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    net = torch.nn.ModuleList(torch.nn.Linear(5, 3) for _ in range(5)).to(DEVICE)
    symopt.constrain(net, {"*.weight": symopt.Sparse()})
    opt = symopt.AdamW(net, backend="triton")
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    opt.step()
    plans = {id(slot.entry.plan): slot.entry.plan for slot in opt._slots.values() if slot.entry.plan}
    assert [len(plan.buckets) for plan in plans.values()] == [2]  # weights, biases
    tables = [bucket.table for plan in plans.values() for _, bucket in plan.buckets]
    sent = [bucket._sent for plan in plans.values() for _, bucket in plan.buckets]
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    opt.step()
    (plan,) = plans.values()
    assert all(a is b.table for a, (_, b) in zip(tables, plan.buckets, strict=True))
    assert [b._sent for _, b in plan.buckets] != sent


# ----------------------------------------------------------------------------------------------------- whole optimizers

ROWS = [row for row in CONSTRAINTS if row.id in ("sparse", "group-in-conv", "group-head-packed")]


@some(row=ROWS, opt_row=[o for o in OPTIMIZERS if o.id in ("sgd-nesterov", "adam-amsgrad", "adamw")])
def test_optimizers_agree_with_the_reference(row: Any, opt_row: OptimizerRow) -> None:
    runs = []
    for backend in ("triton", "reference"):
        module = constrained_parameter(row, dtype=torch.float32).to(DEVICE)
        opt = opt_row.cls(module, lr=opt_row.lr, backend=backend, **opt_row.options)
        for t in range(2):
            generator = torch.Generator().manual_seed(t)
            module.weight.grad = torch.randn(row.shape, generator=generator).to(DEVICE)
            opt.step()
        runs.append((module.weight.detach(), opt.state_dict()["state"][0]))
    (w, state), (expected, wanted) = runs
    near: dict[str, float] = {"rtol": tolerance("backends, fp32"), "atol": 1e-6}
    torch.testing.assert_close(w, expected, **near)
    assert state.keys() == wanted.keys()
    for key, value in state.items():
        torch.testing.assert_close(value.cpu(), wanted[key].cpu(), **near)


def test_without_a_name_a_cpu_tensor_never_gets_it() -> None:
    net = symopt.constrain(torch.nn.Linear(3, 2), {"weight": symopt.Sparse()})
    assert [backend for _, backend, _ in symopt.AdamW(net).backends()] == ["native", "torch"]


# ------------------------------------------------------------------------------------------ selection and explicit mode


def test_ranks_are_exact() -> None:
    tensors = [*numbers(300), torch.tensor([math.nan, math.inf, 0.0, -0.0, 1e-42, -1e-42])]
    everything = torch.cat([t.abs() for t in tensors])
    ordered = torch.cat([everything[~everything.isnan()].sort().values, everything[everything.isnan()]])
    there = [t.to(DEVICE) for t in tensors]
    for k in (1, 2, 30, 31, 300, 605, 606):
        found = triton_select.rank(there, k if k % 2 else torch.tensor(k, device=DEVICE)).cpu()
        torch.testing.assert_close(found, ordered[k - 1], rtol=0, atol=0, equal_nan=True)


@cases(depth=[2, 3, 4], dtype=[torch.float32, torch.bfloat16])
def test_explicit_mode(depth: int, dtype: torch.dtype) -> None:
    factors = [numbers(300, seed)[1].to(dtype).to(DEVICE) for seed in range(depth)]
    grad = numbers(300)[1].to(dtype).to(DEVICE)
    accurate = [u.double().requires_grad_() for u in factors]
    w = gauge.product(tuple(accurate))
    near = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4e-7}
    torch.testing.assert_close(triton_explicit.compose(factors).double(), w, **near)
    (w * grad.double()).sum().backward()
    for strength in (None, 0.25):
        for found, u in zip(triton_explicit.pullback(factors, grad, strength), accurate, strict=True):
            assert u.grad is not None
            torch.testing.assert_close(found.double(), u.grad + (strength or 0.0) * u.detach(), **near)


def test_the_parametrization_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    net = symopt.constrain(torch.nn.Linear(6, 4).to(DEVICE), {"weight": symopt.Sparse(depth=3)}, mode="explicit")
    calls: list[str] = []
    for name in ("compose", "pullback"):
        plain = getattr(triton_explicit, name)
        monkeypatch.setattr(triton_explicit, name, lambda *a, n=name, f=plain: calls.append(n) or f(*a))
    net(torch.randn(2, 6, device=DEVICE)).square().sum().backward()
    assert calls == ["compose", "pullback"]
