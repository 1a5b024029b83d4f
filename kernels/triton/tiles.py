"""Tiles of groups: where they lie, their sums, their moves."""

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
    get,
    load_grad,
    load_weight,
    narrow,
    store_weight,
)

__all__ = ["move", "place", "recall", "total_up"]


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
def place(
    table, entry, unit, line, DTYPE: tl.constexpr, R: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Offsets of a line of a unit, and which of them exist."""
    rows, groups, run = narrow(table, entry, ROWS), narrow(table, entry, GROUPS), narrow(table, entry, RUN)
    G: tl.constexpr = C // P
    per_band = tl.cdiv(groups, G)
    band, group = unit // per_band, (unit % per_band) * G
    chunks = tl.cdiv(run, P)
    row, member = (line // chunks) * R, (line % chunks) * P
    if ALIGNED:  # the compiler sees what the host has checked; hints would be lost where functions are inlined
        wide: tl.constexpr = 128 // DTYPE.primitive_bitwidth
        if P == 1:
            groups = groups // wide * wide
        else:
            run = run // wide * wide
    column, down = tl.arange(0, C), row + tl.arange(0, R)
    mine, inner = group + column // P, member + column % P
    mask = (down < rows)[:, None] & ((mine < groups) & (inner < run))[None, :]
    pitch = groups.to(tl.int64) * run
    across = mine if P == 1 else (group.to(tl.int64) + column // P) * run + inner
    at = (band.to(tl.int64) * rows + down)[:, None] * pitch + across[None, :]
    return at, mask


@triton.jit
def total_up(
    table, live, entry, at, mask, numbers, factor,
    LEAD: tl.constexpr, DTYPE: tl.constexpr, MASTER: tl.constexpr, ADAPTIVE: tl.constexpr, MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr, R: tl.constexpr, C: tl.constexpr, P: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Advance the moments of a line; return weight, update (up to a factor per group) and their four sums."""
    w = load_weight(table, entry, at, mask, DTYPE, MASTER, ALIGNED)
    g = load_grad(table, live, entry, at, mask, w, factor, 0.0, DTYPE, False, ALIGNED)
    u = LEAD(table, entry, at, mask, g, numbers, MOMENTUM, NESTEROV, ALIGNED)
    uu, uw, ww = per_group(u * u, R, C, P), per_group(u * w, R, C, P), per_group(w * w, R, C, P)
    gg = per_group(g * g, R, C, P) if ADAPTIVE else uu
    return w, u, gg, uu, uw, ww


@triton.jit
def move(
    table, entry, at, mask, w, u, keep, shift, seed, number,
    DTYPE: tl.constexpr, MASTER: tl.constexpr, STOCHASTIC: tl.constexpr,
    C: tl.constexpr, P: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """``w' = keep w - shift u``; returns how many weights are zero now."""
    new = per_column(keep, C, P) * w - per_column(shift, C, P) * u + 0.0
    stored = store_weight(table, entry, at, mask, new, seed, number + at, DTYPE, MASTER, STOCHASTIC, ALIGNED)
    gone = (stored == 0) & mask
    return tl.sum(tl.sum(gone.to(tl.float32), 1), 0)


@triton.jit
def recall(
    table, live, entry, at, mask, numbers, factor,
    DTYPE: tl.constexpr, MASTER: tl.constexpr, ADAPTIVE: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Weight and update of a line whose moments have been advanced before."""
    w = load_weight(table, entry, at, mask, DTYPE, MASTER, ALIGNED)
    if ADAPTIVE or MOMENTUM:
        u = get(address(table, entry, FIRST, tl.float32, ALIGNED), at, mask)
        if NESTEROV:
            u = load_grad(table, live, entry, at, mask, w, factor, 0.0, DTYPE, False, ALIGNED) + numbers[0] * u
    else:
        u = load_grad(table, live, entry, at, mask, w, factor, 0.0, DTYPE, False, ALIGNED)
    return w, u
