"""Retractions of single weights as Triton device functions; names and formulas are ``reference``'s.

Each is passed to a kernel as a ``constexpr``, as the directions are, so that m + n functions make m * n kernels without
a branch or a call.  All compute in fp32.  ``sqrt`` and ``/`` compile to the inlined instructions ``sqrt.approx`` and
``div.full`` (1 and 2 ulp): the correctly rounded ones call a subroutine for denormals.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call, attr-defined"

from __future__ import annotations

import triton
import triton.language as tl

from symopt_kernels.triton.constants import SNAP, TINY
from symopt_kernels.triton.memory import FACTOR_0, FACTOR_1, PATTERN_N, address, field_i32, load_f32, store

__all__ = ["nm", "plain", "sparse", "sparse_deep", "sparse_free", "time_scale"]


@triton.jit
def decay_of(w, gain, constants, BUDGETED: tl.constexpr, COUPLED: tl.constexpr):
    """``decay`` of every weight, and whether it may become exactly zero."""
    if BUDGETED:
        decay = tl.where(tl.abs(w) <= constants.threshold, constants.decay_pruned, constants.decay_kept)
    else:
        decay = constants.decay_kept + tl.zeros_like(w)
    return decay * gain if COUPLED else decay, tl.abs(w) <= constants.snap_limit


@triton.jit
def time_scale(metric, pull, decay, scale, SATURATED: tl.constexpr):
    """``reference.time_scale``."""
    if SATURATED:
        return 1 / tl.maximum(metric, tl.maximum(scale, decay + 2 * pull))
    else:
        return 1 / tl.maximum(decay, 1.0)


@triton.jit
def plain(
    table, row, at, mask, w, update, gain, constants, DTYPE: tl.constexpr,
    BUDGETED: tl.constexpr, COUPLED: tl.constexpr, SATURATED: tl.constexpr, DEPTH: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """``reference.plain``."""
    return (1 - constants.decay_kept) * w - constants.lr * update


@triton.jit
def two_factors(w, delta, decay, snaps, constants, SATURATED: tl.constexpr, BUDGETED: tl.constexpr):
    """``reference.sparse`` with the decay of every weight, and which may become zero, given."""
    c, scale = constants.imbalance, constants.metric_scale
    pull = tl.abs(delta)
    metric = tl.sqrt(c * c + (w + w) * (w + w))
    t = time_scale(metric, pull, decay, scale, SATURATED)
    attracted = (pull < decay) & snaps
    delta = t * delta
    rho = 1 - t * decay
    new = (rho * rho + delta * delta) * w - rho * delta * metric
    if BUDGETED:  # what lives within a budget does not vanish
        gone = (tl.abs(new) < tl.minimum(tl.abs(w), scale * SNAP)) & (snaps == 0)
        new = tl.where(gone, w, new)
    return tl.where((tl.abs(new) <= scale * SNAP) & attracted, 0.0, new)


@triton.jit
def sparse(
    table, row, at, mask, w, update, gain, constants, DTYPE: tl.constexpr,
    BUDGETED: tl.constexpr, COUPLED: tl.constexpr, SATURATED: tl.constexpr, DEPTH: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """``reference.sparse``."""
    decay, snaps = decay_of(w, gain, constants, BUDGETED, COUPLED)
    return two_factors(w, constants.lr * update, decay, snaps, constants, SATURATED, BUDGETED)


@triton.jit
def nm(
    table, row, at, mask, w, update, gain, constants, DTYPE: tl.constexpr,
    BUDGETED: tl.constexpr, COUPLED: tl.constexpr, SATURATED: tl.constexpr, DEPTH: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """:func:`sparse` with all but the N largest of every M = DEPTH neighbours pruned; of equals the first stay."""
    n = field_i32(table, row, PATTERN_N)
    size = tl.reshape(tl.abs(w), (w.shape[0] // DEPTH, DEPTH))
    place = tl.arange(0, DEPTH)
    own, other = tl.expand_dims(size, 2), tl.expand_dims(size, 1)
    earlier = (place[None, :] < place[:, None])[None, :, :]
    ahead = tl.sum(((other > own) | ((other == own) & earlier)).to(tl.int32), 2)
    ahead = tl.reshape(ahead, (w.shape[0],))
    chosen = constants.threshold >= 0  # else nothing is pruned yet
    decay = tl.where(ahead >= tl.where(chosen, n, DEPTH), constants.decay_pruned, constants.decay_kept)
    snaps = ahead >= tl.where(chosen, n, DEPTH)
    return two_factors(w, constants.lr * update, decay, snaps, constants, SATURATED, BUDGETED)


@triton.jit
def power(x, N: tl.constexpr):
    """``x**N`` for a whole number N >= 0."""
    y = tl.zeros_like(x) + 1.0
    for _ in tl.static_range(N):
        y = y * x
    return y


@triton.jit
def weight_scale(scale, DEPTH: tl.constexpr):
    """``reference.weight_scale``."""
    return 2 * tl.exp2(tl.log2(scale / DEPTH) * (DEPTH / (2 * (DEPTH - 1))))


@triton.jit
def sparse_deep(
    table, row, at, mask, w, update, gain, constants, DTYPE: tl.constexpr,
    BUDGETED: tl.constexpr, COUPLED: tl.constexpr, SATURATED: tl.constexpr, DEPTH: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """``reference.sparse_deep``.  Near a zero the root is 0 in the product with ``w`` whatever its rounding."""
    decay, snaps = decay_of(w, gain, constants, BUDGETED, COUPLED)
    delta, scale = constants.lr * update, constants.metric_scale
    a = tl.exp2(tl.log2(tl.maximum(tl.abs(w), TINY)) * (1 / DEPTH))
    lever = power(a, DEPTH - 2)
    pull = tl.abs(delta) * lever
    t = time_scale(DEPTH * power(a, 2 * (DEPTH - 1)), pull, decay, scale, SATURATED)
    attracted = (pull < decay) & snaps
    sign = tl.where(w > 0, 1.0, tl.where(w < 0, -1.0, 0.0))
    rest = 1 - t * decay - sign * (t * delta) * lever
    new = w * power(tl.maximum(rest, 0.0, propagate_nan=tl.PropagateNan.ALL), DEPTH) + 0 * delta
    return tl.where((tl.abs(new) <= weight_scale(scale, DEPTH) * SNAP) & attracted, 0.0, new)


@triton.jit
def sparse_free(
    table, row, at, mask, w, update, gain, constants, DTYPE: tl.constexpr,
    BUDGETED: tl.constexpr, COUPLED: tl.constexpr, SATURATED: tl.constexpr, DEPTH: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """``reference.sparse_free`` at depth 2 on stored factors, split anew where somebody changed the weight."""
    places = address(table, row, FACTOR_0, tl.float32, ALIGNED), address(table, row, FACTOR_1, tl.float32, ALIGNED)
    a, b = load_f32(places[0], at, mask), load_f32(places[1], at, mask)
    c, scale = constants.imbalance, constants.metric_scale
    stale = (a * b).to(DTYPE).to(tl.float32) != w
    heavy = tl.sqrt((c + tl.sqrt(c * c + 4 * w * w)) / 2)
    a = tl.where(stale, heavy, a)
    b = tl.where(stale, tl.where(heavy > 0, w / tl.maximum(heavy, TINY), 0.0), b)
    stored_a, stored_b = a, b
    if constants.imbalance_factor >= 0:  # a**2 - b**2 times the given factor, at the same product
        product, gap = tl.abs(a * b), constants.imbalance_factor * ((a - b) * (a + b))
        high = tl.sqrt((tl.abs(gap) + tl.sqrt(gap * gap + 4 * product * product)) / 2)
        low = tl.where(high > 0, product / tl.maximum(high, TINY), 0.0)
        new_a, new_b = tl.where(gap >= 0, high, low), tl.where(gap >= 0, low, high)
        a, b = tl.where(a < 0, -new_a, new_a), tl.where(b < 0, -new_b, new_b)
    decay, snaps = decay_of(w, gain, constants, BUDGETED, COUPLED)
    delta = constants.lr * update
    pull = tl.abs(delta)
    t = time_scale(a * a + b * b, pull, decay, scale, SATURATED)
    attracted = (pull < decay) & snaps
    delta = t * delta
    rho = 1 - t * decay
    u, v = rho * a - delta * b, rho * b - delta * a
    new = u * v
    # A product rounds, so where no factor moved nothing is written: a step with lr 0 changes no bit.
    still = (u == a) & (v == b)
    u, v, new = tl.where(still, stored_a, u), tl.where(still, stored_b, v), tl.where(still, w, new)
    if SATURATED:
        snapped = (tl.abs(new) <= scale * SNAP) & attracted
        light = tl.abs(u) <= tl.abs(v)
        u, v = tl.where(snapped & light, 0.0, u), tl.where(snapped & (light == 0), 0.0, v)
        new = tl.where(snapped, 0.0, new)
    store(places[0], at, u, mask)
    store(places[1], at, v, mask)
    return new
