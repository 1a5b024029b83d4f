"""What ends a parameter's step: the imbalance's law, the step count, the number of zeros."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call, attr-defined"

from __future__ import annotations

import triton
import triton.language as tl

from symopt_kernels.triton.constants import MIN_IMBALANCE_FACTOR, SAMPLE, SNAP, TINY
from symopt_kernels.triton.memory import (
    BEGIN,
    COUNT,
    HAS_MOMENTUM,
    IMBALANCE,
    PEAK_,
    SAMPLES,
    SECOND,
    STEP,
    STRIDE,
    address,
    field,
    field_i32,
)

__all__ = ["count_step", "count_zeros", "decay_imbalance", "finish", "reduce_partial"]


@triton.jit
def reduce_partial(partial, begin, count, MOST: tl.constexpr = False):
    """Partial sums of programs added up, or the largest of them, always in one order."""
    lane, lanes = tl.arange(0, SAMPLE), tl.zeros((SAMPLE,), tl.float32)
    for i in range(0, count, SAMPLE):
        more = tl.load(partial + begin + i + lane, mask=i + lane < count, other=0.0, cache_modifier=".cg")
        lanes = tl.maximum(lanes, more) if MOST else lanes + more
    return tl.max(lanes, 0) if MOST else tl.sum(lanes, 0)


@triton.jit
def count_zeros(table, row, partial, zeros):
    """The zeros of a row from those of its programs."""
    begin, count = field_i32(table, row, BEGIN), field_i32(table, row, COUNT)
    lane, none = tl.arange(0, SAMPLE), tl.zeros((SAMPLE,), tl.int64)
    for i in range(0, count, SAMPLE):
        none += tl.load(partial + begin + i + lane, mask=i + lane < count, other=0.0, cache_modifier=".cg").to(tl.int64)
    tl.store(zeros + row, tl.sum(none, 0))


@triton.jit
def low_decile(key, samples):
    """The ``1 + samples // 10``-th smallest of non-negative floats given by their bits, found bit by bit."""
    found = 0
    for i in range(31):
        higher = found | (1 << (30 - i))
        below = tl.sum((key < higher).to(tl.int32), 0)
        found = tl.where(below <= samples // 10, higher, found)
    return found.to(tl.float32, bitcast=True)


@triton.jit
def decay_imbalance(
    table, row, constants, direction, gain, size, square,
    COUPLED: tl.constexpr, PEAK: tl.constexpr, SATURATED: tl.constexpr,
):  # fmt: skip
    """``reference.imbalance_law``, or the given factor; ``size`` and ``square`` are sums over the units."""
    imbalance, scale, factor = constants.imbalance, constants.metric_scale, constants.imbalance_factor
    if factor < 0:
        decay = constants.decay_kept * gain
        if COUPLED:
            source = address(table, row, PEAK_ if PEAK else SECOND, tl.float32, False)
            stride, samples = field(table, row, STRIDE), field_i32(table, row, SAMPLES)
            which = tl.arange(0, 2 * SAMPLE)
            v = tl.load(source + which * stride, mask=which < samples, other=0.0, cache_modifier=".cg")
            key = constants.decay_kept / (tl.sqrt(v * direction.unbias2) + direction.eps)
            key = tl.where(key >= 0, key, float("inf"))  # as kthvalue: NaN comes last
            key = tl.where(which < samples, key.to(tl.int32, bitcast=True), 0x7FFFFFFF)
            decay = low_decile(key, samples)
        if SATURATED:
            typical = 2 * square / tl.maximum(size, TINY)
            decay = decay / tl.maximum(scale, typical)
        rho = tl.maximum(1 - decay, 0.0)
        factor = tl.maximum(rho * rho * (rho * rho), MIN_IMBALANCE_FACTOR)
    imbalance = imbalance * factor
    imbalance = tl.where(imbalance <= scale * SNAP, 0.0, imbalance)
    tl.store(address(table, row, IMBALANCE, tl.float32, False), imbalance)


@triton.jit
def count_step(table, row, arrived, direction, ADAPTIVE: tl.constexpr, MOMENTUM: tl.constexpr):
    """The step count, or that there is a momentum now; the next step may begin."""
    if ADAPTIVE:
        tl.store(address(table, row, STEP, tl.float32, False), direction.step)
    if MOMENTUM:
        place = field(table, row, HAS_MOMENTUM)
        if place != 0:
            tl.store(place.to(tl.pointer_type(tl.int32)), 1)
    tl.store(arrived + row, 0)


@triton.jit
def finish(
    table, row, partial, zeros, arrived, constants, direction, programs, gain,
    IMBALANCE_LAW: tl.constexpr, COUPLED: tl.constexpr, PEAK: tl.constexpr, ADAPTIVE: tl.constexpr,
    MOMENTUM: tl.constexpr, TALLY: tl.constexpr, SATURATED: tl.constexpr,
):  # fmt: skip
    """Runs once per parameter, in whichever program is its last: zeros, ``reference.imbalance_law``, the step count."""
    if TALLY:
        begin, count = field_i32(table, row, BEGIN), field_i32(table, row, COUNT)
        lane = tl.arange(0, SAMPLE)
        sizes, squares = tl.zeros((SAMPLE,), tl.float32), tl.zeros((SAMPLE,), tl.float32)
        none = tl.zeros((SAMPLE,), tl.int64)
        for i in range(0, count, SAMPLE):  # three loads under way at a time
            at, mask = begin + i + lane, i + lane < count
            sizes += tl.load(partial + at, mask=mask, other=0.0, cache_modifier=".cg")
            squares += tl.load(partial + programs + at, mask=mask, other=0.0, cache_modifier=".cg")
            none += tl.load(partial + 2 * programs + at, mask=mask, other=0.0, cache_modifier=".cg").to(tl.int64)
        tl.store(zeros + row, tl.sum(none, 0))
        if IMBALANCE_LAW:
            size, square = tl.sum(sizes, 0), tl.sum(squares, 0)
            decay_imbalance(table, row, constants, direction, gain, size, square, COUPLED, PEAK, SATURATED)
    count_step(table, row, arrived, direction, ADAPTIVE, MOMENTUM)
