"""The two generic kernels behind every fused step on GPUs, and what ends a tensor's step.

``singles`` steps weights that are units of their own, one block of BLOCK to a program.  ``groups`` (in
``triton_groups``) steps groups: tiles of R rows by C columns are summed and moved by one program where they fit, and
otherwise cut into parts that are summed by some programs and then moved by others.  Its programs take their tasks in
the order of a ticket and wait only for tasks with earlier tickets, so there is no deadlock however few of them run at
a time.  Whichever program finishes a tensor last advances its step count and its imbalance: no second launch, and
nothing for the host to wait for.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call, attr-defined"

from __future__ import annotations

import triton
import triton.language as tl

from symopt_kernels.triton.imbalance import finish, settings
from symopt_kernels.triton.memory import (
    ALIGNED,
    BEGIN,
    COUNT,
    NUMEL,
    field,
    load_grad,
    load_weight,
    narrow,
    store_weight,
)

__all__ = ["singles"]


@triton.jit
def finite(size):
    return tl.where(size < float("inf"), size, 0.0)


@triton.jit
def block(
    table, live, entry, first, numel, numbers, law, factor, weight_decay, seed, number,
    DIRECTION: tl.constexpr, RETRACTION: tl.constexpr, DTYPE: tl.constexpr, MASTER: tl.constexpr, PEAK: tl.constexpr,
    MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, TRIMMED: tl.constexpr, COUPLED: tl.constexpr,
    SATURATED: tl.constexpr, DECAYS: tl.constexpr, STOCHASTIC: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """One block of weights; returns the sums of their sizes and squares and how many are zero."""
    lane = tl.arange(0, BLOCK)
    at = first + lane
    mask = None if ALIGNED else at < numel
    w = load_weight(table, entry, at, mask, DTYPE, MASTER, ALIGNED)
    g = load_grad(table, live, entry, at, mask, w, factor, weight_decay, DTYPE, DECAYS, ALIGNED)
    update, gain = DIRECTION(table, entry, at, mask, g, numbers, MOMENTUM, NESTEROV, PEAK, ALIGNED)
    new = RETRACTION(
        table, entry, at, mask, w, update, gain, law, DTYPE, TRIMMED, COUPLED, SATURATED, DEPTH, ALIGNED
    )  # fmt: skip
    stored = store_weight(table, entry, at, mask, new, seed, number + lane, DTYPE, MASTER, STOCHASTIC, ALIGNED)
    size = finite(tl.abs(new))
    gone = stored == 0
    if not ALIGNED:
        size = tl.where(mask, size, 0.0)
        gone = gone & mask
    return tl.sum(size, 0), tl.sum(size * size, 0), tl.sum(gone.to(tl.float32), 0)


@triton.jit(do_not_specialize=["seed", "programs"])
def singles(
    table, live, owners, arrived, partial, zeros, lr_at, found_inf, grad_scale,
    lr, fresh1, beta2, fresh2, log1, log2, eps, momentum, undamped, amplify, weight_decay, imbalance_factor,
    seed, programs,
    DIRECTION: tl.constexpr, RETRACTION: tl.constexpr, DTYPE: tl.constexpr, MASTER: tl.constexpr, PEAK: tl.constexpr,
    ADAPTIVE: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, DECOUPLED: tl.constexpr,
    MAXIMIZE: tl.constexpr, CONSTRAINED: tl.constexpr, LAW: tl.constexpr, TRIMMED: tl.constexpr,
    COUPLED: tl.constexpr, SATURATED: tl.constexpr, DECAYS: tl.constexpr, STOCHASTIC: tl.constexpr,
    DEPTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """See the module."""
    if found_inf is not None:  # noqa: SIM102 (Triton must not look at None)
        if tl.load(found_inf) != 0:
            return
    program = tl.program_id(0)
    entry = tl.load(owners + program)
    numel = field(table, entry, NUMEL)
    first = (program - field(table, entry, BEGIN)) * BLOCK
    numbers, law, factor = settings(
        table, live, entry, lr_at, grad_scale,
        lr, fresh1, beta2, fresh2, log1, log2, eps, momentum, undamped, amplify, weight_decay, imbalance_factor,
        ADAPTIVE, MOMENTUM, CONSTRAINED, DECOUPLED, MAXIMIZE, TRIMMED,
    )  # fmt: skip
    number = program.to(tl.int64) * BLOCK
    whole = (field(table, entry, ALIGNED) != 0) & (tl.load(live + 3 * entry) % 16 == 0) & (first + BLOCK <= numel)
    if whole:
        size, square, gone = block(
            table, live, entry, first, numel, numbers, law, factor, weight_decay, seed, number,
            DIRECTION, RETRACTION, DTYPE, MASTER, PEAK, MOMENTUM, NESTEROV, TRIMMED, COUPLED, SATURATED, DECAYS,
            STOCHASTIC, DEPTH, BLOCK, True,
        )  # fmt: skip
    else:
        size, square, gone = block(
            table, live, entry, first, numel, numbers, law, factor, weight_decay, seed, number,
            DIRECTION, RETRACTION, DTYPE, MASTER, PEAK, MOMENTUM, NESTEROV, TRIMMED, COUPLED, SATURATED, DECAYS,
            STOCHASTIC, DEPTH, BLOCK, False,
        )  # fmt: skip
    if CONSTRAINED or ADAPTIVE or MOMENTUM:
        if CONSTRAINED:
            tl.store(partial + program, size)
            tl.store(partial + programs + program, square)
            tl.store(partial + 2 * programs + program, gone)
        tl.debug_barrier()
        before = tl.atomic_add(arrived + entry, 1, sem="acq_rel")
        if before == narrow(table, entry, COUNT) - 1:
            tl.debug_barrier()
            numbers, law, _ = settings(  # anew, so that they need no registers until here
                table, live, entry, lr_at, grad_scale,
                lr, fresh1, beta2, fresh2, log1, log2, eps, momentum, undamped, amplify, weight_decay, imbalance_factor,
                ADAPTIVE, MOMENTUM, CONSTRAINED, DECOUPLED, MAXIMIZE, TRIMMED,
            )  # fmt: skip
            finish(
                table, entry, partial, zeros, arrived, law, numbers, programs, 1.0,
                LAW, COUPLED, PEAK, ADAPTIVE, MOMENTUM, CONSTRAINED, SATURATED,
            )  # fmt: skip
