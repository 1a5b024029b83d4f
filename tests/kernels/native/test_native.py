"""The native kernel against ``reference`` evaluated in fp64 on the same numbers, and against torch.optim.

Every result is a sum, and rounding is relative to what is added up, not to what is left when it cancels.  So each
expected number comes with its *terms*, the same formula with every minus turned into a plus, and a tolerance counts
ulps of those: see :func:`expect`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import symopt
from support.table import tolerance
from symopt_kernels.groups import Groups
from symopt_kernels.native import binding as native
from symopt_kernels.reference import directions, elementwise, gauge
from symopt_kernels.reference import group as group_kernel

torch.set_num_threads(1)

LR, STRENGTH, OUTSIDE, THRESHOLD = 0.01, 0.3, 1.5, 0.046875
SCALE = 0.1  # metric_scale
SNAP = gauge.SNAP
STEP = 3.0

DIRECTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("sgd", {}),
    "momentum": ("sgd", {"momentum": 0.9}),
    "momentum-fresh": ("sgd", {"momentum": 0.9, "fresh": True}),
    "nesterov": ("sgd", {"momentum": 0.9, "nesterov": True}),
    "nesterov-fresh": ("sgd", {"momentum": 0.9, "nesterov": True, "fresh": True}),
    "dampening": ("sgd", {"momentum": 0.8, "dampening": 0.3}),
    "dampening-fresh": ("sgd", {"momentum": 0.8, "dampening": 0.3, "fresh": True}),
    "adam": ("adam", {}),
    "adam-amsgrad": ("adam", {"amsgrad": True}),
    "adamw": ("adamw", {}),
    "adamw-amsgrad": ("adamw", {"amsgrad": True}),
}
BETA1, BETA2, EPS = 0.9, 0.99, 1e-8

# Storage of the weight, and whether an fp32 copy is kept beside it.
FORMATS = {
    "fp32": (torch.float32, False),
    "fp64": (torch.float64, False),
    "bf16": (torch.bfloat16, False),
    "bf16+master": (torch.bfloat16, True),
    "fp16": (torch.float16, False),
    "fp16+master": (torch.float16, True),
}

# numel: one, around vectors, around blocks of 512, around chunks of 16384 and 65536, and where chunks get larger.
SIZES = [1, 2, 15, 16, 17, 511, 512, 513, 16383, 16384, 16385, 65535, 65536, 65537]

# Every way in which native.cpp cuts groups into units, with a size on either side of its borders.
GROUPS: dict[str, tuple[tuple[int, ...], str | int]] = {
    "one-weight": ((1,), "out"),
    "out": ((7, 5), "out"),
    "out-1d": ((19,), "out"),
    "out-conv": ((4, 3, 3, 2), "out"),
    "out-short-runs": ((70, 127), "out"),
    "out-long-runs": ((70, 128), "out"),
    "out-block": ((5, 513), "out"),
    "one-huge-group": ((1, 70001), "out"),
    "out-huge-groups": ((3, 40000), "out"),
    "in": ((5, 7), "in"),
    "in-one-row": ((1, 700), "in"),
    "in-conv": ((16, 8, 3, 3), "in"),
    "in-rows-33": ((33, 65), "in"),  # rows are visited in fours, and summed 32 at a time before they go to double
    "in-last-stripe-has-one-group": ((64, 513), "in"),
    "in-last-stripe-is-narrow": ((70, 4097), "in"),
    "in-split": ((700, 130), "in"),
    "in-split-in-three": ((1100, 70), "in"),
    "in-split-conv": ((300, 33, 3, 3), "in"),
    "in-split-narrow-stripe": ((130, 4100), "in"),
    "in-split-last-stripe-has-one-group": ((130, 4097), "in"),
    "in-whole-stripes": ((3, 9000), "in"),
    "head": ((8, 6), "head:2"),
    "head-packed": ((12, 4), "head:2"),
    "head-packed-long-runs": ((192, 64), "head:4"),
    "head-packed-split": ((480, 160), "head:2"),
    "block-1x1": ((9, 11), "block:1x1"),
    "block": ((4, 6), "block:2x3"),
    "block-conv": ((6, 4, 3, 3), "block:3x2"),
    "block-tall": ((256, 40), "block:128x1"),
    "block-wide": ((3, 400), "block:1x200"),
    "block-split": ((1040, 130), "block:520x1"),
    "block-split-wide": ((260, 520), "block:130x260"),
    "index": ((33, 50), 7),
    "index-one-group": ((5, 4), 1),
    "index-all-apart": ((40, 3), 120),
    "index-split": ((301, 700), 900),
}
SMALL_GROUPS = [name for name, (shape, _) in GROUPS.items() if math.prod(shape) <= 2000]
LARGE_GROUPS = [name for name in GROUPS if name not in SMALL_GROUPS]
RETRACTIONS = native.RETRACTIONS[:-1]  # mirror steps several tensors as one: test_native_mirror.py


@dataclass(frozen=True)
class Case:
    """One call of the kernel on one tensor.  ``repr`` reproduces it: ``check(Case(...))``."""

    direction: str = "adamw"
    retraction: str = "sparse"
    shape: tuple[int, ...] = (513,)
    groups: str | int | None = None
    """A named partition, or the number of groups of an index map."""
    format: str = "fp32"
    instructions: str = native.INSTRUCTIONS[-1]
    saturated: bool = True
    trimmed: bool = False
    imbalance: float = 0.02
    imbalance_factor: float | None = None
    maximize: bool = False
    grad_scale: float | None = None
    weight_decay: float = 0.0
    order: tuple[int, ...] | None = None
    """Dimensions as they lie in memory, outermost first."""
    poison: bool = False
    """NaN and infinities in gradient and weight."""
    seed: int = 0

    @property
    def lr(self) -> float:
        """At the largest the imbalance decays as fast as it may, at the others as fast as the law says."""
        return LR / (1, 20, 200)[self.seed % 3]

    @property
    def kind(self) -> str:
        return DIRECTIONS[self.direction][0]

    def option(self, name: str) -> Any:
        return DIRECTIONS[self.direction][1].get(name, 0)


@dataclass
class Problem:
    """A weight, its gradient and its state, as the kernel sees them.  ``start`` are copies of everything."""

    w: Tensor
    g: Tensor
    state: dict[str, Tensor]
    groups: Groups | None
    guards: list[tuple[Tensor, Tensor]]

    def __post_init__(self) -> None:
        self.start = {key: value.clone() for key, value in self.all().items()}

    def all(self) -> dict[str, Tensor]:
        return {"w": self.w, "g": self.g, **self.state}


def partition(shape: tuple[int, ...], groups: str | int | None, seed: int) -> Groups | None:
    if groups is None:
        return None
    if isinstance(groups, str):
        return symopt.GroupSparse(groups).partition(torch.empty(shape))
    index = torch.randint(0, groups, shape, generator=torch.Generator().manual_seed(seed))
    index.view(-1)[:groups] = torch.arange(groups)  # none is empty
    return symopt.GroupSparse(index).partition(torch.empty(shape))


def underflow(accurate: torch.dtype) -> float:
    """What the root of a sum of squares is off by at most, in ulps, where the squares underflow."""
    info = torch.finfo(accurate)
    return math.sqrt(info.smallest_normal / info.eps)


def math_of(format: str) -> torch.dtype:
    return torch.float64 if format == "fp64" else torch.float32


def make(case: Case) -> Problem:
    """Numbers of both signs over several decades, with zeros, denormals, and units around the threshold of snapping."""
    dtype, has_master = FORMATS[case.format]
    accurate = math_of(case.format)
    generator = torch.Generator().manual_seed(case.seed)
    groups = partition(case.shape, case.groups, case.seed)
    units = case.shape if groups is None else (groups.count,)

    def spread(v: Tensor) -> Tensor:
        return v.reshape(case.shape) if groups is None else groups.expand(v).reshape(case.shape)

    def randn(shape: tuple[int, ...] = case.shape) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def rand(shape: tuple[int, ...] = case.shape) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    def speckle(x: Tensor) -> Tensor:
        """Some exact zeros, some denormals."""
        which = rand()
        tiny = torch.finfo(dtype).smallest_normal * rand() * x.sign()
        return torch.where(which < 0.08, 0.0, torch.where(which < 0.12, tiny, x))

    def levels(small: float) -> Tensor:
        """A size for every unit: 1 for most, some 0, some just about ``small``, some wide apart."""
        which = rand(units)
        wide = 10 ** (4 * rand(units) - 3)
        return torch.where(which < 0.6, 1.0, torch.where(which < 0.7, 0.0, torch.where(which < 0.8, small * 3, wide)))

    # Sizes of whole units are scaled, so that groups too come near zero; SNAP * SCALE is where they snap.
    members = 1.0 if groups is None else case_size(case) / groups.count
    w = speckle(0.05 * randn() * spread(levels(SNAP * SCALE / 0.05 / math.sqrt(members)) * rand(units)))
    g = speckle(0.1 * randn() * spread(levels(1e-5)))
    state: dict[str, Tensor] = {}
    if case.retraction != "plain":
        state |= {"imbalance": torch.tensor(case.imbalance), "metric_scale": torch.tensor(SCALE)}
    if case.kind != "sgd":
        v = (0.1 * levels(1e-5) * rand(units)) ** 2
        state |= {"exp_avg": speckle(randn() * spread(v.sqrt())), "exp_avg_sq": v, "step": torch.tensor(STEP)}
        if case.option("amsgrad"):
            state["max_exp_avg_sq"] = v * 2 * rand(units)
    elif case.option("fresh"):
        state["momentum_buffer"] = torch.full(case.shape, math.nan, dtype=torch.float64)  # it holds nothing yet
    elif case.option("momentum"):
        state["momentum_buffer"] = speckle(randn() * 0.1 * spread(levels(1e-5)))
    if case.poison:
        where = torch.randperm(w.numel(), generator=torch.Generator().manual_seed(case.seed))[:6]
        g.view(-1)[where[:3]] = w.view(-1)[where[3:]] = g.new_tensor([math.nan, math.inf, -math.inf])
    w, g = w.to(dtype), g.to(dtype)
    if groups is not None:  # a group whose squares all underflow has no norm; its members may be denormal
        norm = groups.sum(w.double() ** 2).sqrt()
        w = torch.where(spread(norm) < underflow(accurate), 0.0, w)
    state = {key: value.to(accurate) for key, value in state.items()}
    stale = rand() < 0.03  # somebody changed the weight since
    if case.retraction == "sparse_free":
        if case.imbalance_factor is not None:  # whose square is the product of the squares
            w = torch.where(w.abs() < underflow(accurate), 0.0, w)
        # Every weight has its own imbalance, of either sign.
        heavy, light = symopt.Sparse().split(w.to(accurate), state["imbalance"] * 2 * rand().to(accurate))
        swap = rand() < 0.3
        state["factor_0"], state["factor_1"] = torch.where(swap, light, heavy), torch.where(swap, heavy, light)
        stale &= w.abs() >= underflow(accurate)  # whose factors cannot be found if the imbalance is 0
        w = torch.where(stale, w, (state["factor_0"] * state["factor_1"]).to(dtype))
    if has_master:
        near = w.to(accurate) * (1 + torch.finfo(dtype).eps * (rand() - 0.5).to(accurate) * 0.9)
        near = torch.where(near.to(dtype) == w, near, w.to(accurate))
        state["master"] = torch.where(stale, near + 0.1, near)
    if groups is not None and groups.index is not None:
        state["group_index"] = groups.index
    if case.order is not None:
        w, g = in_order(w, case.order), in_order(g, case.order)
        state = {k: in_order(v, case.order) if v.shape == case.shape else v for k, v in state.items()}
    guards: list[tuple[Tensor, Tensor]] = []
    if case.seed % 2:  # the others end where their memory does, for the address sanitizer
        w, g = (guarded(x, guards) for x in (w, g))
        state = {key: guarded(value, guards) for key, value in state.items()}
    return Problem(w, g, state, groups, guards)


def case_size(case: Case) -> int:
    return math.prod(case.shape)


def in_order(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """The same tensor with its dimensions laid out in memory in this order."""
    return x.permute(order).contiguous().permute([order.index(d) for d in range(x.dim())])


def guarded(x: Tensor, guards: list[tuple[Tensor, Tensor]]) -> Tensor:
    """A copy of ``x`` in the middle of memory that must stay as it is, at an odd address (in elements)."""
    room = torch.full((x.numel() + 66,), 77, dtype=x.dtype)
    inside = room[33 : 33 + x.numel()].as_strided(x.shape, x.stride())
    inside.copy_(x)
    guards.append((room[:33], room[33 + x.numel() :]))
    return inside


def run(case: Case, problem: Problem, **changes: Any) -> native.Entry:
    entry = native.Entry()
    native.fill(
        entry, problem.w, problem.state, case.retraction, problem.groups, fresh=bool(case.option("fresh"))
    )  # fmt: skip
    entry.grad = problem.g.data_ptr()
    entry.strength_kept = changes.pop("strength", STRENGTH)
    entry.strength_pruned = OUTSIDE if case.trimmed else entry.strength_kept
    entry.threshold = THRESHOLD if case.trimmed else -1.0
    native.step([entry], case.kind, **{**arguments(case), **changes})
    return entry


def arguments(case: Case) -> dict[str, Any]:
    scale = None if case.grad_scale is None else torch.tensor(case.grad_scale)
    return {
        "lr": case.lr,
        "beta1": BETA1,
        "beta2": BETA2,
        "eps": EPS,
        "momentum": case.option("momentum"),
        "dampening": case.option("dampening"),
        "nesterov": bool(case.option("nesterov")),
        "weight_decay": case.weight_decay,
        "maximize": case.maximize,
        "saturated": case.saturated,
        "imbalance_factor": case.imbalance_factor,
        "grad_scale": scale,
        "instructions": case.instructions,
    }


# ---------------------------------------------------------------------------------------------------------- the oracle


@dataclass
class Expected:
    """A number may be one of several where a decision hangs on rounding; ``terms`` is what its rounding is relative to.

    ``slack`` is an absolute error on top: half an ulp of a storage format.
    """

    values: tuple[Tensor, ...]
    terms: Tensor
    slack: Tensor | float = 0.0


def expect(case: Case, problem: Problem) -> dict[str, Expected]:
    """The step by ``reference`` in fp64.  Terms of every output, with |x| for x and plus for minus throughout:

    ==================  ===============================================================================================
    momentum_buffer     ``momentum |b| + (1 - dampening) |g|``
    exp_avg             ``|m| + (1 - beta1) |g - m|``: it cancels where the gradient turns
    exp_avg_sq, max     themselves: sums of squares (see :func:`unsummed`)
    w, plain            ``|w| + lr |u|``
    w, sparse           ``(rho**2 + delta**2) |w| + rho |delta| sqrt(c**2 + 4 w**2)``
    w, group            ``(rho + <|delta|, |w|> / s**2) (rho |w| + s**2 |delta|)``
    factors, w          ``rho |a| + |delta b|``, and the product of two such
    imbalance           itself
    ==================  ===============================================================================================

    where rho stands for ``1 + t decay`` and the update u in ``delta = t lr u`` for its own terms; t is as the step has
    it.  Nothing that is stored or squared on the way counts as less than the smallest normal number.  A weight without
    a master is rounded to its format once more, half an ulp of that.
    """
    dtype, has_master = FORMATS[case.format]
    least = torch.finfo(math_of(case.format)).smallest_normal
    old = {k: v.double() if v.is_floating_point() else v for k, v in problem.start.items()}
    groups = problem.groups
    w, g = old["w"], old["g"]
    if has_master:
        w = torch.where(problem.start["master"].to(dtype) == problem.start["w"], old["master"], w)
    g = g * (-1.0 if case.maximize else 1.0) / (1.0 if case.grad_scale is None else case.grad_scale)
    weight_decay = case.weight_decay if case.retraction == "plain" else 0.0
    g_terms = g.abs()
    if weight_decay and case.kind != "adamw":
        g_terms = g.abs() + weight_decay * w.abs()
        g = g + weight_decay * w
    out: dict[str, Expected] = {}
    up, terms, gain = _direct(case, old, g, g_terms.clamp(min=least), groups, out, least)

    if case.retraction == "plain":
        decay = case.lr * weight_decay if case.kind == "adamw" else 0.0
        new = elementwise.plain(w, case.lr * up, decay)
        out |= _weights(case, (new,), w.abs() + case.lr * terms)
        return out

    size = w.abs() if groups is None else groups.sum(w * w).sqrt()
    decay: Any = case.lr * STRENGTH * gain
    flags: dict[str, Any] = {"saturated": case.saturated, "snaps": size <= THRESHOLD if case.trimmed else True}
    if case.trimmed:
        decay = case.lr * torch.where(size <= THRESHOLD, size.new_tensor(OUTSIDE), size.new_tensor(STRENGTH)) * gain
    delta, c, scale = case.lr * up, old["imbalance"], old["metric_scale"]
    if case.retraction == "sparse_free":
        return out | _free(case, problem, old, w, delta, (case.lr * terms).clamp(min=least), decay, flags)
    if case.retraction == "sparse":
        metric, pull = (c * c + 4 * w * w).sqrt(), delta.abs()
    else:
        assert groups is not None
        metric, pull = (c * c + 4 * groups.sum(w * w)).sqrt(), groups.sum(delta * delta).sqrt()
    t = gauge.time_scale(metric, pull, decay, scale if case.saturated else None)
    metric, terms = metric + underflow(math_of(case.format)), (case.lr * terms).clamp(min=least)
    if case.retraction == "sparse":
        news = snapped(lambda: elementwise.sparse(w, delta, decay, c, scale, **flags))
        rho, far = 1 + t * decay, t * terms
        out |= _weights(case, news, (rho * rho + far * far) * w.abs() + rho * far * metric)
    else:
        news = snapped(lambda: group_kernel.group(w, delta, decay, c, scale, groups, **flags))
        gate_sq, rho = (c + metric) / 2, 1 + t * decay
        far = groups.scale(t, terms)
        radial = groups.sum(far * w.abs()) / gate_sq.clamp(min=torch.finfo(torch.float64).tiny)
        shared = rho + radial
        new_terms = groups.scale(shared * rho, w.abs()) + groups.scale(shared * gate_sq, far)
        new_terms = groups.scale(unsummed(case, groups), new_terms)
        # native.cpp does not snap a group whose two terms cancel to below 2e-3 of them: that may be rounding.
        noise = 4e-6 if math_of(case.format) == torch.float32 else 4e-14
        doubtful = groups.sum(news[-1] ** 2) <= noise * groups.sum(new_terms**2)
        news = (*news[:-1], torch.where(groups.expand(doubtful).reshape(w.shape), news[-1], news[0]))
        out |= _weights(case, news, new_terms)
    if case.imbalance_factor is None:
        size = news[0].abs().flatten() if groups is None else groups.sum(news[0] * news[0]).sqrt()
        if isinstance(decay, Tensor) and case.order is not None and decay.shape == case.shape:
            decay = decay.permute(case.order)  # the kernel samples it as it lies in memory
        sizes = [size]
        if groups is None:  # the kernel takes a weight that snaps for as large as it was before
            sizes.append(news[-1].abs().flatten())
        laws = [gauge.imbalance_law(c, decay, scale, x, saturated=case.saturated) for x in sizes]
    else:
        laws = [torch.where(c * case.imbalance_factor <= SNAP * scale, 0.0, c * case.imbalance_factor)]
    out["imbalance"] = Expected(tuple(laws), laws[0])
    return out


def _direct(
    case: Case,
    old: dict[str, Tensor],
    g: Tensor,
    g_terms: Tensor,
    groups: Groups | None,
    out: dict[str, Expected],
    least: float,
) -> tuple[Tensor, Tensor, Any]:
    """The update, its terms, its gain; the moments go to ``out``."""
    if case.kind == "sgd":
        momentum, dampening = case.option("momentum"), case.option("dampening")
        nesterov, fresh = bool(case.option("nesterov")), bool(case.option("fresh"))
        buffer = None if fresh else old.get("momentum_buffer")
        up, new = directions.sgd_lead(g, buffer, momentum=momentum, dampening=dampening, nesterov=nesterov)
        gain = directions.amplification(momentum, dampening)
        terms = g_terms
        if new is not None:
            if buffer is not None:
                terms = momentum * buffer.abs() + (1 - dampening) * g_terms
            out["momentum_buffer"] = Expected((new,), terms)
            terms = g_terms + momentum * terms if nesterov else terms
        return up, terms, gain
    moments = (old["exp_avg"], old["exp_avg_sq"], old.get("max_exp_avg_sq"))
    beta1, beta2 = BETA1, BETA2
    lead, m = directions.adam_lead(g, moments[0], step=STEP + 1, beta1=beta1)
    square = g * g if groups is None else groups.sum(g * g) / groups.size(g)
    scale, v, peak = directions.adam_scale(square, *moments[1:], step=STEP + 1, beta2=beta2, eps=EPS)
    up = scale * lead if groups is None else groups.scale(scale, lead)
    gain: Any = scale
    if case.kind != "adam":
        gain = 1.0 if groups is None else groups.size(g).sqrt()
    m_terms = moments[0].abs() + (1 - beta1) * (g_terms - g.abs() + (g - moments[0]).abs())
    m_terms = m_terms.clamp(min=least)
    out["exp_avg"] = Expected((m,), m_terms)
    if case.weight_decay and case.kind == "adam":  # the square of a sum
        square = g_terms * g_terms
        square = square if groups is None else groups.sum(square) / groups.size(square)
        v_terms = beta2 * moments[1] + (1 - beta2) * square
    else:
        v_terms = v
    if groups is not None:
        v_terms = v_terms * unsummed(case, groups)
    out["exp_avg_sq"] = Expected((v,), v_terms)
    if peak is not None:
        out["max_exp_avg_sq"] = Expected((peak,), torch.maximum(peak, v_terms))
    high = v if peak is None else peak
    preconditioner = 1 / ((high / (1 - beta2 ** (STEP + 1))).sqrt() + EPS)
    mean = m_terms / (1 - beta1 ** (STEP + 1))
    return up, preconditioner * mean if groups is None else groups.scale(preconditioner, mean), gain


def unsummed(case: Case, groups: Groups) -> Tensor:
    """How much longer terms are because the *reference* sums n of them one by one, in fp64: its error is a random walk.

    In fp32 that does not count, and the kernel adds in lanes and blocks.
    """
    size = groups.size(torch.empty(case.shape, dtype=torch.float64))
    return 1 + size.sqrt() / 8 if case.format == "fp64" else torch.ones_like(size)


def _free(
    case: Case, problem: Problem, old: dict[str, Tensor], w: Tensor, delta: Tensor, far: Tensor, decay: Any, flags: Any
) -> dict[str, Expected]:
    dtype, _ = FORMATS[case.format]
    start = problem.start
    stale = (start["factor_0"] * start["factor_1"]).to(dtype) != start["w"]
    fresh = symopt.Sparse().split(w, old["imbalance"])
    factors = tuple(torch.where(stale, new, old[f"factor_{i}"]) for i, new in enumerate(fresh))
    stored = factors
    if case.imbalance_factor is not None:
        factors = rebalanced(*factors, case.imbalance_factor)
    a, b = factors
    scale = old["metric_scale"]
    steps = snapped(
        lambda: torch.stack(
            [x for part in elementwise.sparse_free(factors, delta, decay, scale, **flags) for x in
             (part if isinstance(part, tuple) else (part,))]
        )
    )  # fmt: skip
    t = gauge.time_scale(a * a + b * b, delta, decay, scale if case.saturated else None)
    rho, far = 1 + t * decay, t * far
    terms = [rho * a.abs() + far * b.abs(), rho * b.abs() + far * a.abs()]
    u, v = steps[2][1:]
    still = (u == a) & (v == b)  # then nothing is written, whatever a product or a rebalanced factor rounds to
    out = _weights(case, tuple(torch.where(still, w, s[0]) for s in steps), terms[0] * terms[1])
    # Where |u| = |v| up to rounding, either may be the factor that is zeroed.
    tie = (u.abs() - v.abs()).abs() <= 1e-6 * (terms[0] + terms[1])
    for i, free in enumerate((u, v)):
        values = [s[1 + i] for s in steps[:2]]
        values += [torch.where(tie, x, values[0]) for x in (torch.zeros_like(free), free)]
        values = [torch.where(still & ~tie, stored[i], x) for x in values] + [torch.where(still, stored[i], values[0])]
        out[f"factor_{i}"] = Expected(tuple(values), terms[i])
    return out


def rebalanced(a: Tensor, b: Tensor, keep: float) -> tuple[Tensor, Tensor]:
    """The factors of ``a * b`` whose ``a**2 - b**2`` is ``keep`` times what it was: the root of a quadratic.

    ``reference.rebalance`` is compared with it below.
    """
    c, product = keep * (a - b) * (a + b), (a * b).abs()
    high = ((c.abs() + torch.hypot(c, 2 * product)) / 2).sqrt()
    low = torch.where(high > 0, product / high, 0.0)
    high, low = torch.where(c >= 0, high, low), torch.where(c >= 0, low, high)
    return torch.where(a < 0, -high, high), torch.where(b < 0, -low, low)


def snapped(step: Any) -> tuple[Tensor, ...]:
    """``step`` with the threshold of snapping a little lower, a little higher, and out of reach."""
    results = []
    for factor in (1 - 1e-4, 1 + 1e-4, -1.0):
        with pytest.MonkeyPatch.context() as patch:
            for module in (elementwise, group_kernel):
                patch.setattr(module, "SNAP", SNAP * factor)
            results.append(step())
    return tuple(results)


def _weights(case: Case, values: tuple[Tensor, ...], terms: Tensor) -> dict[str, Expected]:
    """The last of three values (no snapping at all) counts only where the caller made it count."""
    dtype, has_master = FORMATS[case.format]
    if case.retraction in ("sparse", "sparse_free"):
        values = values[:2]
    if dtype == math_of(case.format):
        return {"w": Expected(values, terms)}
    info = torch.finfo(dtype)
    half_ulp = torch.maximum(values[0].abs() * info.eps, torch.tensor(info.smallest_normal * info.eps).double()) / 2
    half_ulp = half_ulp.where(torch.isfinite(half_ulp), torch.zeros(()).double())
    out = {"w": Expected(values, terms, 1.001 * half_ulp)}
    return out | {"master": Expected(values, terms)} if has_master else out


def distances(case: Case, problem: Problem, expected: dict[str, Expected]) -> dict[str, float]:
    """The largest error of every output, in ulps of its terms; NaN must stand where NaN is expected, infinities too."""
    info = torch.finfo(math_of(case.format))
    have, found = problem.all(), {}
    for key, want in expected.items():
        best = torch.full_like(want.terms, math.inf)
        for value in want.values:
            error = (have[key].double() - value).abs()
            error = torch.where((have[key].double() == value) | (have[key].isnan() & value.isnan()), 0.0, error)
            best = torch.minimum(best, error.nan_to_num(nan=math.inf))
        floor = info.smallest_normal  # below it an ulp is smallest_normal * eps
        ulp = info.eps * want.terms.abs().nan_to_num(0.0, 0.0, 0.0).clamp(min=floor)
        found[key] = float(((best - want.slack).clamp(min=0) / ulp).max()) if best.numel() else 0.0
    return found


def allowed(case: Case, key: str) -> float:
    kind = "native weight" if key in ("w", "master", "factor_0", "factor_1") else "native state"
    if kind == "native weight" and case.retraction == "sparse_free" and case.imbalance_factor is not None:
        kind = "native rebalanced"
    return tolerance(f"{kind}, fp64" if case.format == "fp64" and kind != "native rebalanced" else kind)


def check(case: Case, **changes: Any) -> dict[str, float]:
    """Step and compare everything: outputs with the oracle, and that nothing else has changed."""
    problem = make(case)
    expected = expect(case, problem)
    entry = run(case, problem, **changes)
    errors = distances(case, problem, expected)
    bad = {key: f"{error:.1f} ulp" for key, error in errors.items() if not error <= allowed(case, key)}
    assert not bad, f"{case}: {bad}"
    assert entry.zeros == int((problem.w == 0).sum()), f"{case}: zeros"
    dtype, has_master = FORMATS[case.format]
    if has_master:  # torch's rounding is the oracle for the kernel's own
        rounded = problem.state["master"].to(dtype)
        assert bool(((problem.w == rounded) | (problem.w.isnan() & rounded.isnan())).all()), f"{case}: rounding"
    for key, value in problem.all().items():
        if key == "step":
            assert value == STEP + 1, f"{case}: step"
        elif key not in expected and not (key == "imbalance" and case.retraction == "sparse_free"):
            assert same(value, problem.start[key]), f"{case}: {key} was written to"
    for guard in itertools.chain.from_iterable(problem.guards):
        assert bool((guard == 77).all()), f"{case}: wrote beyond a tensor"
    return errors


def same(x: Tensor, y: Tensor) -> bool:
    """Bit for bit, NaN included."""
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return torch.equal(x.contiguous().view(bits), y.contiguous().view(bits))


# --------------------------------------------------------------------------------------- one step, every combination


def test_the_extension_is_built() -> None:
    """Whatever runs these tests has a compiler; without one all others here would fail for the wrong reason."""
    assert native.UNAVAILABLE is None


AXES: dict[str, list[Any]] = {
    "format": list(FORMATS),
    "instructions": list(native.INSTRUCTIONS),
    "saturated": [True, False],
    "trimmed": [False, True],
    "imbalance": [0.02, 0.0],
}


def applies(case: Case) -> bool:
    """A master belongs to fixed gauges and, from the tests of rounding, to plain weights."""
    return not (case.retraction == "sparse_free" and FORMATS[case.format][1])


def product_of_axes(direction: str, retraction: str) -> Iterator[Case]:
    """All values of all axes with each other; shapes rotate, so that each meets many of them."""
    shapes = [((n,), None) for n in SIZES if n <= 513] if retraction != "group" else [GROUPS[n] for n in SMALL_GROUPS]
    for i, values in enumerate(itertools.product(*AXES.values())):
        shape, groups = shapes[i % len(shapes)]
        case = Case(direction, retraction, shape, groups, seed=i, **dict(zip(AXES, values, strict=True)))
        if retraction == "plain":
            case = replace(case, weight_decay=0.1 if case.trimmed else 0.0)
        if applies(case):
            yield case


@pytest.mark.parametrize("retraction", RETRACTIONS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_step_is_the_references(direction: str, retraction: str) -> None:
    for case in product_of_axes(direction, retraction):
        check(case)


def rotated(direction: str, i: int, **fixed: Any) -> Case:
    """Combination number i of the axes: neighbours differ in all of them."""
    values = {axis: options[(i // (1 + k)) % len(options)] for k, (axis, options) in enumerate(AXES.items())}
    return Case(direction, seed=i, **{**values, **fixed})


def large_cases(retraction: str) -> Iterator[Case]:
    """Every size with several directions; a step between neighbours that is prime to all lengths of axes."""
    directions = list(DIRECTIONS)
    rows = [((n,), None) for n in SIZES] if retraction != "group" else list(GROUPS.values())
    for i, (shape, groups) in enumerate(rows):
        for k in range(4):
            case = rotated(directions[(4 * i + k) % len(directions)], 5 * i + 7 * k, retraction=retraction)
            case = replace(case, shape=shape, groups=groups)
            yield case if applies(case) else replace(case, format=case.format.removesuffix("+master"))


@pytest.mark.parametrize("retraction", RETRACTIONS)
def test_a_step_is_the_references_at_every_size(retraction: str) -> None:
    for case in large_cases(retraction):
        check(case)


def meets(case: Case) -> set[str]:
    """What happens in a case, so that the cases above are known to reach every branch."""
    problem = make(case)
    new, old = expect(case, problem)["w"].values[-1], problem.start["w"].double()
    scale = SNAP * SCALE
    found = {
        "snaps": (old != 0) & (new == 0),
        "revives": (old == 0) & (new != 0),
        "survives just above the threshold": (new.abs() > scale) & (new.abs() < 10 * scale),
        "survives below the threshold, driven": (new.abs() < scale) & (new != 0) & (old.abs() > 1e-30),
        "stays zero": (old == 0) & (new == 0),
        "turns": old * new < 0,
    }
    names = {name for name, where in found.items() if bool(where.any())}
    if "imbalance" in problem.start and case.retraction != "sparse_free" and case.imbalance:
        kept = float(expect(case, problem)["imbalance"].values[0]) / float(problem.start["imbalance"])
        if gauge.MIN_IMBALANCE_FACTOR * (1 + 1e-6) < kept < 1 - 1e-6:
            names.add("the imbalance's own law")
    return names


@pytest.mark.parametrize("retraction", RETRACTIONS[1:])
def test_the_cases_above_reach_every_branch(retraction: str) -> None:
    directions = ("momentum", "adam", "adamw")
    together = set().union(*(meets(case) for d in directions for case in product_of_axes(d, retraction)))
    law = {"the imbalance's own law"} if retraction != "sparse_free" else set()
    assert together == law | {
        "snaps",
        "revives",
        "survives just above the threshold",
        "survives below the threshold, driven",
        "stays zero",
        "turns",
    }


@pytest.mark.parametrize("retraction", RETRACTIONS)
def test_every_value_of_every_axis_occurs_at_large_sizes_too(retraction: str) -> None:
    cases = list(large_cases(retraction))
    for axis, values in (*AXES.items(), ("direction", DIRECTIONS)):
        seen = {getattr(case, axis) for case in cases}
        wanted = {v for v in values if retraction != "sparse_free" or not str(v).endswith("+master")}
        assert seen == wanted, axis


@pytest.mark.parametrize("instructions", native.INSTRUCTIONS)
def test_a_group_whose_terms_nearly_cancel_is_not_taken_for_zero(instructions: str) -> None:
    """Its norm comes from four fp32 sums and drowns in their rounding; the members know that they are not yet zero."""
    n, lr, decay = 1 << 16, 1.0, 0.1
    generator = torch.Generator().manual_seed(0)
    pull = 0.05 * (1 + torch.rand(n, generator=generator, dtype=torch.float64))
    off = 1 + (1e-5 + 4e-5 * torch.rand(n, generator=generator, dtype=torch.float64))
    w = pull
    for _ in range(50):  # to where the group retraction at c = 1 ends in zero: rho w = s**2 t pull
        metric = (1 + 4 * w * w).sqrt()
        w = (1 + metric) / 2 * pull / (metric - decay)
    w, g = (w * off).float(), pull.float()
    groups = symopt.GroupSparse("out").partition(w)
    state = {"imbalance": torch.tensor(1.0), "metric_scale": torch.tensor(0.01)}
    c, scale = (state[key].double() for key in ("imbalance", "metric_scale"))
    want = group_kernel.group(w.double(), lr * g.double(), decay, c, scale, groups)
    assert bool((want.abs() < 1e-4 * w).all()) and bool((want != 0).all())
    entry = native.Entry()
    native.fill(entry, w, state, "group", groups)
    entry.grad, entry.strength_kept, entry.strength_pruned = g.data_ptr(), decay, decay
    native.step([entry], "sgd", lr=lr, instructions=instructions)
    assert entry.zeros == int((w == 0).sum()) == 0


MEANT = {"lr": Case().lr, "strength": STRENGTH, "beta1": BETA1, "beta2": BETA2, "momentum": 0.8, "dampening": 0.3}
MEANT |= {"imbalance_factor": 0.9, "weight_decay": 0.1, "grad_scale": 3.0}


@pytest.mark.parametrize("format", ["fp32", "fp64", "bf16+master"])
@pytest.mark.parametrize("name", MEANT)
def test_the_comparison_notices_a_relative_error_of_1e_5(name: str, format: str) -> None:
    """In any one number handed to the kernel."""
    direction = "dampening" if name in ("momentum", "dampening", "grad_scale") else "adam"
    case = Case(direction, "plain" if name == "weight_decay" else "sparse", (2000,), format=format)
    if name in ("imbalance_factor", "weight_decay", "grad_scale"):
        case = replace(case, **{name: MEANT[name]})
    wrong = MEANT[name] * (1 + 1e-5)
    check(case)
    with pytest.raises(AssertionError, match="ulp"):
        check(case, **{name: torch.tensor(wrong) if name == "grad_scale" else wrong})


@pytest.mark.parametrize("key", ["w", "g", "exp_avg", "exp_avg_sq", "imbalance", "metric_scale", "factor_0"])
def test_the_comparison_notices_a_single_wrong_element(key: str) -> None:
    """A thousandth of one element of the smallest input that shows."""
    case = Case("adam", "sparse_free" if key == "factor_0" else "sparse", (2000,))
    problem = make(case)
    expected = expect(case, problem)
    value = problem.all()[key]
    value.view(-1)[int(value.abs().argmax())] *= 1 + 1e-3
    run(case, problem)
    errors = distances(case, problem, expected)
    assert any(error > allowed(case, name) for name, error in errors.items())


seeds = st.integers(0, 2**20)


@st.composite
def any_case(draw: Any) -> Case:
    """Any shape, any partition that fits it, any order of its dimensions in memory, any setting."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    shape = (shape[0] * draw(st.sampled_from([1, 1, 3, 40])), *shape[1:])
    retraction = draw(st.sampled_from(RETRACTIONS))
    partitions: list[str | int] = ["out", draw(st.integers(1, math.prod(shape)))]
    partitions += [f"head:{n}" for n in range(2, shape[0]) if shape[0] % n == 0][:2]
    if len(shape) > 1:
        partitions += ["in", *(f"block:{r}x{c}" for r, c in itertools.product(range(1, 5), range(1, 5))
                               if shape[0] % r == 0 and shape[1] % c == 0)]  # fmt: skip
        if len(shape) == 2 and shape[0] == 3 * shape[1]:
            partitions = [p for p in partitions if not str(p).startswith("head")]  # packed: heads of another size
    groups = draw(st.sampled_from(partitions)) if retraction == "group" else None
    order = tuple(draw(st.permutations(range(len(shape)))))
    if native.layout(in_order(torch.empty(shape), order), partition(shape, groups, 0)) is None:
        order = None
    format = draw(st.sampled_from([f for f in FORMATS if retraction != "sparse_free" or "master" not in f]))
    return Case(
        draw(st.sampled_from(list(DIRECTIONS))),
        retraction,
        shape,
        groups,
        format,
        draw(st.sampled_from(native.INSTRUCTIONS)),
        saturated=draw(st.booleans()),
        trimmed=draw(st.booleans()),
        imbalance=draw(st.sampled_from([0.0, 1e-6, 0.02, 3.0])),
        imbalance_factor=draw(st.sampled_from([None, None, 0.0, 0.9, 1.0])),
        maximize=draw(st.booleans()),
        grad_scale=draw(st.sampled_from([None, 1024.0, 3.0])),
        weight_decay=draw(st.sampled_from([0.0, 0.1])),
        order=order,
        seed=draw(seeds),
    )


@settings(max_examples=300, deadline=None, derandomize=True)
@given(any_case())
def test_any_step_is_the_references(case: Case) -> None:
    check(case)


# --------------------------------------------------------------------------------------------------- numbers gone bad

POISONED: list[tuple[str, tuple[int, ...], str | int | None]] = [
    ("plain", (3000,), None),
    ("sparse", (3000,), None),
    ("sparse_free", (3000,), None),
    ("group", (60, 50), "out"),
    ("group", (60, 150), "out"),
    ("group", (60, 50), "in"),
    ("group", (700, 130), "in"),
    ("group", (60, 50), 40),
]


@pytest.mark.parametrize("instructions", native.INSTRUCTIONS)
@pytest.mark.parametrize(("retraction", "shape", "groups"), POISONED, ids=str)
def test_nan_and_infinity_stay_where_they_are(
    retraction: str, shape: tuple[int, ...], groups: str | int | None, instructions: str
) -> None:
    """They appear where the reference has them, move no other unit by a bit, and leave the imbalance finite."""
    for i, direction in enumerate(DIRECTIONS):
        saturated = i % 2 == 0
        format = ["fp32", "fp64", "bf16", "bf16+master", "fp16", "fp16+master"][i % 6]
        format = format.removesuffix("+master") if retraction == "sparse_free" else format
        clean = Case(
            direction, retraction, shape, groups, format, instructions, saturated, trimmed=i % 4 > 1, seed=2 * i
        )
        poisoned = replace(clean, poison=True)
        check(poisoned)
        with_it, without = make(poisoned), make(clean)
        hit = ~(with_it.w.isfinite() & with_it.g.isfinite() & (with_it.w == without.w) & (with_it.g == without.g))
        if with_it.groups is not None:
            hit = with_it.groups.expand(with_it.groups.sum(hit.double()) > 0).reshape(shape)
        run(poisoned, with_it)
        run(clean, without)
        assert bool(hit.any()) and not bool(hit.all())
        for key, value in with_it.all().items():
            other = without.all()[key]
            if value.shape == hit.shape:
                assert same(value[~hit], other[~hit]), f"{poisoned}: {key}"
        if retraction != "plain":
            assert bool(with_it.state["imbalance"].isfinite())


@pytest.mark.parametrize("instructions", native.INSTRUCTIONS)
@pytest.mark.parametrize("direction", ["adam", "adam-amsgrad"])
def test_many_nan_gradients_leave_the_imbalance_what_the_finite_ones_make_it(direction: str, instructions: str) -> None:
    """Adam's rate of the imbalance is a quantile of preconditioners, some of which are NaN now."""
    for share in (0.05, 0.5, 0.8):
        for retraction, shape, groups in POISONED[1:]:
            case = Case(direction, retraction, shape, groups, instructions=instructions)
            problem = make(case)
            bad = torch.rand(shape, generator=torch.Generator().manual_seed(5)) < share
            if problem.groups is not None:
                bad = problem.groups.expand(torch.arange(problem.groups.count) % 20 < 20 * share).reshape(shape)
            problem.g[bad] = math.nan
            problem.start["g"][bad] = math.nan
            expected = expect(case, problem)
            run(case, problem)
            errors = distances(case, problem, expected)
            assert errors.get("imbalance", 0.0) <= allowed(case, "imbalance"), f"{case}: {share} are NaN"
            assert bool(problem.state["imbalance"].isfinite())


# --------------------------------------------------------------------------------------------------- threads, repeats


def everything(direction: str, format: str) -> list[tuple[Case, Problem]]:
    """A tensor of every kind and size, for one call."""
    cases = []
    for retraction in RETRACTIONS:
        rows: list[Any] = [((n,), None) for n in SIZES] if retraction != "group" else list(GROUPS.values())
        cases += [Case(direction, retraction, shape, groups, format, seed=4) for shape, groups in rows]
    return [(case, make(case)) for case in cases if applies(case)]


def run_all(pairs: list[tuple[Case, Problem]]) -> list[Tensor]:
    """Steps all of them in one call, from where they started, and returns all there is afterwards."""
    entries = []
    for case, problem in pairs:
        for key, value in problem.all().items():
            value.copy_(problem.start[key])
        entry = native.Entry()
        fresh = bool(case.option("fresh"))
        native.fill(entry, problem.w, problem.state, case.retraction, problem.groups, fresh=fresh)
        entry.grad = problem.g.data_ptr()
        entry.strength_kept = entry.strength_pruned = STRENGTH
        entries.append(entry)
    native.step(entries, pairs[0][0].kind, **arguments(pairs[0][0]))
    zeros = torch.tensor([entry.zeros for entry in entries])
    return [zeros, *(value.clone() for _, problem in pairs for value in problem.all().values())]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("direction", "format"), [("nesterov", "fp32"), ("adam-amsgrad", "fp32"), ("adamw", "bf16")])
def test_results_do_not_depend_on_the_number_of_threads(direction: str, format: str, threads: None) -> None:
    torch.set_num_threads(1)
    pairs = everything(direction, format)
    want = run_all(pairs)
    for count in (1, 2, 2, 3, 8):
        torch.set_num_threads(count)
        have = run_all(pairs)
        assert all(same(x, y) for x, y in zip(have, want, strict=True)), f"{count} threads"


@pytest.mark.parametrize("direction", ["nesterov", "adamw"])
def test_a_tensor_does_not_notice_its_neighbours(direction: str) -> None:
    pairs = everything(direction, "fp32")
    together = run_all(pairs)[1:]
    alone = []
    for case, problem in pairs:
        for key, value in problem.all().items():
            value.copy_(problem.start[key])
        run(case, problem)
        alone += list(problem.all().values())
    assert all(same(x, y) for x, y in zip(alone, together, strict=True))


def test_a_tensor_large_enough_for_large_chunks(threads: None) -> None:
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        case = Case("adam", "sparse", ((1 << 20) + 3,))
        problem = make(case)
        expected = expect(case, problem)
        entry = run(case, problem)
        errors = distances(case, problem, expected)
        assert {key: error for key, error in errors.items() if error > allowed(case, key)} == {}
        assert entry.zeros == int((problem.w == 0).sum())
        results.append(problem.all())
    assert all(same(results[0][key], results[1][key]) for key in results[0])


# ------------------------------------------------------------------------------------------------ nothing may change


@pytest.mark.parametrize("retraction", RETRACTIONS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_step_of_length_zero_changes_no_bit_of_a_weight(direction: str, retraction: str) -> None:
    """Nor of factors and masters.  Only a negative zero may lose its sign."""
    for case in itertools.islice(product_of_axes(direction, retraction), 0, None, 5):
        for decay in (None, 0.0) if retraction == "sparse_free" else (None,):
            problem = make(case)
            for key in ("w", "master"):
                if key in problem.start:
                    problem.all()[key].add_(0.0)  # turns -0.0 into 0.0
            dtype, has_master = FORMATS[case.format]
            w = problem.w.clone()
            used = w
            if has_master:
                master = problem.state["master"]
                used = torch.where(master.to(dtype) == w, master, w.to(master.dtype))
            valid = (
                retraction == "sparse_free" and (problem.start["factor_0"] * problem.start["factor_1"]).to(dtype) == w
            )
            run(case, problem, lr=0.0, imbalance_factor=decay)
            assert same(problem.w, w), case
            if has_master:
                assert same(problem.state["master"], used), case
            for key in ("factor_0", "factor_1"):
                if key in problem.state:
                    assert same(problem.state[key][valid], problem.start[key][valid]), f"{case}: {key}"


@pytest.mark.parametrize("retraction", RETRACTIONS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradients_that_overflowed_change_nothing(direction: str, retraction: str) -> None:
    shape, groups = GROUPS["in"] if retraction == "group" else ((50,), None)
    for flag in (1.0, 0.0):
        problem = make(case := Case(direction, retraction, shape, groups, poison=flag != 0))
        entry = native.Entry()
        entry.zeros = -7
        run(case, problem, found_inf=torch.tensor(flag))
        unchanged = all(same(value, problem.start[key]) for key, value in problem.all().items())
        assert unchanged == bool(flag)


def test_no_tensors_and_empty_tensors() -> None:
    native.step([], "adamw", lr=LR)
    problem = make(case := Case("adamw", "plain", (5,)))
    empty, nothing = native.Entry(), torch.empty(0)
    state = {"exp_avg": nothing, "exp_avg_sq": nothing, "step": torch.tensor(STEP)}
    native.fill(empty, nothing, state, "plain")
    other = native.Entry()
    native.fill(other, problem.w, problem.state, "plain")
    other.grad = problem.g.data_ptr()
    expected = expect(case, problem)
    native.step([empty, other], "adamw", **arguments(case))
    assert empty.zeros == 0 and state["step"] == STEP + 1
    assert all(error <= allowed(case, key) for key, error in distances(case, problem, expected).items())


# ----------------------------------------------------------------------------------------------------- torch's numbers


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("format", ["fp32", "fp64"])
@pytest.mark.parametrize("direction", [d for d in DIRECTIONS if d != "nesterov-dampening"])
def test_plain_tensors_take_torchs_own_step(direction: str, format: str, maximize: bool, weight_decay: float) -> None:
    for instructions, scale in itertools.product(native.INSTRUCTIONS, (None, 1024.0, 3.0)):
        case = Case(direction, "plain", (1000,), None, format, instructions, maximize=maximize, grad_scale=scale)
        case = replace(case, weight_decay=weight_decay, seed=3)
        problem = make(case)
        p = torch.nn.Parameter(problem.w.double().clone())
        p.grad = problem.g.double().clone() / (1.0 if scale is None else scale)
        options: dict[str, Any] = {"lr": case.lr, "weight_decay": weight_decay, "maximize": maximize, "foreach": False}
        if case.kind == "sgd":
            options |= {name: case.option(name) for name in ("momentum", "dampening")}
            opt: torch.optim.Optimizer = torch.optim.SGD([p], nesterov=bool(case.option("nesterov")), **options)
        else:
            cls = torch.optim.Adam if case.kind == "adam" else torch.optim.AdamW
            opt = cls([p], betas=(BETA1, BETA2), eps=EPS, amsgrad=bool(case.option("amsgrad")), **options)
        if not case.option("fresh"):
            opt.state[p] = {k: v.clone() if k == "step" else v.double().clone() for k, v in problem.state.items()}
        opt.step()
        terms = expect(case, problem)
        run(case, problem)
        theirs = {"w": p.detach(), **opt.state[p]}
        want = {key: replace(value, values=(theirs[key],)) for key, value in terms.items()}
        errors = distances(case, problem, want)
        assert {key: error for key, error in errors.items() if not error <= allowed(case, key)} == {}, case


def test_the_step_count_may_be_fp32_or_fp64_and_large() -> None:
    for count in (0.0, 5.0, 1e6):
        for dtype in (torch.float32, torch.float64):
            problem = make(case := Case("adam", "plain", (300,)))
            problem.state["step"] = torch.tensor(count, dtype=dtype)
            p = torch.nn.Parameter(problem.w.double())
            p.grad = problem.g.double()
            opt = torch.optim.Adam([p], lr=case.lr, betas=(BETA1, BETA2), eps=EPS, foreach=False)
            opt.state[p] = {k: v.double().clone() for k, v in problem.state.items()}
            opt.step()
            run(case, problem)
            assert problem.state["step"] == count + 1 and problem.state["step"].dtype == dtype
            terms = p.detach().abs() + (p.detach() - problem.start["w"].double()).abs() + problem.start["w"].abs()
            want = {"w": Expected((p.detach(),), terms)}
            # The step itself is a small difference of moments; here it is only its length that is compared.
            assert distances(case, problem, want)["w"] <= 100 * allowed(case, "w")


# ------------------------------------------------------------------------------------------------------- imbalance law


@pytest.mark.parametrize("keep", [1.0, 0.9, 1e-3, 0.0])
@pytest.mark.parametrize("retraction", RETRACTIONS[1:])
def test_a_given_decay_of_the_imbalance(retraction: str, keep: float) -> None:
    """Alike in every direction and instruction set; in the free gauge it rebalances each weight's factors."""
    for i, (direction, instructions) in enumerate(itertools.product(DIRECTIONS, native.INSTRUCTIONS)):
        format = list(FORMATS)[i % len(FORMATS)]
        shape, groups = GROUPS["in-rows-33"] if retraction == "group" else ((700,), None)
        case = Case(direction, retraction, shape, groups, format, instructions, imbalance_factor=keep, seed=1)
        if not applies(case):
            continue
        errors = check(case)
        assert ("imbalance" in errors) == (retraction != "sparse_free")


@pytest.mark.parametrize("keep", [None, 0.9])
def test_an_imbalance_at_its_end_becomes_zero(keep: float | None) -> None:
    for retraction, (shape, groups) in {"sparse": ((50,), None), "group": GROUPS["out"]}.items():
        for factor in (1 - 1e-3, 1 + 1e-3):
            decay = gauge.MIN_IMBALANCE_FACTOR if keep is None else keep
            start = factor * SNAP * SCALE / decay
            case = Case("sgd", retraction, shape, groups, imbalance=start, imbalance_factor=keep)
            problem = make(case)
            run(case, problem, strength=1e3)  # so strong that the automatic law takes its fastest step
            assert bool(problem.state["imbalance"] == 0) == (factor < 1), case


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_reference_rebalances_to_the_same_weight(dtype: torch.dtype) -> None:
    """Whatever the sizes of the factors: the oracle above is its closed form, and the product is the weight."""
    for ratio in (1.0, 0.5, 1e-1, 1e-2, 1e-3, 1e-4):
        a = torch.tensor([0.14, -0.14], dtype=dtype)
        b = ratio * a.flip(0)
        for keep in (0.99, 0.5, 0.0):
            one, two = elementwise.rebalance((a, b), keep), rebalanced(a.double(), b.double(), keep)
            tol = 100 * torch.finfo(dtype).eps
            torch.testing.assert_close(one[0] * one[1], a * b, rtol=tol, atol=0)
            for have, want in zip(one, two, strict=True):
                torch.testing.assert_close(have.double(), want, rtol=tol, atol=0)


# ------------------------------------------------------------------------------------------------------ half precision


def halves(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.mark.parametrize("instructions", native.INSTRUCTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_precision_number_is_read_and_written_as_torch_does(dtype: torch.dtype, instructions: str) -> None:
    """All 65 536 of them, at every offset of a vector; and fp32 numbers at and next to the midpoints between them."""
    every = halves(dtype)
    for shift in range(0, 8, 3):
        w, g = every[shift:].clone(), every.roll(shift)[shift:].clone()
        buffer = torch.full(w.shape, math.nan)
        entry = native.Entry()
        native.fill(entry, w, {"momentum_buffer": buffer}, "plain", fresh=True)
        entry.grad = g.data_ptr()
        native.step([entry], "sgd", lr=0.0, momentum=0.9, instructions=instructions)
        finite = g.isfinite()  # 0 * infinity
        assert same((w + 0.0)[finite & ~w.isnan()], (every[shift:] + 0.0)[finite & ~w.isnan()])  # -0.0 - -0.0 is 0.0
        assert torch.equal(buffer[~g.isnan()], g[~g.isnan()].float()) and bool(buffer[g.isnan()].isnan().all())
    wide = every[every.isfinite()].float().sort().values
    middle = (wide[1:].double() + wide[:-1].double()) / 2
    near = [middle.float(), *(torch.nextafter(middle.float(), wide.new_tensor(side)) for side in (-math.inf, math.inf))]
    random = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 10 ** torch.linspace(-46, 38, 5000)
    for x in (wide, *near, random, torch.tensor([65519.99, 65520.0, 65520.01, 1e38, 3.3953e38, 3.4e38, math.inf])):
        x = x + 0.0
        master, w = x.clone(), x.to(dtype)
        entry = native.Entry()
        native.fill(entry, w, {"master": master}, "plain")
        entry.grad = (zero := torch.zeros_like(w)).data_ptr()
        native.step([entry], "sgd", lr=LR, instructions=instructions)
        assert same(w, x.to(dtype)) and zero.eq(0).all()
        # Had the kernel rounded otherwise it would have taken the master for stale, and with it the weight's value.
        assert same(master, x)
        assert entry.zeros == int((w == 0).sum())


# --------------------------------------------------------------------------------------------------------------- layout


def positions(w: Tensor) -> Tensor:
    """Where in memory every element of a dense tensor lies."""
    return sum((torch.arange(n).reshape([-1 if i == d else 1 for i in range(w.dim())]) * w.stride(d)
                for d, n in enumerate(w.shape)), torch.zeros(w.shape, dtype=torch.int64))  # fmt: skip


def in_memory(w: Tensor, groups: Groups) -> Tensor:
    labels = torch.empty(w.numel(), dtype=torch.int64)
    labels[positions(w).flatten()] = groups.expand(torch.arange(groups.count)).reshape(w.shape).flatten()
    return labels


def from_layout(form: tuple[int, int, int, int]) -> Tensor:
    bands, rows, groups, run = form
    return (torch.arange(bands * groups).reshape(bands, 1, groups, 1)).expand(bands, rows, groups, run).flatten()


@st.composite
def layouts(draw: Any) -> tuple[Tensor, Groups]:
    view = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=5)))
    dims = tuple(d for d in range(len(view)) if draw(st.booleans()))
    order = tuple(draw(st.permutations(range(len(view)))))
    if draw(st.booleans()):
        order = tuple(range(len(view)))
    count = math.prod(n for d, n in enumerate(view) if d not in dims)
    return in_order(torch.empty(view), order), Groups(count, view, dims)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(layouts())
def test_the_layout_of_groups_is_found_exactly_where_there_is_one(made: tuple[Tensor, Groups]) -> None:
    """Against all forms there are: whatever it returns puts every element into its group, and None means none does."""
    w, groups = made
    want, n = in_memory(w, groups), w.numel()
    form = native.layout(w, groups)
    if form is not None:
        assert math.prod(form) == n and form[0] * form[2] == groups.count
        assert torch.equal(from_layout(form), want)
        return
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    for form in itertools.product(divisors, repeat=4):
        if math.prod(form) == n:
            assert not torch.equal(from_layout(form), want), f"{w.shape} {w.stride()} {groups.dims}: {form}"


@pytest.mark.parametrize(("shape", "groups"), GROUPS.values(), ids=list(GROUPS))
def test_named_groups_of_contiguous_tensors_have_a_layout(shape: tuple[int, ...], groups: str | int) -> None:
    made = partition(shape, groups, 0)
    assert made is not None
    form = native.layout(torch.empty(shape), made)
    if isinstance(groups, int):
        assert form == (1, 1, groups, 1)
    else:
        assert form is not None and torch.equal(from_layout(form), in_memory(torch.empty(shape), made))


def test_tensors_with_gaps_or_overlaps_have_no_layout() -> None:
    base = torch.empty(6, 8, 4)
    for w in (base[:, ::2], base[:, :, 1:3], base[:, 0:1].expand(6, 3, 4), base.as_strided((3, 3), (2, 1))):
        assert native.layout(w) is None
        assert native.layout(w, symopt.GroupSparse("out").partition(w)) is None
    for w in (
        base,
        base[2],
        base[1:3],
        base.transpose(0, 2),
        base[:, :1, :1][:1],
        torch.empty(()),
        torch.empty(1, 5)[0],
    ):
        assert native.layout(w) == (1, 1, w.numel(), 1) or native.layout(w) == (1, 1, 1, 1)
