"""Whatever happens between two steps is noticed on every backend: data, state, options, graphs, counters."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import symopt
from support.cases import cases, pairs
from support.runs import (
    FEW,
    HALF,
    KINDS,
    ROWS,
    SOME,
    Run,
    both,
    close,
    equal,
    gradient,
    kind_of,
    made,
    optimizer,
    start,
    step,
    step_alike,
    tensors,
)
from support.table import CPU_BACKENDS, OPTIMIZERS, ConstraintRow, OptimizerRow, constrained_parameter
from support.tolerances import tolerance

# -- things that happen between steps --------------------------------------------------------------------------------


def swap_data(run: Run) -> None:
    run[0].weight.data = run[0].weight.data.clone()


def other_values(run: Run) -> None:
    run[0].weight.data = run[0].weight.data.flip(0).contiguous()


def write_in_place(run: Run) -> None:
    with torch.no_grad():
        run[0].weight.view(-1)[::2] = 0.25


def replace_state(run: Run) -> None:
    state = run[1].state[run[0].weight]
    for key, value in state.items():
        if isinstance(value, Tensor) and key != "step":
            state[key] = value.clone() * (0.5 if value.is_floating_point() and "factor" not in key else 1)


def write_state(run: Run) -> None:
    for key, value in run[1].state[run[0].weight].items():
        if key in ("exp_avg", "momentum_buffer", "imbalance"):
            value.mul_(0.5)


def drop_state(run: Run) -> None:
    run[1].state.clear()


def drop_moments(run: Run) -> None:
    state = run[1].state[run[0].weight]
    for key in ("exp_avg", "momentum_buffer", "exp_avg_sq", "max_exp_avg_sq"):
        state.pop(key, None)


def reload_own(run: Run) -> None:
    run[1].load_state_dict(copy.deepcopy(run[1].state_dict()))


def toggle(run: Run) -> None:
    group = run[1].param_groups[0]
    if "momentum" in group:
        group["momentum"], group["nesterov"] = (0.0, False) if group["momentum"] else (0.7, False)
    else:
        group["amsgrad"] = not group["amsgrad"]


def other_betas(run: Run) -> None:
    group = run[1].param_groups[0]
    if "betas" in group:
        group["betas"], group["eps"] = (0.5, 0.9), 1e-3
    group["maximize"] = not group["maximize"]


def release(run: Run) -> None:
    constraint = symopt.constraints(run[0])["weight"]
    symopt.release(run[0])
    step(run, 77)
    symopt.constrain(run[0], {"weight": constraint})


def another_constraint(run: Run) -> None:
    symopt.constrain(symopt.release(run[0]), {"weight": symopt.GroupSparse("out", strength=0.2)})


def transpose_storage(run: Run) -> None:
    """The same numbers in another order in memory."""
    w = run[0].weight.data
    run[0].weight.data = (
        w.permute(tuple(reversed(range(w.dim())))).contiguous().permute(tuple(reversed(range(w.dim()))))
    )


EVENTS = [
    swap_data,
    other_values,
    write_in_place,
    replace_state,
    write_state,
    drop_state,
    drop_moments,
    reload_own,
    toggle,
    other_betas,
    release,
    another_constraint,
    transpose_storage,
]


@pairs(row=ROWS, opt_row=FEW, event=EVENTS)
def test_whatever_happens_between_steps_is_noticed(row: ConstraintRow, opt_row: OptimizerRow, event: Any) -> None:
    ours, theirs = start(row, opt_row), start(row, opt_row, backend="reference")
    for t in range(7):
        for run in (ours, theirs):
            if t in (2, 4):
                event(run)
            step(run, t)
        close_moments(ours, theirs, kind_of(row))
    assert ours[1].zeros() == {"weight": int((ours[0].weight == 0).sum())}


def close_moments(run: Run, other: Run, kind: str) -> None:
    """As ``close``; momentum that is not in use may be missing on one side."""
    for key in ("momentum_buffer", "max_exp_avg_sq"):
        states = [r[1].state[r[0].weight] for r in (run, other)]
        if sum(key in state and state[key] is not None for state in states) == 1:
            for state in states:
                state.pop(key, None)
    close(run, other, kind)


@cases(row=SOME, dtype=HALF)
def test_half_weights_changed_from_outside_win_over_the_copy(row: ConstraintRow, dtype: torch.dtype) -> None:
    runs = both(row, FEW[2], dtype)
    for t in range(8):
        for run in runs:
            if t % 3 == 2:
                with torch.no_grad():
                    run[0].weight.view(-1)[t::3] = 0.5
        step_alike(runs, t)
        close(*runs, "backends, fp32")


@cases(row=ROWS, opt_row=FEW)
def test_a_square_weight_may_be_transposed_where_it_lies(row: ConstraintRow, opt_row: OptimizerRow) -> None:
    """``p.data = p.data.t()`` keeps the address and changes everything else."""
    if row.id.startswith(("group-head-packed", "group-block", "group-index")):
        constraint: Any = symopt.GroupSparse("head:2", strength=0.3)
    else:
        constraint = row.make(0.3)
    runs = []
    for backend in (None, "reference"):
        module = made((4, 4), constraint)
        opt = optimizer(module, opt_row, backend=backend)
        for t in range(4):
            if t == 2:
                module.weight.grad = None
                module.weight.data = module.weight.data.t()
            module.weight.grad = gradient(module.weight.detach().contiguous(), t)
            opt.step()
        runs.append((module, opt))
    close(*runs)


@cases(kind=KINDS, backend=CPU_BACKENDS)
def test_a_weight_of_another_shape_is_refused(kind: str, backend: str) -> None:
    """State of the old shape must not be read or written beyond its end."""
    module = made((12, 6), KINDS[kind]())
    opt = symopt.AdamW(module, lr=0.01, backend=backend)
    step((module, opt), 0)
    module.weight.grad = None
    module.weight.data = module.weight.data[:4]  # at the same address
    module.weight.grad = torch.ones_like(module.weight)
    module.bias.grad = None
    before = {key: value.clone() for key, value in tensors((module, opt)).items()}
    with pytest.raises((RuntimeError, ValueError)):
        opt.step()
    for key, value in tensors((module, opt)).items():
        assert torch.equal(value, before[key]) or key.endswith("step"), key


@cases(backend=CPU_BACKENDS)
def test_a_weight_of_another_shape_with_fresh_state_has_other_groups(backend: str) -> None:
    """As many numbers, but groups are cut from the new shape."""
    module = made((4, 6), KINDS["out"]())
    opt = symopt.AdamW(module, lr=0.01, backend=backend)
    step((module, opt), 0)
    opt.state.clear()
    module.weight.grad = None
    module.weight.data = module.weight.data.clone().reshape(6, 4)
    step((module, opt), 1)
    assert opt.state[module.weight]["exp_avg_sq"].shape == (6,)


def test_sparse_gradients_are_refused_in_words_that_fit() -> None:
    for constrained in (True, False):
        net = nn.Embedding(5, 3, sparse=True)
        if constrained:
            symopt.constrain(net, {"weight": symopt.Sparse()})
        before = net.weight.detach().clone()
        opt = symopt.SGD(net, lr=0.1, backend="native")
        net(torch.tensor([1, 2])).sum().backward()
        with pytest.raises(RuntimeError, match=r"^weight: sparse gradients are not supported") as error:
            opt.step()
        assert torch.equal(net.weight, before)
        assert ("constrain" in str(error.value)) == constrained


@cases(key=["exp_avg", "exp_avg_sq", "max_exp_avg_sq", "factor_0", "imbalance", "group_index"], backend=CPU_BACKENDS)
def test_state_that_does_not_fit_is_refused(key: str, backend: str) -> None:
    """A checkpoint of another model: an error, not memory beyond a tensor's end."""
    kind = {"factor_0": "free", "group_index": "index"}.get(key, "sparse")
    module = made((12, 8), KINDS[kind]())
    opt = symopt.AdamW(module, lr=0.01, amsgrad=True, backend=backend)
    step((module, opt), 0)
    state = opt.state[module.weight]
    before = module.weight.detach().clone()
    # Larger than it should be, so that nothing is corrupted where this fails; the numbers would be wrong all the same.
    if key == "group_index":
        state["exp_avg_sq"] = state["exp_avg_sq"].repeat(3)
        state["max_exp_avg_sq"] = state["max_exp_avg_sq"].repeat(3)
        state[key] = state[key] + 2  # the last groups have no moments
        if backend == "native":  # do not write there
            state[key] = state[key].repeat(2, 1)
    else:
        state[key] = state[key].repeat(24) if state[key].dim() == 0 else state[key].repeat(2, 1)
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        opt.step()
    assert torch.equal(module.weight, before)


@cases(opt_row=FEW)
def test_parameters_without_gradients_wait(opt_row: OptimizerRow) -> None:
    runs = []
    for backend in CPU_BACKENDS:
        module = nn.Module()
        for i, row in enumerate(SOME):
            module.register_parameter(f"w{i}", nn.Parameter(constrained_parameter(row).weight.detach().clone()))
        symopt.constrain(module, {f"w{i}": row.make(0.3) for i, row in enumerate(SOME)})
        opt = optimizer(module, opt_row, backend=backend)
        for t in range(10):
            before = [p.detach().clone() for p in module.parameters()]
            for i, p in enumerate(module.parameters()):
                p.grad = gradient(p, t) if t % (i + 2) == 0 else None
            opt.step()
            for i, p in enumerate(module.parameters()):
                assert torch.equal(p, before[i]) == (t % (i + 2) != 0)
        runs.append((module, opt))
    close(*runs)


def test_first_momentum_survives_a_step_that_failed() -> None:
    """A step that raises may leave tensors behind for a first momentum that never came."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)  # memory nobody has written holds NaN
    try:
        module = nn.Module()
        module.a, module.b = (nn.Parameter(torch.ones(5)) for _ in range(2))
        symopt.constrain(module, {"a": symopt.Sparse(strength=0.1), "b": symopt.Sparse(strength=0.1, depth=3)})
        opt = symopt.SGD(module, lr=0.1, momentum=0.9, backend="native")
        module.a.grad, module.b.grad = torch.ones(5), torch.ones(5)
        with pytest.raises(ValueError, match="b: backend='native'"):
            opt.step()
        for state in opt.state_dict()["state"].values():
            assert not bool(state.get("momentum_buffer", torch.zeros(())).isnan().any())
        opt.param_groups[0]["backend"] = None
        opt.step()
        assert bool(module.a.isfinite().all())
    finally:
        torch.use_deterministic_algorithms(False)


# -- autograd, scaled gradients, threads -----------------------------------------------------------------------------


@cases(kind=KINDS, backend=CPU_BACKENDS)
def test_autograd_notices_the_step(kind: str, backend: str) -> None:
    module = made((4, 6), KINDS[kind]())
    opt = symopt.AdamW(module, lr=0.01, backend=backend)
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    versions = [p._version for p in module.parameters()]
    loss = module.weight.square().sum() + module.bias.square().sum()
    opt.step()
    assert all(p._version > v for p, v in zip(module.parameters(), versions, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    module.bias.square().sum().backward()  # a new graph is fine


@cases(opt_row=OPTIMIZERS, backend=CPU_BACKENDS)
def test_a_grad_scaler_scales_and_skips(opt_row: OptimizerRow, backend: str) -> None:
    """``fused=True`` makes torch's GradScaler leave the division, and what overflowed, to the step."""
    dtype = torch.float32
    module, plain = (made((6, 4), symopt.Sparse(strength=0.3), dtype=dtype) for _ in range(2))
    opt = optimizer(module, opt_row, fused=True, backend=backend)
    want = optimizer(plain, opt_row, backend=backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    for t in range(6):
        before = {key: value.clone() for key, value in tensors((module, opt)).items()}
        for p, q in zip(module.parameters(), plain.parameters(), strict=True):
            q.grad = gradient(q, t)
            p.grad = q.grad * scaler.get_scale()
        if t == 3:
            module.bias.grad[1] = float("inf")
        scaler.scale(torch.zeros(()))  # as for a loss
        scaler.step(opt)
        scaler.update()
        if t == 3:
            assert all(torch.equal(value, before[key]) for key, value in tensors((module, opt)).items())
            assert scaler.get_scale() == 512.0
        else:
            want.step()
        close((module, opt), (plain, want), "backends, fp32")


@cases(dtype=[torch.float32, torch.float64])
def test_a_grad_scale_of_any_dtype_divides(dtype: torch.dtype) -> None:
    """torch's own fused step takes fp32 only; what is accepted must be right."""
    moments = []
    for backend in CPU_BACKENDS:
        module = made((6, 4), symopt.Sparse(strength=0.3))
        opt = symopt.Adam(module, lr=0.01, backend=backend)
        opt.grad_scale = torch.tensor(1024.0, dtype=dtype)
        module.weight.grad = gradient(module.weight, 0)
        opt.step()
        moments.append(opt.state[module.weight]["exp_avg"])
    tol = tolerance("backends")
    torch.testing.assert_close(*moments, rtol=tol, atol=tol)


def test_two_optimizers_step_at_the_same_time() -> None:
    def train(i: int, results: dict[int, Run]) -> None:
        module = made((300, 400), KINDS[["sparse", "in"][i % 2]](), dtype=torch.float32)
        opt = symopt.AdamW(module, lr=0.01, backend="native")
        for t in range(30):
            generator = torch.Generator().manual_seed(t)
            for p in module.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            opt.step()
        results[i] = (module, opt)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        alone: dict[int, Run] = {}
        together: dict[int, Run] = {}
        for i in range(3):
            train(i, alone)
        threads = [threading.Thread(target=train, args=(i, together)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        torch.set_num_threads(before)
    assert alone.keys() == together.keys()
    assert all(equal(alone[i], together[i]) for i in alone)


# -- the counter -----------------------------------------------------------------------------------------------------


@pytest.fixture
def default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


@cases(dtype=[torch.float64, torch.bfloat16, torch.float16], backend=CPU_BACKENDS)
def test_the_step_count_under_another_default_dtype(backend: str, dtype: torch.dtype, default_dtype: None) -> None:
    """torch.optim counts in fp64 if that is the default, else in fp32."""
    torch.set_default_dtype(dtype)
    module = made((4, 3), symopt.Sparse(strength=0.3), dtype=torch.float32)
    opt = symopt.AdamW(module, lr=0.01, backend=backend)
    for t in range(300):
        module.weight.grad = gradient(module.weight, t)
        opt.step()
    count = opt.state[module.weight]["step"]
    assert float(count) == 300
    assert count.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@cases(count=[torch.tensor(5), torch.tensor(5.0, dtype=torch.float64), torch.tensor([5.0])])
def test_the_step_count_of_a_checkpoint_of_any_kind_goes_on(count: Tensor) -> None:
    for backend in CPU_BACKENDS:
        module = made((4, 3), symopt.Sparse(strength=0.3))
        opt = symopt.AdamW(module, lr=0.01, backend=backend)
        step((module, opt), 0)
        opt.state[module.weight]["step"] = count.clone()
        step((module, opt), 1)
        assert opt.state[module.weight]["step"].item() == 6
