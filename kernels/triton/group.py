"""Groups of weights of one parameter: survey, combine and move in one launch.

Tiles of R rows by C columns are surveyed and moved by one program where they fit; longer ones are cut into parts that
are surveyed by some programs and then moved by others.  Programs take their tasks in the order of a ticket and wait
only for tasks with earlier tickets, so there is no deadlock however few of them run at a time.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call, attr-defined"

from __future__ import annotations

import triton
import triton.language as tl

from symopt_kernels.triton.constants import LARGEST, SNAP, TINY, prepare
from symopt_kernels.triton.directions import advance_second
from symopt_kernels.triton.group_tiles import line_offsets, move_line, reload_line, survey_line
from symopt_kernels.triton.imbalance import finish
from symopt_kernels.triton.memory import (
    BEGIN,
    COUNT,
    COUNTERS,
    GROUPS,
    LAG,
    LINES,
    PARTS,
    ROWS,
    RUN,
    SCRATCH,
    TILES,
    field,
    field_i32,
)

__all__ = ["combine", "step_groups"]

NOISE = tl.constexpr(4e-6)


@triton.jit
def combine(
    table, row, at, mask, size, direction, constants, gg, uu, uw, ww,
    PEAK: tl.constexpr, ADAPTIVE: tl.constexpr, BUDGETED: tl.constexpr, COUPLED: tl.constexpr,
    SATURATED: tl.constexpr,
):  # fmt: skip
    """``reference.group`` from the four sums of each unit, whose second moment lies at ``at`` and is advanced.

    Returns shrink and shift of ``w' = shrink w - shift u``, the norm of w' where it counts for the imbalance, and its
    square.
    """
    lr, gain = constants.lr, 1.0
    if ADAPTIVE:
        p = advance_second(table, row, at, mask, gg / size, direction, PEAK, False)
        lr = lr * (p * direction.unbias1)
        gain = p if COUPLED else tl.sqrt(size)
    norm = tl.sqrt(ww)
    decay = constants.decay_kept + tl.zeros_like(ww)
    if BUDGETED:
        decay = tl.where(norm <= constants.threshold, constants.decay_pruned, constants.decay_kept)
    decay = decay * gain
    snaps = norm <= constants.snap_limit
    c, scale = constants.imbalance, constants.metric_scale
    metric, pull = tl.sqrt(c * c + 4 * ww), lr * tl.sqrt(uu)
    if SATURATED:
        t = 1 / tl.maximum(metric, tl.maximum(scale, decay + 2 * pull))
    else:
        t = 1 / tl.maximum(decay, 1.0)
    gate_sq, rho = (c + metric) / 2, 1 - t * decay
    shared = rho - t * lr * uw / tl.maximum(gate_sq, TINY)
    shrink, shift = shared * rho, shared * gate_sq * (t * lr)
    # A group must not snap because two large terms cancel to within their rounding.
    terms = shrink * shrink * ww + shift * shift * uu
    new_norm = tl.sqrt(tl.maximum(terms - 2 * shrink * shift * uw, terms * NOISE, propagate_nan=tl.PropagateNan.ALL))
    small = new_norm <= scale * SNAP
    snapped = small & (pull < decay) & snaps
    stays = small & (snaps == 0) & (new_norm < norm)  # what lives within a budget does not vanish
    new_norm = tl.where(stays, norm, new_norm)
    new_norm = tl.where((new_norm <= LARGEST) & (snapped == 0) & mask, new_norm, 0.0)
    shrink, shift = tl.where(stays, 1.0, shrink), tl.where(stays, 0.0, shift)
    shrink, shift = tl.where(snapped, 0.0, shrink), tl.where(snapped, 0.0, shift)
    return shrink, shift, new_norm, new_norm * new_norm


@triton.jit
def combine_tile(
    table, row, tile, direction, constants, gg, uu, uw, ww,
    PEAK: tl.constexpr, ADAPTIVE: tl.constexpr, BUDGETED: tl.constexpr, COUPLED: tl.constexpr,
    SATURATED: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """:func:`combine` of the groups of a tile; their norms and squares added up."""
    rows, groups, run = field_i32(table, row, ROWS), field_i32(table, row, GROUPS), field_i32(table, row, RUN)
    per_band = tl.cdiv(groups, G)
    group = (tile % per_band) * G + tl.arange(0, G)
    at = (tile // per_band) * groups + group
    size = (rows.to(tl.int64) * run).to(tl.float32)
    shrink, shift, norm, square = combine(
        table, row, at, group < groups, size, direction, constants, gg, uu, uw, ww,
        PEAK, ADAPTIVE, BUDGETED, COUPLED, SATURATED,
    )  # fmt: skip
    return shrink, shift, tl.sum(norm, 0), tl.sum(square, 0)


@triton.jit(do_not_specialize=["seed", "programs"])
def step_groups(
    table, per_step, owners, arrived, partial, zeros, ticket, scratch, counters, given, seed, programs,
    LEAD: tl.constexpr, DTYPE: tl.constexpr, MASTER: tl.constexpr, PEAK: tl.constexpr,
    ADAPTIVE: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr,
    BUDGETED: tl.constexpr, COUPLED: tl.constexpr, SATURATED: tl.constexpr, STOCHASTIC: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, P: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """See the module."""
    if given.found_inf is not None:  # noqa: SIM102 (Triton must not look at None)
        if tl.load(given.found_inf) != 0:
            return
    G: tl.constexpr = C // P
    program = tl.atomic_add(ticket, 1)
    if program == programs - 1:
        tl.store(ticket, 0)
    row = tl.load(owners + program)
    direction, constants, grad_factor = prepare(
        table, per_step, row, given, ADAPTIVE, MOMENTUM, True, False, MAXIMIZE, BUDGETED
    )
    task = program - field_i32(table, row, BEGIN)
    tiles, parts, lines = field_i32(table, row, TILES), field_i32(table, row, PARTS), field_i32(table, row, LINES)
    # Tiles are moved `lag` tiles after they are surveyed: survey 0 ... survey lag-1, move 0, survey lag, move 1, ...
    turn, part = task // parts, task % parts
    lag = field_i32(table, row, LAG)
    split = parts > 1
    later = turn - lag
    even, last = (later & 1) == 0, turn >= 2 * tiles - lag
    moves = split & (later >= 0) & (even | last)
    tile = tl.where(later < 0, turn, tl.where(last, turn - tiles, tl.where(even, later >> 1, lag + (later >> 1))))
    tile = tl.where(split, tile, task)
    per_part = (lines + parts - 1) // parts
    begin = tl.where(split, part * per_part, 0)
    end = tl.minimum(begin + per_part, lines)
    lane = tl.arange(0, G)
    counter = counters + field(table, row, COUNTERS) + tile
    sums = scratch + field(table, row, SCRATCH) + tile.to(tl.int64) * ((parts * 4 + 2) * G)
    combined = sums + parts * 4 * G + lane
    shrink, shift = tl.zeros((G,), tl.float32), tl.zeros((G,), tl.float32)
    size, square, gone = 0.0, 0.0, 0.0
    draw = row.to(tl.int64) << 36

    if lines == 1:  # everything stays in registers
        at, mask = line_offsets(table, row, tile, 0, DTYPE, R, C, P, ALIGNED)
        w, _, u, gg, uu, uw, ww = survey_line(
            table, per_step, row, at, mask, direction, grad_factor, LEAD, DTYPE, MASTER, ADAPTIVE, MOMENTUM, NESTEROV,
            R, C, P, ALIGNED,
        )  # fmt: skip
        shrink, shift, size, square = combine_tile(
            table, row, tile, direction, constants, gg, uu, uw, ww, PEAK, ADAPTIVE, BUDGETED, COUPLED, SATURATED, G
        )
        gone = move_line(
            table, row, at, mask, w, u, shrink, shift, seed, draw, DTYPE, MASTER, STOCHASTIC, C, P, ALIGNED
        )
    else:
        if moves == 0:
            gg, uu = tl.zeros((G,), tl.float32), tl.zeros((G,), tl.float32)
            uw, ww = tl.zeros((G,), tl.float32), tl.zeros((G,), tl.float32)
            for line in range(begin, end):
                at, mask = line_offsets(table, row, tile, line, DTYPE, R, C, P, ALIGNED)
                _, _, _, a, b, c, d = survey_line(
                    table, per_step, row, at, mask, direction, grad_factor, LEAD, DTYPE, MASTER, ADAPTIVE, MOMENTUM,
                    NESTEROV, R, C, P, ALIGNED,
                )  # fmt: skip
                gg, uu, uw, ww = gg + a, uu + b, uw + c, ww + d
            last_part = split == 0
            if split:
                own = sums + part * 4 * G + lane
                tl.store(own, gg)
                tl.store(own + G, uu)
                tl.store(own + 2 * G, uw)
                tl.store(own + 3 * G, ww)
                tl.debug_barrier()
                last_part = tl.atomic_add(counter, 1, sem="acq_rel") == parts - 1
                tl.debug_barrier()
                if last_part:  # in the order of the parts, whoever comes last
                    gg, uu = tl.zeros((G,), tl.float32), tl.zeros((G,), tl.float32)
                    uw, ww = tl.zeros((G,), tl.float32), tl.zeros((G,), tl.float32)
                    for i in range(0, parts):
                        one = sums + i * 4 * G + lane
                        gg += tl.load(one, cache_modifier=".cg")
                        uu += tl.load(one + G, cache_modifier=".cg")
                        uw += tl.load(one + 2 * G, cache_modifier=".cg")
                        ww += tl.load(one + 3 * G, cache_modifier=".cg")
            if last_part:
                shrink, shift, size, square = combine_tile(
                    table, row, tile, direction, constants, gg, uu, uw, ww,
                    PEAK, ADAPTIVE, BUDGETED, COUPLED, SATURATED, G,
                )  # fmt: skip
                if split:
                    tl.store(combined, shrink)
                    tl.store(combined + G, shift)
                    tl.debug_barrier()
                    tl.atomic_add(counter, 1, sem="release")
        if (moves != 0) | (split == 0):
            if split:
                while tl.load(counter, volatile=True) <= parts:
                    pass
                tl.atomic_add(counter, 0, sem="acquire")
                shrink = tl.load(combined, cache_modifier=".cg")
                shift = tl.load(combined + G, cache_modifier=".cg")
            tl.debug_barrier()  # moments written by other threads of this program
            for line in range(begin, end):
                at, mask = line_offsets(table, row, tile, line, DTYPE, R, C, P, ALIGNED)
                w, u = reload_line(
                    table, per_step, row, at, mask, direction, grad_factor,
                    DTYPE, MASTER, ADAPTIVE, MOMENTUM, NESTEROV, ALIGNED,
                )  # fmt: skip
                gone += move_line(
                    table, row, at, mask, w, u, shrink, shift, seed, draw, DTYPE, MASTER, STOCHASTIC, C, P, ALIGNED
                )
            if split:
                tl.debug_barrier()
                if tl.atomic_add(counter, 1, sem="acq_rel") == 2 * parts:
                    tl.store(counter, 0)

    tl.store(partial + program, size)
    tl.store(partial + programs + program, square)
    tl.store(partial + 2 * programs + program, gone)
    tl.debug_barrier()
    before = tl.atomic_add(arrived + row, 1, sem="acq_rel")
    if before == field_i32(table, row, COUNT) - 1:
        tl.debug_barrier()
        direction, constants, _ = prepare(  # anew, so that they need no registers until here
            table, per_step, row, given, ADAPTIVE, MOMENTUM, True, False, MAXIMIZE, BUDGETED
        )
        gain = 1.0
        if ADAPTIVE and not COUPLED:
            gain = tl.sqrt((field(table, row, ROWS) * field(table, row, RUN)).to(tl.float32))
        finish(
            table, row, partial, zeros, arrived, constants, direction, programs, gain,
            True, COUPLED, PEAK, ADAPTIVE, MOMENTUM, True, SATURATED,
        )  # fmt: skip
