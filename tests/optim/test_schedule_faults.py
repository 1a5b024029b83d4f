"""What happens to budgets in loops as people write them: the count is met exactly, and no strength is made of rubbish."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import symopt
from support.cases import pairs
from support.courses import KINDS, MAKE, STEPS, Kind, Run, backward, begun, bits, optimizer, same

pytestmark = pytest.mark.filterwarnings("ignore:.* are too few to ramp (its|their) budget in")

BACKENDS = ("native", "reference")
DUE = (1, 20, 40, 60)
"""Steps after which something is selected or committed."""


def has(kind: Kind, name: str, backend: str | None = None, **_: Any) -> bool:
    """Whether the backend steps the kind under this optimizer."""
    if backend != "native":
        return True
    return not kind.id.startswith("rank") and not (name == "lion" and kind.id.startswith("rows"))


# ------------------------------------------------------------------------------------------------------- GradScaler


def scaled(run: Run, steps: Iterator[int] | range, scaler: Any, spoilt: tuple[int, ...] = (), clip: float = 0) -> None:
    net, opt = run
    for t in steps:
        opt.zero_grad()
        backward(net, t, scaler.scale)
        if t in spoilt:
            net[0].weight.grad[0, 0] = math.inf
        if clip:
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        scaler.step(opt)
        scaler.update(1024.0)


@pairs(
    has, kind=KINDS, name=["sgd", "sgd-momentum"], fused=[False, True], backend=[None, "reference"], at=[0, 19, 39, 59]
)
def test_a_step_that_gradscaler_skips_changes_nothing(kind, name, fused, backend, at) -> None:
    run, scaler = begun(kind, name, at, fused=fused, backend=backend), torch.amp.GradScaler("cpu", init_scale=1024.0)
    if at == 0:
        begun(kind, name, 0)
    before = bits(run)
    scaled(run, range(at, at + 1), scaler, spoilt=(at,))
    if at:
        same(run, before)
    else:
        assert not any("." in key and "progress" in key and bool(value) for key, value in bits(run).items())
    scaled(run, range(at, STEPS), scaler)
    same(run, begun(kind, name, STEPS, fused=fused, backend=backend))


@pairs(
    has,
    kind=KINDS,
    name=["sgd", "sgd-momentum", "adamw"],
    fused=[False, True],
    backend=[None, "reference"],
    clip=[0, 0.1],
)
def test_a_scaled_gradient_is_the_gradient(kind, name, fused, backend, clip) -> None:
    run, other = (begun(kind, name, 0, fused=fused, backend=backend) for _ in range(2))
    scaled(run, range(50), torch.amp.GradScaler("cpu", init_scale=1024.0), clip=clip)
    for t in range(50):
        other[1].zero_grad()
        backward(other[0], t)
        if clip:
            nn.utils.clip_grad_norm_(other[0].parameters(), clip)
        other[1].step()
    same(run, other)


def rearranged(run: Run, order: str) -> None:
    net, opt = run
    opt.zero_grad()
    for t in range(STEPS):
        if order == "before":
            opt.zero_grad()
        if order == "zeros":
            opt.zero_grad(set_to_none=False)
        backward(net, t)
        opt.step()
        if order == "after":
            opt.zero_grad()
        if order == "twice":
            opt.zero_grad(set_to_none=False)
            opt.zero_grad()
        if order == "gone":
            net[0].weight.grad = net[2].weight.grad = None
            opt.zero_grad(set_to_none=False)


@pairs(kind=KINDS, name=MAKE, order=["zeros", "after", "twice", "gone"])
def test_gradients_may_be_zeroed_anywhere(kind: Kind, name: str, order: str) -> None:
    run, other = begun(kind, name), begun(kind, name)
    rearranged(run, "before")
    rearranged(other, order)
    same(run, other)
    assert kind.live(run[0]) == kind.left


# ----------------------------------------------------------------------------------------------- late first gradients


@pairs(has, kind=KINDS, name=MAKE, backend=[None, "reference"], how=["frozen", "none"], until=[61, 70, 90])
def test_a_weight_that_trains_only_after_the_commit_meets_its_budget(kind, name, backend, how, until) -> None:
    net, opt = begun(kind, name, backend=backend)
    w = net[0].weight
    w.requires_grad_(how != "frozen")

    def each(t: int) -> None:
        w.requires_grad_(how != "frozen" or t >= until)

    def hide(t):
        if how == "none" and t < until:
            w.grad = None

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for t in range(STEPS):
            opt.zero_grad()
            each(t)
            backward(net, t)
            hide(t)
            opt.step()
    found = [str(c.message) for c in caught if "frozen" in str(c.message)]
    assert len(found) == (how == "frozen"), found
    assert kind.live(net) == kind.left


# ------------------------------------------------------------------------------------------------------ lr that rises


def lrs(kind: str, t: int, high: float) -> float:
    if kind == "restart":
        return high * 0.5 * (1 + math.cos(math.pi * (t % 25) / 25))
    if kind == "cyclic":
        return high * (0.01 + abs((t % 20) / 10 - 1))
    if kind == "late":
        return 0.0 if t < 60 else high
    if kind == "wild":
        return high * 10.0 ** ((t * 7919) % 13 / 4 - 2)
    if kind == "warmup":
        return high * t / 200
    return high


DEAD = {
    "in-half": (lambda: symopt.GroupSparse("in", keep=0.5), lambda w: int(w.any(0).sum()), 32),
    "in-most": (lambda: symopt.GroupSparse("in", keep=0.75), lambda w: int(w.any(0).sum()), 48),
    "out": (lambda: symopt.GroupSparse("out", keep=0.75), lambda w: int(w.any(1).sum()), 24),
    "sparse": (lambda: symopt.Sparse(density=0.9), lambda w: int(w.count_nonzero()), round(0.9 * 64 * 32)),
    "sparse-half": (lambda: symopt.Sparse(density=0.5), lambda w: int(w.count_nonzero()), 32 * 32),
    "2:4": (lambda: symopt.Sparse(pattern="2:4"), lambda w: int(w.count_nonzero()), 32 * 32),
    "rank": (lambda: symopt.LowRank(rank=10), lambda w: int((torch.linalg.svdvals(w) > 1e-4 * w.norm()).sum()), 10),
}
HIGH = {"sgd": 1.0, "sgd-momentum": 0.3, "adam": 3e-2, "adamw": 3e-2, "lion": 1e-2}


def _has(budget, name, backend, **_):
    return backend != "native" or (
        budget != "rank" and not (name == "lion" and budget in ("in-half", "in-most", "out"))
    )


@pairs(
    _has,
    budget=list(DEAD),
    name=list(MAKE),
    backend=["native", "reference"],
    lr=["restart", "cyclic", "late", "wild", "warmup"],
    tensor=[False, True],
)
def test_no_course_of_the_learning_rate_kills_what_the_budget_keeps(budget, name, backend, lr, tensor) -> None:
    make, live, left = DEAD[budget]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
    symopt.constrain(net, {"0.weight": make()})
    if tensor and name == "lion":
        tensor = False
    opt = optimizer(name, net, lr=torch.tensor(HIGH[name]) if tensor else HIGH[name], total_steps=200, backend=backend)
    for t in range(200):
        x = torch.randn(16, 64, generator=torch.Generator().manual_seed(t))
        x[:, 16:] = 0
        for group in opt.param_groups:
            if tensor:
                group["lr"].fill_(lrs(lr, t, HIGH[name]))
            else:
                group["lr"] = lrs(lr, t, HIGH[name])
        opt.zero_grad()
        nn.functional.cross_entropy(net(x), (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()).backward()
        opt.step()
    assert live(net[0].weight.detach()) == left, live(net[0].weight.detach())
