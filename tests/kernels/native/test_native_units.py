"""Native units that span several parameters, against an oracle in fp64 that gathers unit after unit.

Errors are counted in ulps of the terms that are added up, as in ``test_native.py``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from support.tolerances import tolerance
from symopt_kernels.groups import Groups
from symopt_kernels.native import binding as native
from symopt_kernels.reference.gauge import MIN_IMBALANCE_FACTOR, SNAP
from symopt_kernels.units import Part, Units

torch.set_num_threads(1)

LR, KEPT, PRUNED, THRESHOLD, SCALE = 0.01, 0.3, 1.5, 0.3, 0.1
BETA1, BETA2, EPS, STEP = 0.9, 0.99, 1e-8, 3.0

DIRECTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("sgd", {}),
    "momentum": ("sgd", {"momentum": 0.9}),
    "nesterov": ("sgd", {"momentum": 0.9, "nesterov": True}),
    "nesterov-fresh": ("sgd", {"momentum": 0.9, "nesterov": True, "fresh": True}),
    "dampening": ("sgd", {"momentum": 0.8, "dampening": 0.3}),
    "dampening-fresh": ("sgd", {"momentum": 0.8, "dampening": 0.3, "fresh": True}),
    "adam": ("adam", {}),
    "adam-amsgrad": ("adam", {"amsgrad": True}),
    "adam-decoupled": ("adam", {"decoupled": True}),
    "adamw": ("adamw", {}),
    "adamw-amsgrad": ("adamw", {"amsgrad": True}),
}
FORMATS = {
    "fp32": (torch.float32, False),
    "fp64": (torch.float64, False),
    "bf16": (torch.bfloat16, False),
    "bf16+master": (torch.bfloat16, True),
    "fp16": (torch.float16, False),
    "fp16+master": (torch.float16, True),
}

# Parts as (shape, dimension, index, factor); an index is a list, or "own": a unit for every slice, or another rule.
LAYOUTS: dict[str, list[tuple[tuple[int, ...], int, Any, float]]] = {
    "rows": [((7, 5), 0, "own", 1.0)],
    "one-weight": [((1,), 0, "own", 1.0)],
    "one-unit": [((4, 3), 0, [0, 0, 0, 0], 1.0), ((5,), 0, [0] * 5, 0.3)],
    "vectors": [((9,), 0, "own", 1.0), ((9,), 0, "own", 0.25)],
    "convolution-and-norm": [((8, 3, 3, 2), 0, "own", 1.0), ((8,), 0, "own", 0.3), ((8,), 0, "own", 0.07)],
    "stream": [((6, 5), 0, "own", 1.0), ((7, 6), 1, "own", 0.5), ((2, 6, 3), 1, "own", 2), ((6,), 0, "own", 0.1)],
    "repeats": [((12, 5), 0, [0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 1, 2], 1.0), ((6, 4), 0, [2, 1, 0, 0, 1, 2], 0.7)],
    "some-unbound": [((6, 5), 0, [0, -1, 1, -1, -1, 2], 1.0), ((4, 6), 1, [-1, 2, 2, -1, 0, 1], 0.5)],
    "unbound-at-the-ends": [((9,), 0, [-1, -1, 0, 1, 0, 1, -1, -1, -1], 1.0), ((2, 5, 3), 1, [-1, 1, 0, 0, -1], 3.0)],
    "one-part-unbound": [((5, 4), 0, "own", 1.0), ((3, 4), 1, [-1] * 4, 0.5)],
    "alternating": [((40, 3), 0, "alternating", 1.0), ((3, 40), 1, "alternating", 0.5), ((40,), 0, "alternating", 2.0)],
    "long-runs": [((6, 200), 0, "own", 1.0), ((3, 6, 130), 1, [5, 4, -1, 2, 1, 0], 0.5)],
    "block-borders": [((5, 513), 0, "own", 1.0), ((33, 700), 1, "mod 5", 0.5), ((1030,), 0, "mod 5", 1.5)],
    "divided-columns": [((700, 130), 1, "mod 40", 1.0), ((130,), 0, "mod 40", 0.2)],
    "divided-columns-unbound": [((1100, 70), 1, "some of 20", 1.0)],
    "divided-rows": [((3, 40000), 0, "own", 1.0), ((3,), 0, "own", 0.1)],
    "last-stripe-has-one-slice": [((130, 4097), 1, "some of 300", 1.0)],
    "many-units": [((3000, 2), 0, "own", 1.0), ((3000,), 0, "own", 0.5)],
    "large": [((300, 33, 3, 3), 1, "own", 1.0), ((33, 1200), 0, "own", 0.5), ((33,), 0, "own", 0.1)],
}
SMALL = [name for name, parts in LAYOUTS.items() if sum(math.prod(shape) for shape, *_ in parts) <= 400]


def units_of(layout: str, seed: int) -> Units:
    parts = []
    for shape, dim, rule, factor in LAYOUTS[layout]:
        n = shape[dim]
        if isinstance(rule, list):
            index = torch.tensor(rule)
        elif rule == "own":
            index = torch.arange(n)
        elif rule == "alternating":
            index = torch.where(torch.arange(n) % 2 == 0, torch.arange(n) // 2, -1)
        else:
            generator = torch.Generator().manual_seed(seed)
            count = int(rule.split()[-1])
            index = torch.randint(-1 if rule.startswith("some") else 0, count, (n,), generator=generator)
            index[:count] = torch.arange(count)[:n]  # none is empty
        parts.append(Part(shape, dim, index, factor))
    return Units(max(int(part.index.max()) for part in parts) + 1, tuple(parts))


@dataclass(frozen=True)
class Case:
    """One call of the kernel on one entry.  ``repr`` reproduces it: ``check(Case(...))``."""

    direction: str = "adamw"
    layout: str = "stream"
    format: str = "fp32"
    instructions: str = native.INSTRUCTIONS[-1]
    saturated: bool = True
    budget: bool = False
    """Strengths kept and pruned in the state, else one strength for all."""
    imbalance: float = 0.02
    imbalance_factor: float | None = None
    maximize: bool = False
    grad_scale: float | None = None
    seed: int = 0

    @property
    def lr(self) -> float:
        return LR / (1, 20, 200)[self.seed % 3]

    @property
    def kind(self) -> str:
        return DIRECTIONS[self.direction][0]

    @property
    def accurate(self) -> torch.dtype:
        return torch.float64 if self.format == "fp64" else torch.float32

    def option(self, name: str) -> Any:
        return DIRECTIONS[self.direction][1].get(name, 0)


@dataclass
class Problem:
    """Parameters, their gradients and states, as the kernel sees them."""

    units: Units
    weights: list[Tensor]
    grads: list[Tensor]
    states: list[dict[str, Tensor]]
    guards: list[tuple[Tensor, Tensor]]

    def all(self) -> dict[str, Tensor]:
        """Everything by name, what is common to the parameters once."""
        found = {f"w{t}": w for t, w in enumerate(self.weights)} | {f"g{t}": g for t, g in enumerate(self.grads)}
        for t, state in enumerate(self.states):
            for key, value in state.items():
                found[f"{key}{t}" if key in OWN else key] = value
        return found

    def copy(self) -> dict[str, Tensor]:
        return {key: value.clone() for key, value in self.all().items()}


OWN = ("first", "master")


def make(case: Case, units: Units | None = None) -> Problem:
    """Units of many sizes: ordinary ones, dead ones, some far below the size that snaps, and gradients of two."""
    dtype, has_master = FORMATS[case.format]
    units = units or units_of(case.layout, case.seed)
    generator = torch.Generator().manual_seed(case.seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    def randn(shape: Sequence[int]) -> Tensor:
        return torch.randn(tuple(shape), generator=generator, dtype=torch.float64)

    which = rand(units.count)
    snapping = 0.1 * SNAP * SCALE / units.sizes(torch.empty((), dtype=torch.float64)).clamp(min=1).sqrt()
    level = torch.where(which < 0.6, 0.1, torch.where(which < 0.7, 0.0, torch.where(which < 0.85, snapping, 1e-3)))
    drive = torch.where(rand(units.count) < 0.3, 1e-6, 0.1)
    weights = [randn(p.shape) * units.expand(level, p, 0.1) * p.factor for p in units.parts]
    grads = [randn(p.shape) * units.expand(drive, p, 0.1) / p.factor for p in units.parts]
    moments = [x * randn(x.shape).sign() * (0.5 + rand(*x.shape)) for x in grads]
    common: dict[str, Tensor] = {"metric_scale": torch.tensor(SCALE, dtype=case.accurate)}
    common["imbalance"] = torch.tensor(case.imbalance, dtype=case.accurate)
    if case.budget:
        factor = -1.0 if case.imbalance_factor is None else case.imbalance_factor
        common["budget"] = torch.tensor([KEPT, PRUNED, THRESHOLD, factor, math.inf], dtype=torch.float64)
    if case.kind != "sgd":
        second = torch.cat([drive, torch.full((units.unbound,), 0.1)]).double()
        common["second"] = ((0.5 + rand(len(second))) * second).square().to(case.accurate)
        common["step"] = torch.tensor(STEP)
        if case.option("amsgrad"):
            common["peak"] = common["second"] * 2 * rand(len(second)).to(case.accurate)
    guards: list[tuple[Tensor, Tensor]] = []
    poison = case.seed % 2 == 1  # the others end where their memory does, for the address sanitizer

    def place(x: Tensor, as_dtype: torch.dtype) -> Tensor:
        return among_nan(x.to(as_dtype), guards) if poison else x.to(as_dtype)

    common = {key: place(value, value.dtype) for key, value in common.items()}
    stored = [place(w, dtype) for w in weights]
    states = []
    for t, w in enumerate(stored):
        state = dict(common)
        if case.kind != "sgd":
            state["first"] = place(moments[t], case.accurate)
        elif case.option("fresh"):
            state["first"] = place(torch.full(w.shape, math.nan), case.accurate)  # it holds nothing yet
        elif case.option("momentum"):
            state["first"] = place(moments[t], case.accurate)
        if has_master:
            near = w.to(case.accurate) * (1 + torch.finfo(dtype).eps * (rand(*w.shape) - 0.5).to(case.accurate) * 0.9)
            near = torch.where(near.to(dtype) == w, near, w.to(case.accurate))
            state["master"] = place(torch.where(rand(*w.shape) < 0.03, near + 0.1, near), case.accurate)
        states.append(state)
    return Problem(units, stored, [place(g, dtype) for g in grads], states, guards)


def among_nan(x: Tensor, guards: list[tuple[Tensor, Tensor]]) -> Tensor:
    """A copy with NaN before and after it: whoever reads or writes beyond an end shows."""
    room = torch.full((x.numel() + 66,), math.nan, dtype=x.dtype)
    room[33 : 33 + x.numel()] = x.flatten()
    guards.append((room[:33], room[33 + x.numel() :]))
    return room[33 : 33 + x.numel()].view(x.shape)


def fill(case: Case, problem: Problem, strength: float = KEPT) -> native.UnitsEntry:
    entry = native.UnitsEntry()
    native.fill_units(entry, problem.weights, problem.states, problem.units, fresh=bool(case.option("fresh")))
    for one, grad in zip(entry.entries, problem.grads, strict=True):
        one.grad, one.decoupled = grad.data_ptr(), bool(case.option("decoupled"))
        one.strength_kept = one.strength_pruned = strength
    return entry


def run(case: Case, problem: Problem, **changes: Any) -> native.UnitsEntry:
    entry = fill(case, problem, changes.pop("strength", KEPT))
    native.step([entry], case.kind, **{**arguments(case), **changes})
    return entry


def arguments(case: Case) -> dict[str, Any]:
    return {
        "lr": case.lr,
        "beta1": BETA1,
        "beta2": BETA2,
        "eps": EPS,
        **{name: case.option(name) for name in ("momentum", "dampening")},
        "nesterov": bool(case.option("nesterov")),
        "maximize": case.maximize,
        "saturated": case.saturated,
        "imbalance_factor": case.imbalance_factor,
        "grad_scale": None if case.grad_scale is None else torch.tensor(case.grad_scale),
        "instructions": case.instructions,
    }


# ---------------------------------------------------------------------------------------------------------- the oracle


@dataclass
class Expected:
    """Values and what their rounding is relative to; ``slack`` is an absolute error on top."""

    value: Tensor
    terms: Tensor
    slack: Tensor | float = 0.0


def expect(case: Case, problem: Problem, hook: Callable[[Tensor], None] | None = None) -> dict[str, Expected]:
    """The step in fp64.  Terms are those of ``test_native.expect``, with |x| for x and plus for minus throughout."""
    dtype, has_master = FORMATS[case.format]
    units, parts = problem.units, problem.units.parts
    least = torch.finfo(case.accurate).smallest_normal
    common = {k: v.double() for k, v in problem.states[0].items() if k not in OWN}
    out: dict[str, Expected] = {}
    ws, gs, leads, lead_terms = [], [], [], []
    for t in range(len(parts)):
        own = {k: v.double() for k, v in problem.states[t].items() if k in OWN}
        w, g = problem.weights[t].double(), problem.grads[t].double()
        if has_master:
            w = torch.where(problem.states[t]["master"].to(dtype) == problem.weights[t], own["master"], w)
        g = g * (-1.0 if case.maximize else 1.0) / (1.0 if case.grad_scale is None else case.grad_scale)
        lead, terms = _lead(case, t, g, own, out)
        ws.append(w), gs.append(g), leads.append(lead), lead_terms.append(terms.clamp(min=least))
    correct1 = 1 / (1 - BETA1 ** (STEP + 1)) if case.kind != "sgd" else 1.0
    correct2 = 1 / (1 - BETA2 ** (STEP + 1))
    gather = slices_of(units)

    def joined(xs: list[Tensor], u: int, power: int) -> Tensor:
        slices = [xs[t].select(d, i).flatten() * parts[t].factor ** power for t, d, i in gather[u]]
        return torch.cat([torch.empty(0, dtype=torch.float64), *slices])

    sums = torch.stack(
        [torch.stack([x.square().sum() for x in (joined(gs, u, 1), joined(leads, u, 1))]) for u in range(units.count)]
    ).T
    mw = torch.stack([(joined(leads, u, 1) * joined(ws, u, -1)).sum() for u in range(units.count)])
    ww = torch.stack([joined(ws, u, -1).square().sum() for u in range(units.count)])
    sums = torch.cat([sums, mw[None], ww[None]])
    sizes = torch.tensor([float(len(joined(ws, u, 1))) for u in range(units.count)], dtype=torch.float64)
    if hook is not None:
        hook(sums)
    gg, mm, mw, ww = sums
    rate, gain = torch.full_like(gg, case.lr), torch.ones_like(gg)
    unsummed = 1 + sizes.sqrt() / 8 if case.format == "fp64" else torch.ones_like(gg)
    if case.kind == "sgd":
        gain *= (1 - case.option("dampening")) / (1 - case.option("momentum"))
    else:
        second = common["second"].clone()
        second[: units.count] = BETA2 * second[: units.count] + (1 - BETA2) * gg / sizes.clamp(min=1)
        for t, (part, g) in enumerate(zip(parts, gs, strict=True)):
            place = units.count + sum(p.unbound for p in parts[:t])
            for own in unbound_rows(part, g):
                second[place : place + len(own)] *= BETA2
                second[place : place + len(own)] += (1 - BETA2) * own.square()
                place += len(own)
        slack = torch.cat([unsummed, torch.ones(units.unbound)]).double()
        out["second"] = Expected(second, second * slack)
        high = second
        if case.option("amsgrad"):
            high = torch.maximum(common["peak"], second)
            out["peak"] = Expected(high, high * slack)
        preconditioner = 1 / ((high * correct2).sqrt() + EPS)
        rate = rate * preconditioner[: units.count] * correct1
        coupled = case.kind == "adam" and not case.option("decoupled")
        gain = preconditioner[: units.count] if coupled else sizes.sqrt()
    norm, c, scale = ww.sqrt(), common["imbalance"], common["metric_scale"]
    snaps = norm <= THRESHOLD if case.budget else torch.ones_like(norm, dtype=torch.bool)
    strength = torch.full_like(norm, KEPT)
    if case.budget:
        strength[snaps] = PRUNED
    decay, pull, metric = case.lr * strength * gain, rate * mm.sqrt(), (c * c + 4 * ww).sqrt()
    t_scale = 1 / torch.maximum(metric, torch.maximum(scale, decay + 2 * pull))
    if not case.saturated:
        t_scale = 1 / decay.clamp(min=1)
    rho, gate_sq = 1 - t_scale * decay, (c + metric) / 2
    shared = rho - t_scale * rate * mw / gate_sq.clamp(min=least)
    shrink, shift = shared * rho, shared * gate_sq * t_scale * rate
    size_after = torch.zeros_like(norm)
    weight_terms = [torch.zeros_like(w) for w in ws]
    new = [w.clone() for w in ws]
    for u in range(units.count):
        v, lead = joined(ws, u, -1), joined(leads, u, 1)
        after = shrink[u] * v - shift[u] * lead
        if hook is not None:  # the unit's size is that of all its weights, here and elsewhere
            after_size = (shrink[u] ** 2 * ww[u] - 2 * shrink[u] * shift[u] * mw[u] + shift[u] ** 2 * mm[u]).sqrt()
        else:
            after_size = after.norm()
        small = after_size <= SNAP * scale
        if small and snaps[u] and pull[u] < decay[u]:
            after, after_size = torch.zeros_like(v), torch.zeros(())
        elif small and not snaps[u] and after_size < norm[u]:
            after, after_size = v, norm[u]
        size_after[u] = after_size
        radial = t_scale[u] * rate[u] * (joined(lead_terms, u, 1) * v.abs()).sum() / gate_sq[u].clamp(min=least)
        outer = (1 + t_scale[u] * decay[u] + radial) * unsummed[u]
        begin = 0
        for t, d, i in gather[u]:
            one = new[t].select(d, i)
            one.copy_(after[begin : begin + one.numel()].reshape(one.shape) * parts[t].factor)
            far = gate_sq[u] * t_scale[u] * rate[u] * parts[t].factor ** 2 * lead_terms[t].select(d, i)
            inner = (1 + t_scale[u] * decay[u]) * ws[t].select(d, i).abs()
            weight_terms[t].select(d, i).copy_(outer * (inner + far))
            begin += one.numel()
    for t, part in enumerate(parts):
        place = units.count + sum(p.unbound for p in parts[:t])
        rows = [unbound_rows(part, x) for x in (new[t], weight_terms[t], ws[t], leads[t], lead_terms[t])]
        for after, terms, w, lead, lead_term in zip(*rows, strict=True):
            gains = torch.ones_like(w)
            if case.kind != "sgd":
                gains = correct1 * preconditioner[place : place + len(w)]
            place += len(w)
            after.copy_(w - case.lr * gains * lead)
            terms.copy_(w.abs() + case.lr * gains * lead_term)
        out |= _weights(case, t, new[t], weight_terms[t])
    out["imbalance"] = _imbalance(case, c, decay, scale, size_after)
    return out


def slices_of(units: Units) -> list[list[tuple[int, int, int]]]:
    """Of every unit, parameter, dimension and place of its slices."""
    found: list[list[tuple[int, int, int]]] = [[] for _ in range(units.count)]
    for t, part in enumerate(units.parts):
        for i, unit in enumerate(part.index.tolist()):
            if unit >= 0:
                found[unit].append((t, part.dim, i))
    return found


def unbound_rows(part: Part, x: Tensor) -> list[Tensor]:
    """What a parameter has of its slices that belong to no unit, in row-major order."""
    whole = x.view(-1, part.shape[part.dim], math.prod(part.shape[part.dim + 1 :]))
    return [whole[o, i] for o in range(len(whole)) for i in (part.index < 0).nonzero().flatten().tolist()]


def _lead(case: Case, t: int, g: Tensor, own: dict[str, Tensor], out: dict[str, Expected]) -> tuple[Tensor, Tensor]:
    """The update before the unit's gain, and its terms; first moments go to ``out``."""
    if case.kind != "sgd":
        m = own["first"] + (1 - BETA1) * (g - own["first"])
        terms = own["first"].abs() + (1 - BETA1) * (g - own["first"]).abs()
        out[f"first{t}"] = Expected(m, terms)
        return m, terms
    momentum, dampening = case.option("momentum"), case.option("dampening")
    if not momentum:
        return g, g.abs()
    buffer, terms = g, g.abs()
    if not case.option("fresh"):
        buffer = momentum * own["first"] + (1 - dampening) * g
        terms = momentum * own["first"].abs() + (1 - dampening) * g.abs()
    out[f"first{t}"] = Expected(buffer, terms)
    if case.option("nesterov"):
        return g + momentum * buffer, g.abs() + momentum * terms
    return buffer, terms


def _weights(case: Case, t: int, new: Tensor, terms: Tensor) -> dict[str, Expected]:
    dtype, has_master = FORMATS[case.format]
    if dtype == case.accurate:
        return {f"w{t}": Expected(new, terms)}
    info = torch.finfo(dtype)
    half_ulp = torch.maximum(new.abs() * info.eps, torch.tensor(info.smallest_normal * info.eps).double()) / 2
    found = {f"w{t}": Expected(new, terms, 1.001 * half_ulp)}
    return found | ({f"master{t}": Expected(new, terms)} if has_master else {})


def _imbalance(case: Case, c: Tensor, decay: Tensor, scale: Tensor, sizes: Tensor) -> Expected:
    """The factor given for this step, or the law: rho**4 with rho from a low quantile of decays and the mass's size."""
    factor = torch.tensor(-1.0 if case.imbalance_factor is None else case.imbalance_factor, dtype=torch.float64)
    if factor < 0:
        sample = decay[:: max(1, len(decay) // 1024)].sort().values
        low = float(sample[len(sample) // 10]) if not case.budget else case.lr * KEPT * amplification(case)
        if case.saturated:
            sizes = sizes.nan_to_num(0.0, 0.0, 0.0)
            low /= max(float(scale), 2 * float(sizes.square().sum()) / max(float(sizes.sum()), 1e-300))
        factor = torch.tensor(max(max(1 - low, 0.0) ** 4, MIN_IMBALANCE_FACTOR), dtype=torch.float64)
    new = c * factor
    new = torch.where(new <= SNAP * scale, 0.0, new)
    return Expected(new, new)


def amplification(case: Case) -> float:
    return (1 - case.option("dampening")) / (1 - case.option("momentum")) if case.kind == "sgd" else 1.0


def distances(case: Case, have: dict[str, Tensor], expected: dict[str, Expected]) -> dict[str, float]:
    """The largest error of every output, in ulps of its terms; NaN must stand where NaN is expected."""
    info, found = torch.finfo(case.accurate), {}
    for key, want in expected.items():
        same = (have[key].double() == want.value) | (have[key].isnan() & want.value.isnan())
        error = torch.where(same, 0.0, (have[key].double() - want.value).abs()).nan_to_num(nan=math.inf)
        ulp = info.eps * want.terms.abs().nan_to_num(0.0, 0.0, 0.0).clamp(min=info.smallest_normal)
        found[key] = float(((error - want.slack).clamp(min=0) / ulp).max())
    return found


def allowed(case: Case, key: str) -> float:
    kind = "native weight" if key.startswith(("w", "master")) else "native state"
    return tolerance(f"{kind}, fp64" if case.format == "fp64" else kind)


def compare(case: Case, problem: Problem, expected: dict[str, Expected]) -> None:
    errors = distances(case, problem.all(), expected)
    bad = {key: f"{error:.1f} ulp" for key, error in errors.items() if not error <= allowed(case, key)}
    assert not bad, f"{case}: {bad}"


def check(case: Case, problem: Problem | None = None, **changes: Any) -> None:
    """Step and compare everything: outputs with the oracle, and that nothing else has changed."""
    problem = problem or make(case)
    start, expected = problem.copy(), expect(case, problem)
    entry = run(case, problem, **changes)
    compare(case, problem, expected)
    for one, w in zip(entry.entries, problem.weights, strict=True):
        assert one.zeros == int((w == 0).sum()), f"{case}: zeros"
    for key, value in problem.all().items():
        if key == "step":
            assert value == STEP + 1, f"{case}: step"
        elif key not in expected:
            assert same(value, start[key]), f"{case}: {key} was written to"
    for guard in itertools.chain.from_iterable(problem.guards):
        assert bool(guard.isnan().all()), f"{case}: wrote beyond a tensor"


def same(x: Tensor, y: Tensor) -> bool:
    """Bit for bit, NaN included."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return torch.equal(x.contiguous().view(bits), y.contiguous().view(bits))


# ----------------------------------------------------------------------------------------------------------- the tests

AXES: dict[str, list[Any]] = {
    "format": list(FORMATS),
    "instructions": list(native.INSTRUCTIONS),
    "saturated": [True, False],
    "budget": [False, True],
    "imbalance": [0.02, 0.0],
    "layout": SMALL,
}


def rotated(direction: str, i: int, **fixed: Any) -> Case:
    """Combination number i of the axes: neighbours differ in all of them."""
    values = {axis: options[(i // (1 + k)) % len(options)] for k, (axis, options) in enumerate(AXES.items())}
    more = {"maximize": i % 4 == 1, "grad_scale": (None, 3.0, None, 1024.0)[i % 4]}
    return Case(direction, seed=i, **{**values, **more, **fixed})


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_step_is_the_oracles(direction: str, format: str) -> None:
    for i, (saturated, budget, imbalance) in enumerate(itertools.product([True, False], [False, True], [0.02, 0.0])):
        for k in range(3):
            layout = SMALL[(3 * i + k + 2 * list(DIRECTIONS).index(direction)) % len(SMALL)]
            case = rotated(direction, i, format=format, layout=layout)
            check(replace(case, saturated=saturated, budget=budget, imbalance=imbalance, seed=7 * i + k))


def test_those_cases_meet_every_layout_with_every_direction() -> None:
    for n in range(len(DIRECTIONS)):
        assert {(3 * i + k + 2 * n) % len(SMALL) for i in range(8) for k in range(3)} == set(range(len(SMALL)))


@st.composite
def any_case(draw: Any) -> tuple[Case, Units]:
    """Any shapes, dimensions and indices: units may repeat in a parameter, be in only one, or have no slice at all."""
    count, parts = draw(st.integers(1, 6)), []
    for _ in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=4)))
        dim = draw(st.integers(0, len(shape) - 1))
        index = draw(st.lists(st.integers(-1, count - 1), min_size=shape[dim], max_size=shape[dim]))
        parts.append(Part(shape, dim, torch.tensor(index), draw(st.sampled_from([1.0, 0.5, 0.3, 7.0]))))
    case = rotated(draw(st.sampled_from(list(DIRECTIONS))), draw(st.integers(0, 2**20)))
    case = replace(case, imbalance_factor=draw(st.sampled_from([None, None, 0.0, 0.9])))
    return case, Units(count, tuple(parts))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(any_case())
def test_any_step_is_the_oracles(made: tuple[Case, Units]) -> None:
    case, units = made
    check(case, make(case, units))


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in SMALL])
def test_a_step_of_every_layout_is_the_oracles(layout: str) -> None:
    for i, direction in enumerate(["nesterov", "adam-amsgrad", "adamw", "sgd"]):
        check(rotated(direction, 5 * i + len(layout), layout=layout))


@pytest.mark.parametrize("instructions", native.INSTRUCTIONS)
@pytest.mark.parametrize("factor", [1.0, 0.9, 0.0])
def test_a_given_factor_of_the_imbalance(factor: float, instructions: str) -> None:
    for i, direction in enumerate(DIRECTIONS):
        case = Case(direction, format=list(FORMATS)[i % 6], instructions=instructions, imbalance_factor=factor, seed=i)
        check(replace(case, budget=i % 2 == 0))


def test_the_cases_reach_what_can_happen() -> None:
    """Units that die, live on, revive, and stay within a budget although they are small."""
    found = set()
    for direction, layout, budget in itertools.product(("momentum", "adam", "adamw"), SMALL, (False, True)):
        for i in range(8):
            problem = make(case := Case(direction, layout, budget=budget, imbalance=0.02 * (i % 2), seed=i))
            new = expect(case, problem)
            for t, w in enumerate(problem.weights):
                before, after = w.double(), new[f"w{t}"].value
                bound = problem.units.parts[t].bound.expand(w.shape)
                for name, where in {
                    "dies": (before != 0) & (after == 0) & bound,
                    "revives": (before == 0) & (after != 0) & bound,
                    "stays zero": (before == 0) & (after == 0) & bound,
                    "turns": (before * after < 0) & bound,
                    "unbound": ~bound & (before != after),
                }.items():
                    found |= {name} if bool(where.any()) else set()
    assert found == {"dies", "revives", "stays zero", "turns", "unbound"}


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("format", ["fp32", "fp64", "bf16+master"])
@pytest.mark.parametrize("direction", ["momentum", "nesterov-fresh", "adam-amsgrad", "adamw"])
def test_many_steps(direction: str, format: str, sign: int) -> None:
    """Each against the oracle from where the kernel is; moments and imbalance are compared too."""
    for budget in (False, True):
        case = Case(direction, "some-unbound", format, budget=budget, maximize=sign < 0, seed=2)
        problem = make(case)
        grads = [g.clone() for g in problem.grads]
        moved = problem.copy()
        for t in range(30):
            for g, first in zip(problem.grads, grads, strict=True):
                g.copy_(first * math.cos(t) + 0.3 * first)
            if "step" in problem.states[0]:
                problem.states[0]["step"].fill_(STEP)  # the oracle's
            expected = expect(case, problem)
            run(case, problem)
            compare(case, problem, expected)
            if case.option("fresh"):
                case = replace(case, direction="nesterov")
        assert not any(same(w, moved[f"w{t}"]) for t, w in enumerate(problem.weights))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_rows_of_one_matrix_step_as_groups_do(direction: str) -> None:
    """Units that are the rows of one contiguous parameter are what the retraction of groups knows."""
    for format, imbalance in itertools.product(("fp32", "fp64"), (0.0, 0.02)):
        case = Case(direction, "rows", format, imbalance=imbalance, seed=2)
        ours, theirs = make(case), make(case)
        run(case, ours)
        entry = native.Entry()
        groups = Groups(7, (7, 5), (1,))
        native.fill(entry, theirs.weights[0], theirs.states[0], "group", groups, fresh=bool(case.option("fresh")))
        entry.grad, entry.decoupled = theirs.grads[0].data_ptr(), bool(case.option("decoupled"))
        entry.strength_kept = entry.strength_pruned = KEPT
        native.step([entry], case.kind, **arguments(case))
        assert all(same(x, y) for x, y in zip(ours.all().values(), theirs.all().values(), strict=True))


@pytest.mark.parametrize("format", ["fp32", "fp64"])
@pytest.mark.parametrize("name", ["lr", "strength", "beta1", "beta2", "momentum", "dampening", "factor", "grad_scale"])
def test_the_comparison_notices_a_small_error(name: str, format: str) -> None:
    """In any number that is handed over: 1e-4 of it in fp32, 1e-9 in fp64."""
    wrong = 1 + (1e-4 if format == "fp32" else 1e-9)
    direction = "dampening" if name in ("momentum", "dampening", "grad_scale") else "adam"
    case = Case(direction, "stream", format, grad_scale=3.0 if name == "grad_scale" else None, seed=4)
    check(case)
    meant: dict[str, Any] = {"lr": case.lr, "strength": KEPT, "beta1": BETA1, "beta2": BETA2}
    meant |= {"momentum": case.option("momentum"), "dampening": case.option("dampening")}
    if name == "factor":
        problem = make(case)
        expected = expect(case, problem)
        parts = [replace(p, factor=p.factor * wrong) if i == 1 else p for i, p in enumerate(problem.units.parts)]
        problem.units = Units(problem.units.count, tuple(parts))
        run(case, problem)
        with pytest.raises(AssertionError, match="ulp"):
            compare(case, problem, expected)
        return
    change = torch.tensor(3.0 * wrong) if name == "grad_scale" else meant[name] * wrong
    if name == "grad_scale" and format == "fp64":
        change = torch.tensor(3.0 * (1 + 1e-6))  # it is an fp32 number
    with pytest.raises(AssertionError, match="ulp"):
        check(case, **{name: change})


@pytest.mark.parametrize("key", ["w0", "w3", "g1", "first2", "second", "imbalance", "metric_scale"])
@pytest.mark.parametrize("format", ["fp32", "fp64"])
def test_the_comparison_notices_a_single_wrong_element(key: str, format: str) -> None:
    case = Case("adam", "stream", format, seed=4)
    problem = make(case)
    expected = expect(case, problem)
    value = problem.all()[key]
    lives = expected[key].value if key.startswith("w") else value  # a unit that dies is zero whatever it was
    value.view(-1)[int(lives.abs().argmax())] *= 1 + (1e-4 if format == "fp32" else 1e-9)
    run(case, problem)
    with pytest.raises(AssertionError, match="ulp"):
        compare(case, problem, expected)


# ---------------------------------------------------------------------------------------- threads, other entries, hooks


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("direction", "format"), [("nesterov", "fp32"), ("adam-amsgrad", "fp64"), ("adamw", "bf16")])
def test_results_depend_neither_on_threads_nor_on_other_entries(direction: str, format: str, threads: None) -> None:
    cases = [Case(direction, layout, format, seed=4) for layout in LAYOUTS]
    alone = [make(case) for case in cases]
    for case, problem in zip(cases, alone, strict=True):
        run(case, problem)
    want = [value for problem in alone for value in problem.all().values()]
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        problems = [make(case) for case in cases]
        entries = [fill(case, problem) for case, problem in zip(cases, problems, strict=True)]
        native.step(entries, cases[0].kind, **arguments(cases[0]))
        have = [value for problem in problems for value in problem.all().values()]
        assert all(same(x, y) for x, y in zip(have, want, strict=True)), f"{count} threads"


@pytest.mark.parametrize("direction", ["momentum", "adam", "adamw-amsgrad"])
def test_sums_may_be_completed_by_another_process(direction: str) -> None:
    """One part at a time, each with the other's sums added by the hook, is both together."""
    case = Case(direction, "one-unit", seed=4)
    whole, halves = make(case), make(case)
    run(case, whole)
    entries, sums = [], []
    for t, part in enumerate(halves.units.parts):
        # The common state is the process's own.
        state = {k: v if k in OWN else v.clone() for k, v in halves.states[t].items()}
        halves.states[t] = state
        alone = Problem(Units(1, (part,)), [halves.weights[t]], [halves.grads[t]], [state], [])
        trial = Problem(alone.units, *[[x.clone() for x in xs] for xs in (alone.weights, alone.grads)],
                        [{k: v.clone() for k, v in state.items()}], [])  # fmt: skip
        native.step([fill(case, trial)], case.kind, combine=lambda x: sums.append(x.clone()), **arguments(case))
        entries.append((fill(case, alone), alone))
    total = whole.units.sizes(torch.empty((), dtype=torch.float64))
    calls = []

    def complete(x: Tensor) -> None:
        assert x.shape == (4, 1) and x.dtype == torch.float64
        calls.append(x)
        x.copy_(sums[0] + sums[1])

    for entry, _ in entries:
        entry.sizes = total.data_ptr()
        native.step([entry], case.kind, combine=complete, **arguments(case))
    assert len(calls) == 2
    for t, w in enumerate(whole.weights):
        assert same(halves.weights[t], w)
        assert all(same(halves.states[t][key], value) for key, value in whole.states[t].items())


def test_one_call_steps_tensors_and_units() -> None:
    case = Case("sgd", "stream", seed=2)
    together, alone = make(case), make(case)
    run(case, alone)
    w, g = torch.ones(5000), torch.rand(5000)
    plain = native.Entry()
    native.fill(plain, w, {}, "plain")
    plain.grad = g.data_ptr()
    native.step([fill(case, together), plain], case.kind, **arguments(case))
    torch.testing.assert_close(w, 1 - case.lr * g)
    assert all(same(x, y) for x, y in zip(together.all().values(), alone.all().values(), strict=True))


def test_the_hook_gets_the_sums_of_every_entry() -> None:
    cases = [Case("adam", layout, "fp64", seed=2) for layout in ("stream", "some-unbound")]
    problems, seen, want = [make(case) for case in cases], list[Tensor](), list[Tensor]()
    for case, problem in zip(cases, problems, strict=True):
        expect(case, problem, lambda sums: want.append(sums.clone()))
    entries = [fill(case, problem) for case, problem in zip(cases, problems, strict=True)]
    native.step(entries, "adam", combine=lambda sums: seen.append(sums.clone()), **arguments(cases[0]))
    assert len(seen) == len(want) == 2
    for have, oracle in zip(seen, want, strict=True):
        torch.testing.assert_close(have, oracle, rtol=1e-13, atol=1e-25)


# ---------------------------------------------------------------------------------------- numbers gone bad, no movement


@pytest.mark.parametrize("instructions", native.INSTRUCTIONS)
@pytest.mark.parametrize("layout", ["stream", "some-unbound", "repeats", "divided-columns"])
def test_nan_stays_in_its_unit(layout: str, instructions: str) -> None:
    """What is no number in a slice reaches all slices of its unit, and nothing else; an unbound weight only itself."""
    for i, (direction, bad) in enumerate(itertools.product(("momentum", "adam", "adamw"), (math.nan, math.inf))):
        case = Case(direction, layout, ["fp32", "fp64", "bf16"][i % 3], instructions, seed=2 * i)
        poisoned, clean = make(case), make(case)
        units = poisoned.units
        poisoned.grads[0].view(-1)[0] = bad
        index = int(units.parts[0].index[0])
        run(case, clean)
        run(case, poisoned)
        for t, part in enumerate(units.parts):
            hit = part.along(part.index == index).expand(part.shape)
            if index < 0:
                hit = torch.zeros(part.shape, dtype=torch.bool)
                if t == 0:
                    hit.view(-1)[0] = True
            assert same(poisoned.weights[t][~hit], clean.weights[t][~hit]), case
            assert not bool(poisoned.weights[t][hit].isfinite().any()), case
        assert bool(poisoned.states[0]["imbalance"].isfinite())
        second = poisoned.states[0].get("second")
        assert second is None or int((~second.isfinite()).sum()) == 1


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradients_that_overflowed_change_nothing(direction: str) -> None:
    for flag in (1.0, 0.0):
        problem = make(case := Case(direction, "some-unbound"))
        start, calls = problem.copy(), list[Tensor]()
        run(case, problem, found_inf=torch.tensor(flag), combine=calls.append)
        unchanged = all(same(value, start[key]) for key, value in problem.all().items())
        assert unchanged == bool(flag) and len(calls) == (0 if flag else 1)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_step_of_length_zero_changes_no_bit_of_a_weight(direction: str) -> None:
    for format, layout, budget in itertools.product(FORMATS, SMALL, (False, True)):
        case = Case(direction, layout, format, budget=budget, seed=2)
        problem = make(case)
        for state in problem.states:  # the copy that counts is the one that rounds to the weight
            state.pop("master", None)
        start = problem.copy()
        run(case, problem, lr=0.0)
        assert all(torch.equal(w, start[f"w{t}"]) for t, w in enumerate(problem.weights)), case
