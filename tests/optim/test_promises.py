"""What every step promises, of every row of the table, under every optimizer, on every backend of the CPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from support.cases import pairs
from support.oracles import labels
from support.table import (
    CONSTRAINTS,
    EVERY,
    EVERY_OPTIMIZER,
    MATRICES,
    ConstraintRow,
    OptimizerRow,
    Row,
    bound_module,
    taken,
)
from symopt.optim.lowrank import step as lowrank

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BACKENDS = [None, "reference"]


def noise(p: Tensor, seed: int) -> Tensor:
    values = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.empty_like(p).copy_(values)


def spread(p: Tensor) -> None:
    """Numbers from next to nothing to the largest, and zeros."""
    p.mul_(torch.logspace(-9, 3, p.numel()).reshape(p.shape).to(p.dtype))
    p.view(-1)[::4] = 0


def without_units(p: Tensor, row: Row) -> None:
    """Every other unit is zero, or every other number where units are no part of one parameter."""
    units = isinstance(row, ConstraintRow) and row not in MATRICES
    dead = labels(row) if units else torch.arange(p.numel())
    p[(dead % 2 == 0).reshape(p.shape)] = 0


def absorbs(row: Row) -> bool:
    """With more than two factors, balanced ones, a zero takes any step to zero."""
    constraint = row.make(None)
    return constraint.depth > 2 and not constraint.carries_factors


STARTS = {
    "as drawn": lambda p, row: None,
    "over twelve decades": lambda p, row: spread(p),
    "half of the units zero": without_units,
}


# -- a step of length zero changes no bit ------------------------------------------------------------------------------


@pairs(
    # The factors of a low rank are refactored by every step with a gradient, which rounds.
    lambda row, opt_row, gradient, warm, **_: (
        taken(row, opt_row) and (row not in MATRICES or (gradient == 0 and not warm))
    ),
    row=EVERY,
    opt_row=EVERY_OPTIMIZER,
    dtype=DTYPES,
    backend=BACKENDS,
    strength=[0.3, None],
    imbalance=[1.0, 0.0],
    start=STARTS,
    gradient=[1.0, 0.0],
    warm=[0, 3],
)
def test_a_step_of_length_zero_changes_no_bit(
    row: Row,
    opt_row: OptimizerRow,
    dtype: torch.dtype,
    backend: str | None,
    strength: float | None,
    imbalance: float,
    start: str,
    gradient: float,
    warm: int,
) -> None:
    """torch.distributed.checkpoint makes an optimizer's state by such a step, with gradients of zero."""
    module = bound_module(row, strength, dtype=dtype)
    with torch.no_grad():
        for p in module.parameters():
            STARTS[start](p, row)
    opt = opt_row.cls(module, backend=backend, imbalance=imbalance, **{**opt_row.options, "lr": opt_row.lr})
    for t in range(warm):
        for p in module.parameters():
            p.grad = noise(p, t)
        opt.step()
    opt.param_groups[0]["lr"] = 0.0
    kept = {"master", "factor_0", "factor_1", "metric_scale"} | (set() if warm else {"imbalance"})
    before = [p.detach().clone() for p in module.parameters()]
    states: list[dict[str, Tensor]] = []
    for t in range(lowrank.EVERY + 1 if row in MATRICES else 3):
        for i, p in enumerate(module.parameters()):
            p.grad = gradient * noise(p, 10 * t + i)
        if t == 1 or warm:
            states = states or [
                {k: v.clone() for k, v in opt.state[p].items() if k in kept} for p in module.parameters()
            ]
        opt.step()
        assert all(torch.equal(p, old) for p, old in zip(module.parameters(), before, strict=True))
    for p, state in zip(module.parameters(), states, strict=True):
        assert all(torch.equal(opt.state[p][key], value) for key, value in state.items())
    if row in CONSTRAINTS and not warm and dtype in (torch.float64, torch.float32):
        assert torch.equal(states[0]["imbalance"], row.make(None).start(before[0], imbalance)[0])


# -- what is not a number shows ----------------------------------------------------------------------------------------


@pairs(
    lambda row, opt_row, on_zero, **_: taken(row, opt_row) and (not absorbs(row) or not on_zero),
    row=[row for row in EVERY if row not in MATRICES],
    opt_row=EVERY_OPTIMIZER,
    bad=[math.nan, math.inf, -math.inf],
    on_zero=[False, True],
    dtype=[torch.float64, torch.float32],
    backend=BACKENDS,
    strength=[0.3, None],
    imbalance=[1.0, 0.0],
    time_scale=["saturated", "none"],
)
def test_a_bad_gradient_shows_in_the_weight(
    row: Row,
    opt_row: OptimizerRow,
    bad: float,
    on_zero: bool,
    dtype: torch.dtype,
    backend: str | None,
    strength: float | None,
    imbalance: float,
    time_scale: str,
) -> None:
    """Neither snapped to zero nor turned into a finite number: on zero and on other weights."""
    module = bound_module(row, strength, dtype=dtype)
    (p, *others) = module.parameters()
    with torch.no_grad():
        without_units(p, row)
    options = {"backend": backend, "imbalance": imbalance, "time_scale": time_scale, **opt_row.options}
    opt = opt_row.cls(module, lr=opt_row.lr, **options)
    place = int(((p == 0) == on_zero).flatten().nonzero()[0])
    for t, q in enumerate((p, *others)):
        q.grad = noise(q, t)
    assert p.grad is not None
    p.grad.view(-1)[place] = bad
    opt.step()
    hit = p.detach().flatten()[place]
    assert not bool(hit.isfinite())
    assert bool(hit.isnan()) or bad == bad
