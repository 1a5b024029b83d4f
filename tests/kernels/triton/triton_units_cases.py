"""The Triton step of units that span several parameters, against the formulas in fp64; run by ``test_triton.py``.

The oracle goes through the units one by one.  Rounding is relative to the terms that are added, as in ``test_native``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import symopt
from support.cases import cases
from support.interpreter import DEVICE, poisoned, pytestmark
from support.roles import roles
from support.runs import Run, close, step_alike
from support.table import OPTIMIZERS
from support.tolerances import tolerance
from symopt_kernels.reference import gauge
from symopt_kernels.triton import launch as triton_launch
from symopt_kernels.triton import table as triton_table
from symopt_kernels.units import Part, Units

__all__ = ["poisoned", "pytestmark"]

LR, STRENGTH, PRUNED, THRESHOLD, SCALE, STEP = 0.01, 0.3, 1.5, 0.5, 0.7, 3.0
BETA1, BETA2, EPS = 0.9, 0.99, 1e-8
TINY = 1e-9  # the size of units that snap

Slices = tuple[tuple[int, ...], int, list[int], float]


def same(count: int) -> list[int]:
    return list(range(count))


SHAPES: dict[str, list[Slices]] = {
    # What writes the channels of a convolution with its norm, and an embedding that writes the same ones.
    "channels": [((6, 5, 3, 2), 0, same(6), 1.0), ((6,), 0, same(6), 0.5), ((6,), 0, same(6), 3.0),
                 ((9, 6), 1, [5, 3, 1, 0, 2, 4], 0.7)],
    # Units of several slices, in any order, and slices of no unit, the first and the last of several among them.
    "unbound": [((10, 4), 0, [-1, 2, 0, -1, 1, 2, 2, 0, -1, -1], 2.0),
                ((3, 10, 2), 1, [0, 0, -1, 2, 1, -1, 1, 1, 0, 2], 1.0), ((7,), 0, [-1, -1, 0, 1, 2, -1, 1], 0.5)],
    # Tiles in several parts, along rows and down columns; aligned ones.
    "long": [((3, 700), 0, [2, 0, 1], 1.0), ((90, 16), 1, [i % 3 for i in range(16)], 0.5)],
    # More units than one program combines, and a parameter that none of them has.
    "many": [((150,), 0, same(150), 1.0), ((160, 3), 0, [*same(150), *[-1] * 10], 2.0), ((4, 5), 0, [-1] * 4, 1.0)],
}  # fmt: skip
DIRECTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("sgd", {}),
    "momentum-fresh": ("sgd", {"momentum": 0.8, "dampening": 0.3, "fresh": True}),
    "nesterov": ("sgd", {"momentum": 0.9, "nesterov": True}),
    "adam": ("adam", {}),
    "adam-amsgrad": ("adam", {"amsgrad": True}),
    "adamw": ("adamw", {}),
    "adamw-amsgrad": ("adamw", {"amsgrad": True}),
}
FORMATS = {
    "fp32": (torch.float32, False),
    "bf16": (torch.bfloat16, False),
    "bf16+master": (torch.bfloat16, True),
    "fp16": (torch.float16, False),
    "fp16+master": (torch.float16, True),
}


@dataclass(frozen=True)
class Case:
    direction: str = "adamw"
    shapes: str = "channels"
    format: str = "fp32"
    budget: bool = False
    saturated: bool = True
    imbalance: float = 0.02
    imbalance_factor: float | None = None
    maximize: bool = False
    grad_scale: float | None = None
    poison: bool = False
    seed: int = 0

    @property
    def kind(self) -> str:
        return DIRECTIONS[self.direction][0]

    def option(self, name: str, default: Any = 0.0) -> Any:
        return DIRECTIONS[self.direction][1].get(name, default)


@dataclass
class Problem:
    """Parameters, gradients, states as a kernel sees them; ``guards`` is memory around them that must stay 77."""

    units: Units
    weights: list[Tensor]
    grads: list[Tensor]
    states: list[dict[str, Tensor]]
    guards: list[Tensor]


def make(case: Case) -> Problem:
    dtype, has_master = FORMATS[case.format]
    generator = torch.Generator().manual_seed(case.seed)
    guards: list[Tensor] = []

    def randn(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator)

    def put(x: Tensor) -> Tensor:
        """On the device, in memory of its own whose ends are watched; with an odd seed it is not aligned."""
        pad = 8 if case.seed % 2 == 0 else 5
        whole = torch.full((x.numel() + 2 * pad,), 77, dtype=x.dtype, device=DEVICE)
        own = whole[pad : pad + x.numel()].view(x.shape)
        own.copy_(x)
        guards.extend([whole[:pad], whole[pad + x.numel() :]])
        return own

    parts = [Part(shape, dim, torch.tensor(index), factor) for shape, dim, index, factor in SHAPES[case.shapes]]
    units = Units(1 + max(int(part.index.max()) for part in parts), tuple(parts))
    level = torch.ones(units.count)
    level[0] = TINY
    weights, grads, states = [], [], []
    for i, part in enumerate(parts):
        scale = units.expand(level, part, 1.0)
        w, g = randn(part.shape) * scale, 0.1 * randn(part.shape) * scale.sqrt()
        if case.poison and i == 0:
            g.view(-1)[-1] = math.nan
        state = {}
        w = w.to(dtype)
        if has_master:
            near = w.float() * (1 + torch.finfo(dtype).eps * 0.4 * (randn(part.shape).clamp(-1, 1)))
            state["master"] = put(torch.where(near.to(dtype) == w, near, w.float()))
        if case.kind != "sgd":
            state["exp_avg"] = put(0.1 * randn(part.shape) * scale.sqrt())
        elif case.option("momentum"):
            state["momentum_buffer"] = put(0.1 * randn(part.shape) * scale.sqrt())
            if case.option("fresh"):
                state["momentum_buffer"].fill_(math.nan)  # it holds nothing yet
        weights.append(put(w))
        grads.append(put(g.to(dtype)))
        states.append(state)
    shared = {"imbalance": put(torch.tensor([case.imbalance])), "metric_scale": put(torch.tensor([SCALE]))}
    if case.budget:
        budget = torch.tensor([STRENGTH, PRUNED, THRESHOLD, 0.9, math.inf], dtype=torch.float64)
        shared["budget"] = put(budget)
    if case.kind != "sgd":
        n = units.count + units.unbound
        shared |= {"exp_avg_sq": put(0.01 * randn((n,)).square() + 1e-4), "step": put(torch.tensor([STEP]))}
        if case.option("amsgrad"):
            shared["max_exp_avg_sq"] = put(0.02 * randn((n,)).square())
    for state in states:
        state |= shared
    return Problem(units, weights, grads, states, guards)


def entry_of(case: Case, problem: Problem, **changes: Any) -> triton_launch.UnitsEntry:
    entry = triton_launch.UnitsEntry()
    units = changes.get("units", problem.units)
    states = [roles(state) for state in problem.states]
    triton_launch.fill_units(entry, problem.weights, states, units, fresh=case.option("fresh", False))
    for own, g in zip(entry.entries, problem.grads, strict=True):
        own.grad, own.strength_kept = g.data_ptr(), changes.get("strength", STRENGTH)
    return entry


def arguments(case: Case) -> dict[str, Any]:
    scale = None if case.grad_scale is None else torch.tensor(case.grad_scale, device=DEVICE)
    return {
        "lr": LR, "beta1": BETA1, "beta2": BETA2, "eps": EPS, "saturated": case.saturated, "maximize": case.maximize,
        "momentum": case.option("momentum"), "dampening": case.option("dampening"), "grad_scale": scale,
        "nesterov": case.option("nesterov", False), "imbalance_factor": case.imbalance_factor,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- the oracle

Found = dict[str, list[tuple[Tensor, Tensor]]]
"""Values and the terms that their rounding is relative to."""


def expect(case: Case, problem: Problem) -> Found:
    units, shared = problem.units, problem.states[0]
    sgd, coupled = case.kind == "sgd", case.kind == "adam" and not case.budget
    momentum, dampening = case.option("momentum"), case.option("dampening")
    amplify = (1 - dampening) / (1 - momentum) if sgd else 1.0
    unbias1, unbias2 = 1 / (1 - BETA1 ** (STEP + 1)), 1 / (1 - BETA2 ** (STEP + 1))
    c, scale = float(shared["imbalance"]), float(shared["metric_scale"])
    found: Found = {"weight": [], "first": []}
    leads, lead_terms, grads, olds = [], [], [], []
    for w, g, state in zip(problem.weights, problem.grads, problem.states, strict=True):
        w = state.get("master", w).double().cpu()
        g = g.double().cpu() * (-1 if case.maximize else 1) / (case.grad_scale or 1.0)
        first = lead = g
        terms = g.abs()
        if not sgd:
            m = state["exp_avg"].double().cpu()
            first = lead = BETA1 * m + (1 - BETA1) * g
            terms = m.abs() + g.abs()
        elif momentum:
            if not case.option("fresh"):
                b = state["momentum_buffer"].double().cpu()
                first, terms = momentum * b + (1 - dampening) * g, momentum * b.abs() + g.abs()
            lead = g + momentum * first if case.option("nesterov") else first
            terms = terms + g.abs()
        found["first"].append((first, terms))
        leads.append(lead)
        lead_terms.append(terms)
        grads.append(g)
        olds.append(w)
        found["weight"].append((w.clone(), torch.zeros_like(w)))
    moments = shared["exp_avg_sq"].double().cpu().clone() if not sgd else torch.zeros(0).double()
    peaks = shared["max_exp_avg_sq"].double().cpu().clone() if case.option("amsgrad") else moments

    def advanced(i: int, square: float) -> float:
        """The preconditioner of second moment ``i``."""
        moments[i] = BETA2 * moments[i] + (1 - BETA2) * square
        peaks[i] = torch.maximum(peaks[i], moments[i])
        return 1 / (math.sqrt(peaks[i] * unbias2) + EPS)

    norms, decays = [], []
    for unit in range(units.count):
        views = [(k, part, i) for k, part in enumerate(units.parts) for i in (part.index == unit).nonzero().flatten()]

        def together(xs: list[Tensor], power: int, views: list[Any] = views) -> Tensor:
            return torch.cat([xs[k].select(p.dim, i).flatten() * p.factor**power for k, p, i in views])

        v, d, dt = together(olds, -1), together(leads, 1), together(lead_terms, 1)
        gain, rate = amplify, LR
        if not sgd:
            p = advanced(unit, float(together(grads, 1).square().mean()))
            rate, gain = LR * p * unbias1, p if coupled else math.sqrt(len(v))
        norm = float(v.norm())
        strength = PRUNED if case.budget and norm <= THRESHOLD else STRENGTH
        decay, pull = LR * strength * gain, rate * float(d.norm())
        decays.append(decay)
        metric = math.sqrt(c * c + 4 * norm**2)
        t = 1 / max(metric, scale, decay + 2 * pull) if case.saturated else 1 / max(1.0, decay)
        square, rho = (c + metric) / 2, 1 - t * decay
        shared_factor = rho - t * rate * float(d @ v) / max(square, 1e-38)
        bound = rho + t * rate * float(dt @ v.abs()) / max(square, 1e-38)
        shrink, shift = shared_factor * rho, shared_factor * square * t * rate
        new = float((shrink * v - shift * d).norm())
        snaps = not case.budget or norm <= THRESHOLD
        if new <= gauge.SNAP * scale:
            if pull < decay and snaps:
                shrink = shift = new = 0.0
            elif not snaps and new < norm:
                shrink, shift, new = 1.0, 0.0, norm
        if math.isfinite(new):
            norms.append(new)
        for k, part, i in views:
            value, terms = (x.select(part.dim, i) for x in found["weight"][k])
            w, u, a = olds[k].select(part.dim, i), leads[k].select(part.dim, i), part.factor**2
            value.copy_(shrink * w - shift * a * u)
            if shrink or shift:
                size = square * t * rate * a * lead_terms[k].select(part.dim, i)
                terms.copy_(bound * (abs(rho) * w.abs() + size))
    at = units.count
    for k, part in enumerate(units.parts):
        value, terms = found["weight"][k]
        own = part.bound.expand(part.shape).logical_not()
        for place in own.nonzero():
            j = tuple(place.tolist())
            rate = LR
            if not sgd:
                rate = LR * unbias1 * advanced(at, float(grads[k][j] ** 2))
                at += 1
            value[j] -= rate * leads[k][j]
            terms[j] = olds[k][j].abs() + rate * lead_terms[k][j]
    if not sgd:
        found["exp_avg_sq"] = [(moments, moments)]
    if case.option("amsgrad"):
        found["max_exp_avg_sq"] = [(peaks, peaks)]
    factor = 0.9 if case.budget else case.imbalance_factor
    if factor is None:
        decay = sorted(decays)[len(decays) // 10]
        if case.saturated:
            decay /= max(scale, 2 * sum(x * x for x in norms) / sum(norms))
        factor = max(max(1 - decay, 0.0) ** 4, gauge.MIN_IMBALANCE_FACTOR)
    new_c = torch.tensor([c * factor], dtype=torch.float64)
    found["imbalance"] = [(torch.where(new_c <= gauge.SNAP * scale, 0.0, new_c), torch.tensor([c]).double())]
    return found


def have(problem: Problem) -> dict[str, list[Tensor]]:
    shared = problem.states[0]
    first = "exp_avg" if "exp_avg" in shared else "momentum_buffer"
    found = {"weight": problem.weights, "imbalance": [shared["imbalance"]]}
    found |= {key: [shared[key]] for key in ("exp_avg_sq", "max_exp_avg_sq") if key in shared}
    if first in shared:
        found["first"] = [state[first] for state in problem.states]
    if "master" in shared:
        found["master"] = [state["master"] for state in problem.states]
    return found


def check(case: Case, **changes: Any) -> None:
    problem = make(case)
    expected = expect(case, problem)
    expected["master"] = expected["weight"]
    entry = entry_of(case, problem, **changes)
    options = {**arguments(case), **{k: v for k, v in changes.items() if k not in ("strength", "units")}}
    triton_launch.step([entry], case.kind, **options)
    half = torch.finfo(FORMATS[case.format][0]).eps / 2 if case.format != "fp32" else 0.0
    for key, values in have(problem).items():
        kind = "triton weight" if key in ("weight", "master") else "triton state"
        for value, (want, terms) in zip(values, expected[key], strict=True):
            value = value.double().cpu()
            slack = half * (want.abs() + torch.finfo(value.dtype).tiny) if key == "weight" else 0.0
            if key == "weight" and case.format.startswith("fp16"):
                slack = slack + 2.0**-25  # half of the least denormal
            bound = tolerance(kind) * 2.0**-23 * terms + slack
            close = ((value - want).abs() <= bound) | (value.isnan() & want.isnan())
            assert bool(close.all()), f"{case}: {key} by {((value - want).abs() / bound)[~close].max():.1f} of its ulp"
    dead = entry.entries
    assert [own.zeros for own in dead] == [int((w == 0).sum()) for w in problem.weights], f"{case}: zeros"
    if case.kind != "sgd":
        assert problem.states[0]["step"] == STEP + 1
    assert all(bool((guard == 77).all()) for guard in problem.guards), f"{case}: wrote beyond a tensor"


def every_case() -> list[Case]:
    """Every direction with every shape; the other choices rotate."""
    found, i = [], 0
    for direction in DIRECTIONS:
        for shapes in SHAPES:
            budget = i % 3 == 1
            case = Case(
                direction, shapes, list(FORMATS)[i % 5], budget, saturated=i % 4 != 2, imbalance=(0.02, 0.0)[i % 2],
                imbalance_factor=0.99 if i % 5 == 1 else None, maximize=i % 7 == 3,
                grad_scale=(None, 4.0)[i % 6 == 1], poison=i % 9 == 4, seed=i,
            )  # fmt: skip
            found.append(case)
            i += 1
    return found


@pytest.fixture(autouse=True)
def few_units_per_program(monkeypatch: pytest.MonkeyPatch, poisoned: None) -> None:
    monkeypatch.setattr(triton_table, "UNITS", 64)


@pytest.mark.parametrize("case", every_case(), ids=lambda c: f"{c.direction}-{c.shapes}")
def test_a_step_is_that_of_the_formulas(case: Case) -> None:
    check(case)


def test_units_snap_to_zero_together() -> None:
    case = Case(imbalance=0.0)
    problem = make(case)
    entry = entry_of(case, problem)
    triton_launch.step([entry], case.kind, **arguments(case))
    assert [own.zeros for own in entry.entries] == [30, 1, 1, 9]
    assert not problem.weights[3][:, 3].any()  # its slice of unit 0


CHANGES: list[dict[str, Any]] = [{"lr": LR * (1 + 1e-4)}, {"strength": STRENGTH * 1.001}, {"beta1": 0.9001}]


@pytest.mark.parametrize("shapes", ["channels", "unbound"])
def test_the_comparison_notices(shapes: str) -> None:
    case = Case(shapes=shapes, seed=2)
    check(case)
    right = make(case).units
    parts = list(right.parts)
    scaled = Units(right.count, (*parts[:-1], replace(parts[-1], factor=parts[-1].factor * 1.001)))
    moved = Units(right.count, (*parts[:-1], replace(parts[-1], index=parts[-1].index.roll(1))))
    for change in (*CHANGES, {"units": scaled}, {"units": moved}):
        with pytest.raises(AssertionError, match="of its ulp"):
            check(case, **change)


def test_numbers_may_be_tensors_and_an_overflow_moves_nothing() -> None:
    case = Case("nesterov", "unbound")
    ends = []
    for tensors in (False, True):
        problem = make(case)
        strength, lr = (torch.tensor(x, device=DEVICE) if tensors else x for x in (STRENGTH, LR))
        entry = entry_of(case, problem, strength=strength)
        before = [w.clone() for w in problem.weights]
        options = {**arguments(case), "lr": lr}
        triton_launch.step([entry], case.kind, **options, found_inf=torch.ones((), device=DEVICE))
        assert all(torch.equal(w, old) for w, old in zip(problem.weights, before, strict=True))
        triton_launch.step([entry], case.kind, **options, found_inf=torch.zeros((), device=DEVICE))
        ends.append([*problem.weights, *(state["momentum_buffer"] for state in problem.states)])
    assert all(torch.equal(x, y) for x, y in zip(*ends, strict=True))


def test_entries_share_launches_and_do_not_disturb_each_other() -> None:
    chosen = [Case(shapes="channels", seed=2), Case(shapes="unbound", seed=4)]
    alone, together = [make(case) for case in chosen], [make(case) for case in chosen]
    for case, problem in zip(chosen, alone, strict=True):
        triton_launch.step([entry_of(case, problem)], "adamw", **arguments(case))
    entries = [entry_of(case, problem) for case, problem in zip(chosen, together, strict=True)]
    triton_launch.step(entries, "adamw", **arguments(chosen[0]))
    plan = entries[0].plan
    assert plan is not None
    ((key, _),) = plan.buckets
    names = [launch.kernel.__name__ for launch in triton_launch.launches(key, "adamw")]
    forms = len(key[-1])
    assert names == ["survey_units"] * forms + ["combine_units"] + ["move_units"] * forms
    for a, b in zip(alone, together, strict=True):
        for x, y in zip(have(a).values(), have(b).values(), strict=True):
            assert all(torch.equal(one, other) for one, other in zip(x, y, strict=True))


def test_sums_may_be_reduced_between_survey_and_move() -> None:
    case = Case(seed=2)
    plain, hooked, changed = (make(case) for _ in range(3))
    seen: list[Tensor] = []

    def step(problem: Problem, combine: Callable[[Tensor], Any] | None) -> None:
        triton_launch.step([entry_of(case, problem)], "adamw", **arguments(case), combine=combine)

    step(plain, None)
    step(hooked, lambda sums: seen.append(sums.clone()))
    step(changed, lambda sums: sums.mul_(2))
    (sums,) = seen
    grads = [g.double().cpu() for g in hooked.grads]
    factors = [part.factor**2 for part in hooked.units.parts]
    gg = hooked.units.sum([a * g * g for a, g in zip(factors, grads, strict=True)])
    torch.testing.assert_close(sums[0].double().cpu(), gg, rtol=tolerance("fp32"), atol=0)
    assert sums.shape == (4, hooked.units.count)
    for x, y, z in zip(plain.weights, hooked.weights, changed.weights, strict=True):
        assert torch.equal(x, y) and not torch.equal(x, z)


@cases(case=[("sgd-nesterov", None), ("adam-amsgrad", 4), ("adamw", None), ("adamw", 4)])
def test_optimizers_agree_with_the_reference(case: tuple[str, int | None]) -> None:
    """Channels with their norm, of which one has no unit; a budget by its schedule."""
    (opt_row,), keep = [row for row in OPTIMIZERS if row.id == case[0]], case[1]
    runs: list[Run] = []
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Conv2d(2, 6, 2), torch.nn.BatchNorm2d(6)).to(DEVICE)
        index = torch.tensor([0, 1, 2, 3, 4, -1])
        made = symopt.GroupSparse({"0.*": (0, index), "1.*": (0, index)}, factors={"1.*": 2.0}, keep=keep)
        opt = opt_row.cls(symopt.constrain(net, {"*": made}), lr=opt_row.lr, backend=backend, **opt_row.options)
        assert {row[1] for row in opt.backends()} == {backend}
        runs.append((net, opt))
    schedules = [symopt.Anneal(opt, total_steps=200) for _, opt in runs] if keep else []
    for t in range(3):
        step_alike(runs, t)
        for anneal in schedules:
            anneal.step()
        close(*runs, kind="backends, fp32")
