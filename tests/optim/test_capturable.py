"""``capturable=True``: once its state exists, a step asks the device for nothing, so that a graph can capture it.

Under FakeTensorMode tensors have no numbers: whoever looks at one (``.item()``, a branch, a size that depends on it)
raises.  Builds of torch without CUDA can fake the operations of a GPU but not ``copy_``, so the tensors are faked where
they are.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import symopt
from support.cases import cases, some
from support.table import (
    CONSTRAINTS,
    MATRICES,
    OPTIMIZERS,
    PLANES,
    ConstraintRow,
    OptimizerRow,
    PlaneRow,
    constrained_parameter,
    plane_module,
)
from support.tolerances import tolerance

ROWS = [
    *CONSTRAINTS,
    ConstraintRow("free", lambda k: symopt.Sparse(strength=k, gauge="free"), (6, 5)),
    ConstraintRow("deep", lambda k: symopt.Sparse(strength=k, depth=3), (6, 5)),
    ConstraintRow("deep-groups", lambda k: symopt.GroupSparse("out", strength=k, depth=3), (6, 5)),
    ConstraintRow("density", lambda k: symopt.Sparse(density=0.4), (6, 5)),
    ConstraintRow("pattern", lambda k: symopt.Sparse(pattern="2:4"), (6, 8)),
    ConstraintRow("keep", lambda k: symopt.GroupSparse("out", keep=2), (6, 5)),
    *PLANES,
]
CAPTURED = [row for row in OPTIMIZERS if row.torch_cls is not torch.optim.SGD]
PLAIN = [row for row in CAPTURED if not row.options]
Run = tuple[torch.nn.Module, Any]


def start(row: Any, opt_row: OptimizerRow, strength: float | None = 0.3, **options: Any) -> Run:
    """After two steps: all state exists, and whatever is looked up once has been."""
    module = plane_module(row, strength) if isinstance(row, PlaneRow) else constrained_parameter(row, strength=strength)
    opt = opt_row.cls(module, backend="reference", **{"lr": opt_row.lr, **opt_row.options, **options})
    if not isinstance(row, PlaneRow) and row.make(None).budget is not None:
        opt.reschedule(10_000)
    run = module, opt
    for t in range(2):
        step(run, t)
    return run


def step(run: Run, t: int) -> None:
    module, opt = run
    for p in module.parameters():
        p.grad = torch.sin(torch.arange(p.numel(), dtype=p.dtype).reshape(p.shape) + t)
    opt.step()


@some(bound=[*((row, 0.3) for row in ROWS), *((row, None) for row in PLANES)], opt_row=CAPTURED)
def test_a_step_waits_for_nothing(bound: tuple[Any, float | None], opt_row: OptimizerRow) -> None:
    row, strength = bound
    _, opt = start(row, opt_row, strength, lr=torch.tensor(opt_row.lr), capturable=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        opt.step()


@some(row=ROWS, opt_row=[row for row in OPTIMIZERS if row not in CAPTURED])
def test_sgd_never_does(row: Any, opt_row: OptimizerRow) -> None:
    _, opt = start(row, opt_row, lr=torch.tensor(opt_row.lr))
    with FakeTensorMode(allow_non_fake_inputs=True):
        opt.step()


def test_a_strength_may_be_a_tensor() -> None:
    _, opt = start(ROWS[0], CAPTURED[0], capturable=True)
    opt.param_groups[0]["strength"] = torch.tensor(0.1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        opt.step()


@cases(row=ROWS, opt_row=PLAIN)
def test_otherwise_it_counts_on_the_host_which_is_noticed(row: Any, opt_row: OptimizerRow) -> None:
    _, opt = start(row, opt_row)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(DataDependentOutputException):
        opt.step()


@cases(row=ROWS, opt_row=PLAIN)
def test_the_numbers_are_the_same(row: Any, opt_row: OptimizerRow) -> None:
    """Up to bias corrections that are computed in the precision of the count, as in torch."""
    runs = [start(row, opt_row, capturable=capturable) for capturable in (True, False)]
    for t in range(2, 10):
        for run in runs:
            step(run, t)
    tol = tolerance("backends, fp32")
    for p, q in zip(*(module.parameters() for module, _ in runs), strict=True):
        torch.testing.assert_close(p, q, rtol=tol, atol=tol)


@cases(row=MATRICES, opt_row=CAPTURED)
def test_low_rank_is_refused(row: ConstraintRow, opt_row: OptimizerRow) -> None:
    with pytest.raises(ValueError, match=r"^weight: LowRank drops columns .* capturable=False"):
        start(row, opt_row, capturable=True)
