"""The schedule inside the optimizer: what is counted, how long training is, and what is said of it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

import symopt
from support.cases import cases, pairs, some
from support.courses import (
    FEW,
    FEW_KINDS,
    KINDS,
    MAKE,
    STEPS,
    Kind,
    Run,
    backward,
    begun,
    bits,
    network,
    optimizer,
    same,
    train,
)
from support.table import ANY_SHAPE, EVERY, OptimizerRow, Row, available, bound_module

pytestmark = pytest.mark.filterwarnings("ignore:.* are too few to (ramp|bring)")

SHARED = [kind for kind in KINDS if len(kind.names) > 1]


def unmoved(run: Run, before: dict[str, Tensor]) -> None:
    """What was there before is so to the bit."""
    now = bits(run)
    same({key: now[key] for key in before}, before)


def counted(run: Run) -> set[float]:
    return {float(state["progress"]) for state in run[1].state.values() if "progress" in state}


# ----------------------------------------------------------------------------------------------------------- counting


@some(kind=KINDS, name=MAKE)
def test_every_call_of_step_counts(kind: Kind, name: str) -> None:
    """Without a gradient too, and at lr 0."""
    net, opt = begun(kind, name)
    for t in range(62):
        opt.zero_grad()
        if t % 3:
            backward(net, t)
        opt.param_groups[0]["lr"] = 0.0 if t % 7 == 0 else opt.defaults["lr"]
        opt.step()
        assert counted((net, opt)) == {t + 1}
    assert kind.live(net) == kind.left


@pairs(kind=FEW_KINDS, name=FEW, flat=[False, True], at=[0, 30])
def test_the_step_of_distributed_checkpoints_changes_nothing(kind: Kind, name: str, flat: bool, at: int) -> None:
    run, other = begun(kind, name, at), begun(kind, name, at)
    before = bits(run)
    get_optimizer_state_dict(*run, options=StateDictOptions(flatten_optimizer_state_dict=flat))
    unmoved(run, before)
    assert counted(run) == {at}
    if at or not name.startswith("adam"):  # these count it for their bias correction, as torch's do
        same(train(run, range(at, 62)), train(other, range(at, 62)))


# -------------------------------------------------------------------------------------------------------------- length


@some(kind=KINDS, name=MAKE)
def test_a_budget_without_a_length_is_an_error_before_anything_moves(kind: Kind, name: str) -> None:
    run = begun(kind, name, total_steps=None)
    before = bits(run)
    backward(run[0], 0)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"0\.weight.*budget.*total_steps=N"):
            run[1].step()
        same(run, before)
    run[1].reschedule(total_steps=STEPS)
    same(train(run, range(62)), begun(kind, name, 62))


@cases(kind=SHARED, key=["total_steps", "commit"])
def test_lengths_that_differ_within_a_shared_budget_are_an_error(kind: Kind, key: str) -> None:
    net = network(kind)
    values = (90, 100) if key == "total_steps" else (0.5, 0.6)
    groups = [{"params": net[i].parameters(), key: value} for i, value in zip((0, 2), values, strict=True)]
    opt = symopt.AdamW(groups, total_steps=100)
    before = bits((net, opt))
    backward(net, 0)
    with pytest.raises(ValueError, match=r"0\.weight, 2\.weight share one budget.*total_steps"):
        opt.step()
    unmoved((net, opt), before)


@pairs(kind=KINDS, at=[0, 10, 30, 70], total=[30, 80, 150])
def test_the_length_may_change_at_any_time(kind: Kind, at: int, total: int) -> None:
    run = begun(kind, "adamw", at)
    run[1].reschedule(total_steps=total)
    train(run, range(at, max(round(0.6 * total) + 1, at + 1)))
    assert kind.live(run[0]) == kind.left


@pairs(kind=[kind for kind in KINDS if kind.id != "rank"], total=[65, 150])
def test_what_is_committed_stays_so_in_a_longer_training(kind: Kind, total: int) -> None:
    run, other = begun(kind, "adamw", 61), begun(kind, "adamw", 61)
    run[1].reschedule(total_steps=total)
    same(train(run, range(61, 80)), train(other, range(61, 80)))


# ------------------------------------------------------------------------------------------------------------- warnings


def said(make: Callable[[], symopt.Constraint], name: str, layers: int, steps: int = 2, **options: Any) -> list[str]:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)))
    symopt.constrain(net, {f"{i}.weight": make() for i in range(layers)})
    opt = optimizer(name, net, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for t in range(steps):
            opt.zero_grad()
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(t))
            torch.stack([layer(x).square().sum() for layer in net]).sum().backward()
            opt.step()
    return [str(warning.message) for warning in caught]


@cases(
    make=[
        lambda: symopt.Sparse(density=0.1),
        lambda: symopt.Sparse(pattern="2:4"),
        lambda: symopt.GroupSparse("out", keep=3),
        lambda: symopt.Sparse(strength=0.3),
        lambda: symopt.LowRank(rank=2),
    ],
    name=MAKE,
    total=[3, 30],
)
def test_one_warning_whose_advice_silences_it(make: Callable[[], symopt.Constraint], name: str, total: int) -> None:
    (text,) = said(make, name, 1, lr=1e-5, total_steps=total)
    assert "too few" in text
    lr, steps = re.search(r"lr >= ([\d.e+-]+)", text), re.search(r"or (\d+) steps", text)
    assert lr is not None and steps is not None
    assert said(make, name, 1, lr=1e-5, total_steps=int(steps[1])) == []
    assert said(make, name, 1, lr=float(lr[1]), total_steps=total) == []


@cases(
    make=[lambda: symopt.Sparse(density=0.1), lambda: symopt.GroupSparse("out", strength=0.3)], name=["sgd", "adamw"]
)
def test_a_hundred_tensors_are_one_warning(make: Callable[[], symopt.Constraint], name: str) -> None:
    found = said(make, name, 100, lr=1e-5, total_steps=3)
    assert len(found) == 1 and found[0].startswith("0.weight, 1.weight, 2.weight and 97 more: ")


@cases(name=MAKE)
def test_a_rate_that_is_still_zero_says_nothing_about_a_budget(name: str) -> None:
    assert said(lambda: symopt.Sparse(density=0.1), name, 1, lr=0.0, total_steps=1000) == []


def test_a_scaled_gradient_is_judged_as_the_gradient() -> None:
    for scale in (None, 2.0**20):
        net = network(KINDS[0])
        opt = symopt.SGD(net, lr=1e-3, fused=True, total_steps=STEPS)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        backward(net, 0, scaler.scale)
        with pytest.warns(UserWarning, match="too few to ramp its budget in.*lr >= 0.367"):
            scaler.step(opt)


# -------------------------------------------------------------------------------------------------------- default dtype


def in_default(dtype: torch.dtype, run: Callable[[], Run]) -> dict[str, Tensor]:
    """Without the steps that Adam counts, whose dtype is torch's choice."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return {key: value for key, value in bits(run()).items() if not key.endswith(".step")}
    finally:
        torch.set_default_dtype(before)


@some(
    available,
    row=EVERY,
    opt_row=[row for row in ANY_SHAPE if row.id in ("sgd-momentum", "adam-amsgrad", "adamw", "lion")],
    backend=["native", "reference"],
    total=[None, 20],
    dtype=[torch.bfloat16, torch.float64],
)
def test_the_default_dtype_changes_no_bit(
    row: Row, opt_row: OptimizerRow, backend: str, total: int | None, dtype: torch.dtype
) -> None:
    def run() -> Run:
        module: Any = bound_module(row, dtype=torch.float32)
        options = {**opt_row.options, "lr": opt_row.lr, "backend": backend, "total_steps": total}
        opt = opt_row.cls(module, **options)
        for t in range(6):
            for i, p in enumerate(module.parameters()):
                seed = torch.Generator().manual_seed(100 * t + i)
                p.grad = torch.randn(p.shape, generator=seed, dtype=torch.float32)
            opt.step()
        return module, opt

    same(in_default(torch.float32, run), in_default(dtype, run))


@some(kind=KINDS, name=MAKE, dtype=[torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_no_bit_of_a_budget(kind: Kind, name: str, dtype: torch.dtype) -> None:
    same(*(in_default(one, lambda: begun(kind, name, 62)) for one in (torch.float32, dtype)))
