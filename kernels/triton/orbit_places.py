"""Orbits of weights that a plane makes equal: where they lie, what they differ by, their sums.

Orbits that are not simply the weights at one place of several tensors come in segments (``segments.Segment``):
``segment`` is the row of the table that says where their copies lie, ``entry`` that of the first tensor.
Copies are compared with the first of them, so that what equal ones differ by is exactly zero.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call, attr-defined"

from __future__ import annotations

import triton
import triton.language as tl

from symopt_kernels.triton.memory import (
    BEGIN,
    MAIN,
    NUMEL,
    OF,
    PEAK_,
    PLACES,
    SECOND,
    SKIP,
    address,
    field,
    get,
    load_grad,
    load_weight,
    narrow,
    put,
)
from symopt_kernels.triton.tiles import recall

__all__ = ["block", "change", "gather", "lies", "owner", "place"]


@triton.jit
def owner(table, owners, program, GATHERED: tl.constexpr):
    """The segment of a program, and the first row of its tie."""
    segment = tl.load(owners + program)
    return segment, narrow(table, segment, MAIN) if GATHERED else segment


@triton.jit
def lies(table, segment, entry, j, at, mask, GATHERED: tl.constexpr):
    """The row of the j-th copy of every orbit, and where in that tensor it lies."""
    row = entry + j
    if GATHERED:
        row = entry + tl.load(address(table, segment, OF, tl.int32, False) + j)
        places = address(table, segment, PLACES, tl.int32, False) + j * field(table, segment, NUMEL)
        at = tl.load(places + at, mask=mask, other=0).to(tl.int64)
    return row, at


@triton.jit
def block(table, row, number, DTYPE: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """Elements of a block of a row, and which of them exist."""
    numel = field(table, row, NUMEL)
    if ALIGNED:  # as in triton_tiles
        wide: tl.constexpr = 128 // DTYPE.primitive_bitwidth
        numel = numel // wide * wide
    at = number.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return at, at < numel


@triton.jit
def place(table, entry, program, DTYPE: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """Orbits of a program, and which of them exist."""
    return block(table, entry, program - field(table, entry, BEGIN), DTYPE, BLOCK, ALIGNED)


@triton.jit
def copy(
    table, live, entry, at, mask, numbers, factor,
    LEAD: tl.constexpr, DTYPE: tl.constexpr, MASTER: tl.constexpr, ADAPTIVE: tl.constexpr, MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr, ADVANCE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Weight, update (up to Adam's preconditioner) and squared gradient of one copy of every orbit."""
    if ADVANCE:
        w = load_weight(table, entry, at, mask, DTYPE, MASTER, ALIGNED)
        g = load_grad(table, live, entry, at, mask, w, factor, 0.0, DTYPE, False, ALIGNED)
        u = LEAD(table, entry, at, mask, g, numbers, MOMENTUM, NESTEROV, ALIGNED)
        square = g * g
    else:
        w, u = recall(
            table, live, entry, at, mask, numbers, factor, DTYPE, MASTER, ADAPTIVE, MOMENTUM, NESTEROV, ALIGNED
        )
        square = tl.zeros_like(w)
    return w, u, square


@triton.jit
def gather(
    table, live, segment, entry, copies, at, mask, numbers, factor,
    LEAD: tl.constexpr, DTYPE: tl.constexpr, MASTER: tl.constexpr, ADAPTIVE: tl.constexpr, MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr, PEAK: tl.constexpr, ADVANCE: tl.constexpr, GATHERED: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The first copy and the last, how far the mean is from the first, sums of what is off it, the preconditioner."""
    row, mine = lies(table, segment, entry, 0, at, mask, GATHERED)
    w0, u0, gg = copy(
        table, live, row, mine, mask, numbers, factor,
        LEAD, DTYPE, MASTER, ADAPTIVE, MOMENTUM, NESTEROV, ADVANCE, ALIGNED,
    )  # fmt: skip
    w, u, everything = w0, u0, u0 * u0
    w_mean, u_mean = tl.zeros_like(w0), tl.zeros_like(w0)
    ww, uu, uw = tl.zeros_like(w0), tl.zeros_like(w0), tl.zeros_like(w0)
    for j in range(1, copies):
        row, mine = lies(table, segment, entry, j, at, mask, GATHERED)
        w, u, square = copy(
            table, live, row, mine, mask, numbers, factor,
            LEAD, DTYPE, MASTER, ADAPTIVE, MOMENTUM, NESTEROV, ADVANCE, ALIGNED,
        )  # fmt: skip
        x, y = w - w0, u - u0
        w_mean, u_mean = w_mean + x, u_mean + y
        ww, uu, uw = ww + x * x, uu + y * y, uw + y * x
        gg, everything = gg + square, everything + u * u
    share = 1 / (copies * 1.0)
    # Sums about the first copy: they exceed those about the mean at most by a factor of as many as there are copies.
    ww = tl.maximum(ww - share * w_mean * w_mean, 0.0, propagate_nan=tl.PropagateNan.ALL)
    uu = tl.maximum(uu - share * u_mean * u_mean, 0.0, propagate_nan=tl.PropagateNan.ALL)
    uw -= share * u_mean * w_mean
    speed = tl.zeros_like(w0) + 1.0
    if ADAPTIVE:
        second, peak = (
            address(table, entry, SECOND, tl.float32, ALIGNED),
            address(table, entry, PEAK_, tl.float32, ALIGNED),
        )
        if GATHERED:
            at += field(table, segment, SKIP)
        v = get(peak if PEAK and not ADVANCE else second, at, mask)
        if ADVANCE:
            v = numbers[4] * v + numbers[5] * (share * gg)
            put(second, at, v, mask)
            if PEAK:
                v = tl.maximum(v, get(peak, at, mask), propagate_nan=tl.PropagateNan.ALL)
                put(peak, at, v, mask)
        speed = tl.where(mask, 1 / (tl.sqrt(v * numbers[8]) + numbers[6]), 0.0)
    return (w0, u0, share * w_mean, share * u_mean), (w, u), (ww, uu, uw, everything), speed


@triton.jit
def change(w, u, first, step):
    """What is off the plane, and what the step changes of it."""
    off, d = (w - first[0]) - first[2], (u - first[1]) - first[3]
    return off, step[1] * off - step[2] * d
