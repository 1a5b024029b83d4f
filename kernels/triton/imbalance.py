"""What the weights of a tensor share, before its step and after: numbers, the imbalance's law, the step count."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call, attr-defined"

from __future__ import annotations

import triton
import triton.language as tl

from symopt_kernels.triton.directions import unbias
from symopt_kernels.triton.memory import (
    BEGIN,
    COUNT,
    IMBALANCE,
    PEAK_,
    SAMPLES,
    SCALE,
    SECOND,
    SEEN,
    SNAP,
    STEP,
    STRIDE,
    TINY,
    TRIM,
    address,
    field,
    narrow,
    narrow_double,
    scalar,
)

__all__ = ["count_step", "decay_imbalance", "finish", "settings"]

MIN_IMBALANCE_FACTOR = tl.constexpr(0.98)
SAMPLE = tl.constexpr(1024)  # as in reference.py; triton_table counts the strides


@triton.jit
def settings(
    table, live, entry, lr_at, grad_scale,
    lr, fresh1, beta2, fresh2, log1, log2, eps, momentum, undamped, amplify, weight_decay, imbalance_factor,
    ADAPTIVE: tl.constexpr, MOMENTUM: tl.constexpr, CONSTRAINED: tl.constexpr, DECOUPLED: tl.constexpr,
    MAXIMIZE: tl.constexpr, TRIMMED: tl.constexpr,
):  # fmt: skip
    """What the weights of a tensor share: numbers of the direction, of the retraction, and the gradient's factor."""
    if lr_at is not None:
        lr = tl.load(lr_at)
    new, count, unbias1, unbias2 = 0, 0.0, 1.0, 1.0
    if MOMENTUM and not ADAPTIVE:
        seen = field(table, entry, SEEN)
        if seen != 0:
            new = (tl.load(seen.to(tl.pointer_type(tl.int32))) == 0).to(tl.int32)
    if ADAPTIVE:
        count = scalar(table, entry, STEP) + 1
        unbias1, unbias2 = unbias(count, log1), unbias(count, log2)
    numbers = (momentum, undamped, new, fresh1, beta2, fresh2, eps, unbias1, unbias2, count)
    inside, outside, threshold, keep, c, scale = 0.0, 0.0, -1.0, imbalance_factor, 0.0, 1.0
    if CONSTRAINED:
        c, scale = scalar(table, entry, IMBALANCE), scalar(table, entry, SCALE)
        if TRIMMED:
            budget = field(table, entry, TRIM)
            inside, outside = narrow_double(budget), narrow_double(budget + 8)
            threshold, keep = narrow_double(budget + 16), narrow_double(budget + 24)
        else:
            inside = tl.load(live + 3 * entry + 1).to(tl.int32).to(tl.float32, bitcast=True)
            place = tl.load(live + 3 * entry + 2)
            if place != 0:
                inside = tl.load(place.to(tl.pointer_type(tl.float32)))
        inside, outside = lr * inside * amplify, lr * outside * amplify
    elif DECOUPLED:
        inside = lr * weight_decay
    factor = -1.0 if MAXIMIZE else 1.0
    if grad_scale is not None:
        factor = factor / tl.load(grad_scale)
    most = threshold if TRIMMED else float("inf")
    return numbers, (lr, inside, outside, threshold, c, scale, keep, most), factor


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
    table, entry, law, numbers, gain, size, square,
    COUPLED: tl.constexpr, PEAK: tl.constexpr, SATURATED: tl.constexpr,
):  # fmt: skip
    """``reference.imbalance_law``, or the given factor; ``size`` and ``square`` are sums over the units."""
    c, scale, keep = law[4], law[5], law[6]
    if keep < 0:
        decay = law[1] * gain
        if COUPLED:
            source = address(table, entry, PEAK_ if PEAK else SECOND, tl.float32, False)
            stride, samples = field(table, entry, STRIDE), narrow(table, entry, SAMPLES)
            which = tl.arange(0, 2 * SAMPLE)
            v = tl.load(source + which * stride, mask=which < samples, other=0.0, cache_modifier=".cg")
            key = law[1] / (tl.sqrt(v * numbers[8]) + numbers[6])
            key = tl.where(key >= 0, key, float("inf"))  # as kthvalue: NaN comes last
            key = tl.where(which < samples, key.to(tl.int32, bitcast=True), 0x7FFFFFFF)
            decay = low_decile(key, samples)
        if SATURATED:
            typical = 2 * square / tl.maximum(size, TINY)
            decay = decay / tl.maximum(scale, typical)
        rho = tl.maximum(1 - decay, 0.0)
        keep = tl.maximum(rho * rho * (rho * rho), MIN_IMBALANCE_FACTOR)
    c = c * keep
    c = tl.where(c <= scale * SNAP, 0.0, c)
    tl.store(address(table, entry, IMBALANCE, tl.float32, False), c)


@triton.jit
def count_step(table, entry, arrived, numbers, ADAPTIVE: tl.constexpr, MOMENTUM: tl.constexpr):
    """The step count, or that there is a momentum now; the next step may begin."""
    if ADAPTIVE:
        tl.store(address(table, entry, STEP, tl.float32, False), numbers[9])
    elif MOMENTUM:
        seen = field(table, entry, SEEN)
        if seen != 0:
            tl.store(seen.to(tl.pointer_type(tl.int32)), 1)
    tl.store(arrived + entry, 0)


@triton.jit
def finish(
    table, entry, partial, zeros, arrived, law, numbers, programs, gain,
    LAW: tl.constexpr, COUPLED: tl.constexpr, PEAK: tl.constexpr, ADAPTIVE: tl.constexpr, MOMENTUM: tl.constexpr,
    TALLY: tl.constexpr, SATURATED: tl.constexpr,
):  # fmt: skip
    """Runs once per tensor, in whichever program is its last: zeros, ``reference.imbalance_law``, the step count."""
    begin, count = narrow(table, entry, BEGIN), narrow(table, entry, COUNT)
    lane = tl.arange(0, SAMPLE)
    if TALLY:
        sums, squares = tl.zeros((SAMPLE,), tl.float32), tl.zeros((SAMPLE,), tl.float32)
        none = tl.zeros((SAMPLE,), tl.int64)
        for i in range(0, count, SAMPLE):
            at, mask = begin + i + lane, i + lane < count
            sums += tl.load(partial + at, mask=mask, other=0.0, cache_modifier=".cg")
            squares += tl.load(partial + programs + at, mask=mask, other=0.0, cache_modifier=".cg")
            none += tl.load(partial + 2 * programs + at, mask=mask, other=0.0, cache_modifier=".cg").to(tl.int64)
        tl.store(zeros + entry, tl.sum(none, 0))
        if LAW:
            decay_imbalance(
                table, entry, law, numbers, gain, tl.sum(sums, 0), tl.sum(squares, 0), COUPLED, PEAK, SATURATED
            )
    count_step(table, entry, arrived, numbers, ADAPTIVE, MOMENTUM)
