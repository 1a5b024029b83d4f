"""Units that span several parameters: survey, combine and move as launches of their own (``reference.units``).

``survey_units`` advances the first moments and adds up, per slice of each parameter and in the tiles of groups, what
``combine_units`` then adds up per unit: parameters in their order, slices in theirs, parts of a slice in theirs, so
that equal inputs give equal bits.  ``move_units`` applies the two numbers of every unit.  Slices of another tile shape
are surveyed and moved by launches of their own.  Weights without a unit take the plain step in ``survey_units``.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call, attr-defined"

from __future__ import annotations

import triton
import triton.language as tl

from symopt_kernels.triton.constants import prepare
from symopt_kernels.triton.coordinates import part_of
from symopt_kernels.triton.directions import advance_second
from symopt_kernels.triton.group import combine
from symopt_kernels.triton.group_tiles import line_offsets, per_column, reload_line, survey_line
from symopt_kernels.triton.imbalance import count_step, count_zeros, decay_imbalance, reduce_partial
from symopt_kernels.triton.memory import (
    COMBINE_BEGIN,
    COMBINE_COUNT,
    COUNT,
    FACTOR_SQUARED,
    FIRST_UNBOUND,
    GROUPS,
    LAW_GAIN,
    MAIN,
    PARAMETERS,
    PARTS,
    RUN,
    SCRATCH,
    UNBOUND_SLICES,
    UNIT_BEGINS,
    UNIT_OF,
    UNIT_SIZES,
    UNIT_SLICES,
    UNIT_SUMS,
    UNITS,
    address,
    field,
    field_f32,
    field_i32,
    store_weight,
)

__all__ = ["combine_units", "move_units", "survey_units"]


@triton.jit
def slices_of(table, row, tile, G: tl.constexpr):
    """Slices of a tile, which of them exist, and their units; below zero: -1 - the place among those without one."""
    groups = field_i32(table, row, GROUPS)
    slices = tile * G + tl.arange(0, G)
    mask = slices < groups
    return slices, mask, tl.load(address(table, row, UNIT_OF, tl.int32, False) + slices, mask=mask, other=0)


@triton.jit
def unbound_moments(table, row, tile, line, unit, R: tl.constexpr, C: tl.constexpr, P: tl.constexpr):
    """Where the second moments of the unbound weights of a line lie: row-major, without the slices that are bound."""
    run = field_i32(table, row, RUN)
    chunks = tl.cdiv(run, P)
    down = (line // chunks) * R + tl.arange(0, R)
    inner = (line % chunks) * P + tl.arange(0, C) % P
    slices = down.to(tl.int64)[:, None] * field(table, row, UNBOUND_SLICES) + per_column(-1 - unit, C, P)
    return field(table, row, FIRST_UNBOUND) + slices * run + inner[None, :]


@triton.jit(do_not_specialize=["seed", "programs"])
def survey_units(
    table, per_step, owners, scratch, given, seed, programs,
    LEAD: tl.constexpr, DTYPE: tl.constexpr, MASTER: tl.constexpr, PEAK: tl.constexpr, ADAPTIVE: tl.constexpr,
    MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr, STOCHASTIC: tl.constexpr,
    UNBOUND: tl.constexpr, R: tl.constexpr, C: tl.constexpr, P: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """First moments, four sums per slice and part of a tile, and the whole step of weights without a unit."""
    if given.found_inf is not None:  # noqa: SIM102 (Triton must not look at None)
        if tl.load(given.found_inf) != 0:
            return
    G: tl.constexpr = C // P
    program = tl.program_id(0)
    row = tl.load(owners + program)
    main = field_i32(table, row, MAIN)
    direction, constants, grad_factor = prepare(
        table, per_step, main, given, ADAPTIVE, MOMENTUM, True, False, MAXIMIZE, False
    )
    tile, part, begin, end = part_of(table, row, program)
    slices, exists, unit = slices_of(table, row, tile, G)
    gg, uu = tl.zeros((G,), tl.float32), tl.zeros((G,), tl.float32)
    uw, ww = tl.zeros((G,), tl.float32), tl.zeros((G,), tl.float32)
    for line in range(begin, end):
        at, mask = line_offsets(table, row, tile, line, DTYPE, R, C, P, ALIGNED)
        w, g, u, a, b, c, d = survey_line(
            table, per_step, row, at, mask, direction, grad_factor, LEAD, DTYPE, MASTER, ADAPTIVE, MOMENTUM, NESTEROV,
            R, C, P, ALIGNED,
        )  # fmt: skip
        gg, uu, uw, ww = gg + a, uu + b, uw + c, ww + d
        if UNBOUND:
            unbound = mask & (per_column(unit, C, P) < 0)
            update = u
            if ADAPTIVE:
                moment = unbound_moments(table, row, tile, line, unit, R, C, P)
                gain = advance_second(table, main, moment, unbound, g * g, direction, PEAK, False)
                update = gain * (u * direction.unbias1)
            new = w - constants.lr * update
            draw = row.to(tl.int64) << 36
            store_weight(table, row, at, unbound, new, seed, draw + at, DTYPE, MASTER, STOCHASTIC, ALIGNED)
    groups = field(table, row, GROUPS)
    own = scratch + field(table, row, SCRATCH) + part * 4 * groups + slices
    tl.store(own, gg, mask=exists)
    tl.store(own + groups, uu, mask=exists)
    tl.store(own + 2 * groups, uw, mask=exists)
    tl.store(own + 3 * groups, ww, mask=exists)


@triton.jit
def add_slices(table, main, unit, mask, scratch, LANES: tl.constexpr):
    """The four sums of every unit over its slices in all parameters, always in one order."""
    gg, uu = tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32)
    uw, ww = tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32)
    for k in range(0, field_i32(table, main, PARAMETERS)):
        row = main + k
        begins = address(table, row, UNIT_BEGINS, tl.int32, False) + unit
        begin, end = tl.load(begins, mask=mask, other=0), tl.load(begins + 1, mask=mask, other=0)
        groups, parts = field(table, row, GROUPS), field_i32(table, row, PARTS)
        own = scratch + field(table, row, SCRATCH)
        a, b = tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32)
        c, d = tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32)
        for j in range(0, tl.max(end - begin, 0)):
            some = begin + j < end
            slices = address(table, row, UNIT_SLICES, tl.int32, False) + begin + j
            at = own + tl.load(slices, mask=some, other=0)
            for i in range(0, parts):
                one = at + i * 4 * groups
                a += tl.load(one, mask=some, other=0.0)
                b += tl.load(one + groups, mask=some, other=0.0)
                c += tl.load(one + 2 * groups, mask=some, other=0.0)
                d += tl.load(one + 3 * groups, mask=some, other=0.0)
        square = field_f32(table, row, FACTOR_SQUARED)
        gg, uu, uw, ww = gg + square * a, uu + square * b, uw + c, ww + d / square
    return gg, uu, uw, ww


@triton.jit(do_not_specialize=["programs"])
def combine_units(
    table, per_step, owners, arrived, partial, scratch, given, programs,
    PEAK: tl.constexpr, ADAPTIVE: tl.constexpr, MOMENTUM: tl.constexpr, MAXIMIZE: tl.constexpr,
    BUDGETED: tl.constexpr, COUPLED: tl.constexpr, SATURATED: tl.constexpr,
    ADD: tl.constexpr, DECIDE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Sums of LANES units (``ADD``); second moments, shrink and shift from them, imbalance and step count (``DECIDE``).

    Between two launches that do one each, somebody else may reduce the sums over processes.
    """
    if given.found_inf is not None:  # noqa: SIM102 (Triton must not look at None)
        if tl.load(given.found_inf) != 0:
            return
    program = tl.program_id(0)
    main = tl.load(owners + program)
    units = field_i32(table, main, UNITS)
    unit = (program - field_i32(table, main, COMBINE_BEGIN)) * LANES + tl.arange(0, LANES)
    mask = unit < units
    sums = scratch + field(table, main, UNIT_SUMS) + unit
    if ADD:
        gg, uu, uw, ww = add_slices(table, main, unit, mask, scratch, LANES)
    else:
        gg, uu = tl.load(sums, mask=mask, other=0.0), tl.load(sums + units, mask=mask, other=0.0)
        uw, ww = tl.load(sums + 2 * units, mask=mask, other=0.0), tl.load(sums + 3 * units, mask=mask, other=0.0)
    if not DECIDE:
        tl.store(sums, gg, mask=mask)
        tl.store(sums + units, uu, mask=mask)
        tl.store(sums + 2 * units, uw, mask=mask)
        tl.store(sums + 3 * units, ww, mask=mask)
    else:
        direction, constants, _ = prepare(
            table, per_step, main, given, ADAPTIVE, MOMENTUM, True, False, MAXIMIZE, BUDGETED
        )
        size = tl.load(address(table, main, UNIT_SIZES, tl.float32, False) + unit, mask=mask, other=1.0)
        shrink, shift, norms, squares = combine(
            table, main, unit, mask, size, direction, constants, gg, uu, uw, ww,
            PEAK, ADAPTIVE, BUDGETED, COUPLED, SATURATED,
        )  # fmt: skip
        tl.store(sums + 4 * units, shrink, mask=mask)
        tl.store(sums + 5 * units, shift, mask=mask)
        tl.store(partial + program, tl.sum(norms, 0))
        tl.store(partial + programs + program, tl.sum(squares, 0))
        tl.debug_barrier()
        before = tl.atomic_add(arrived + main, 1, sem="acq_rel")
        begin, count = field_i32(table, main, COMBINE_BEGIN), field_i32(table, main, COMBINE_COUNT)
        if before == count - 1:
            tl.debug_barrier()
            total, square = reduce_partial(partial, begin, count), reduce_partial(partial + programs, begin, count)
            gain = 1.0
            if ADAPTIVE and not COUPLED:
                gain = field_f32(table, main, LAW_GAIN)
            decay_imbalance(table, main, constants, direction, gain, total, square, COUPLED, PEAK, SATURATED)
            count_step(table, main, arrived, direction, ADAPTIVE, MOMENTUM)


@triton.jit(do_not_specialize=["seed", "programs"])
def move_units(
    table, per_step, owners, arrived, partial, zeros, scratch, given, seed, programs,
    DTYPE: tl.constexpr, MASTER: tl.constexpr, ADAPTIVE: tl.constexpr, MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr, STOCHASTIC: tl.constexpr, UNBOUND: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, P: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """``w' = shrink w - shift a**2 u`` of every weight that has a unit; zeros of all."""
    if given.found_inf is not None:  # noqa: SIM102 (Triton must not look at None)
        if tl.load(given.found_inf) != 0:
            return
    G: tl.constexpr = C // P
    program = tl.program_id(0)
    row = tl.load(owners + program)
    main = field_i32(table, row, MAIN)
    direction, _, grad_factor = prepare(table, per_step, main, given, ADAPTIVE, MOMENTUM, True, False, MAXIMIZE, False)
    tile, _, begin, end = part_of(table, row, program)
    _, exists, unit = slices_of(table, row, tile, G)
    bound = exists & (unit >= 0)
    units = field_i32(table, main, UNITS)
    combined = scratch + field(table, main, UNIT_SUMS) + 4 * units + unit
    shrink = tl.load(combined, mask=bound, other=1.0)
    shift = tl.load(combined + units, mask=bound, other=0.0) * field_f32(table, row, FACTOR_SQUARED)
    draw = row.to(tl.int64) << 36
    gone = 0.0
    for line in range(begin, end):
        at, mask = line_offsets(table, row, tile, line, DTYPE, R, C, P, ALIGNED)
        w, u = reload_line(
            table, per_step, row, at, mask, direction, grad_factor, DTYPE, MASTER, ADAPTIVE, MOMENTUM, NESTEROV, ALIGNED
        )
        new = per_column(shrink, C, P) * w - per_column(shift, C, P) * u + 0.0
        moved = mask
        if UNBOUND:
            moved = mask & (per_column(unit, C, P) >= 0)
            new = tl.where(moved, new, w)
        stored = store_weight(table, row, at, moved, new, seed, draw + at, DTYPE, MASTER, STOCHASTIC, ALIGNED)
        zero = (stored == 0) & mask
        gone += tl.sum(tl.sum(zero.to(tl.float32), 1), 0)
    tl.store(partial + program, gone)
    tl.debug_barrier()
    before = tl.atomic_add(arrived + row, 1, sem="acq_rel")
    if before == field_i32(table, row, COUNT) - 1:
        tl.debug_barrier()
        count_zeros(table, row, partial, zeros)
        tl.store(arrived + row, 0)
