"""The step of weights whose means over groups, or coordinates in a basis, vanish: ``mirror.mirror`` of those numbers.

A coordinate is the sum over a group divided by the root of its size, or the inner product with a direction.  One launch
advances the moments and sums (``reduce_groups``, ``reduce_basis``); in the next, ``settle``, the first program of every
plane decides from the sums what each coordinate changes by and whether the plane is reached; the last moves the weights
(``shift_groups``, ``shift_basis``):

    w' = w - lr p u + add.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call, attr-defined"

from __future__ import annotations

import triton
import triton.language as tl

from symopt_kernels.triton.directions import shared_gain
from symopt_kernels.triton.imbalance import count_step, decay_imbalance, settings
from symopt_kernels.triton.memory import (
    BEGIN,
    GROUPS,
    LINES,
    PARTS,
    PLACES,
    ROOM,
    SNAP,
    UNITS,
    WEIGHTS,
    address,
    field,
    get,
    load_grad,
    load_weight,
    narrow,
    store_weight,
)
from symopt_kernels.triton.orbit import ATTRACTS, decided, one_gate, weigh
from symopt_kernels.triton.orbit_places import block, owner
from symopt_kernels.triton.table import GATE as _GATE
from symopt_kernels.triton.tiles import per_column, per_group, place, recall

__all__ = ["reduce_basis", "reduce_groups", "settle", "shift_basis", "shift_groups"]

GATE = tl.constexpr(_GATE)
LARGEST = tl.constexpr(3.4028234663852886e38)
ENTRIES = tl.constexpr(2048)  # partial sums that are added up at a time: with 4096 ptxas spills


@triton.jit
def sums_at(table, entry, unit, part, G: tl.constexpr):
    """Where the four sums of a part lie, G numbers each."""
    parts = field(table, entry, PARTS)
    return field(table, entry, ROOM) + (unit * parts + part) * (4 * G)


@triton.jit
def moves_at(table, entry, G: tl.constexpr):
    """Where three numbers of every coordinate lie: first itself, its update and preconditioner, then what it adds."""
    return sums_at(table, entry, field(table, entry, UNITS), 0, G)


@triton.jit
def coordinates(table, entry, G: tl.constexpr):
    """How many there are."""
    groups = narrow(table, entry, GROUPS)
    return narrow(table, entry, UNITS) // tl.cdiv(groups, G) * groups


@triton.jit
def lines_of(table, entry, program):
    """Tile, part, and the lines of a program."""
    task = program - narrow(table, entry, BEGIN)
    parts, lines = narrow(table, entry, PARTS), narrow(table, entry, LINES)
    per_part = (lines + parts - 1) // parts
    part = task % parts
    return task // parts, part, part * per_part, tl.minimum((part + 1) * per_part, lines)


@triton.jit
def direction(table, row, entry, j, at, mask, ALIGNED: tl.constexpr):
    """Weights' share of the j-th direction of the basis."""
    pitch = field(table, entry, WEIGHTS)
    if ALIGNED:
        pitch = pitch // 4 * 4
    return get(address(table, row, PLACES, tl.float32, ALIGNED), j * pitch + at, mask)


@triton.jit(do_not_specialize=["programs"])
def reduce_groups(
    table, live, owners, room, lr_at, found_inf, grad_scale,
    lr, fresh1, beta2, fresh2, log1, log2, eps, momentum, undamped, amplify, imbalance_factor, programs,
    LEAD: tl.constexpr, DTYPE: tl.constexpr, MASTER: tl.constexpr, ADAPTIVE: tl.constexpr, MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, P: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Moments of a part of a tile, and per group the sums of g^2, u, w and u^2."""
    if found_inf is not None:  # noqa: SIM102 (Triton must not look at None)
        if tl.load(found_inf) != 0:
            return
    G: tl.constexpr = C // P
    program = tl.program_id(0)
    entry = tl.load(owners + program)
    numbers, _, factor = settings(
        table, live, entry, lr_at, grad_scale,
        lr, fresh1, beta2, fresh2, log1, log2, eps, momentum, undamped, amplify, 0.0, imbalance_factor,
        ADAPTIVE, MOMENTUM, True, False, MAXIMIZE, False,
    )  # fmt: skip
    unit, part, begin, end = lines_of(table, entry, program)
    gg, us = tl.zeros((G,), tl.float32), tl.zeros((G,), tl.float32)
    ws, uu = tl.zeros((G,), tl.float32), tl.zeros((G,), tl.float32)
    for line in range(begin, end):
        at, mask = place(table, entry, unit, line, DTYPE, R, C, P, ALIGNED)
        w = load_weight(table, entry, at, mask, DTYPE, MASTER, ALIGNED)
        g = load_grad(table, live, entry, at, mask, w, factor, 0.0, DTYPE, False, ALIGNED)
        u = LEAD(table, entry, at, mask, g, numbers, MOMENTUM, NESTEROV, ALIGNED)
        if ADAPTIVE:
            gg += per_group(g * g, R, C, P)
        us, ws, uu = us + per_group(u, R, C, P), ws + per_group(w, R, C, P), uu + per_group(u * u, R, C, P)
    own = room + sums_at(table, entry, unit, part, G) + tl.arange(0, G)
    tl.store(own, gg)
    tl.store(own + G, us)
    tl.store(own + 2 * G, ws)
    tl.store(own + 3 * G, uu)


@triton.jit(do_not_specialize=["programs"])
def reduce_basis(
    table, live, owners, room, lr_at, found_inf, grad_scale,
    lr, fresh1, beta2, fresh2, log1, log2, eps, momentum, undamped, amplify, imbalance_factor, programs,
    LEAD: tl.constexpr, DTYPE: tl.constexpr, MASTER: tl.constexpr, ADAPTIVE: tl.constexpr, MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Moments of some blocks, the sums of g^2 and u^2, and per direction the coordinates of u and w."""
    if found_inf is not None:  # noqa: SIM102 (Triton must not look at None)
        if tl.load(found_inf) != 0:
            return
    program = tl.program_id(0)
    row, entry = owner(table, owners, program, True)
    numbers, _, factor = settings(
        table, live, entry, lr_at, grad_scale,
        lr, fresh1, beta2, fresh2, log1, log2, eps, momentum, undamped, amplify, 0.0, imbalance_factor,
        ADAPTIVE, MOMENTUM, True, False, MAXIMIZE, False,
    )  # fmt: skip
    lane, columns, lines = tl.arange(0, G), narrow(table, entry, GROUPS), narrow(table, entry, LINES)
    first = (program - narrow(table, row, BEGIN)) * lines
    us, ws = tl.zeros((G,), tl.float32), tl.zeros((G,), tl.float32)
    gg, uu = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for line in range(0, lines):
        at, mask = block(table, row, first + line, DTYPE, BLOCK, ALIGNED)
        w = load_weight(table, row, at, mask, DTYPE, MASTER, ALIGNED)
        g = load_grad(table, live, row, at, mask, w, factor, 0.0, DTYPE, False, ALIGNED)
        u = LEAD(table, row, at, mask, g, numbers, MOMENTUM, NESTEROV, ALIGNED)
        if ADAPTIVE:
            gg += g * g
        uu += u * u
        for j in range(0, columns):
            o = direction(table, row, entry, j, at, mask, ALIGNED)
            us += tl.where(lane == j, tl.sum(o * u, 0), 0.0)
            ws += tl.where(lane == j, tl.sum(o * w, 0), 0.0)
    own = room + sums_at(table, entry, 0, program - narrow(table, entry, BEGIN), G) + lane
    tl.store(own, tl.where(lane == 0, tl.sum(gg, 0), 0.0))
    tl.store(own + G, us)
    tl.store(own + 2 * G, ws)
    tl.store(own + 3 * G, tl.where(lane == 0, tl.sum(uu, 0), 0.0))


@triton.jit
def total(room, own, mask, parts, which: tl.constexpr, G: tl.constexpr, Q: tl.constexpr):
    """One of the sums of some coordinates over all parts, always in one order."""
    q = tl.arange(0, Q)
    found = tl.zeros((ENTRIES // Q,), tl.float32)
    for i in range(0, parts, Q):
        at = own[:, None] + ((i + q).to(tl.int64) * (4 * G) + which * G)[None, :]
        some = mask[:, None] & (i + q < parts)[None, :]
        found += tl.sum(tl.load(room + at, mask=some, other=0.0), 1)
    return found


@triton.jit
def turned(kept, gate, j, number, COUPLED: tl.constexpr):
    """Coordinates, their updates and preconditioners, and what the gate changes of them."""
    mask = j < number
    z, d = tl.load(kept + j, mask=mask, other=0.0), tl.load(kept + number + j, mask=mask, other=0.0)
    p = tl.load(kept + 2 * number + j, mask=mask, other=0.0)
    lost, shift = one_gate(gate, p, COUPLED)
    return z, d, p, lost * z - shift * d


@triton.jit(do_not_specialize=["programs"])
def settle(
    table, live, owners, arrived, gates, room, lr_at, found_inf, grad_scale,
    lr, fresh1, beta2, fresh2, log1, log2, eps, momentum, undamped, amplify, imbalance_factor, programs,
    PEAK: tl.constexpr, ADAPTIVE: tl.constexpr, MOMENTUM: tl.constexpr, DECOUPLED: tl.constexpr,
    COUPLED: tl.constexpr, MAXIMIZE: tl.constexpr, SATURATED: tl.constexpr, AUTOMATIC: tl.constexpr,
    BASIS: tl.constexpr, G: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """Second moments, the gate, what every coordinate changes by; the imbalance and the step count."""
    if found_inf is not None:  # noqa: SIM102 (Triton must not look at None)
        if tl.load(found_inf) != 0:
            return
    program = tl.program_id(0)
    _, entry = owner(table, owners, program, BASIS)
    if program != narrow(table, entry, BEGIN):
        return
    LANES: tl.constexpr = ENTRIES // Q
    numbers, law, _ = settings(
        table, live, entry, lr_at, grad_scale,
        lr, fresh1, beta2, fresh2, log1, log2, eps, momentum, undamped, amplify, 0.0, imbalance_factor,
        ADAPTIVE, MOMENTUM, True, DECOUPLED, MAXIMIZE, False,
    )  # fmt: skip
    gate, parts = gates + entry * GATE, narrow(table, entry, PARTS)
    groups, number = narrow(table, entry, GROUPS), coordinates(table, entry, G)
    per_band, weights = tl.cdiv(groups, G), field(table, entry, WEIGHTS).to(tl.float32)
    size = weights if BASIS else weights / number  # weights that share a second moment
    root = 1.0 if BASIS else 1 / tl.sqrt(size)
    lane, kept = tl.arange(0, LANES), room + moves_at(table, entry, G)
    everything, paces, ww, uu, uw, dd, dw = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    common = 1.0
    if BASIS:
        one = lane == 0
        own = field(table, entry, ROOM) + lane * 0
        if ADAPTIVE:
            square = total(room, own, one, parts, 0, G, Q) / size
            p = shared_gain(table, entry, lane, one, square, numbers, PEAK)
            common = tl.sum(tl.where(one, p, 0.0), 0)
        paces = weights / common
    for base in range(0, number, LANES):
        j = base + lane
        mask = j < number
        group = j % groups
        unit = (j // groups) * per_band + group // G
        own = sums_at(table, entry, unit.to(tl.int64), 0, G) + group % G
        d, z = total(room, own, mask, parts, 1, G, Q) * root, total(room, own, mask, parts, 2, G, Q) * root
        everything += tl.sum(total(room, own, mask, parts, 3, G, Q), 0)
        p = common + tl.zeros((LANES,), tl.float32)
        if ADAPTIVE and not BASIS:
            square = total(room, own, mask, parts, 0, G, Q) / size
            p = shared_gain(table, entry, j, mask, square, numbers, PEAK)
            paces += tl.sum(tl.where(mask, size / p, 0.0), 0)
        p = tl.where(mask, p, 0.0)
        ww, uu, uw = ww + tl.sum(z * z, 0), uu + tl.sum(d * d, 0), uw + tl.sum(z * d, 0)
        dd, dw = dd + tl.sum(p * p * d * d, 0), dw + tl.sum(p * d * z, 0)
        tl.store(kept + j, z, mask=mask)
        tl.store(kept + number + j, d, mask=mask)
        tl.store(kept + 2 * number + j, p, mask=mask)
    weigh(
        table, entry, gate, numbers, law, amplify, everything, ww, uu, uw, dd, dw, paces,
        AUTOMATIC, DECOUPLED, COUPLED, SATURATED,
    )  # fmt: skip
    tl.debug_barrier()  # what other threads of this program have written
    law = decided(gate, law)
    square = 0.0
    for base in range(0, number, LANES):
        z, d, p, turn = turned(kept, gate, base + lane, number, COUPLED)
        square += tl.sum((z + turn) * (z + turn), 0)
    far = tl.sqrt(square)
    gone = (far <= law[5] * SNAP) & (tl.load(gate + ATTRACTS) != 0)
    for base in range(0, number, LANES):
        j = base + lane
        z, d, p, turn = turned(kept, gate, j, number, COUPLED)
        forth = law[0] * numbers[7] * p
        tl.store(kept + j, (forth * d + tl.where(gone, -z, turn)) * root, mask=j < number)
        tl.store(kept + 2 * number + j, forth, mask=j < number)
    counts = (far <= LARGEST) & (gone == 0)
    far, square = tl.where(counts, far, 0.0), tl.where(counts, square, 0.0)
    decay_imbalance(table, entry, law, numbers, 1.0, far, square, COUPLED, PEAK, SATURATED)
    count_step(table, entry, arrived, numbers, ADAPTIVE, MOMENTUM)


@triton.jit(do_not_specialize=["programs"])
def shift_groups(
    table, live, owners, room, lr_at, found_inf, grad_scale,
    lr, fresh1, beta2, fresh2, log1, log2, eps, momentum, undamped, amplify, imbalance_factor, programs,
    DTYPE: tl.constexpr, MASTER: tl.constexpr, ADAPTIVE: tl.constexpr, MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, P: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Every weight by what its group has decided."""
    if found_inf is not None:  # noqa: SIM102 (Triton must not look at None)
        if tl.load(found_inf) != 0:
            return
    G: tl.constexpr = C // P
    program = tl.program_id(0)
    entry = tl.load(owners + program)
    numbers, _, factor = settings(
        table, live, entry, lr_at, grad_scale,
        lr, fresh1, beta2, fresh2, log1, log2, eps, momentum, undamped, amplify, 0.0, imbalance_factor,
        ADAPTIVE, MOMENTUM, True, False, MAXIMIZE, False,
    )  # fmt: skip
    unit, _, begin, end = lines_of(table, entry, program)
    groups = narrow(table, entry, GROUPS)
    per_band = tl.cdiv(groups, G)
    group = (unit % per_band) * G + tl.arange(0, G)
    own = room + moves_at(table, entry, G) + (unit // per_band).to(tl.int64) * groups + group
    add = tl.load(own, mask=group < groups, other=0.0)
    forth = tl.load(own + 2 * coordinates(table, entry, G), mask=group < groups, other=0.0)
    for line in range(begin, end):
        at, mask = place(table, entry, unit, line, DTYPE, R, C, P, ALIGNED)
        w, u = recall(
            table, live, entry, at, mask, numbers, factor, DTYPE, MASTER, ADAPTIVE, MOMENTUM, NESTEROV, ALIGNED
        )
        new = w - per_column(forth, C, P) * u + per_column(add, C, P)
        store_weight(table, entry, at, mask, new, 0, 0, DTYPE, MASTER, False, ALIGNED)


@triton.jit(do_not_specialize=["programs"])
def shift_basis(
    table, live, owners, room, lr_at, found_inf, grad_scale,
    lr, fresh1, beta2, fresh2, log1, log2, eps, momentum, undamped, amplify, imbalance_factor, programs,
    DTYPE: tl.constexpr, MASTER: tl.constexpr, ADAPTIVE: tl.constexpr, MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Every weight, along all directions."""
    if found_inf is not None:  # noqa: SIM102 (Triton must not look at None)
        if tl.load(found_inf) != 0:
            return
    program = tl.program_id(0)
    row, entry = owner(table, owners, program, True)
    numbers, _, factor = settings(
        table, live, entry, lr_at, grad_scale,
        lr, fresh1, beta2, fresh2, log1, log2, eps, momentum, undamped, amplify, 0.0, imbalance_factor,
        ADAPTIVE, MOMENTUM, True, False, MAXIMIZE, False,
    )  # fmt: skip
    columns, lines = narrow(table, entry, GROUPS), narrow(table, entry, LINES)
    first = (program - narrow(table, row, BEGIN)) * lines
    kept = room + moves_at(table, entry, G)
    forth = tl.load(kept + 2 * columns)
    for line in range(0, lines):
        at, mask = block(table, row, first + line, DTYPE, BLOCK, ALIGNED)
        w, u = recall(table, live, row, at, mask, numbers, factor, DTYPE, MASTER, ADAPTIVE, MOMENTUM, NESTEROV, ALIGNED)
        new = w - forth * u
        for j in range(0, columns):
            new += tl.load(kept + j) * direction(table, row, entry, j, at, mask, ALIGNED)
        store_weight(table, row, at, mask, new, 0, 0, DTYPE, MASTER, False, ALIGNED)
