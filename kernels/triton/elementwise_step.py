"""The kernel behind every step of weights that are units of their own, one block of BLOCK weights to a program.

Whichever program finishes a parameter last advances its step count and its imbalance: no second launch, and nothing for
the host to wait for.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call, attr-defined"

from __future__ import annotations

import triton
import triton.language as tl

from symopt_kernels.triton.constants import prepare
from symopt_kernels.triton.imbalance import finish
from symopt_kernels.triton.memory import (
    ALIGNED,
    BEGIN,
    COUNT,
    NUMEL,
    field,
    field_i32,
    grad_address,
    load_grad,
    load_weight,
    store_weight,
)

__all__ = ["step_elementwise"]


@triton.jit
def finite_or_zero(size):
    return tl.where(size < float("inf"), size, 0.0)


@triton.jit
def step_block(
    table, per_step, row, first, numel, direction, constants, grad_factor, weight_decay, seed, draw,
    DIRECTION: tl.constexpr, RETRACTION: tl.constexpr, DTYPE: tl.constexpr, MASTER: tl.constexpr, PEAK: tl.constexpr,
    MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, BUDGETED: tl.constexpr, COUPLED: tl.constexpr,
    SATURATED: tl.constexpr, DECAYS: tl.constexpr, STOCHASTIC: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """One block of weights; returns the sums of their sizes and squares and how many are zero."""
    lane = tl.arange(0, BLOCK)
    at = first + lane
    mask = None if ALIGNED else at < numel
    w = load_weight(table, row, at, mask, DTYPE, MASTER, ALIGNED)
    g = load_grad(table, per_step, row, at, mask, w, grad_factor, weight_decay, DTYPE, DECAYS, ALIGNED)
    update, gain = DIRECTION(table, row, at, mask, g, direction, MOMENTUM, NESTEROV, PEAK, ALIGNED)
    new = RETRACTION(
        table, row, at, mask, w, update, gain, constants, DTYPE, BUDGETED, COUPLED, SATURATED, DEPTH, ALIGNED
    )  # fmt: skip
    stored = store_weight(table, row, at, mask, new, seed, draw + lane, DTYPE, MASTER, STOCHASTIC, ALIGNED)
    size = finite_or_zero(tl.abs(new))
    gone = stored == 0
    if not ALIGNED:
        size = tl.where(mask, size, 0.0)
        gone = gone & mask
    return tl.sum(size, 0), tl.sum(size * size, 0), tl.sum(gone.to(tl.float32), 0)


@triton.jit(do_not_specialize=["seed", "programs"])
def step_elementwise(
    table, per_step, owners, arrived, partial, zeros, given, seed, programs,
    DIRECTION: tl.constexpr, RETRACTION: tl.constexpr, DTYPE: tl.constexpr, MASTER: tl.constexpr, PEAK: tl.constexpr,
    ADAPTIVE: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, DECOUPLED: tl.constexpr,
    MAXIMIZE: tl.constexpr, CONSTRAINED: tl.constexpr, IMBALANCE_LAW: tl.constexpr, BUDGETED: tl.constexpr,
    COUPLED: tl.constexpr, SATURATED: tl.constexpr, DECAYS: tl.constexpr, STOCHASTIC: tl.constexpr,
    DEPTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """See the module."""
    if given.found_inf is not None:  # noqa: SIM102 (Triton must not look at None)
        if tl.load(given.found_inf) != 0:
            return
    program = tl.program_id(0)
    row = tl.load(owners + program)
    numel = field(table, row, NUMEL)
    first = (program - field(table, row, BEGIN)) * BLOCK
    direction, constants, grad_factor = prepare(
        table, per_step, row, given, ADAPTIVE, MOMENTUM, CONSTRAINED, DECOUPLED, MAXIMIZE, BUDGETED
    )
    draw = program.to(tl.int64) * BLOCK
    whole = (field(table, row, ALIGNED) != 0) & (grad_address(per_step, row) % 16 == 0) & (first + BLOCK <= numel)
    if whole:
        size, square, gone = step_block(
            table, per_step, row, first, numel, direction, constants, grad_factor, given.weight_decay, seed, draw,
            DIRECTION, RETRACTION, DTYPE, MASTER, PEAK, MOMENTUM, NESTEROV, BUDGETED, COUPLED, SATURATED, DECAYS,
            STOCHASTIC, DEPTH, BLOCK, True,
        )  # fmt: skip
    else:
        size, square, gone = step_block(
            table, per_step, row, first, numel, direction, constants, grad_factor, given.weight_decay, seed, draw,
            DIRECTION, RETRACTION, DTYPE, MASTER, PEAK, MOMENTUM, NESTEROV, BUDGETED, COUPLED, SATURATED, DECAYS,
            STOCHASTIC, DEPTH, BLOCK, False,
        )  # fmt: skip
    if CONSTRAINED or ADAPTIVE or MOMENTUM:
        if CONSTRAINED:
            tl.store(partial + program, size)
            tl.store(partial + programs + program, square)
            tl.store(partial + 2 * programs + program, gone)
        tl.debug_barrier()
        before = tl.atomic_add(arrived + row, 1, sem="acq_rel")
        if before == field_i32(table, row, COUNT) - 1:
            tl.debug_barrier()
            direction, constants, _ = prepare(  # anew, so that they need no registers until here
                table, per_step, row, given, ADAPTIVE, MOMENTUM, CONSTRAINED, DECOUPLED, MAXIMIZE, BUDGETED
            )
            finish(
                table, row, partial, zeros, arrived, constants, direction, programs, 1.0,
                IMBALANCE_LAW, COUPLED, PEAK, ADAPTIVE, MOMENTUM, CONSTRAINED, SATURATED,
            )  # fmt: skip
