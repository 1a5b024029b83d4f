"""Loops as people write them: the budget is met exactly, and no strength is made of what is no gradient."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import symopt
from support.cases import cases, pairs
from support.courses import (
    FEW,
    FEW_KINDS,
    KINDS,
    STEPS,
    Kind,
    Run,
    backward,
    batch,
    begun,
    bits,
    network,
    optimizer,
    same,
    train,
)
from support.tolerances import tolerance

pytestmark = pytest.mark.filterwarnings("ignore:.* are too few to ramp (its|their) budget in")

SGDS = ["sgd", "sgd-momentum", "sgd-reference"]


# -------------------------------------------------------------------------------------- gradients of selection steps


def scaled(run: Run, steps: Iterable[int], scaler: Any, *, spoilt: int | None = None, clip: float = 0.0) -> None:
    """The same steps under GradScaler; ``spoilt`` has an overflow."""
    net, opt = run
    for t in steps:
        opt.zero_grad()
        backward(net, t, scaler.scale)
        if t == spoilt:
            net.get_parameter("0.weight").grad[0, 0] = math.inf  # type: ignore[index]
        if clip:
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        scaler.step(opt)
        scaler.update(1024.0)


def scaler() -> Any:
    return torch.amp.GradScaler("cpu", init_scale=1024.0)


@pairs(kind=KINDS, name=SGDS, fused=[False, True], at=[0, 19, 59])
def test_a_step_that_gradscaler_skips_changes_nothing(kind: Kind, name: str, fused: bool, at: int) -> None:
    run = begun(kind, name, at, fused=fused)
    before, skipping = bits(run), scaler()
    scaled(run, [at], skipping, spoilt=at)
    same(run, before)
    scaled(run, range(at, 62), skipping)
    same(run, begun(kind, name, 62, fused=fused))


@pairs(kind=KINDS, name=[*SGDS, "adamw"], fused=[False, True], clip=[0.0, 0.1])
def test_a_scaled_gradient_is_the_gradient(kind: Kind, name: str, fused: bool, clip: float) -> None:
    run, other = (begun(kind, name, fused=fused) for _ in range(2))
    scaled(run, range(42), scaler(), clip=clip)
    for t in range(42):
        other[1].zero_grad()
        backward(other[0], t)
        if clip:
            nn.utils.clip_grad_norm_(other[0].parameters(), clip)
        other[1].step()
    same(run, other)


@cases(kind=FEW_KINDS, name=SGDS, fused=[False, True])
def test_strengths_of_accumulated_gradients_are_those_of_their_sum(kind: Kind, name: str, fused: bool) -> None:
    whole, halves = (begun(kind, name, fused=fused) for _ in range(2))
    train(whole, [0])
    net, opt = halves
    x, y = batch(0)
    scaling = scaler()
    for rows in (slice(0, 16), slice(16, 32)):
        scaling.scale(nn.functional.cross_entropy(net(x[rows]), y[rows]) / 2).backward()
    scaling.step(opt)
    one, two = (run[1].state[run[0].get_parameter("0.weight")]["budget"][:2] for run in (whole, halves))
    assert bool((one > 0).all())
    torch.testing.assert_close(one, two, rtol=tolerance("fp32"), atol=0)


@pairs(kind=FEW_KINDS, name=SGDS, at=[0, 19, 39], spoilt=[math.nan, math.inf])
def test_a_gradient_that_is_no_number_keeps_the_strengths(kind: Kind, name: str, at: int, spoilt: float) -> None:
    net, opt = begun(kind, name, at)
    w = net.get_parameter("0.weight")
    before = opt.state[w]["budget"][:2].clone() if at else None
    opt.zero_grad()
    backward(net, at)
    assert w.grad is not None
    w.grad[0, 0] = spoilt
    opt.step()
    strengths = opt.state[w]["budget"][:2]
    assert bool(strengths.isfinite().all())
    assert before is None or torch.equal(strengths, before)


def zeroed(run: Run, order: str) -> Run:
    net, opt = run
    opt.zero_grad()
    for t in range(62):
        if order == "before":
            opt.zero_grad(set_to_none=False)
        backward(net, t)
        opt.step()
        if order == "after":
            opt.zero_grad()
        if order == "twice":
            opt.zero_grad(set_to_none=False)
            opt.zero_grad()
        if order == "by hand":
            for p in net.parameters():
                p.grad = None
    return run


@pairs(kind=FEW_KINDS, name=FEW, order=["before", "after", "twice", "by hand"])
def test_gradients_may_be_zeroed_anywhere(kind: Kind, name: str, order: str) -> None:
    run = zeroed(begun(kind, name), order)
    same(run, begun(kind, name, 62))
    assert kind.live(run[0]) == kind.left


# ------------------------------------------------------------------------------------------------ frozen, and late


@pairs(kind=KINDS, name=FEW, frozen=[True, False], until=[61, 70, 90])
def test_a_weight_that_trains_only_after_the_commit_meets_its_budget(
    kind: Kind, name: str, frozen: bool, until: int
) -> None:
    """Frozen, or without a gradient, as an expert that no token has reached."""
    net, opt = begun(kind, name)
    w = net.get_parameter("0.weight")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for t in range(STEPS):
            w.requires_grad_(not frozen or t >= until)
            opt.zero_grad()
            backward(net, t)
            if t < until:
                w.grad = None
            opt.step()
    found = [str(warning.message) for warning in caught if "too few" not in str(warning.message)]
    assert len(found) == frozen and all(text.startswith("0.weight: frozen") for text in found), found
    assert kind.live(net) == kind.left


@cases(kind=KINDS[3:5], name=["sgd", "adamw"])
def test_weights_that_share_a_budget_with_a_frozen_one_keep_what_they_were_given(kind: Kind, name: str) -> None:
    net, opt = begun(kind, name)
    net.get_parameter("0.weight").requires_grad_(False)
    with pytest.warns(UserWarning, match=r"0\.weight: frozen"):
        train((net, opt), range(60))
    zero = net.get_parameter("2.weight") == 0
    train((net, opt), range(60, 170))
    assert torch.equal(zero, net.get_parameter("2.weight") == 0)


# --------------------------------------------------------------------------------------------- any course of the rate


def constant(t: int) -> float:
    return 0.3


def restarts(t: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * (t % 25) / 25))


def cyclic(t: int) -> float:
    return 0.01 + abs((t % 20) / 10 - 1)


def late(t: int) -> float:
    return 0.0 if t < 60 else 1.0


def wild(t: int) -> float:
    return float(10.0 ** ((t * 7919) % 13 / 4 - 2))


def columns(w: Tensor) -> int:
    return int(w.any(0).sum())


def entries(w: Tensor) -> int:
    return int(w.count_nonzero())


DEAD: dict[str, tuple[Callable[[], symopt.Constraint], Callable[[Tensor], int], int]] = {
    "in": (lambda: symopt.GroupSparse("in", keep=0.5), columns, 32),
    "in-most": (lambda: symopt.GroupSparse("in", keep=0.75), columns, 48),
    "in-few": (lambda: symopt.GroupSparse("in", keep=20), columns, 20),
    "density": (lambda: symopt.Sparse(density=0.9), entries, round(0.9 * 64 * 32)),
    "density-half": (lambda: symopt.Sparse(density=0.5), entries, 32 * 32),
    "2:4": (lambda: symopt.Sparse(pattern="2:4"), entries, 32 * 32),
}
HIGH = {"sgd": 1.0, "sgd-momentum": 0.3, "adam": 3e-2, "adamw": 3e-2, "lion": 1e-2, "adamw-reference": 3e-2}


@pairs(
    lambda rate, name, equal, **_: rate is not wild or not equal,
    budget=list(DEAD),
    name=list(HIGH),
    rate=[constant, restarts, cyclic, late, wild],
    equal=[False, True],
)
def test_units_without_a_gradient_fill_a_budget(
    budget: str, name: str, rate: Callable[[int], float], equal: bool
) -> None:
    """48 of 64 inputs are always zero, and what they weigh may be all the same: none dies for which there is room."""
    make, live, left = DEAD[budget]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
    if equal:
        with torch.no_grad():
            net.get_parameter("0.weight")[:, 16:] = 0.1
    symopt.constrain(net, {"0.weight": make()})
    tensor = not equal and name != "lion"
    opt = optimizer(name, net, lr=torch.tensor(HIGH[name]) if tensor else HIGH[name], total_steps=200)
    for t in range(125):
        for group in opt.param_groups:
            if tensor:
                group["lr"].fill_(rate(t) * HIGH[name])
            else:
                group["lr"] = rate(t) * HIGH[name]
        x = torch.randn(16, 64, generator=torch.Generator().manual_seed(t))
        x[:, 16:] = 0
        opt.zero_grad()
        nn.functional.cross_entropy(net(x), (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()).backward()
        opt.step()
    assert live(net.get_parameter("0.weight").detach()) == left


@cases(name=["adam", "adamw"])
def test_few_units_that_drift_over_the_threshold_together_do_not_die(name: str) -> None:
    """Found with no lr for 60 steps and then three times the usual one."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
    symopt.constrain(net, {"0.weight": symopt.GroupSparse("in", keep=20)})
    opt = optimizer(name, net, total_steps=1000)
    x = torch.randn(256, 64)
    x[:, 16:] = 0
    y = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    for t in range(601):
        opt.param_groups[0]["lr"] = 0.0 if t < 60 else 3e-2
        opt.zero_grad()
        rows = slice(t % 8 * 32, t % 8 * 32 + 32)
        nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
        opt.step()
    assert columns(net.get_parameter("0.weight").detach()) == 20


def test_param_groups_have_rates_of_their_own() -> None:
    net = network(KINDS[3])
    groups = [{"params": net[0].parameters(), "lr": 0.0}, {"params": net[2].parameters(), "lr": 1e-2}]
    opt = symopt.AdamW(groups, total_steps=STEPS)
    for t in range(STEPS):
        opt.param_groups[t // 20 % 2]["lr"] = 3e-2 * (t % 20 > 10)
        train((net, opt), [t])
    assert KINDS[3].live(net) == KINDS[3].left
