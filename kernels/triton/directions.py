"""Directions as Triton device functions; names and formulas are ``reference``'s.

They load, advance and store the moments, and return the update and what multiplies the strength.  Of a direction whose
second moment several weights share, the part that every weight has for itself is a function of its own (``lead``): the
first moment, and the update up to one factor per gate.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call, attr-defined"

from __future__ import annotations

import triton
import triton.language as tl

from symopt_kernels.triton.memory import FIRST, PEAK_, SECOND, address, load_f32, store

__all__ = ["adam", "adam_lead", "adamw", "advance_second", "lion", "sgd", "sgd_lead"]


@triton.jit
def sgd(
    table, row, at, mask, g, direction,
    MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, PEAK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """``reference.sgd``."""
    return sgd_lead(table, row, at, mask, g, direction, MOMENTUM, NESTEROV, ALIGNED), 1.0


@triton.jit
def sgd_lead(
    table, row, at, mask, g, direction, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    """The whole update: SGD has no second moment."""
    update = g
    if MOMENTUM:
        buffer = address(table, row, FIRST, tl.float32, ALIGNED)
        b = load_f32(buffer, at, mask)
        b = tl.where(direction.fresh != 0, g, direction.momentum * b + direction.one_minus_dampening * g)
        store(buffer, at, b, mask)
        update = g + direction.momentum * b if NESTEROV else b
    return update


@triton.jit
def adam(
    table, row, at, mask, g, direction,
    MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, PEAK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """``reference.adam``."""
    m = adam_lead(table, row, at, mask, g, direction, MOMENTUM, NESTEROV, ALIGNED)
    gain = advance_second(table, row, at, mask, g * g, direction, PEAK, ALIGNED)
    return gain * (m * direction.unbias1), gain


adamw = adam


@triton.jit
def adam_lead(
    table, row, at, mask, g, direction, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    """The first moment."""
    exp_avg = address(table, row, FIRST, tl.float32, ALIGNED)
    m = load_f32(exp_avg, at, mask)
    m = m + direction.one_minus_beta1 * (g - m)
    store(exp_avg, at, m, mask)
    return m


@triton.jit
def advance_second(table, row, at, mask, square, direction, PEAK: tl.constexpr, ALIGNED: tl.constexpr):
    """Advance second moments by (mean) squared gradients; the preconditioner."""
    second = address(table, row, SECOND, tl.float32, ALIGNED)
    v = direction.beta2 * load_f32(second, at, mask) + direction.one_minus_beta2 * square
    store(second, at, v, mask)
    if PEAK:
        peak = address(table, row, PEAK_, tl.float32, ALIGNED)
        v = tl.maximum(v, load_f32(peak, at, mask), propagate_nan=tl.PropagateNan.ALL)
        store(peak, at, v, mask)
    return 1 / (tl.sqrt(v * direction.unbias2) + direction.eps)


@triton.jit
def lion(
    table, row, at, mask, g, direction,
    MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, PEAK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """``reference.lion``: the sign of ``beta1 m + (1 - beta1) g``, NaN where not finite; ``m`` forgets by beta2."""
    exp_avg = address(table, row, FIRST, tl.float32, ALIGNED)
    m = load_f32(exp_avg, at, mask)
    lead = direction.beta1 * m + direction.one_minus_beta1 * g
    store(exp_avg, at, direction.beta2 * m + direction.one_minus_beta2 * g, mask)
    return tl.where(lead > 0, 1.0, tl.where(lead < 0, -1.0, 0.0)) + lead * 0.0, 1.0
