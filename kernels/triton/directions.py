"""Directions as Triton device functions; names and formulas are ``reference``'s.

They load, advance and store the moments, and return the update and what multiplies the strength.  ``numbers`` are
momentum, 1 - dampening, whether the buffer is new; 1 - beta1, beta2, 1 - beta2, eps, and 1 / the bias corrections.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call, attr-defined"

from __future__ import annotations

import triton
import triton.language as tl

from symopt_kernels.triton.memory import FIRST, PEAK_, SECOND, address, get, put

__all__ = ["adam", "adam_lead", "sgd", "sgd_lead", "shared_gain", "unbias"]


@triton.jit
def sgd(
    table, entry, at, mask, g, numbers,
    MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, PEAK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """``reference.sgd``."""
    return sgd_lead(table, entry, at, mask, g, numbers, MOMENTUM, NESTEROV, ALIGNED), 1.0


@triton.jit
def sgd_lead(
    table, entry, at, mask, g, numbers, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    """Its part that every weight of a group owns."""
    update = g
    if MOMENTUM:
        buffer = address(table, entry, FIRST, tl.float32, ALIGNED)
        b = get(buffer, at, mask)
        b = tl.where(numbers[2] != 0, g, numbers[0] * b + numbers[1] * g)
        put(buffer, at, b, mask)
        update = g + numbers[0] * b if NESTEROV else b
    return update


@triton.jit
def adam(
    table, entry, at, mask, g, numbers,
    MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, PEAK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """``reference.adam``."""
    m = adam_lead(table, entry, at, mask, g, numbers, MOMENTUM, NESTEROV, ALIGNED)
    second = address(table, entry, SECOND, tl.float32, ALIGNED)
    v = numbers[4] * get(second, at, mask) + numbers[5] * (g * g)
    put(second, at, v, mask)
    if PEAK:
        peak = address(table, entry, PEAK_, tl.float32, ALIGNED)
        v = tl.maximum(v, get(peak, at, mask), propagate_nan=tl.PropagateNan.ALL)
        put(peak, at, v, mask)
    gain = 1 / (tl.sqrt(v * numbers[8]) + numbers[6])
    return gain * (m * numbers[7]), gain


@triton.jit
def adam_lead(
    table, entry, at, mask, g, numbers, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    """Its part that every weight of a group owns: the first moment, an update up to one factor per group."""
    exp_avg = address(table, entry, FIRST, tl.float32, ALIGNED)
    m = get(exp_avg, at, mask)
    m = m + numbers[3] * (g - m)
    put(exp_avg, at, m, mask)
    return m


@triton.jit
def shared_gain(table, entry, at, mask, square, numbers, PEAK: tl.constexpr):
    """Advance second moments that several weights share by their mean squared gradient; the preconditioner."""
    second = address(table, entry, SECOND, tl.float32, False)
    v = numbers[4] * tl.load(second + at, mask=mask, other=0.0) + numbers[5] * square
    tl.store(second + at, v, mask=mask)
    if PEAK:
        peak = address(table, entry, PEAK_, tl.float32, False)
        v = tl.maximum(v, tl.load(peak + at, mask=mask, other=0.0), propagate_nan=tl.PropagateNan.ALL)
        tl.store(peak + at, v, mask=mask)
    return 1 / (tl.sqrt(v * numbers[8]) + numbers[6])


@triton.jit
def unbias(step, log_beta):
    """``1 / (1 - beta**step)``: by the series of expm1, because 1 - beta loses its digits in fp32."""
    x = step * log_beta
    y = 1 + x / 12
    for i in tl.static_range(10):
        y = 1 + x * y / (11 - i)
    return 1 / tl.where(x > -1, -x * y, 1 - tl.exp(x))
