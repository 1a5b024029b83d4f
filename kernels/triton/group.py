"""The kernel of groups: see :mod:`symopt_kernels.triton.elementwise`, whose other half this is."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call, attr-defined"

from __future__ import annotations

import triton
import triton.language as tl

from symopt_kernels.triton.directions import shared_gain
from symopt_kernels.triton.imbalance import finish, settings
from symopt_kernels.triton.memory import (
    BEGIN,
    COUNT,
    GROUPS,
    LAG,
    LINES,
    MARKS,
    PARTS,
    ROOM,
    ROWS,
    RUN,
    SNAP,
    TINY,
    UNITS,
    field,
    narrow,
)
from symopt_kernels.triton.tiles import move, place, recall, total_up

__all__ = ["groups"]

LARGEST = tl.constexpr(3.4028234663852886e38)
NOISE = tl.constexpr(4e-6)


@triton.jit
def decide(
    table, entry, unit, numbers, law, gg, uu, uw, ww,
    PEAK: tl.constexpr, ADAPTIVE: tl.constexpr, TRIMMED: tl.constexpr, COUPLED: tl.constexpr,
    SATURATED: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """The steps of a unit's groups from their four sums: a shared second moment, then ``reference.group``."""
    rows, groups, run = narrow(table, entry, ROWS), narrow(table, entry, GROUPS), narrow(table, entry, RUN)
    per_band = tl.cdiv(groups, G)
    group = (unit % per_band) * G + tl.arange(0, G)
    mask = group < groups
    at = (unit // per_band) * groups + group
    size = (rows.to(tl.int64) * run).to(tl.float32)
    lr, gain = law[0], 1.0
    if ADAPTIVE:
        p = shared_gain(table, entry, at, mask, gg / size, numbers, PEAK)
        lr = lr * (p * numbers[7])
        gain = p if COUPLED else tl.sqrt(size)
    norm = tl.sqrt(ww)
    decay = (tl.where(norm <= law[3], law[2], law[1]) if TRIMMED else law[1] + tl.zeros_like(ww)) * gain
    snaps = norm <= law[7]
    c, scale = law[4], law[5]
    metric, pull = tl.sqrt(c * c + 4 * ww), lr * tl.sqrt(uu)
    if SATURATED:
        t = 1 / tl.maximum(metric, tl.maximum(scale, decay + 2 * pull))
    else:
        t = 1 / tl.maximum(decay, 1.0)
    gate_sq, rho = (c + metric) / 2, 1 - t * decay
    shared = rho - t * lr * uw / tl.maximum(gate_sq, TINY)
    keep, shift = shared * rho, shared * gate_sq * (t * lr)
    # A group must not snap because two large terms cancel to within their rounding.
    terms = keep * keep * ww + shift * shift * uu
    far = tl.sqrt(tl.maximum(terms - 2 * keep * shift * uw, terms * NOISE, propagate_nan=tl.PropagateNan.ALL))
    small = far <= scale * SNAP
    snapped = small & (pull < decay) & snaps
    stays = small & (snaps == 0) & (far < norm)  # what lives within a budget does not vanish
    far = tl.where(stays, norm, far)
    far = tl.where((far <= LARGEST) & (snapped == 0) & mask, far, 0.0)
    keep, shift = tl.where(stays, 1.0, keep), tl.where(stays, 0.0, shift)
    keep, shift = tl.where(snapped, 0.0, keep), tl.where(snapped, 0.0, shift)
    return keep, shift, tl.sum(far, 0), tl.sum(far * far, 0)


@triton.jit(do_not_specialize=["seed", "programs"])
def groups(
    table, live, owners, arrived, partial, zeros, lr_at, found_inf, grad_scale, ticket, room, marks,
    lr, fresh1, beta2, fresh2, log1, log2, eps, momentum, undamped, amplify, imbalance_factor,
    seed, programs,
    LEAD: tl.constexpr, DTYPE: tl.constexpr, MASTER: tl.constexpr, PEAK: tl.constexpr,
    ADAPTIVE: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr,
    TRIMMED: tl.constexpr, COUPLED: tl.constexpr, SATURATED: tl.constexpr, STOCHASTIC: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, P: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """See :mod:`symopt_kernels.triton.elementwise`."""
    if found_inf is not None:  # noqa: SIM102 (Triton must not look at None)
        if tl.load(found_inf) != 0:
            return
    G: tl.constexpr = C // P
    program = tl.atomic_add(ticket, 1)
    if program == programs - 1:
        tl.store(ticket, 0)
    entry = tl.load(owners + program)
    numbers, law, factor = settings(
        table, live, entry, lr_at, grad_scale,
        lr, fresh1, beta2, fresh2, log1, log2, eps, momentum, undamped, amplify, 0.0, imbalance_factor,
        ADAPTIVE, MOMENTUM, True, False, MAXIMIZE, TRIMMED,
    )  # fmt: skip
    task = program - narrow(table, entry, BEGIN)
    units, parts, lines = narrow(table, entry, UNITS), narrow(table, entry, PARTS), narrow(table, entry, LINES)
    # Units are moved `lag` units after they are summed: sum 0 ... sum lag-1, move 0, sum lag, move 1, ...
    turn, part = task // parts, task % parts
    lag = narrow(table, entry, LAG)
    split = parts > 1
    later = turn - lag
    even, last = (later & 1) == 0, turn >= 2 * units - lag
    moves = split & (later >= 0) & (even | last)
    unit = tl.where(later < 0, turn, tl.where(last, turn - units, tl.where(even, later >> 1, lag + (later >> 1))))
    unit = tl.where(split, unit, task)
    per_part = (lines + parts - 1) // parts
    begin = tl.where(split, part * per_part, 0)
    end = tl.minimum(begin + per_part, lines)
    lane = tl.arange(0, G)
    mark = marks + field(table, entry, MARKS) + unit
    sums_at = room + field(table, entry, ROOM) + unit.to(tl.int64) * ((parts * 4 + 2) * G)
    keep, shift = tl.zeros((G,), tl.float32), tl.zeros((G,), tl.float32)
    size, square, gone = 0.0, 0.0, 0.0
    number = entry.to(tl.int64) << 36

    if lines == 1:  # everything stays in registers
        at, mask = place(table, entry, unit, 0, DTYPE, R, C, P, ALIGNED)
        w, u, gg, uu, uw, ww = total_up(
            table, live, entry, at, mask, numbers, factor, LEAD, DTYPE, MASTER, ADAPTIVE, MOMENTUM, NESTEROV,
            R, C, P, ALIGNED,
        )  # fmt: skip
        keep, shift, size, square = decide(
            table, entry, unit, numbers, law, gg, uu, uw, ww, PEAK, ADAPTIVE, TRIMMED, COUPLED, SATURATED, G
        )
        gone = move(table, entry, at, mask, w, u, keep, shift, seed, number, DTYPE, MASTER, STOCHASTIC, C, P, ALIGNED)
    else:
        if moves == 0:
            gg, uu = tl.zeros((G,), tl.float32), tl.zeros((G,), tl.float32)
            uw, ww = tl.zeros((G,), tl.float32), tl.zeros((G,), tl.float32)
            for line in range(begin, end):
                at, mask = place(table, entry, unit, line, DTYPE, R, C, P, ALIGNED)
                _, _, a, b, c, d = total_up(
                    table, live, entry, at, mask, numbers, factor, LEAD, DTYPE, MASTER, ADAPTIVE, MOMENTUM, NESTEROV,
                    R, C, P, ALIGNED,
                )  # fmt: skip
                gg, uu, uw, ww = gg + a, uu + b, uw + c, ww + d
            last_sum = split == 0
            if split:
                own = sums_at + part * 4 * G + lane
                tl.store(own, gg)
                tl.store(own + G, uu)
                tl.store(own + 2 * G, uw)
                tl.store(own + 3 * G, ww)
                tl.debug_barrier()
                last_sum = tl.atomic_add(mark, 1, sem="acq_rel") == parts - 1
                tl.debug_barrier()
                if last_sum:  # in the order of the parts, whoever comes last
                    gg, uu = tl.zeros((G,), tl.float32), tl.zeros((G,), tl.float32)
                    uw, ww = tl.zeros((G,), tl.float32), tl.zeros((G,), tl.float32)
                    for i in range(0, parts):
                        one = sums_at + i * 4 * G + lane
                        gg += tl.load(one, cache_modifier=".cg")
                        uu += tl.load(one + G, cache_modifier=".cg")
                        uw += tl.load(one + 2 * G, cache_modifier=".cg")
                        ww += tl.load(one + 3 * G, cache_modifier=".cg")
            if last_sum:
                keep, shift, size, square = decide(
                    table, entry, unit, numbers, law, gg, uu, uw, ww, PEAK, ADAPTIVE, TRIMMED, COUPLED, SATURATED, G
                )
                if split:
                    decided = sums_at + parts * 4 * G + lane
                    tl.store(decided, keep)
                    tl.store(decided + G, shift)
                    tl.debug_barrier()
                    tl.atomic_add(mark, 1, sem="release")
        if (moves != 0) | (split == 0):
            if split:
                while tl.load(mark, volatile=True) <= parts:
                    pass
                tl.atomic_add(mark, 0, sem="acquire")
                decided = sums_at + parts * 4 * G + lane
                keep = tl.load(decided, cache_modifier=".cg")
                shift = tl.load(decided + G, cache_modifier=".cg")
            tl.debug_barrier()  # moments written by other threads of this program
            for line in range(begin, end):
                at, mask = place(table, entry, unit, line, DTYPE, R, C, P, ALIGNED)
                w, u = recall(
                    table, live, entry, at, mask, numbers, factor, DTYPE, MASTER, ADAPTIVE, MOMENTUM, NESTEROV, ALIGNED
                )
                gone += move(
                    table, entry, at, mask, w, u, keep, shift, seed, number, DTYPE, MASTER, STOCHASTIC, C, P, ALIGNED
                )
            if split:
                tl.debug_barrier()
                if tl.atomic_add(mark, 1, sem="acq_rel") == 2 * parts:
                    tl.store(mark, 0)

    tl.store(partial + program, size)
    tl.store(partial + programs + program, square)
    tl.store(partial + 2 * programs + program, gone)
    tl.debug_barrier()
    before = tl.atomic_add(arrived + entry, 1, sem="acq_rel")
    if before == narrow(table, entry, COUNT) - 1:
        tl.debug_barrier()
        numbers, law, _ = settings(  # anew, so that they need no registers until here
            table, live, entry, lr_at, grad_scale,
            lr, fresh1, beta2, fresh2, log1, log2, eps, momentum, undamped, amplify, 0.0, imbalance_factor,
            ADAPTIVE, MOMENTUM, True, False, MAXIMIZE, TRIMMED,
        )  # fmt: skip
        gain = 1.0
        if ADAPTIVE and not COUPLED:
            gain = tl.sqrt((field(table, entry, ROWS) * field(table, entry, RUN)).to(tl.float32))
        finish(
            table, entry, partial, zeros, arrived, law, numbers, programs, gain,
            True, COUPLED, PEAK, ADAPTIVE, MOMENTUM, True, SATURATED,
        )  # fmt: skip
