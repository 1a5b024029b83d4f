"""Optimizers step alike on every backend: ``reference`` is the oracle for ``native``, torch.optim for plain tensors.

Gradients are functions of the weight and the step, so that an error is fed back instead of forgotten.
"""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.cases import cases, pairs
from support.runs import (
    FEW,
    HALF,
    ROWS,
    SOME,
    STEPS,
    Run,
    both,
    close,
    equal,
    gradient,
    kind_of,
    optimizer,
    start,
    step,
    step_alike,
    stepped,
    tensors,
)
from support.table import ANY_SHAPE, ConstraintRow, OptimizerRow, available, claimed, constrained_parameter
from support.tolerances import tolerance


def native_too(row: ConstraintRow, opt_row: OptimizerRow, **_: Any) -> bool:
    return available(row, opt_row, "native")


def moved(run: Run, row: ConstraintRow) -> bool:
    return not torch.equal(run[0].weight.double(), constrained_parameter(row).weight)


# -- the same steps --------------------------------------------------------------------------------------------------


@pairs(native_too, row=ROWS, opt_row=ANY_SHAPE, imbalance=[1.0, 0.0], time_scale=["saturated", "none"])
def test_twenty_steps_in_fp64(row: ConstraintRow, opt_row: OptimizerRow, imbalance: float, time_scale: str) -> None:
    ours, theirs = both(row, opt_row, imbalance=imbalance, time_scale=time_scale)
    for t in range(STEPS):
        step(ours, t)
        step(theirs, t)
        close(ours, theirs, kind_of(row))
    assert moved(ours, row)


@pairs(native_too, row=ROWS, opt_row=ANY_SHAPE, dtype=[torch.float32, *HALF])
def test_twenty_steps_in_lower_precision(row: ConstraintRow, opt_row: OptimizerRow, dtype: torch.dtype) -> None:
    ours, theirs = both(row, opt_row, dtype)
    for t in range(STEPS):
        step_alike([ours, theirs], t)
        close(ours, theirs, "backends, fp32")
    for module, opt in (ours, theirs):
        state = opt.state[module.weight]
        if dtype in HALF and "master" in state:
            assert torch.equal(module.weight, state["master"].to(dtype))
        if dtype in HALF and "factor_0" in state:
            assert torch.equal(module.weight, (state["factor_0"] * state["factor_1"]).to(dtype))
    assert moved(ours, row)


@pytest.mark.filterwarnings("ignore:.* steps before the commit .* are too few")
@cases(native_too, row=ROWS, opt_row=FEW)
def test_a_schedule_of_the_imbalance(row: ConstraintRow, opt_row: OptimizerRow) -> None:
    """Commit included."""
    ours, theirs = both(row, opt_row, strength=20.0 * opt_row.lr)
    for _, opt in (ours, theirs):
        opt.reschedule(STEPS, 0.75)
    for t in range(STEPS):
        for run in (ours, theirs):
            step(run, t)
        close(ours, theirs, kind_of(row))
    if row.id != "sparse-free":
        assert float(ours[1].state[ours[0].weight]["imbalance"]) == 0


@cases(native_too, row=ROWS, opt_row=FEW)
def test_numbers_that_schedules_change(row: ConstraintRow, opt_row: OptimizerRow) -> None:
    ours, theirs = both(row, opt_row)
    for t in range(STEPS):
        for run in (ours, theirs):
            group = run[1].param_groups[0]
            group["lr"] = torch.tensor(opt_row.lr / (1 + t), dtype=torch.float64) if t % 2 else opt_row.lr
            group["strength"] = [None, 0.1, torch.tensor(1.0, dtype=torch.float64)][t % 3]
            group["time_scale"] = ["saturated", "none"][t % 4 == 3]
            step(run, t)
        close(ours, theirs, kind_of(row))


@cases(lambda row: native_too(row, FEW[2]), row=ROWS)
def test_tensor_settings(row: ConstraintRow) -> None:
    def number(x: float) -> Tensor:
        return torch.tensor(x, dtype=torch.float64)

    options = {"lr": number(0.01), "betas": (number(0.8), number(0.95)), "foreach": False, "strength": number(0.3)}
    ours, theirs = both(row, FEW[2], **options)
    plain = start(row, FEW[2], backend="native", lr=0.01, betas=(0.8, 0.95), strength=0.3)
    for t in range(5):
        for run in (ours, theirs, plain):
            step(run, t)
    close(ours, theirs, kind_of(row))
    assert equal(ours, plain)


# -- torch.optim -----------------------------------------------------------------------------------------------------

PLAIN = {"matrix": (5, 7), "vector": (11,), "scalar": (), "one": (1,), "empty": (0, 3), "conv": (4, 3, 3, 2)}


def plain_module(dtype: torch.dtype) -> nn.Module:
    module = nn.Module()
    for name, shape in PLAIN.items():
        generator = torch.Generator().manual_seed(len(name))
        value = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        module.register_parameter(name, nn.Parameter(value))
    module.conv.data = module.conv.data.to(memory_format=torch.channels_last)
    return module


@cases(claimed, opt_row=ANY_SHAPE, dtype=[torch.float32, torch.float64], weight_decay=[0.0, 0.1])
def test_native_steps_unconstrained_tensors_like_torch(
    opt_row: OptimizerRow, dtype: torch.dtype, weight_decay: float
) -> None:
    ours, theirs = plain_module(dtype), plain_module(dtype)
    opt = optimizer(ours, opt_row, weight_decay=weight_decay, backend="native")
    options = {"lr": opt_row.lr, "weight_decay": weight_decay, **opt_row.one_by_one, **opt_row.options}
    torch_opt = opt_row.torch_cls(theirs.parameters(), **options)
    kind = "backends" if dtype == torch.float64 else "backends, fp32"
    for t in range(STEPS):
        step((ours, opt), t)
        step((theirs, torch_opt), t)
        close((ours, opt), (theirs, torch_opt), kind)


@cases(claimed, opt_row=ANY_SHAPE, dtype=HALF)
def test_native_steps_unconstrained_halves_with_fp32_moments(opt_row: OptimizerRow, dtype: torch.dtype) -> None:
    ours, theirs = plain_module(dtype), plain_module(torch.float32)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        q.data.copy_(p.data)
    opt = optimizer(ours, opt_row, backend="native")
    torch_opt = opt_row.torch_cls(theirs.parameters(), lr=opt_row.lr, **opt_row.one_by_one, **opt_row.options)
    for t in range(3):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = gradient(p, t)
            q.grad = p.grad.float()
            q.data.copy_(p.data)
        opt.step()
        torch_opt.step()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            ulp = torch.finfo(dtype).eps
            torch.testing.assert_close(p.float(), q, rtol=ulp, atol=torch.finfo(dtype).smallest_normal * ulp)
            for key, value in torch_opt.state[q].items():
                if value is not None:
                    assert opt.state[p][key].dtype == torch.float32
                    tol = tolerance("backends, fp32")
                    torch.testing.assert_close(opt.state[p][key], value, rtol=tol, atol=tol)


@cases(claimed, opt_row=ANY_SHAPE)
def test_unconstrained_tensors_may_change_backends(opt_row: OptimizerRow) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        module = plain_module(dtype)
        opt = optimizer(module, opt_row)
        for t in range(6):
            opt.param_groups[0]["backend"] = ["native", None][t % 2]
            step((module, opt), t)
        assert all(bool(p.isfinite().all()) for p in module.parameters())
        if dtype == torch.float64:
            other = plain_module(dtype)
            torch_opt = opt_row.torch_cls(other.parameters(), lr=opt_row.lr, **opt_row.one_by_one, **opt_row.options)
            for t in range(6):
                step((other, torch_opt), t)
            close((module, opt), (other, torch_opt))


# -- checkpoints -----------------------------------------------------------------------------------------------------


def saved(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def continued(run: Run, row: ConstraintRow, opt_row: OptimizerRow, backend: str) -> Run:
    """Weight and checkpoint of ``run`` in a new module with a new optimizer on ``backend``."""
    module, opt = start(row, opt_row, run[0].weight.dtype, backend=backend)
    module.load_state_dict(saved(run[0].state_dict()))
    state = saved(run[1].state_dict())
    for group in state["param_groups"]:
        group["backend"] = backend
    opt.load_state_dict(state)
    return module, opt


@pairs(native_too, row=ROWS, opt_row=ANY_SHAPE, dtype=[torch.float64, torch.bfloat16])
def test_a_checkpoint_continues_on_the_other_backend(
    row: ConstraintRow, opt_row: OptimizerRow, dtype: torch.dtype
) -> None:
    kind = kind_of(row) if dtype == torch.float64 else "backends, fp32"
    runs = both(row, opt_row, dtype)
    for t in range(5):
        step_alike(runs, t)
    crossed = [continued(run, row, opt_row, b) for run, b in zip(runs, ("reference", "native"), strict=True)]
    for t in range(5, 10):
        step_alike([*runs, *crossed], t)
        for run in crossed:
            close(run, runs[1], kind)


@cases(native_too, row=ROWS, opt_row=ANY_SHAPE)
def test_checkpoints_look_the_same(row: ConstraintRow, opt_row: OptimizerRow) -> None:
    ours, theirs = (run[1] for run in map(stepped, both(row, opt_row)))
    one, two = ours.state_dict(), theirs.state_dict()
    assert one["state"][0].keys() == two["state"][0].keys()
    for key, value in two["state"][0].items():
        if isinstance(value, Tensor):
            mine = one["state"][0][key]
            assert (mine.shape, mine.dtype, mine.stride()) == (value.shape, value.dtype, value.stride()), key
        else:
            assert one["state"][0][key] == value
    assert {**one["param_groups"][0], "backend": 0} == {**two["param_groups"][0], "backend": 0}


@cases(row=SOME, opt_row=FEW)
def test_copies_and_pickles_continue(row: ConstraintRow, opt_row: OptimizerRow) -> None:
    for duplicate in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        original = stepped(start(row, opt_row, backend="native"))
        twin = duplicate(original)
        before = {key: value.clone() for key, value in tensors(original).items()}
        step(twin, 5)
        assert all(torch.equal(value, before[key]) for key, value in tensors(original).items())
        assert not torch.equal(twin[0].weight, original[0].weight)
        step(original, 5)
        assert equal(twin, original)
        assert twin[1].zeros() == {"weight": int((twin[0].weight == 0).sum())}


def test_unstepped_copies_have_first_steps() -> None:
    """A copy made between construction and the first step, when there is no momentum yet."""
    for opt_row in filter(claimed, ANY_SHAPE):
        original = start(ROWS[0], opt_row, backend="native")
        twin = copy.deepcopy(original)
        assert equal(stepped(twin), stepped(original))


# -- the comparison itself -------------------------------------------------------------------------------------------


@cases(native_too, row=ROWS, opt_row=FEW, dtype=[torch.float64, torch.float32])
def test_the_comparison_notices_a_wrong_learning_rate(
    row: ConstraintRow, opt_row: OptimizerRow, dtype: torch.dtype
) -> None:
    """By 1e-5 of it in fp64, by 1e-2 in fp32."""
    ours, theirs = both(row, opt_row, dtype)
    ours[1].param_groups[0]["lr"] *= 1 + (1e-5 if dtype == torch.float64 else 1e-2)
    with pytest.raises(AssertionError, match="not close"):
        for t, run in itertools.product(range(STEPS), (ours, theirs)):
            step(run, t)
            if run is theirs:
                close(ours, theirs, "backends" if dtype == torch.float64 else "backends, fp32")
