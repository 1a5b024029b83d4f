"""The step of weights that a fixed plane makes equal: ``reference.plane_step`` for orbits of equally many copies.

Copy j of orbit i is weight i of tensor j, or gathered; the tensors are rows of the table that follow one another.  One
gate needs its sums before any weight can move: ``survey_orbits`` advances the moments and adds up, whichever of its
programs is last combines the sums, ``move_orbits`` moves, and ``snap_orbits`` returns at once unless that was the step
onto the plane.  A gate for every orbit needs no sums, so there ``move_orbits`` advances the moments itself and is all.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call, attr-defined"

from __future__ import annotations

import triton
import triton.language as tl

from symopt_kernels.reference import gauge
from symopt_kernels.triton.constants import LARGEST, SNAP, TINY, StepConstants, prepare
from symopt_kernels.triton.elementwise import time_scale
from symopt_kernels.triton.group_tiles import reload_line
from symopt_kernels.triton.imbalance import count_step, decay_imbalance, reduce_partial
from symopt_kernels.triton.memory import (
    BEGIN,
    COUNT,
    CRITICAL,
    ROWS,
    SQRT_DIM,
    WEIGHTS,
    address,
    field,
    field_f32,
    field_i32,
    load_weight,
    store_weight,
)
from symopt_kernels.triton.orbit_places import (
    OffPlaneStep,
    locate_copy,
    off_plane_change,
    orbit_offsets,
    owner,
    survey_orbit,
)
from symopt_kernels.triton.table import GATE_NUMBERS as _GATE_NUMBERS

__all__ = ["move_orbits", "snap_orbits", "survey_orbits"]

AUTO_STRENGTH_MARGIN = tl.constexpr(gauge.AUTO_STRENGTH_MARGIN)
CRITICAL_EMA = tl.constexpr(gauge.CRITICAL_EMA)
CRITICAL_FLOOR = tl.constexpr(gauge.CRITICAL_FLOOR)

# Where in memory the numbers of the one gate of a plane lie: 1 - its factor, t * decay, its shift, lr * strength,
# whether the plane attracts and whether it was reached.
GATE_NUMBERS = tl.constexpr(_GATE_NUMBERS)
GATE_CHANGE, RATE, SHIFT, DECAY, ATTRACTS, SNAPPED = (tl.constexpr(i) for i in range(6))


@triton.jit
def automatic_strength(table, main):
    """A margin above what earlier steps have needed."""
    return tl.load(address(table, main, CRITICAL, tl.float32, False)) * AUTO_STRENGTH_MARGIN


@triton.jit
def remember_needed(table, main, direction, amplify, squares, all_uu, DECOUPLED: tl.constexpr):
    """``reference.needed`` of the updates, for the steps to come."""
    sqrt_dim = field_f32(table, main, SQRT_DIM)
    weights = field(table, main, WEIGHTS).to(tl.float32)
    critical, typical = direction.unbias1 * tl.sqrt(squares) / amplify, 1.0
    if DECOUPLED:
        critical = critical / sqrt_dim  # per coordinate; its update of a steady gradient is 1
    else:
        typical = direction.unbias1 * tl.sqrt(all_uu / weights) / amplify * sqrt_dim
    at = address(table, main, CRITICAL, tl.float32, False)
    needed = tl.maximum(critical, typical * CRITICAL_FLOOR, propagate_nan=tl.PropagateNan.ALL)
    tl.store(at, tl.maximum(tl.load(at) * CRITICAL_EMA, needed, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def with_decay(constants, decay):
    """``constants`` with another ``decay_kept``."""
    return StepConstants(
        constants.lr, decay, constants.decay_pruned, constants.threshold, constants.imbalance,
        constants.metric_scale, constants.imbalance_factor, constants.snap_limit,
    )  # fmt: skip


@triton.jit
def with_gate_decay(table, main, constants, amplify, AUTOMATIC: tl.constexpr, DECOUPLED: tl.constexpr):
    """``constants`` with lr * strength as it counts for a gate."""
    decay = constants.decay_kept
    if AUTOMATIC:
        decay = constants.lr * automatic_strength(table, main) * amplify
    if DECOUPLED:
        decay *= field_f32(table, main, SQRT_DIM)
    return with_decay(constants, decay)


@triton.jit
def with_combined_decay(gate, constants):
    """The same as :func:`combine_gate` has found it."""
    return with_decay(constants, tl.load(gate + DECAY))


@triton.jit
def combine_gate(
    table, main, gate, direction, constants, amplify, all_uu, ww, uu, uw, dd, dw, inverse_preconditioners,
    AUTOMATIC: tl.constexpr, DECOUPLED: tl.constexpr, COUPLED: tl.constexpr, SATURATED: tl.constexpr,
):  # fmt: skip
    """From the sums of a plane what ``reference.plane_step`` says of its one gate, and the strength it will need."""
    constants = with_gate_decay(table, main, constants, amplify, AUTOMATIC, DECOUPLED)
    if AUTOMATIC:
        remember_needed(table, main, direction, amplify, dd if DECOUPLED else uu, all_uu, DECOUPLED)
    decay_kept = constants.decay_kept
    gate_decay = field(table, main, WEIGHTS).to(tl.float32) / inverse_preconditioners if COUPLED else 1.0
    lr, c = constants.lr * direction.unbias1, constants.imbalance
    decay, metric, pull = decay_kept * gate_decay, tl.sqrt(c * c + 4 * ww), lr * tl.sqrt(dd)
    t = time_scale(metric, pull, decay, constants.metric_scale, SATURATED)
    gate_sq = (c + metric) / 2
    # The gate sees the gradient through its own preconditioner; else the threshold would not be that of the norm.
    gradient = tl.where(decay_kept != 0, gate_decay * uw, dw) if COUPLED else dw
    gate_change = t * decay + t * lr * gradient / tl.maximum(gate_sq, TINY)
    # Copies that are equal already need no snapping.
    attracts = ((lr * tl.sqrt(uu) if COUPLED else pull) < decay_kept) & ((ww > 0) | (c != 0))
    tl.store(gate + DECAY, decay_kept)
    tl.store(gate + GATE_CHANGE, gate_change)
    tl.store(gate + RATE, t * decay_kept)
    tl.store(gate + SHIFT, (1 - gate_change) * gate_sq * t * lr)
    tl.store(gate + ATTRACTS, attracts.to(tl.float32))


@triton.jit
def combine_orbits(
    table, main, gate, direction, constants, amplify, partial, programs,
    AUTOMATIC: tl.constexpr, ADAPTIVE: tl.constexpr, DECOUPLED: tl.constexpr, COUPLED: tl.constexpr,
    SATURATED: tl.constexpr,
):  # fmt: skip
    """:func:`combine_gate` of the sums over all orbits."""
    begin, count = field_i32(table, main, BEGIN), field_i32(table, main, COUNT)
    all_uu = reduce_partial(partial, begin, count)
    ww = reduce_partial(partial + programs, begin, count)
    uu, uw = reduce_partial(partial + 2 * programs, begin, count), reduce_partial(partial + 3 * programs, begin, count)
    dd, dw, inverse_preconditioners = uu, uw, 1.0
    if ADAPTIVE:
        dd = reduce_partial(partial + 4 * programs, begin, count)
        dw = reduce_partial(partial + 5 * programs, begin, count)
    if COUPLED:
        inverse_preconditioners = reduce_partial(partial + 6 * programs, begin, count)
    combine_gate(
        table, main, gate, direction, constants, amplify, all_uu, ww, uu, uw, dd, dw, inverse_preconditioners,
        AUTOMATIC, DECOUPLED, COUPLED, SATURATED,
    )  # fmt: skip


@triton.jit(do_not_specialize=["programs"])
def survey_orbits(
    table, per_step, owners, arrived, partial, gates, given, programs,
    LEAD: tl.constexpr, DTYPE: tl.constexpr, MASTER: tl.constexpr, PEAK: tl.constexpr, ADAPTIVE: tl.constexpr,
    MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, DECOUPLED: tl.constexpr, COUPLED: tl.constexpr,
    MAXIMIZE: tl.constexpr, SATURATED: tl.constexpr, TWO_COPIES: tl.constexpr,
    AUTOMATIC: tl.constexpr, GATHERED: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The moments, the sums, and the one gate from them."""
    if given.found_inf is not None:  # noqa: SIM102 (Triton must not look at None)
        if tl.load(given.found_inf) != 0:
            return
    program = tl.program_id(0)
    segment, main = owner(table, owners, program, GATHERED)
    direction, constants, grad_factor = prepare(
        table, per_step, main, given, ADAPTIVE, MOMENTUM, True, DECOUPLED, MAXIMIZE, False
    )
    at, mask = orbit_offsets(table, segment, program, DTYPE, BLOCK, ALIGNED)
    copies = 2 if TWO_COPIES else field_i32(table, segment, ROWS)
    _first, _w, _u, sums, p = survey_orbit(
        table, per_step, segment, main, copies, at, mask, direction, grad_factor,
        LEAD, DTYPE, MASTER, ADAPTIVE, MOMENTUM, NESTEROV, PEAK, True, GATHERED, ALIGNED,
    )  # fmt: skip
    tl.store(partial + program, tl.sum(sums.all_uu, 0))
    tl.store(partial + programs + program, tl.sum(sums.ww, 0))
    tl.store(partial + 2 * programs + program, tl.sum(sums.uu, 0))
    tl.store(partial + 3 * programs + program, tl.sum(sums.uw, 0))
    if ADAPTIVE:
        tl.store(partial + 4 * programs + program, tl.sum(p * p * sums.uu, 0))
        tl.store(partial + 5 * programs + program, tl.sum(p * sums.uw, 0))
    if COUPLED:
        tl.store(partial + 6 * programs + program, copies * tl.sum(tl.where(mask, 1 / p, 0.0), 0))
    tl.debug_barrier()
    before = tl.atomic_add(arrived + main, 1, sem="acq_rel")
    if before == field_i32(table, main, COUNT) - 1:
        tl.debug_barrier()
        direction, constants, _ = prepare(  # anew, so that they need no registers until here
            table, per_step, main, given, ADAPTIVE, MOMENTUM, True, DECOUPLED, MAXIMIZE, False
        )
        combine_orbits(
            table, main, gates + main * GATE_NUMBERS, direction, constants, given.amplify, partial, programs,
            AUTOMATIC, ADAPTIVE, DECOUPLED, COUPLED, SATURATED,
        )  # fmt: skip
        tl.store(arrived + main, 0)


@triton.jit
def move_copy(
    table, row, at, mask, w, u, first, step, snapped, on,
    DTYPE: tl.constexpr, MASTER: tl.constexpr, GATE_PER_ORBIT: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Move one copy of every orbit; returns how far it is from the plane, squared."""
    off, change = off_plane_change(w, u, first, step)
    # Rounded alike for every copy, whatever the compiler fuses: equal ones must stay equal.
    new = tl.fma(-step.step_scale, first.u + first.u_mean, w) + change
    if GATE_PER_ORBIT:
        new = tl.where(snapped, on, new)
    store_weight(table, row, at, mask, new, 0, 0, DTYPE, MASTER, False, ALIGNED)
    return (off + change) * (off + change)


@triton.jit
def gate_per_orbit_step(step_scale, p, sums, constants, COUPLED: tl.constexpr, SATURATED: tl.constexpr):
    """:class:`OffPlaneStep` of a gate for every orbit, and which attract."""
    c = constants.imbalance
    decay = constants.decay_kept * p if COUPLED else constants.decay_kept + tl.zeros_like(p)
    pull, metric = step_scale * tl.sqrt(sums.uu), tl.sqrt(c * c + 4 * sums.ww)
    t = time_scale(metric, pull, decay, constants.metric_scale, SATURATED)
    gate_sq, rate = (c + metric) / 2, t * decay
    gate_change = rate + t * step_scale * sums.uw / tl.maximum(gate_sq, TINY)
    shrink_less_one = gate_change * rate - gate_change - rate
    return OffPlaneStep(step_scale, shrink_less_one, (1 - gate_change) * gate_sq * (t * step_scale)), pull < decay


@triton.jit
def one_gate_step(gate, step_scale, p, COUPLED: tl.constexpr):
    """:class:`OffPlaneStep` of the gate of all.  A weight that never had a gradient has a decay without bounds: it
    must not overshoot."""
    gate_change, rate = tl.load(gate + GATE_CHANGE), tl.load(gate + RATE)
    rate = rate * p if COUPLED else rate + tl.zeros_like(p)
    fits = 1 / tl.maximum(rate, 1.0)
    rate = tl.minimum(rate, 1.0)
    return OffPlaneStep(step_scale, gate_change * rate - gate_change - rate, tl.load(gate + SHIFT) * fits * p)


@triton.jit(do_not_specialize=["programs"])
def move_orbits(
    table, per_step, owners, arrived, partial, gates, given, programs,
    LEAD: tl.constexpr, DTYPE: tl.constexpr, MASTER: tl.constexpr, PEAK: tl.constexpr, ADAPTIVE: tl.constexpr,
    MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, DECOUPLED: tl.constexpr, COUPLED: tl.constexpr,
    MAXIMIZE: tl.constexpr, SATURATED: tl.constexpr, TWO_COPIES: tl.constexpr, GATE_PER_ORBIT: tl.constexpr,
    AUTOMATIC: tl.constexpr, GATHERED: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Every weight; then the imbalance, the step count, and whether what is off the plane is to vanish."""
    if given.found_inf is not None:  # noqa: SIM102 (Triton must not look at None)
        if tl.load(given.found_inf) != 0:
            return
    program = tl.program_id(0)
    segment, main = owner(table, owners, program, GATHERED)
    gate = gates + main * GATE_NUMBERS
    direction, constants, grad_factor = prepare(
        table, per_step, main, given, ADAPTIVE, MOMENTUM, True, DECOUPLED, MAXIMIZE, False
    )
    if GATE_PER_ORBIT:
        constants = with_gate_decay(table, main, constants, given.amplify, AUTOMATIC, DECOUPLED)
    at, mask = orbit_offsets(table, segment, program, DTYPE, BLOCK, ALIGNED)
    copies = 2 if TWO_COPIES else field_i32(table, segment, ROWS)
    first, last_w, last_u, sums, p = survey_orbit(
        table, per_step, segment, main, copies, at, mask, direction, grad_factor,
        LEAD, DTYPE, MASTER, ADAPTIVE, MOMENTUM, NESTEROV, PEAK, GATE_PER_ORBIT, GATHERED, ALIGNED,
    )  # fmt: skip
    if not TWO_COPIES:
        tl.debug_barrier()  # moments written by other threads of this program
    step_scale = constants.lr * direction.unbias1 * p
    on = first.w + first.w_mean - step_scale * (first.u + first.u_mean)
    if GATE_PER_ORBIT:
        step, attracted = gate_per_orbit_step(step_scale, p, sums, constants, COUPLED, SATURATED)
        rest = tl.zeros_like(p)
        if TWO_COPIES:
            off, change = off_plane_change(last_w, last_u, first, step)
            rest = 2 * (off + change) * (off + change)
        else:
            for j in range(0, copies):
                row, place = locate_copy(table, segment, main, j, at, mask, GATHERED)
                w, u = reload_line(
                    table, per_step, row, place, mask, direction, grad_factor,
                    DTYPE, MASTER, ADAPTIVE, MOMENTUM, NESTEROV, ALIGNED,
                )  # fmt: skip
                off, change = off_plane_change(w, u, first, step)
                rest += (off + change) * (off + change)
        size = tl.sqrt(rest)
        snapped = (size <= constants.metric_scale * SNAP) & attracted
        size = tl.where((size <= LARGEST) & (snapped == 0) & mask, size, 0.0)
        tl.store(partial + program, tl.sum(size, 0))
        tl.store(partial + programs + program, tl.sum(size * size, 0))
        if AUTOMATIC:
            needed = p * p * sums.uu if DECOUPLED else sums.uu
            tl.store(partial + 2 * programs + program, tl.sum(sums.all_uu, 0))
            tl.store(partial + 3 * programs + program, tl.max(needed, 0))
    else:
        snapped = mask == 0
        step = one_gate_step(gate, step_scale, p, COUPLED)
    if TWO_COPIES:
        rest = move_copy(
            table, main, at, mask, first.w, first.u, first, step, snapped, on, DTYPE, MASTER, GATE_PER_ORBIT, ALIGNED
        )
        rest += move_copy(
            table, main + 1, at, mask, last_w, last_u, first, step, snapped, on, DTYPE, MASTER, GATE_PER_ORBIT, ALIGNED
        )
    else:
        rest = tl.zeros_like(p)
        for j in range(0, copies):
            row, place = locate_copy(table, segment, main, j, at, mask, GATHERED)
            w, u = reload_line(
                table, per_step, row, place, mask, direction, grad_factor,
                DTYPE, MASTER, ADAPTIVE, MOMENTUM, NESTEROV, ALIGNED,
            )  # fmt: skip
            rest += move_copy(
                table, row, place, mask, w, u, first, step, snapped, on, DTYPE, MASTER, GATE_PER_ORBIT, ALIGNED
            )
    if not GATE_PER_ORBIT:
        tl.store(partial + program, tl.sum(rest, 0))
    tl.debug_barrier()
    before = tl.atomic_add(arrived + main, 1, sem="acq_rel")
    if before == field_i32(table, main, COUNT) - 1:
        tl.debug_barrier()
        direction, constants, _ = prepare(  # anew, so that they need no registers until here
            table, per_step, main, given, ADAPTIVE, MOMENTUM, True, DECOUPLED, MAXIMIZE, False
        )
        begin, count = field_i32(table, main, BEGIN), field_i32(table, main, COUNT)
        if GATE_PER_ORBIT:
            constants = with_gate_decay(table, main, constants, given.amplify, AUTOMATIC, DECOUPLED)
            total, square = reduce_partial(partial, begin, count), reduce_partial(partial + programs, begin, count)
            if AUTOMATIC:
                all_uu = reduce_partial(partial + 2 * programs, begin, count)
                most = reduce_partial(partial + 3 * programs, begin, count, True)
                most = tl.where(all_uu < float("inf"), most, all_uu - all_uu)  # a maximum loses NaN
                remember_needed(table, main, direction, given.amplify, most, all_uu, DECOUPLED)
        else:
            constants = with_combined_decay(gate, constants)
            square = reduce_partial(partial, begin, count)
            total = tl.sqrt(square)
            gone = (total <= constants.metric_scale * SNAP) & (tl.load(gate + ATTRACTS) != 0)
            tl.store(gate + SNAPPED, gone.to(tl.float32))
            counts = (total <= LARGEST) & (gone == 0)
            total, square = tl.where(counts, total, 0.0), tl.where(counts, square, 0.0)
        decay_imbalance(table, main, constants, direction, 1.0, total, square, COUPLED, PEAK, SATURATED)
        count_step(table, main, arrived, direction, ADAPTIVE, MOMENTUM)


@triton.jit
def snap_orbits(
    table, owners, gates, given,
    DTYPE: tl.constexpr, MASTER: tl.constexpr, TWO_COPIES: tl.constexpr, GATHERED: tl.constexpr, BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """The step onto the plane: what was on it is the mean of what was written."""
    if given.found_inf is not None:  # noqa: SIM102 (Triton must not look at None)
        if tl.load(given.found_inf) != 0:
            return
    program = tl.program_id(0)
    segment, main = owner(table, owners, program, GATHERED)
    if tl.load(gates + main * GATE_NUMBERS + SNAPPED) != 0:
        at, mask = orbit_offsets(table, segment, program, DTYPE, BLOCK, ALIGNED)
        copies = 2 if TWO_COPIES else field_i32(table, segment, ROWS)
        row, place = locate_copy(table, segment, main, 0, at, mask, GATHERED)
        w0 = load_weight(table, row, place, mask, DTYPE, MASTER, ALIGNED)
        mean = tl.zeros_like(w0)
        for j in range(1, copies):
            row, place = locate_copy(table, segment, main, j, at, mask, GATHERED)
            mean += load_weight(table, row, place, mask, DTYPE, MASTER, ALIGNED) - w0
        mean = w0 + mean / copies
        for j in range(0, copies):
            row, place = locate_copy(table, segment, main, j, at, mask, GATHERED)
            store_weight(table, row, place, mask, mean, 0, 0, DTYPE, MASTER, False, ALIGNED)
