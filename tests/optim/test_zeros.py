"""``zeros()`` counts what is exactly zero now, whoever wrote it."""

from __future__ import annotations

import torch

import symopt
from support.cases import cases, pairs
from support.runs import (
    HALF,
    ROWS,
    made,
    step,
)
from support.table import CPU_BACKENDS, OPTIMIZERS, ConstraintRow, available, constrained_parameter

ADAMW = next(row for row in OPTIMIZERS if row.id == "adamw")


@pairs(
    lambda row, backend, **_: available(row, ADAMW, backend),
    row=ROWS,
    dtype=[torch.float32, torch.float64, *HALF],
    backend=CPU_BACKENDS,
)
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
    module = made((4, 3), symopt.Sparse(strength=1e6))
    opt = symopt.AdamW(module, lr=0.01, backend="native")
    for t in range(4):
        step((module, opt), t)
    assert opt.zeros() == {"weight": 12}
