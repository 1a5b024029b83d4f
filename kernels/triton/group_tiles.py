"""Tiles of groups: where they lie, the survey of one line, its move."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call, attr-defined"

from __future__ import annotations

import triton
import triton.language as tl

from symopt_kernels.triton.memory import (
    FIRST,
    GROUPS,
    ROWS,
    RUN,
    address,
    field_i32,
    load_f32,
    load_grad,
    load_weight,
    store_weight,
)

__all__ = ["line_offsets", "move_line", "per_column", "per_group", "reload_line", "survey_line"]


@triton.jit
def per_group(x, R: tl.constexpr, C: tl.constexpr, P: tl.constexpr):
    """Sums of a tile over its rows and over the P columns of each group: (R, C) -> (C // P,)."""
    columns = tl.sum(x, 0)
    return columns if P == 1 else tl.sum(tl.reshape(columns, (C // P, P)), 1)


@triton.jit
def per_column(x, C: tl.constexpr, P: tl.constexpr):
    """A group's value for each of its columns: (C // P,) -> (1, C)."""
    if P == 1:
        return tl.expand_dims(x, 0)
    else:
        wide = tl.broadcast_to(tl.expand_dims(x, 1), (C // P, P))
        return tl.expand_dims(tl.reshape(wide, (C,)), 0)


@triton.jit
def line_offsets(
    table, row, tile, line, DTYPE: tl.constexpr, R: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Offsets of a line of a tile, and which of them exist."""
    rows, groups, run = field_i32(table, row, ROWS), field_i32(table, row, GROUPS), field_i32(table, row, RUN)
    G: tl.constexpr = C // P
    per_band = tl.cdiv(groups, G)
    band, group = tile // per_band, (tile % per_band) * G
    chunks = tl.cdiv(run, P)
    top, left = (line // chunks) * R, (line % chunks) * P
    if ALIGNED:  # the compiler sees what the host has checked; hints would be lost where functions are inlined
        wide: tl.constexpr = 128 // DTYPE.primitive_bitwidth
        if P == 1:
            groups = groups // wide * wide
        else:
            run = run // wide * wide
    column, down = tl.arange(0, C), top + tl.arange(0, R)
    own, inner = group + column // P, left + column % P
    mask = (down < rows)[:, None] & ((own < groups) & (inner < run))[None, :]
    pitch = groups.to(tl.int64) * run
    across = own if P == 1 else (group.to(tl.int64) + column // P) * run + inner
    at = (band.to(tl.int64) * rows + down)[:, None] * pitch + across[None, :]
    return at, mask


@triton.jit
def survey_line(
    table, per_step, row, at, mask, direction, grad_factor,
    LEAD: tl.constexpr, DTYPE: tl.constexpr, MASTER: tl.constexpr, ADAPTIVE: tl.constexpr, MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr, R: tl.constexpr, C: tl.constexpr, P: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Advance the moments of a line; return weight, gradient, update (up to a factor per group), four sums."""
    w = load_weight(table, row, at, mask, DTYPE, MASTER, ALIGNED)
    g = load_grad(table, per_step, row, at, mask, w, grad_factor, 0.0, DTYPE, False, ALIGNED)
    u = LEAD(table, row, at, mask, g, direction, MOMENTUM, NESTEROV, ALIGNED)
    uu, uw, ww = per_group(u * u, R, C, P), per_group(u * w, R, C, P), per_group(w * w, R, C, P)
    gg = per_group(g * g, R, C, P) if ADAPTIVE else uu
    return w, g, u, gg, uu, uw, ww


@triton.jit
def move_line(
    table, row, at, mask, w, u, shrink, shift, seed, draw,
    DTYPE: tl.constexpr, MASTER: tl.constexpr, STOCHASTIC: tl.constexpr,
    C: tl.constexpr, P: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """``w' = shrink w - shift u``; returns how many weights are zero now."""
    new = per_column(shrink, C, P) * w - per_column(shift, C, P) * u + 0.0
    stored = store_weight(table, row, at, mask, new, seed, draw + at, DTYPE, MASTER, STOCHASTIC, ALIGNED)
    gone = (stored == 0) & mask
    return tl.sum(tl.sum(gone.to(tl.float32), 1), 0)


@triton.jit
def reload_line(
    table, per_step, row, at, mask, direction, grad_factor,
    DTYPE: tl.constexpr, MASTER: tl.constexpr, ADAPTIVE: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Weight and update of a line whose moments have been advanced before."""
    w = load_weight(table, row, at, mask, DTYPE, MASTER, ALIGNED)
    if ADAPTIVE or MOMENTUM:
        u = load_f32(address(table, row, FIRST, tl.float32, ALIGNED), at, mask)
        if NESTEROV:
            g = load_grad(table, per_step, row, at, mask, w, grad_factor, 0.0, DTYPE, False, ALIGNED)
            u = g + direction.momentum * u
    else:
        u = load_grad(table, per_step, row, at, mask, w, grad_factor, 0.0, DTYPE, False, ALIGNED)
    return w, u
