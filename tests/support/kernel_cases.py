"""What a fused kernel may be called with: a direction, a retraction, a shape, a partition, a format, numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import symopt
from support.cases import combinations
from symopt_kernels.groups import Groups
from symopt_kernels.native import binding as native
from symopt_kernels.reference import gauge

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


# Every way in which tasks.h divides groups into stripes, with a size on either side of its borders.
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


RETRACTIONS = native.RETRACTIONS


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
    budgeted: bool = False
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


GRADIENT: dict[str, Any] = {"momentum": 0.0, "dampening": 0.0, "nesterov": False}
"""Settings of SGD that make it the gradient alone."""


def own_settings(case: Any) -> dict[str, Any]:
    """The direction's own settings; a fused step takes no others."""
    if case.kind != "sgd":
        return {"beta1": BETA1, "beta2": BETA2, "eps": EPS}
    numbers = {name: case.option(name) for name in ("momentum", "dampening")}
    return {**numbers, "nesterov": bool(case.option("nesterov"))}


def arguments(case: Case) -> dict[str, Any]:
    scale = None if case.grad_scale is None else torch.tensor(case.grad_scale)
    return {
        "lr": case.lr,
        **own_settings(case),
        "weight_decay": case.weight_decay,
        "maximize": case.maximize,
        "saturated": case.saturated,
        "imbalance_factor": case.imbalance_factor,
        "grad_scale": scale,
        "instructions": case.instructions,
    }


AXES: dict[str, list[Any]] = {
    "format": list(FORMATS),
    "instructions": list(native.INSTRUCTIONS),
    "saturated": [True, False],
    "budgeted": [False, True],
    "imbalance": [0.02, 0.0],
}


def applies(case: Case) -> bool:
    """A master belongs to fixed gauges and, from the tests of rounding, to plain weights."""
    return not (case.retraction == "sparse_free" and FORMATS[case.format][1])


def product_of_axes(direction: str, retraction: str) -> Iterator[Case]:
    """Any three values of the axes meet, with ``--exhaustive`` all; shapes rotate, so that each meets many of them."""
    shapes = [((n,), None) for n in SIZES if n <= 513] if retraction != "group" else [GROUPS[n] for n in SMALL_GROUPS]
    for i, values in enumerate(combinations(AXES, None, 3)):
        shape, groups = shapes[i % len(shapes)]
        case = Case(direction, retraction, shape, groups, seed=i, **values)
        if retraction == "plain":
            case = replace(case, weight_decay=0.1 if case.budgeted else 0.0)
        if applies(case):
            yield case
