"""The numbers that all weights of a parameter share in one step, each by its name."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call, attr-defined"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from symopt_kernels.reference import gauge
from symopt_kernels.triton.memory import (
    BUDGET,
    HAS_MOMENTUM,
    IMBALANCE,
    METRIC_SCALE,
    STEP,
    field,
    load_f64_as_f32,
    scalar,
    strength,
)

__all__ = ["DirectionConstants", "LaunchSettings", "StepConstants", "Value", "prepare", "unbias"]

# Constants stand on the right of a product: before Triton 3.9 its interpreter has none of a constexpr and a tensor.
SNAP = tl.constexpr(gauge.SNAP)
MIN_IMBALANCE_FACTOR = tl.constexpr(gauge.MIN_IMBALANCE_FACTOR)
SAMPLE = tl.constexpr(gauge.SAMPLE)
TINY = tl.constexpr(1.1754943508222875e-38)
LARGEST = tl.constexpr(3.4028234663852886e38)


Value = Any
"""A number, or what a kernel has in its place: a scalar or a block of them."""

ADDRESSES = 3
"""That :class:`LaunchSettings` begins with."""


class LaunchSettings(NamedTuple):
    """Numbers of one launch; the first are addresses of fp32 numbers on the device, or None."""

    lr_at: Value
    found_inf: Value
    grad_scale: Value
    lr: Value
    beta1: Value
    one_minus_beta1: Value
    beta2: Value
    one_minus_beta2: Value
    log_beta1: Value
    log_beta2: Value
    eps: Value
    momentum: Value
    one_minus_dampening: Value
    amplify: Value
    """(1 - dampening) / (1 - momentum): the strength is amplified as momentum amplifies the gradient."""
    weight_decay: Value
    imbalance_factor: Value
    """Below zero: that of the automatic law."""


class DirectionConstants(NamedTuple):
    """What a direction needs; ``fresh`` is nonzero while the momentum buffer holds nothing, ``unbias`` are
    ``1 / (1 - beta**step)``."""

    momentum: Value
    one_minus_dampening: Value
    fresh: Value
    beta1: Value
    one_minus_beta1: Value
    beta2: Value
    one_minus_beta2: Value
    eps: Value
    unbias1: Value
    unbias2: Value
    step: Value


class StepConstants(NamedTuple):
    """What a retraction needs."""

    lr: Value
    decay_kept: Value
    """lr * strength, of what lives within a budget if there is one."""
    decay_pruned: Value
    threshold: Value
    imbalance: Value
    metric_scale: Value
    imbalance_factor: Value
    snap_limit: Value
    """The largest size that may become zero: the threshold of a budget, or infinity."""


@triton.jit
def unbias(step, log_beta):
    """``1 / (1 - beta**step)``: by the series of expm1, because 1 - beta loses its digits in fp32."""
    x = step * log_beta
    y = 1 + x / 12
    for i in tl.static_range(10):
        y = 1 + x * y / (11 - i)
    return 1 / tl.where(x > -1, -x * y, 1 - tl.exp(x))


@triton.jit
def prepare(
    table, per_step, row, given,
    ADAPTIVE: tl.constexpr, MOMENTUM: tl.constexpr, CONSTRAINED: tl.constexpr, DECOUPLED: tl.constexpr,
    MAXIMIZE: tl.constexpr, BUDGETED: tl.constexpr,
):  # fmt: skip
    """:class:`DirectionConstants`, :class:`StepConstants`, and the factor of the gradient."""
    lr = given.lr
    if given.lr_at is not None:
        lr = tl.load(given.lr_at)
    fresh, step, unbias1, unbias2 = 0, 0.0, 1.0, 1.0
    if MOMENTUM:
        place = field(table, row, HAS_MOMENTUM)
        if place != 0:
            fresh = (tl.load(place.to(tl.pointer_type(tl.int32))) == 0).to(tl.int32)
    if ADAPTIVE:
        step = scalar(table, row, STEP) + 1
        unbias1, unbias2 = unbias(step, given.log_beta1), unbias(step, given.log_beta2)
    direction = DirectionConstants(
        given.momentum, given.one_minus_dampening, fresh, given.beta1, given.one_minus_beta1,
        given.beta2, given.one_minus_beta2, given.eps, unbias1, unbias2, step,
    )  # fmt: skip
    kept, pruned, threshold, imbalance_factor, imbalance, scale = 0.0, 0.0, -1.0, given.imbalance_factor, 0.0, 1.0
    largest_decay = float("inf")
    if CONSTRAINED:
        imbalance, scale = scalar(table, row, IMBALANCE), scalar(table, row, METRIC_SCALE)
        if BUDGETED:
            budget = field(table, row, BUDGET)
            kept, pruned = load_f64_as_f32(budget), load_f64_as_f32(budget + 8)
            threshold, imbalance_factor = load_f64_as_f32(budget + 16), load_f64_as_f32(budget + 24)
            largest_decay = load_f64_as_f32(budget + 32)
        else:
            kept = strength(per_step, row)
        kept, pruned = lr * kept * given.amplify, tl.minimum(lr * pruned, largest_decay) * given.amplify
    elif DECOUPLED:
        kept = lr * given.weight_decay
    grad_factor = -1.0 if MAXIMIZE else 1.0
    if given.grad_scale is not None:
        grad_factor = grad_factor / tl.load(given.grad_scale)
    snap_limit = threshold if BUDGETED else float("inf")
    constants = StepConstants(lr, kept, pruned, threshold, imbalance, scale, imbalance_factor, snap_limit)
    return direction, constants, grad_factor
