"""The step of weights that a fixed plane makes equal: ``mirror.mirror`` for orbits of equally many copies.

Copy j of orbit i is weight i of member j, or gathered; the members are rows of the table that follow one another.  One
gate needs its sums before any weight can move: ``surveys`` advances the moments and sums, whichever of its programs is
last decides, ``moves`` moves, and ``snaps`` returns at once unless that was the step onto the plane.  A gate for every
orbit needs no sums, so there ``moves`` advances the moments itself and is all there is.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call, attr-defined"

from __future__ import annotations

import triton
import triton.language as tl

from symopt_kernels.reference import plane
from symopt_kernels.triton.imbalance import count_step, decay_imbalance, settings
from symopt_kernels.triton.memory import (
    BEGIN,
    COUNT,
    CRITICAL,
    ROWS,
    SNAP,
    SPREAD,
    TINY,
    WEIGHTS,
    address,
    field,
    load_weight,
    narrow,
    number,
    store_weight,
)
from symopt_kernels.triton.orbit_places import change, gather, lies, owner, place
from symopt_kernels.triton.retractions import time_scale
from symopt_kernels.triton.table import GATE as _GATE
from symopt_kernels.triton.tiles import recall

__all__ = ["moves", "snaps", "surveys"]

AUTO_STRENGTH_MARGIN = tl.constexpr(plane.AUTO_STRENGTH_MARGIN)
CRITICAL_EMA = tl.constexpr(plane.CRITICAL_EMA)
CRITICAL_FLOOR = tl.constexpr(plane.CRITICAL_FLOOR)
GATE = tl.constexpr(_GATE)
OWN, RATE, BACK, INSIDE, ATTRACTS, SNAPPED = (tl.constexpr(i) for i in range(6))  # numbers of a gate
LARGEST = tl.constexpr(3.4028234663852886e38)
LANES = tl.constexpr(1024)


@triton.jit
def total(partial, begin, count, MOST: tl.constexpr = False):
    """Partial sums of a tie, or the largest of them, always in one order."""
    lane, all_lanes = tl.arange(0, LANES), tl.zeros((LANES,), tl.float32)
    for i in range(0, count, LANES):
        more = tl.load(partial + begin + i + lane, mask=i + lane < count, other=0.0, cache_modifier=".cg")
        all_lanes = tl.maximum(all_lanes, more) if MOST else all_lanes + more
    return tl.max(all_lanes, 0) if MOST else tl.sum(all_lanes, 0)


@triton.jit
def automatic(table, entry):
    """The strength in force: a margin above what earlier steps have needed."""
    return tl.load(address(table, entry, CRITICAL, tl.float32, False)) * AUTO_STRENGTH_MARGIN


@triton.jit
def remember(table, entry, numbers, amplify, squares, everything, DECOUPLED: tl.constexpr):
    """``mirror.needed`` of the updates, for the steps to come."""
    spread = number(table, entry, SPREAD)
    weights = field(table, entry, WEIGHTS).to(tl.float32)
    critical, typical = numbers[7] * tl.sqrt(squares) / amplify, 1.0
    if DECOUPLED:
        critical = critical / spread  # per coordinate; its update of a steady gradient is 1
    else:
        typical = numbers[7] * tl.sqrt(everything / weights) / amplify * spread
    at = address(table, entry, CRITICAL, tl.float32, False)
    needed = tl.maximum(critical, typical * CRITICAL_FLOOR, propagate_nan=tl.PropagateNan.ALL)
    tl.store(at, tl.maximum(tl.load(at) * CRITICAL_EMA, needed, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def in_force(table, entry, law, amplify, AUTOMATIC: tl.constexpr, DECOUPLED: tl.constexpr):
    """``law`` with lr * strength as it counts for a gate."""
    inside = law[1]
    if AUTOMATIC:
        inside = law[0] * automatic(table, entry) * amplify
    if DECOUPLED:
        inside *= number(table, entry, SPREAD)
    return law[0], inside, law[2], law[3], law[4], law[5], law[6], law[7]


@triton.jit
def decided(gate, law):
    """The same as :func:`weigh` has found it."""
    return law[0], tl.load(gate + INSIDE), law[2], law[3], law[4], law[5], law[6], law[7]


@triton.jit
def weigh(
    table, entry, gate, numbers, law, amplify, everything, ww, uu, uw, dd, dw, paces,
    AUTOMATIC: tl.constexpr, DECOUPLED: tl.constexpr, COUPLED: tl.constexpr, SATURATED: tl.constexpr,
):  # fmt: skip
    """From the sums of a plane what ``mirror.mirror`` says of its one gate, and the strength it will need."""
    law = in_force(table, entry, law, amplify, AUTOMATIC, DECOUPLED)
    if AUTOMATIC:
        remember(table, entry, numbers, amplify, dd if DECOUPLED else uu, everything, DECOUPLED)
    inside = law[1]
    pace = field(table, entry, WEIGHTS).to(tl.float32) / paces if COUPLED else 1.0
    lr, c = law[0] * numbers[7], law[4]
    decay, metric, pull = inside * pace, tl.sqrt(c * c + 4 * ww), lr * tl.sqrt(dd)
    t = time_scale(metric, pull, decay, law[5], SATURATED)
    square = (c + metric) / 2
    # The gate sees the gradient through its own preconditioner; else the threshold would not be that of the norm.
    gradient = tl.where(inside != 0, pace * uw, dw) if COUPLED else dw
    own = t * decay + t * lr * gradient / tl.maximum(square, TINY)
    # Copies that are equal already need no snapping.
    attracts = ((lr * tl.sqrt(uu) if COUPLED else pull) < inside) & ((ww > 0) | (c != 0))
    tl.store(gate + INSIDE, inside)
    tl.store(gate + OWN, own)
    tl.store(gate + RATE, t * inside)
    tl.store(gate + BACK, (1 - own) * square * t * lr)
    tl.store(gate + ATTRACTS, attracts.to(tl.float32))


@triton.jit
def decide(
    table, entry, gate, numbers, law, amplify, partial, programs,
    AUTOMATIC: tl.constexpr, ADAPTIVE: tl.constexpr, DECOUPLED: tl.constexpr, COUPLED: tl.constexpr,
    SATURATED: tl.constexpr,
):  # fmt: skip
    """:func:`weigh` of the sums of a tie."""
    begin, count = narrow(table, entry, BEGIN), narrow(table, entry, COUNT)
    everything = total(partial, begin, count)
    ww = total(partial + programs, begin, count)
    uu, uw = total(partial + 2 * programs, begin, count), total(partial + 3 * programs, begin, count)
    dd, dw, paces = uu, uw, 1.0
    if ADAPTIVE:
        dd, dw = total(partial + 4 * programs, begin, count), total(partial + 5 * programs, begin, count)
    if COUPLED:
        paces = total(partial + 6 * programs, begin, count)
    weigh(
        table, entry, gate, numbers, law, amplify, everything, ww, uu, uw, dd, dw, paces,
        AUTOMATIC, DECOUPLED, COUPLED, SATURATED,
    )  # fmt: skip


@triton.jit(do_not_specialize=["programs"])
def surveys(
    table, live, owners, arrived, partial, gates, lr_at, found_inf, grad_scale,
    lr, fresh1, beta2, fresh2, log1, log2, eps, momentum, undamped, amplify, imbalance_factor, programs,
    LEAD: tl.constexpr, DTYPE: tl.constexpr, MASTER: tl.constexpr, PEAK: tl.constexpr, ADAPTIVE: tl.constexpr,
    MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, DECOUPLED: tl.constexpr, COUPLED: tl.constexpr,
    MAXIMIZE: tl.constexpr, SATURATED: tl.constexpr, PAIR: tl.constexpr,
    AUTOMATIC: tl.constexpr, GATHERED: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The moments, the sums, and what they decide."""
    if found_inf is not None:  # noqa: SIM102 (Triton must not look at None)
        if tl.load(found_inf) != 0:
            return
    program = tl.program_id(0)
    segment, entry = owner(table, owners, program, GATHERED)
    numbers, law, factor = settings(
        table, live, entry, lr_at, grad_scale,
        lr, fresh1, beta2, fresh2, log1, log2, eps, momentum, undamped, amplify, 0.0, imbalance_factor,
        ADAPTIVE, MOMENTUM, True, DECOUPLED, MAXIMIZE, False,
    )  # fmt: skip
    at, mask = place(table, segment, program, DTYPE, BLOCK, ALIGNED)
    copies = 2 if PAIR else narrow(table, segment, ROWS)
    _first, _last, sums, p = gather(
        table, live, segment, entry, copies, at, mask, numbers, factor,
        LEAD, DTYPE, MASTER, ADAPTIVE, MOMENTUM, NESTEROV, PEAK, True, GATHERED, ALIGNED,
    )  # fmt: skip
    ww, uu, uw, everything = sums
    tl.store(partial + program, tl.sum(everything, 0))
    tl.store(partial + programs + program, tl.sum(ww, 0))
    tl.store(partial + 2 * programs + program, tl.sum(uu, 0))
    tl.store(partial + 3 * programs + program, tl.sum(uw, 0))
    if ADAPTIVE:
        tl.store(partial + 4 * programs + program, tl.sum(p * p * uu, 0))
        tl.store(partial + 5 * programs + program, tl.sum(p * uw, 0))
    if COUPLED:
        tl.store(partial + 6 * programs + program, copies * tl.sum(tl.where(mask, 1 / p, 0.0), 0))
    tl.debug_barrier()
    before = tl.atomic_add(arrived + entry, 1, sem="acq_rel")
    if before == narrow(table, entry, COUNT) - 1:
        tl.debug_barrier()
        numbers, law, _ = settings(  # anew, so that they need no registers until here
            table, live, entry, lr_at, grad_scale,
            lr, fresh1, beta2, fresh2, log1, log2, eps, momentum, undamped, amplify, 0.0, imbalance_factor,
            ADAPTIVE, MOMENTUM, True, DECOUPLED, MAXIMIZE, False,
        )  # fmt: skip
        decide(
            table, entry, gates + entry * GATE, numbers, law, amplify, partial, programs,
            AUTOMATIC, ADAPTIVE, DECOUPLED, COUPLED, SATURATED,
        )  # fmt: skip
        tl.store(arrived + entry, 0)


@triton.jit
def settle(
    table, entry, at, mask, w, u, first, step, snapped, on,
    DTYPE: tl.constexpr, MASTER: tl.constexpr, EACH: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Move one copy of every orbit; returns how far it is from the plane, squared."""
    off, turn = change(w, u, first, step)
    # Rounded alike for every copy, whatever the compiler fuses: equal ones must stay equal.
    new = tl.fma(-step[0], first[1] + first[3], w) + turn
    if EACH:
        new = tl.where(snapped, on, new)
    store_weight(table, entry, at, mask, new, 0, 0, DTYPE, MASTER, False, ALIGNED)
    return (off + turn) * (off + turn)


@triton.jit
def own_gates(forth, p, sums, law, COUPLED: tl.constexpr, SATURATED: tl.constexpr):
    """What :func:`change` needs of a gate for every orbit, and which attract."""
    ww, uu, uw, _ = sums
    c = law[4]
    decay = law[1] * p if COUPLED else law[1] + tl.zeros_like(p)
    pull, metric = forth * tl.sqrt(uu), tl.sqrt(c * c + 4 * ww)
    t = time_scale(metric, pull, decay, law[5], SATURATED)
    square, shrink = (c + metric) / 2, t * decay
    own = shrink + t * forth * uw / tl.maximum(square, TINY)
    return own * shrink - own - shrink, (1 - own) * square * (t * forth), pull < decay


@triton.jit
def one_gate(gate, p, COUPLED: tl.constexpr):
    """The same of the gate of all.  A weight without a gradient has a decay without bounds: it must not overshoot."""
    own, rate = tl.load(gate + OWN), tl.load(gate + RATE)
    shrink = rate * p if COUPLED else rate + tl.zeros_like(p)
    fits = 1 / tl.maximum(shrink, 1.0)
    shrink = tl.minimum(shrink, 1.0)
    return own * shrink - own - shrink, tl.load(gate + BACK) * fits * p


@triton.jit(do_not_specialize=["programs"])
def moves(
    table, live, owners, arrived, partial, gates, lr_at, found_inf, grad_scale,
    lr, fresh1, beta2, fresh2, log1, log2, eps, momentum, undamped, amplify, imbalance_factor, programs,
    LEAD: tl.constexpr, DTYPE: tl.constexpr, MASTER: tl.constexpr, PEAK: tl.constexpr, ADAPTIVE: tl.constexpr,
    MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, DECOUPLED: tl.constexpr, COUPLED: tl.constexpr,
    MAXIMIZE: tl.constexpr, SATURATED: tl.constexpr, PAIR: tl.constexpr, EACH: tl.constexpr,
    AUTOMATIC: tl.constexpr, GATHERED: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Every weight; then the imbalance, the step count, and whether what is off the plane is to vanish."""
    if found_inf is not None:  # noqa: SIM102 (Triton must not look at None)
        if tl.load(found_inf) != 0:
            return
    program = tl.program_id(0)
    segment, entry = owner(table, owners, program, GATHERED)
    gate = gates + entry * GATE
    numbers, law, factor = settings(
        table, live, entry, lr_at, grad_scale,
        lr, fresh1, beta2, fresh2, log1, log2, eps, momentum, undamped, amplify, 0.0, imbalance_factor,
        ADAPTIVE, MOMENTUM, True, DECOUPLED, MAXIMIZE, False,
    )  # fmt: skip
    if EACH:
        law = in_force(table, entry, law, amplify, AUTOMATIC, DECOUPLED)
    at, mask = place(table, segment, program, DTYPE, BLOCK, ALIGNED)
    copies = 2 if PAIR else narrow(table, segment, ROWS)
    first, last, sums, p = gather(
        table, live, segment, entry, copies, at, mask, numbers, factor,
        LEAD, DTYPE, MASTER, ADAPTIVE, MOMENTUM, NESTEROV, PEAK, EACH, GATHERED, ALIGNED,
    )  # fmt: skip
    if not PAIR:
        tl.debug_barrier()  # moments written by other threads of this program
    forth = law[0] * numbers[7] * p
    on = first[0] + first[2] - forth * (first[1] + first[3])
    if EACH:
        lost, shift, attracted = own_gates(forth, p, sums, law, COUPLED, SATURATED)
        step = (forth, lost, shift)
        rest = tl.zeros_like(p)
        if PAIR:
            off, turn = change(last[0], last[1], first, step)
            rest = 2 * (off + turn) * (off + turn)
        else:
            for j in range(0, copies):
                row, mine = lies(table, segment, entry, j, at, mask, GATHERED)
                w, u = recall(
                    table, live, row, mine, mask, numbers, factor,
                    DTYPE, MASTER, ADAPTIVE, MOMENTUM, NESTEROV, ALIGNED,
                )  # fmt: skip
                off, turn = change(w, u, first, step)
                rest += (off + turn) * (off + turn)
        far = tl.sqrt(rest)
        snapped = (far <= law[5] * SNAP) & attracted
        far = tl.where((far <= LARGEST) & (snapped == 0) & mask, far, 0.0)
        tl.store(partial + program, tl.sum(far, 0))
        tl.store(partial + programs + program, tl.sum(far * far, 0))
        if AUTOMATIC:
            tl.store(partial + 2 * programs + program, tl.sum(sums[3], 0))
            tl.store(partial + 3 * programs + program, tl.max(p * p * sums[1] if DECOUPLED else sums[1], 0))
    else:
        snapped = mask == 0
        lost, shift = one_gate(gate, p, COUPLED)
        step = (forth, lost, shift)
    if PAIR:
        rest = settle(
            table, entry, at, mask, first[0], first[1], first, step, snapped, on, DTYPE, MASTER, EACH, ALIGNED
        )
        rest += settle(
            table, entry + 1, at, mask, last[0], last[1], first, step, snapped, on, DTYPE, MASTER, EACH, ALIGNED
        )
    else:
        rest = tl.zeros_like(p)
        for j in range(0, copies):
            row, mine = lies(table, segment, entry, j, at, mask, GATHERED)
            w, u = recall(
                table, live, row, mine, mask, numbers, factor,
                DTYPE, MASTER, ADAPTIVE, MOMENTUM, NESTEROV, ALIGNED,
            )  # fmt: skip
            rest += settle(table, row, mine, mask, w, u, first, step, snapped, on, DTYPE, MASTER, EACH, ALIGNED)
    if not EACH:
        tl.store(partial + program, tl.sum(rest, 0))
    tl.debug_barrier()
    before = tl.atomic_add(arrived + entry, 1, sem="acq_rel")
    if before == narrow(table, entry, COUNT) - 1:
        tl.debug_barrier()
        numbers, law, _ = settings(  # anew, so that they need no registers until here
            table, live, entry, lr_at, grad_scale,
            lr, fresh1, beta2, fresh2, log1, log2, eps, momentum, undamped, amplify, 0.0, imbalance_factor,
            ADAPTIVE, MOMENTUM, True, DECOUPLED, MAXIMIZE, False,
        )  # fmt: skip
        begin, count = narrow(table, entry, BEGIN), narrow(table, entry, COUNT)
        if EACH:
            law = in_force(table, entry, law, amplify, AUTOMATIC, DECOUPLED)
            size, square = total(partial, begin, count), total(partial + programs, begin, count)
            if AUTOMATIC:
                everything = total(partial + 2 * programs, begin, count)
                most = total(partial + 3 * programs, begin, count, True)
                most = tl.where(everything < float("inf"), most, everything - everything)  # a maximum loses NaN
                remember(table, entry, numbers, amplify, most, everything, DECOUPLED)
        else:
            law = decided(gate, law)
            square = total(partial, begin, count)
            size = tl.sqrt(square)
            gone = (size <= law[5] * SNAP) & (tl.load(gate + ATTRACTS) != 0)
            tl.store(gate + SNAPPED, gone.to(tl.float32))
            counts = (size <= LARGEST) & (gone == 0)
            size, square = tl.where(counts, size, 0.0), tl.where(counts, square, 0.0)
        decay_imbalance(table, entry, law, numbers, 1.0, size, square, COUPLED, PEAK, SATURATED)
        count_step(table, entry, arrived, numbers, ADAPTIVE, MOMENTUM)


@triton.jit
def snaps(
    table, owners, gates, found_inf,
    DTYPE: tl.constexpr, MASTER: tl.constexpr, PAIR: tl.constexpr, GATHERED: tl.constexpr, BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """The step onto the plane: what was on it is the mean of what was written."""
    if found_inf is not None:  # noqa: SIM102 (Triton must not look at None)
        if tl.load(found_inf) != 0:
            return
    program = tl.program_id(0)
    segment, entry = owner(table, owners, program, GATHERED)
    if tl.load(gates + entry * GATE + SNAPPED) != 0:
        at, mask = place(table, segment, program, DTYPE, BLOCK, ALIGNED)
        copies = 2 if PAIR else narrow(table, segment, ROWS)
        row, mine = lies(table, segment, entry, 0, at, mask, GATHERED)
        w0 = load_weight(table, row, mine, mask, DTYPE, MASTER, ALIGNED)
        mean = tl.zeros_like(w0)
        for j in range(1, copies):
            row, mine = lies(table, segment, entry, j, at, mask, GATHERED)
            mean += load_weight(table, row, mine, mask, DTYPE, MASTER, ALIGNED) - w0
        mean = w0 + mean / copies
        for j in range(0, copies):
            row, mine = lies(table, segment, entry, j, at, mask, GATHERED)
            store_weight(table, row, mine, mask, mean, 0, 0, DTYPE, MASTER, False, ALIGNED)
