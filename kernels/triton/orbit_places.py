"""Orbits of weights that a plane makes equal: where they lie, what they differ by, their sums.

Orbits that are not simply the weights at one place of several tensors come in segments (``orbits.Segment``):
``segment`` is the row of the table that says where their copies lie, ``main`` that of the first tensor.  Copies are
compared with the first of them, so that what equal ones differ by is exactly zero.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call, attr-defined"

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from symopt_kernels.triton.constants import Value
from symopt_kernels.triton.group_tiles import reload_line
from symopt_kernels.triton.memory import (
    BEGIN,
    FIRST_ORBIT,
    MAIN,
    NUMEL,
    PEAK_,
    PLACES,
    SECOND,
    TENSORS,
    address,
    field,
    field_i32,
    load_f32,
    load_grad,
    load_weight,
    store,
)

__all__ = [
    "FirstCopy",
    "OffPlaneStep",
    "OrbitSums",
    "block_offsets",
    "locate_copy",
    "off_plane_change",
    "orbit_offsets",
    "owner",
    "survey_orbit",
]


class FirstCopy(NamedTuple):
    """Weight and update of the first copy of every orbit, and what the means over the orbit exceed them by."""

    w: Value
    u: Value
    w_mean: Value
    u_mean: Value


class OrbitSums(NamedTuple):
    """Per orbit: squares and products of what is off the plane, and the squares of the whole updates."""

    ww: Value
    uu: Value
    uw: Value
    all_uu: Value


class OffPlaneStep(NamedTuple):
    """``off' = off + shrink_less_one off - shift u_off``, while on the plane ``on' = on - step_scale u_on``."""

    step_scale: Value
    shrink_less_one: Value
    shift: Value


@triton.jit
def owner(table, owners, program, GATHERED: tl.constexpr):
    """The row that a program works on, and the first row of its plane."""
    segment = tl.load(owners + program)
    return segment, field_i32(table, segment, MAIN) if GATHERED else segment


@triton.jit
def locate_copy(table, segment, main, j, at, mask, GATHERED: tl.constexpr):
    """The row of the j-th copy of every orbit, and where in that tensor it lies."""
    row = main + j
    if GATHERED:
        row = main + tl.load(address(table, segment, TENSORS, tl.int32, False) + j)
        places = address(table, segment, PLACES, tl.int32, False) + j * field(table, segment, NUMEL)
        at = tl.load(places + at, mask=mask, other=0).to(tl.int64)
    return row, at


@triton.jit
def block_offsets(table, row, number, DTYPE: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """Elements of a block of a row, and which of them exist."""
    numel = field(table, row, NUMEL)
    if ALIGNED:  # as in group_tiles
        wide: tl.constexpr = 128 // DTYPE.primitive_bitwidth
        numel = numel // wide * wide
    at = number.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return at, at < numel


@triton.jit
def orbit_offsets(table, row, program, DTYPE: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """Orbits of a program, and which of them exist."""
    return block_offsets(table, row, program - field(table, row, BEGIN), DTYPE, BLOCK, ALIGNED)


@triton.jit
def load_copy(
    table, per_step, row, at, mask, direction, grad_factor,
    LEAD: tl.constexpr, DTYPE: tl.constexpr, MASTER: tl.constexpr, ADAPTIVE: tl.constexpr, MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr, ADVANCE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Weight, update (up to Adam's preconditioner) and squared gradient of one copy of every orbit."""
    if ADVANCE:
        w = load_weight(table, row, at, mask, DTYPE, MASTER, ALIGNED)
        g = load_grad(table, per_step, row, at, mask, w, grad_factor, 0.0, DTYPE, False, ALIGNED)
        u = LEAD(table, row, at, mask, g, direction, MOMENTUM, NESTEROV, ALIGNED)
        square = g * g
    else:
        w, u = reload_line(
            table, per_step, row, at, mask, direction, grad_factor, DTYPE, MASTER, ADAPTIVE, MOMENTUM, NESTEROV, ALIGNED
        )
        square = tl.zeros_like(w)
    return w, u, square


@triton.jit
def survey_orbit(
    table, per_step, segment, main, copies, at, mask, direction, grad_factor,
    LEAD: tl.constexpr, DTYPE: tl.constexpr, MASTER: tl.constexpr, ADAPTIVE: tl.constexpr, MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr, PEAK: tl.constexpr, ADVANCE: tl.constexpr, GATHERED: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """:class:`FirstCopy`, weight and update of the last copy, :class:`OrbitSums`, the preconditioner."""
    row, place = locate_copy(table, segment, main, 0, at, mask, GATHERED)
    w0, u0, gg = load_copy(
        table, per_step, row, place, mask, direction, grad_factor,
        LEAD, DTYPE, MASTER, ADAPTIVE, MOMENTUM, NESTEROV, ADVANCE, ALIGNED,
    )  # fmt: skip
    w, u, all_uu = w0, u0, u0 * u0
    w_mean, u_mean = tl.zeros_like(w0), tl.zeros_like(w0)
    ww, uu, uw = tl.zeros_like(w0), tl.zeros_like(w0), tl.zeros_like(w0)
    for j in range(1, copies):
        row, place = locate_copy(table, segment, main, j, at, mask, GATHERED)
        w, u, square = load_copy(
            table, per_step, row, place, mask, direction, grad_factor,
            LEAD, DTYPE, MASTER, ADAPTIVE, MOMENTUM, NESTEROV, ADVANCE, ALIGNED,
        )  # fmt: skip
        x, y = w - w0, u - u0
        w_mean, u_mean = w_mean + x, u_mean + y
        ww, uu, uw = ww + x * x, uu + y * y, uw + y * x
        gg, all_uu = gg + square, all_uu + u * u
    share = 1 / (copies * 1.0)
    # Sums about the first copy: they exceed those about the mean at most by a factor of as many as there are copies.
    ww = tl.maximum(ww - share * w_mean * w_mean, 0.0, propagate_nan=tl.PropagateNan.ALL)
    uu = tl.maximum(uu - share * u_mean * u_mean, 0.0, propagate_nan=tl.PropagateNan.ALL)
    uw -= share * u_mean * w_mean
    preconditioner = tl.zeros_like(w0) + 1.0
    if ADAPTIVE:
        second = address(table, main, SECOND, tl.float32, ALIGNED)
        peak = address(table, main, PEAK_, tl.float32, ALIGNED)
        if GATHERED:
            at += field(table, segment, FIRST_ORBIT)
        v = load_f32(peak if PEAK and not ADVANCE else second, at, mask)
        if ADVANCE:
            v = direction.beta2 * v + direction.one_minus_beta2 * (share * gg)
            store(second, at, v, mask)
            if PEAK:
                v = tl.maximum(v, load_f32(peak, at, mask), propagate_nan=tl.PropagateNan.ALL)
                store(peak, at, v, mask)
        preconditioner = tl.where(mask, 1 / (tl.sqrt(v * direction.unbias2) + direction.eps), 0.0)
    first, sums = FirstCopy(w0, u0, share * w_mean, share * u_mean), OrbitSums(ww, uu, uw, all_uu)
    return first, w, u, sums, preconditioner


@triton.jit
def off_plane_change(w, u, first, step):
    """What is off the plane, and what the step changes of it."""
    off, d = (w - first.w) - first.w_mean, (u - first.u) - first.u_mean
    return off, step.shrink_less_one * off - step.shift * d
