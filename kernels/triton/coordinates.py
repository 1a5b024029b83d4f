"""The step of weights whose means over groups, or coordinates in a basis, vanish: ``reference.plane_step`` of those.

A coordinate is the sum over a group divided by the root of its size, or the inner product with a direction.  One launch
advances the moments and adds up (``survey_means``, ``survey_basis``); in the next, ``combine_coordinates``, the first
program of every plane finds from the sums what each coordinate changes by and whether the plane is reached; the last
moves the weights (``move_means``, ``move_basis``):

    w' = w - lr p u + add.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call, attr-defined"

from __future__ import annotations

import triton
import triton.language as tl

from symopt_kernels.triton.constants import LARGEST, SNAP, prepare
from symopt_kernels.triton.directions import advance_second
from symopt_kernels.triton.group_tiles import line_offsets, per_column, per_group, reload_line
from symopt_kernels.triton.imbalance import count_step, decay_imbalance
from symopt_kernels.triton.memory import (
    BEGIN,
    GROUPS,
    LINES,
    PARTS,
    PLACES,
    SCRATCH,
    TILES,
    WEIGHTS,
    address,
    field,
    field_i32,
    load_f32,
    load_grad,
    load_weight,
    store_weight,
)
from symopt_kernels.triton.orbit import ATTRACTS, GATE_NUMBERS, combine_gate, one_gate_step, with_combined_decay
from symopt_kernels.triton.orbit_places import block_offsets, owner

__all__ = ["combine_coordinates", "move_basis", "move_means", "part_of", "survey_basis", "survey_means"]

SUMMANDS = tl.constexpr(2048)  # partial sums that are added up at a time: with 4096 ptxas spills


@triton.jit
def sums_at(table, row, tile, part, G: tl.constexpr):
    """Where the four sums of a part lie, G numbers each."""
    parts = field(table, row, PARTS)
    return field(table, row, SCRATCH) + (tile * parts + part) * (4 * G)


@triton.jit
def coordinates_at(table, row, G: tl.constexpr):
    """Where three numbers of every coordinate lie: itself, its update and preconditioner; later what it adds."""
    return sums_at(table, row, field(table, row, TILES), 0, G)


@triton.jit
def coordinates(table, row, G: tl.constexpr):
    """How many there are."""
    groups = field_i32(table, row, GROUPS)
    return field_i32(table, row, TILES) // tl.cdiv(groups, G) * groups


@triton.jit
def part_of(table, row, program):
    """Tile, part, and the lines of a program."""
    task = program - field_i32(table, row, BEGIN)
    parts, lines = field_i32(table, row, PARTS), field_i32(table, row, LINES)
    per_part = (lines + parts - 1) // parts
    part = task % parts
    return task // parts, part, part * per_part, tl.minimum((part + 1) * per_part, lines)


@triton.jit
def basis_direction(table, row, main, j, at, mask, ALIGNED: tl.constexpr):
    """Weights' share of the j-th direction of the basis."""
    pitch = field(table, main, WEIGHTS)
    if ALIGNED:
        pitch = pitch // 4 * 4
    return load_f32(address(table, row, PLACES, tl.float32, ALIGNED), j * pitch + at, mask)


@triton.jit(do_not_specialize=["programs"])
def survey_means(
    table, per_step, owners, scratch, given, programs,
    LEAD: tl.constexpr, DTYPE: tl.constexpr, MASTER: tl.constexpr, ADAPTIVE: tl.constexpr, MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, P: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Moments of a part of a tile, and per group the sums of g^2, u, w and u^2."""
    if given.found_inf is not None:  # noqa: SIM102 (Triton must not look at None)
        if tl.load(given.found_inf) != 0:
            return
    G: tl.constexpr = C // P
    program = tl.program_id(0)
    row = tl.load(owners + program)
    direction, _, grad_factor = prepare(table, per_step, row, given, ADAPTIVE, MOMENTUM, True, False, MAXIMIZE, False)
    tile, part, begin, end = part_of(table, row, program)
    gg, us = tl.zeros((G,), tl.float32), tl.zeros((G,), tl.float32)
    ws, uu = tl.zeros((G,), tl.float32), tl.zeros((G,), tl.float32)
    for line in range(begin, end):
        at, mask = line_offsets(table, row, tile, line, DTYPE, R, C, P, ALIGNED)
        w = load_weight(table, row, at, mask, DTYPE, MASTER, ALIGNED)
        g = load_grad(table, per_step, row, at, mask, w, grad_factor, 0.0, DTYPE, False, ALIGNED)
        u = LEAD(table, row, at, mask, g, direction, MOMENTUM, NESTEROV, ALIGNED)
        if ADAPTIVE:
            gg += per_group(g * g, R, C, P)
        us, ws, uu = us + per_group(u, R, C, P), ws + per_group(w, R, C, P), uu + per_group(u * u, R, C, P)
    own = scratch + sums_at(table, row, tile, part, G) + tl.arange(0, G)
    tl.store(own, gg)
    tl.store(own + G, us)
    tl.store(own + 2 * G, ws)
    tl.store(own + 3 * G, uu)


@triton.jit(do_not_specialize=["programs"])
def survey_basis(
    table, per_step, owners, scratch, given, programs,
    LEAD: tl.constexpr, DTYPE: tl.constexpr, MASTER: tl.constexpr, ADAPTIVE: tl.constexpr, MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Moments of some blocks, the sums of g^2 and u^2, and per direction the coordinates of u and w."""
    if given.found_inf is not None:  # noqa: SIM102 (Triton must not look at None)
        if tl.load(given.found_inf) != 0:
            return
    program = tl.program_id(0)
    row, main = owner(table, owners, program, True)
    direction, _, grad_factor = prepare(table, per_step, main, given, ADAPTIVE, MOMENTUM, True, False, MAXIMIZE, False)
    lane, columns, lines = tl.arange(0, G), field_i32(table, main, GROUPS), field_i32(table, main, LINES)
    first = (program - field_i32(table, row, BEGIN)) * lines
    us, ws = tl.zeros((G,), tl.float32), tl.zeros((G,), tl.float32)
    gg, uu = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for line in range(0, lines):
        at, mask = block_offsets(table, row, first + line, DTYPE, BLOCK, ALIGNED)
        w = load_weight(table, row, at, mask, DTYPE, MASTER, ALIGNED)
        g = load_grad(table, per_step, row, at, mask, w, grad_factor, 0.0, DTYPE, False, ALIGNED)
        u = LEAD(table, row, at, mask, g, direction, MOMENTUM, NESTEROV, ALIGNED)
        if ADAPTIVE:
            gg += g * g
        uu += u * u
        for j in range(0, columns):
            o = basis_direction(table, row, main, j, at, mask, ALIGNED)
            us += tl.where(lane == j, tl.sum(o * u, 0), 0.0)
            ws += tl.where(lane == j, tl.sum(o * w, 0), 0.0)
    own = scratch + sums_at(table, main, 0, program - field_i32(table, main, BEGIN), G) + lane
    tl.store(own, tl.where(lane == 0, tl.sum(gg, 0), 0.0))
    tl.store(own + G, us)
    tl.store(own + 2 * G, ws)
    tl.store(own + 3 * G, tl.where(lane == 0, tl.sum(uu, 0), 0.0))


@triton.jit
def add_parts(scratch, own, mask, parts, WHICH: tl.constexpr, G: tl.constexpr, Q: tl.constexpr):
    """One of the sums of some coordinates over all parts, always in one order."""
    q = tl.arange(0, Q)
    found = tl.zeros((SUMMANDS // Q,), tl.float32)
    for i in range(0, parts, Q):
        at = own[:, None] + ((i + q).to(tl.int64) * (4 * G) + WHICH * G)[None, :]
        some = mask[:, None] & (i + q < parts)[None, :]
        found += tl.sum(tl.load(scratch + at, mask=some, other=0.0), 1)
    return found


@triton.jit
def gate_change(found, gate, j, number, COUPLED: tl.constexpr):
    """Coordinates, their updates and preconditioners, and what the gate changes of them."""
    mask = j < number
    z, d = tl.load(found + j, mask=mask, other=0.0), tl.load(found + number + j, mask=mask, other=0.0)
    p = tl.load(found + 2 * number + j, mask=mask, other=0.0)
    step = one_gate_step(gate, 0.0, p, COUPLED)
    return z, d, p, step.shrink_less_one * z - step.shift * d


@triton.jit(do_not_specialize=["programs"])
def combine_coordinates(
    table, per_step, owners, arrived, gates, scratch, given, programs,
    PEAK: tl.constexpr, ADAPTIVE: tl.constexpr, MOMENTUM: tl.constexpr, DECOUPLED: tl.constexpr,
    COUPLED: tl.constexpr, MAXIMIZE: tl.constexpr, SATURATED: tl.constexpr, AUTOMATIC: tl.constexpr,
    BASIS: tl.constexpr, G: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """Second moments, the gate, what every coordinate changes by; the imbalance and the step count."""
    if given.found_inf is not None:  # noqa: SIM102 (Triton must not look at None)
        if tl.load(given.found_inf) != 0:
            return
    program = tl.program_id(0)
    _, main = owner(table, owners, program, BASIS)
    if program != field_i32(table, main, BEGIN):
        return
    LANES: tl.constexpr = SUMMANDS // Q
    direction, constants, _ = prepare(
        table, per_step, main, given, ADAPTIVE, MOMENTUM, True, DECOUPLED, MAXIMIZE, False
    )
    gate, parts = gates + main * GATE_NUMBERS, field_i32(table, main, PARTS)
    groups, number = field_i32(table, main, GROUPS), coordinates(table, main, G)
    per_band, weights = tl.cdiv(groups, G), field(table, main, WEIGHTS).to(tl.float32)
    size = weights if BASIS else weights / number  # weights that share a second moment
    root = 1.0 if BASIS else 1 / tl.sqrt(size)
    lane, found = tl.arange(0, LANES), scratch + coordinates_at(table, main, G)
    all_uu, inverse_preconditioners, ww, uu, uw, dd, dw = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    common = 1.0
    if BASIS:
        one = lane == 0
        own = field(table, main, SCRATCH) + lane * 0
        if ADAPTIVE:
            square = add_parts(scratch, own, one, parts, 0, G, Q) / size
            p = advance_second(table, main, lane, one, square, direction, PEAK, False)
            common = tl.sum(tl.where(one, p, 0.0), 0)
        inverse_preconditioners = weights / common
    for base in range(0, number, LANES):
        j = base + lane
        mask = j < number
        group = j % groups
        tile = (j // groups) * per_band + group // G
        own = sums_at(table, main, tile.to(tl.int64), 0, G) + group % G
        d = add_parts(scratch, own, mask, parts, 1, G, Q) * root
        z = add_parts(scratch, own, mask, parts, 2, G, Q) * root
        all_uu += tl.sum(add_parts(scratch, own, mask, parts, 3, G, Q), 0)
        p = common + tl.zeros((LANES,), tl.float32)
        if ADAPTIVE and not BASIS:
            square = add_parts(scratch, own, mask, parts, 0, G, Q) / size
            p = advance_second(table, main, j, mask, square, direction, PEAK, False)
            inverse_preconditioners += tl.sum(tl.where(mask, size / p, 0.0), 0)
        p = tl.where(mask, p, 0.0)
        ww, uu, uw = ww + tl.sum(z * z, 0), uu + tl.sum(d * d, 0), uw + tl.sum(z * d, 0)
        dd, dw = dd + tl.sum(p * p * d * d, 0), dw + tl.sum(p * d * z, 0)
        tl.store(found + j, z, mask=mask)
        tl.store(found + number + j, d, mask=mask)
        tl.store(found + 2 * number + j, p, mask=mask)
    combine_gate(
        table, main, gate, direction, constants, given.amplify, all_uu, ww, uu, uw, dd, dw, inverse_preconditioners,
        AUTOMATIC, DECOUPLED, COUPLED, SATURATED,
    )  # fmt: skip
    tl.debug_barrier()  # what other threads of this program have written
    constants = with_combined_decay(gate, constants)
    square = 0.0
    for base in range(0, number, LANES):
        z, d, p, change = gate_change(found, gate, base + lane, number, COUPLED)
        square += tl.sum((z + change) * (z + change), 0)
    total = tl.sqrt(square)
    gone = (total <= constants.metric_scale * SNAP) & (tl.load(gate + ATTRACTS) != 0)
    for base in range(0, number, LANES):
        j = base + lane
        z, d, p, change = gate_change(found, gate, j, number, COUPLED)
        step_scale = constants.lr * direction.unbias1 * p
        tl.store(found + j, (step_scale * d + tl.where(gone, -z, change)) * root, mask=j < number)
        tl.store(found + 2 * number + j, step_scale, mask=j < number)
    counts = (total <= LARGEST) & (gone == 0)
    total, square = tl.where(counts, total, 0.0), tl.where(counts, square, 0.0)
    decay_imbalance(table, main, constants, direction, 1.0, total, square, COUPLED, PEAK, SATURATED)
    count_step(table, main, arrived, direction, ADAPTIVE, MOMENTUM)


@triton.jit(do_not_specialize=["programs"])
def move_means(
    table, per_step, owners, scratch, given, programs,
    DTYPE: tl.constexpr, MASTER: tl.constexpr, ADAPTIVE: tl.constexpr, MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, P: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Every weight by what the coordinate of its group adds."""
    if given.found_inf is not None:  # noqa: SIM102 (Triton must not look at None)
        if tl.load(given.found_inf) != 0:
            return
    G: tl.constexpr = C // P
    program = tl.program_id(0)
    row = tl.load(owners + program)
    direction, _, grad_factor = prepare(table, per_step, row, given, ADAPTIVE, MOMENTUM, True, False, MAXIMIZE, False)
    tile, _, begin, end = part_of(table, row, program)
    groups = field_i32(table, row, GROUPS)
    per_band = tl.cdiv(groups, G)
    group = (tile % per_band) * G + tl.arange(0, G)
    own = scratch + coordinates_at(table, row, G) + (tile // per_band).to(tl.int64) * groups + group
    add = tl.load(own, mask=group < groups, other=0.0)
    step_scale = tl.load(own + 2 * coordinates(table, row, G), mask=group < groups, other=0.0)
    for line in range(begin, end):
        at, mask = line_offsets(table, row, tile, line, DTYPE, R, C, P, ALIGNED)
        w, u = reload_line(
            table, per_step, row, at, mask, direction, grad_factor, DTYPE, MASTER, ADAPTIVE, MOMENTUM, NESTEROV, ALIGNED
        )
        new = w - per_column(step_scale, C, P) * u + per_column(add, C, P)
        store_weight(table, row, at, mask, new, 0, 0, DTYPE, MASTER, False, ALIGNED)


@triton.jit(do_not_specialize=["programs"])
def move_basis(
    table, per_step, owners, scratch, given, programs,
    DTYPE: tl.constexpr, MASTER: tl.constexpr, ADAPTIVE: tl.constexpr, MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Every weight, along all directions."""
    if given.found_inf is not None:  # noqa: SIM102 (Triton must not look at None)
        if tl.load(given.found_inf) != 0:
            return
    program = tl.program_id(0)
    row, main = owner(table, owners, program, True)
    direction, _, grad_factor = prepare(table, per_step, main, given, ADAPTIVE, MOMENTUM, True, False, MAXIMIZE, False)
    columns, lines = field_i32(table, main, GROUPS), field_i32(table, main, LINES)
    first = (program - field_i32(table, row, BEGIN)) * lines
    found = scratch + coordinates_at(table, main, G)
    step_scale = tl.load(found + 2 * columns)
    for line in range(0, lines):
        at, mask = block_offsets(table, row, first + line, DTYPE, BLOCK, ALIGNED)
        w, u = reload_line(
            table, per_step, row, at, mask, direction, grad_factor, DTYPE, MASTER, ADAPTIVE, MOMENTUM, NESTEROV, ALIGNED
        )
        new = w - step_scale * u
        for j in range(0, columns):
            new += tl.load(found + j) * basis_direction(table, row, main, j, at, mask, ALIGNED)
        store_weight(table, row, at, mask, new, 0, 0, DTYPE, MASTER, False, ALIGNED)
