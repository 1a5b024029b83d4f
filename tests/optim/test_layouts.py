"""Weights and gradients in any order in memory: fused where that can be, and always the numbers of a contiguous one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import symopt
from support.cases import cases, pairs
from support.runs import (
    FEW,
    KINDS,
    Run,
    close,
    gradient,
    made,
    optimizer,
    step,
)
from support.table import CPU_BACKENDS, OptimizerRow
from support.tolerances import tolerance

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
        module = made((6, 4), symopt.Sparse(strength=0.3), dtype=dtype)
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
