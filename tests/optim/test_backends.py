"""Optimizers step alike on every backend: ``reference`` is the oracle for ``native``, torch.optim for plain tensors.

Gradients are functions of the weight and the step, so that an error is fed back instead of forgotten.
"""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import symopt
from support.cases import cases, pairs
from support.runs import HALF, Run, both, close, equal, gradient, kind_of, optimizer, start, step, step_alike, tensors
from support.table import CONSTRAINTS, CPU_BACKENDS, OPTIMIZERS, ConstraintRow, OptimizerRow, constrained_parameter
from support.tolerances import tolerance
from symopt_kernels.native import binding as native

STEPS = 20
ROWS = [*CONSTRAINTS, ConstraintRow("sparse-free", lambda k: symopt.Sparse(k, gauge="free"), (6, 5))]
SOME = [row for row in ROWS if row.id in ("sparse", "group-in-conv", "group-index", "sparse-free")]
FEW = [row for row in OPTIMIZERS if row.id in ("sgd-nesterov", "adam-amsgrad", "adamw")]


def moved(run: Run, row: ConstraintRow) -> bool:
    return not torch.equal(run[0].weight.double(), constrained_parameter(row).weight)


# -- the same steps --------------------------------------------------------------------------------------------------


@pairs(row=ROWS, opt_row=OPTIMIZERS, imbalance=[1.0, 0.0], time_scale=["saturated", "none"])
def test_twenty_steps_in_fp64(row: ConstraintRow, opt_row: OptimizerRow, imbalance: float, time_scale: str) -> None:
    ours, theirs = both(row, opt_row, imbalance=imbalance, time_scale=time_scale)
    for t in range(STEPS):
        step(ours, t)
        step(theirs, t)
        close(ours, theirs, kind_of(row))
    assert moved(ours, row)


@pairs(row=ROWS, opt_row=OPTIMIZERS, dtype=[torch.float32, *HALF])
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


@cases(row=ROWS, opt_row=FEW)
def test_a_schedule_of_the_imbalance(row: ConstraintRow, opt_row: OptimizerRow) -> None:
    """As Anneal sets it, commit included."""
    ours, theirs = both(row, opt_row, strength=20.0 * opt_row.lr)
    for t in range(STEPS):
        for run in (ours, theirs):
            run[1].param_groups[0] |= {"imbalance_factor": 0.3 if t < 15 else 0.0, "committed": t >= 15}
            step(run, t)
        close(ours, theirs, kind_of(row))
    if row.id != "sparse-free":
        assert float(ours[1].state[ours[0].weight]["imbalance"]) == 0


@cases(row=ROWS, opt_row=FEW)
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


@cases(row=ROWS)
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


@cases(opt_row=OPTIMIZERS, dtype=[torch.float32, torch.float64], weight_decay=[0.0, 0.1])
def test_native_steps_unconstrained_tensors_like_torch(
    opt_row: OptimizerRow, dtype: torch.dtype, weight_decay: float
) -> None:
    ours, theirs = plain_module(dtype), plain_module(dtype)
    opt = optimizer(ours, opt_row, weight_decay=weight_decay, backend="native")
    options = {"lr": opt_row.lr, "weight_decay": weight_decay, "foreach": False, **opt_row.options}
    torch_opt = opt_row.torch_cls(theirs.parameters(), **options)
    kind = "backends" if dtype == torch.float64 else "backends, fp32"
    for t in range(STEPS):
        step((ours, opt), t)
        step((theirs, torch_opt), t)
        close((ours, opt), (theirs, torch_opt), kind)


@cases(opt_row=OPTIMIZERS, dtype=HALF)
def test_native_steps_unconstrained_halves_with_fp32_moments(opt_row: OptimizerRow, dtype: torch.dtype) -> None:
    ours, theirs = plain_module(dtype), plain_module(torch.float32)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        q.data.copy_(p.data)
    opt = optimizer(ours, opt_row, backend="native")
    torch_opt = opt_row.torch_cls(theirs.parameters(), lr=opt_row.lr, foreach=False, **opt_row.options)
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


@cases(opt_row=OPTIMIZERS)
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
            torch_opt = opt_row.torch_cls(other.parameters(), lr=opt_row.lr, foreach=False, **opt_row.options)
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


@pairs(row=ROWS, opt_row=OPTIMIZERS, dtype=[torch.float64, torch.bfloat16])
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


@cases(row=ROWS, opt_row=OPTIMIZERS)
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


def stepped(run: Run, steps: int = 3) -> Run:
    for t in range(steps):
        step(run, t)
    return run


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
    for opt_row in OPTIMIZERS:
        original = start(ROWS[0], opt_row, backend="native")
        twin = copy.deepcopy(original)
        assert equal(stepped(twin), stepped(original))


# -- memory ----------------------------------------------------------------------------------------------------------

ORDERS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "channels_last": ((4, 6, 3, 2), lambda w: w.contiguous(memory_format=torch.channels_last)),
    "transposed": ((6, 8), lambda w: w.t().contiguous().t()),
    "permuted": ((4, 6, 5), lambda w: w.permute(1, 2, 0).contiguous().permute(2, 0, 1)),
    "leading one": ((1, 8), lambda w: w.as_strided((1, 8), (100, 1)).clone().as_strided((1, 8), (3, 1))),
    "sliced columns": ((6, 4), lambda w: torch.cat([w, w], 1)[:, :4]),
    "every other row": ((6, 4), lambda w: torch.stack([w, w], 1).flatten(0, 1)[::2]),
    "offset": ((6, 4), lambda w: torch.cat([w.new_zeros(3), w.flatten()])[3:].view(6, 4)),
}
DENSE = ("channels_last", "transposed", "permuted", "leading one", "offset")
KINDS: dict[str, Callable[[], symopt.Constraint]] = {
    "sparse": lambda: symopt.Sparse(0.3),
    "free": lambda: symopt.Sparse(0.3, gauge="free"),
    "out": lambda: symopt.GroupSparse("out", 0.3),
    "in": lambda: symopt.GroupSparse("in", 0.3),
    "block": lambda: symopt.GroupSparse("block:1x2", 0.3),
    "index": lambda: symopt.GroupSparse(lambda w: torch.arange(w.numel()).reshape(w.shape) % 5, 0.3),
}


def made(shape: tuple[int, ...], constraint: symopt.Constraint, place: Any = None, dtype: Any = torch.float64) -> Any:
    """A module with a constrained ``weight`` and an unconstrained ``bias``."""
    module = nn.Module()
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    module.weight = nn.Parameter(value if place is None else place(value))
    module.bias = nn.Parameter(torch.ones(3, dtype=dtype))
    return symopt.constrain(module, {"weight": constraint})


@pairs(order=ORDERS, kind=KINDS, opt_row=FEW)
def test_any_order_in_memory(opt_row: OptimizerRow, kind: str, order: str) -> None:
    """Natively where that can be, by the reference where not, and always the numbers of a contiguous weight."""
    shape, place = ORDERS[order]
    module, plain = made(shape, KINDS[kind](), place), made(shape, KINDS[kind]())
    assert torch.equal(module.weight, plain.weight)
    strides = module.weight.stride()
    opt, other = optimizer(module, opt_row), optimizer(plain, opt_row, backend="reference")
    chosen = {name: backend for name, backend, _ in opt.backends()}
    if order in DENSE and kind in ("sparse", "free", "index"):
        assert chosen["weight"] == "native"
    elif order not in DENSE:
        assert chosen["weight"] == "reference" and "not those of a dense tensor" in symopt.explain(opt)
    for t in range(6):
        step((module, opt), t)
        step((plain, other), t)
        close((module, opt), (plain, other), "backends, snapped")
    assert module.weight.stride() == strides
    assert opt.zeros()["weight"] == int((module.weight == 0).sum())
    if chosen["weight"] == "reference":
        strict = optimizer(module, opt_row, backend="native")
        with pytest.raises(ValueError, match=r"^weight: backend='native' cannot step it: strides .*backend=None"):
            strict.step()


STRIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded": lambda g: g[:, :1].expand(g.shape),
    "expanded number": lambda g: g[0, 0].expand(g.shape),
    "transposed": lambda g: g.t().contiguous().t(),
    "sliced": lambda g: torch.cat([g, g], 1)[:, : g.shape[1]],
    "flipped": lambda g: g.flip(0),
    "negative view": lambda g: torch._neg_view(g),
    "conjugated": lambda g: -torch.complex(g, g).conj().imag,
}


@cases(how=STRIDED, kind=["sparse", "in", "index"])
def test_any_order_of_the_gradient(kind: str, how: str) -> None:
    for order in ("transposed", "offset"):
        shape, place = ORDERS[order]
        runs = []
        for backend in CPU_BACKENDS:
            module = made(shape, KINDS[kind](), place)
            opt = symopt.AdamW(module, lr=0.01, backend=backend)
            for t in range(3):
                g = STRIDED[how](gradient(module.weight.detach().contiguous(), t))
                before = g.clone()
                module.weight.grad = g
                opt.step()
                assert torch.equal(module.weight.grad, before)  # a step only reads it
            runs.append((module, opt))
        if kind == "in" and order == "transposed":
            assert dict((n, b) for n, b, _ in runs[0][1].backends())["weight"] == "native"
        close(*runs)


@cases(dtype=[torch.float32, torch.bfloat16, torch.float64], grad_dtype=[torch.float32, torch.bfloat16, torch.float64])
def test_a_gradient_of_another_dtype_counts_or_is_refused(dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    runs = []
    for backend in CPU_BACKENDS:
        module = made((6, 4), symopt.Sparse(0.3), dtype=dtype)
        module.weight.grad_dtype = None  # any
        before = module.weight.detach().clone()
        opt = symopt.SGD(module, lr=0.01, backend=backend)
        module.weight.grad = torch.full((6, 4), 0.125, dtype=grad_dtype)  # exact in all
        opt.step()
        assert not torch.equal(module.weight, before)
        runs.append((module, opt))
    close(*runs, "backends" if dtype == torch.float64 else "backends, fp32")


@cases(backend=CPU_BACKENDS)
def test_constraints_of_nothing_are_refused_and_of_one_number_work(backend: str) -> None:
    for shape in ((), (0,), (0, 3), (3, 0)):
        with pytest.raises(ValueError, match="nothing to constrain"):
            made(shape, symopt.Sparse())
    for shape, kind in (((1,), "sparse"), ((1, 1), "in"), ((1, 1, 1, 1), "out"), ((1, 1), "index"), ((1,), "free")):
        run = (module := made(shape, KINDS[kind]()), symopt.AdamW(module, lr=0.01, backend=backend))
        other = (module := made(shape, KINDS[kind]()), symopt.AdamW(module, lr=0.01, backend="reference"))
        for t in range(5):
            step(run, t)
            step(other, t)
        close((run[0], run[1]), other) if backend == "reference" else close_weight(run, other)


def close_weight(run: Run, other: Run) -> None:
    tol = tolerance("backends")
    torch.testing.assert_close(run[0].weight, other[0].weight, rtol=tol, atol=tol)


# -- what cannot be stepped natively ---------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "depth": (symopt.Sparse(0.3, depth=3), {}, "with the retraction 'sparse_deep'"),
    "group depth": (symopt.GroupSparse("out", 0.3, depth=4), {}, "with the retraction 'group_deep'"),
    "free depth": (symopt.Sparse(0.3, depth=3, gauge="free"), {}, "with the retraction 'sparse_free_deep'"),
    "list": ([symopt.Sparse(0.3), symopt.GroupSparse("in", 0.3)], {}, "with the retraction 'composed'"),
    "differentiable": (symopt.Sparse(0.3), {"differentiable": True}, "differentiable=True needs a step"),
}


@cases(case=REFUSED, cls=[symopt.SGD, symopt.Adam, symopt.AdamW])
def test_native_by_name_names_the_parameter_and_the_reason(cls: Any, case: str) -> None:
    constraint, options, reason = REFUSED[case]
    module = nn.Sequential(nn.Linear(4, 3).double())
    symopt.constrain(module, {"0.weight": constraint})
    before = {name: value.clone() for name, value in module.state_dict().items()}
    opt = cls(module, lr=0.01, backend="native", **options)
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    message = rf"^0\.weight: backend='native' cannot step it: .*{reason}.*; use backend=None for one that can$"
    if options:
        message = message.replace(r"0\.weight", r"0\.(weight|bias)")
    with pytest.raises(ValueError, match=message):
        opt.step()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@cases(case=REFUSED)
def test_without_a_name_the_reference_steps_it_and_explain_says_why(case: str) -> None:
    constraint, options, reason = REFUSED[case]
    runs = []
    for backend in (None, "reference"):
        module = made((4, 3), constraint)
        opt = symopt.AdamW(module, lr=0.01, backend=backend, **options)
        for t in range(0 if options.get("differentiable") else 3):  # torch differentiates steps of non-leaves only
            for p in module.parameters():
                p.grad = gradient(p, t)
            opt.step()
        text = symopt.explain(opt).splitlines()
        assert text[0].startswith("weight  reference")
        assert reason in text[0].partition("native: ")[2].partition("; triton")[0]
        assert text[1].split()[:2] == ["bias", "torch"]
        runs.append((module, opt))
    assert torch.equal(runs[0][0].weight, runs[1][0].weight)


def test_explain_names_the_native_step() -> None:
    module = made((4, 3), symopt.Sparse())
    lines = symopt.explain(symopt.AdamW(module)).splitlines()
    assert lines[0] == "weight  native" and lines[1].split()[:2] == ["bias", "torch"]
    assert native.INSTRUCTIONS[-1] in lines[2]
    lines = symopt.explain(symopt.AdamW(module, backend="native")).splitlines()
    assert [line.split() for line in lines[:2]] == [["weight", "native"], ["bias", "native"]]


def test_other_dtypes_are_torchs() -> None:
    p = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"not torch\.complex64"):
        symopt.AdamW([p], backend="native").step()
    symopt.AdamW([p]).step()
    assert not torch.equal(p, torch.ones_like(p))


@cases(opt_row=OPTIMIZERS, backend=["cuda", "", "NATIVE", 3, True])
def test_an_unknown_backend_is_refused(opt_row: OptimizerRow, backend: Any) -> None:
    module = made((4, 3), symopt.Sparse())
    with pytest.raises(ValueError, match=r"backend must be None or one of \('native', 'triton', 'reference'\)"):
        optimizer(module, opt_row, backend=backend)
    opt = optimizer([module.weight], opt_row)
    with pytest.raises(ValueError, match="backend must be"):
        opt.add_param_group({"params": [module.bias], "backend": backend})
    assert len(opt.param_groups) == 1


def test_an_unknown_backend_written_into_a_group_is_refused_at_the_step() -> None:
    module = made((4, 3), symopt.Sparse())
    opt = symopt.AdamW(module)
    opt.param_groups[0]["backend"] = "cuda"
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="backend"):
        opt.step()


def test_the_backend_is_an_option_of_a_group() -> None:
    def run(backends: list[str | None]) -> Run:
        module = nn.Module()
        for i, row in enumerate(SOME):
            module.register_parameter(f"w{i}", nn.Parameter(constrained_parameter(row).weight.detach().clone()))
        symopt.constrain(module, {f"w{i}": row.make(0.3) for i, row in enumerate(SOME)})
        groups = [{"params": [p], "backend": b} for p, b in zip(module.parameters(), backends, strict=True)]
        opt = symopt.AdamW(groups, lr=0.01)
        assert [group["backend"] for group in opt.param_groups] == backends
        assert [backend for _, backend, _ in opt.backends()] == [b or "native" for b in backends]
        return stepped((module, opt))

    want = run(["reference"] * len(SOME))
    for backends in (["native", "reference", None, "reference"], [None, None, "reference", "native"]):
        close(run(backends), want)


@cases(row=ROWS, opt_row=OPTIMIZERS)
def test_backends_may_change_from_step_to_step(row: ConstraintRow, opt_row: OptimizerRow) -> None:
    mixed, want = start(row, opt_row), start(row, opt_row, backend="reference")
    for t in range(8):
        mixed[1].param_groups[0]["backend"] = ["native", "reference", None, "reference", "reference"][t % 5]
        step(mixed, t)
        step(want, t)
        close(mixed, want, kind_of(row))


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
    symopt.constrain(symopt.release(run[0]), {"weight": symopt.GroupSparse("out", 0.2)})


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
        constraint: Any = symopt.GroupSparse("head:2", 0.3)
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
        symopt.constrain(module, {"a": symopt.Sparse(0.1), "b": symopt.Sparse(0.1, depth=3)})
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


# -- zeros -----------------------------------------------------------------------------------------------------------


@pairs(row=ROWS, dtype=[torch.float32, torch.float64, *HALF], backend=CPU_BACKENDS)
def test_zeros_are_counted(row: ConstraintRow, dtype: torch.dtype, backend: str) -> None:
    module = constrained_parameter(row, dtype=dtype)
    with torch.no_grad():
        module.weight[0] = 0
    opt = symopt.AdamW(module, lr=0.01, imbalance=0.0, backend=backend)

    def right() -> bool:
        return opt.zeros() == {"weight": int((module.weight == 0).sum())}

    assert right() and opt.zeros()["weight"] > 0
    step((module, opt), 0)
    assert right()
    opt.param_groups[0]["strength"] = 300.0
    for t in range(1, 4):
        step((module, opt), t)
        assert right()
    assert opt.zeros()["weight"] > 0
    with torch.no_grad():
        module.weight.fill_(1)
    assert opt.zeros() == {"weight": 0}
    with torch.no_grad():
        module.weight.zero_()
    assert opt.zeros() == {"weight": module.weight.numel()}
    module.load_state_dict({"weight": torch.ones_like(module.weight)})
    assert opt.zeros() == {"weight": 0}


@cases(backend=CPU_BACKENDS)
def test_zeros_notice_weights_written_past_autograd(backend: str) -> None:
    module = constrained_parameter(ROWS[0])
    opt = symopt.AdamW(module, lr=0.01, backend=backend)
    step((module, opt), 0)
    module.weight.data = torch.zeros_like(module.weight)
    assert opt.zeros() == {"weight": module.weight.numel()}


def test_zeros_name_constrained_tensors_only() -> None:
    module = made((4, 3), symopt.Sparse(1e6))
    opt = symopt.AdamW(module, lr=0.01, backend="native")
    for t in range(4):
        step((module, opt), t)
    assert opt.zeros() == {"weight": 12}


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
    module, plain = (made((6, 4), symopt.Sparse(0.3), dtype=dtype) for _ in range(2))
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
        module = made((6, 4), symopt.Sparse(0.3))
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
    module = made((4, 3), symopt.Sparse(0.3), dtype=torch.float32)
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
        module = made((4, 3), symopt.Sparse(0.3))
        opt = symopt.AdamW(module, lr=0.01, backend=backend)
        step((module, opt), 0)
        opt.state[module.weight]["step"] = count.clone()
        step((module, opt), 1)
        assert opt.state[module.weight]["step"].item() == 6


# -- no extension ----------------------------------------------------------------------------------------------------


@cases(row=ROWS)
def test_without_the_extension_the_reference_steps(row: ConstraintRow, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "no compiler, no kernel"
    monkeypatch.setattr(native, "UNAVAILABLE", reason)
    monkeypatch.setattr(native, "LIBRARY", None)
    run, want = start(row, FEW[2]), start(row, FEW[2], backend="reference")
    assert equal(stepped(run), stepped(want))
    text = symopt.explain(run[1])
    assert text.split()[:2] == ["weight", "reference"] and f"native: {reason}" in text
    assert native.INSTRUCTIONS[-1] not in text
    strict = start(row, FEW[2], backend="native")
    with pytest.raises(ValueError, match=f"^weight: backend='native' cannot step it: {reason}"):
        step(strict, 0)


# -- the comparison itself -------------------------------------------------------------------------------------------


@cases(row=ROWS, opt_row=FEW, dtype=[torch.float64, torch.float32])
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
