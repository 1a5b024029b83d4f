"""Retractions as Triton device functions; names and formulas are ``reference``'s.

Each is passed to a kernel as a ``constexpr``, as the directions are, so that m + n functions make m * n kernels without
a branch or a call.  All compute in fp32.  ``sqrt`` and ``/`` compile to the inlined instructions ``sqrt.approx`` and
``div.full`` (1 and 2 ulp): the correctly rounded ones call a subroutine for denormals.

``law`` is lr, lr * strength inside and outside the budget, threshold, imbalance, metric_scale, imbalance_factor, and up
to what size a weight may become zero (the threshold, or infinity without a budget).
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call, attr-defined"

from __future__ import annotations

import triton
import triton.language as tl

from symopt_kernels.triton.memory import FACTOR_0, FACTOR_1, KEEP, SNAP, TINY, WIDTH, address, get, put

__all__ = ["nm", "plain", "sparse", "sparse_deep", "sparse_free"]


@triton.jit
def decays(w, gain, law, TRIMMED: tl.constexpr, COUPLED: tl.constexpr):
    """``decay`` of every weight, and whether it may become exactly zero."""
    decay = tl.where(tl.abs(w) <= law[3], law[2], law[1]) if TRIMMED else law[1] + tl.zeros_like(w)
    return decay * gain if COUPLED else decay, tl.abs(w) <= law[7]


@triton.jit
def time_scale(metric, pull, decay, scale, SATURATED: tl.constexpr):
    if SATURATED:
        return 1 / tl.maximum(metric, tl.maximum(scale, decay + 2 * pull))
    else:
        return 1 / tl.maximum(decay, 1.0)


@triton.jit
def plain(
    table, entry, at, mask, w, update, gain, law, DTYPE: tl.constexpr,
    TRIMMED: tl.constexpr, COUPLED: tl.constexpr, SATURATED: tl.constexpr, DEPTH: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """``reference.plain``."""
    return (1 - law[1]) * w - law[0] * update


@triton.jit
def pair(w, delta, decay, snaps, law, SATURATED: tl.constexpr, TRIMMED: tl.constexpr):
    """``reference.sparse``."""
    pull = tl.abs(delta)
    metric = tl.sqrt(law[4] * law[4] + (w + w) * (w + w))
    t = time_scale(metric, pull, decay, law[5], SATURATED)
    attracted = (pull < decay) & snaps
    delta = t * delta
    rho = 1 - t * decay
    new = (rho * rho + delta * delta) * w - rho * delta * metric
    if TRIMMED:  # what lives within a budget does not vanish
        gone = (tl.abs(new) < tl.minimum(tl.abs(w), law[5] * SNAP)) & (snaps == 0)
        new = tl.where(gone, w, new)
    return tl.where((tl.abs(new) <= law[5] * SNAP) & attracted, 0.0, new)


@triton.jit
def sparse(
    table, entry, at, mask, w, update, gain, law, DTYPE: tl.constexpr,
    TRIMMED: tl.constexpr, COUPLED: tl.constexpr, SATURATED: tl.constexpr, DEPTH: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """``reference.sparse``."""
    decay, snaps = decays(w, gain, law, TRIMMED, COUPLED)
    return pair(w, law[0] * update, decay, snaps, law, SATURATED, TRIMMED)


@triton.jit
def nm(
    table, entry, at, mask, w, update, gain, law, DTYPE: tl.constexpr,
    TRIMMED: tl.constexpr, COUPLED: tl.constexpr, SATURATED: tl.constexpr, DEPTH: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """:func:`sparse` with all but the ``keep`` largest of every DEPTH neighbours outside; of equals the first stay."""
    keep = tl.load(table + entry * WIDTH + KEEP).to(tl.int32)
    size = tl.reshape(tl.abs(w), (w.shape[0] // DEPTH, DEPTH))
    place = tl.arange(0, DEPTH)
    mine, other = tl.expand_dims(size, 2), tl.expand_dims(size, 1)
    earlier = (place[None, :] < place[:, None])[None, :, :]
    ahead = tl.sum(((other > mine) | ((other == mine) & earlier)).to(tl.int32), 2)
    ahead = tl.reshape(ahead, (w.shape[0],))
    chosen = law[3] >= 0  # else nothing is outside yet
    decay = tl.where(ahead >= tl.where(chosen, keep, DEPTH), law[2], law[1])
    snaps = ahead >= tl.where(chosen, keep, DEPTH)
    return pair(w, law[0] * update, decay, snaps, law, SATURATED, TRIMMED)


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
    table, entry, at, mask, w, update, gain, law, DTYPE: tl.constexpr,
    TRIMMED: tl.constexpr, COUPLED: tl.constexpr, SATURATED: tl.constexpr, DEPTH: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """``reference.sparse_deep``.  Near a zero the root is 0 in the product with ``w`` whatever its rounding."""
    decay, snaps = decays(w, gain, law, TRIMMED, COUPLED)
    delta = law[0] * update
    a = tl.exp2(tl.log2(tl.maximum(tl.abs(w), TINY)) * (1 / DEPTH))
    lever = power(a, DEPTH - 2)
    pull = tl.abs(delta) * lever
    t = time_scale(DEPTH * power(a, 2 * (DEPTH - 1)), pull, decay, law[5], SATURATED)
    attracted = (pull < decay) & snaps
    sign = tl.where(w > 0, 1.0, tl.where(w < 0, -1.0, 0.0))
    rest = 1 - t * decay - sign * (t * delta) * lever
    new = w * power(tl.maximum(rest, 0.0, propagate_nan=tl.PropagateNan.ALL), DEPTH) + 0 * delta
    return tl.where((tl.abs(new) <= weight_scale(law[5], DEPTH) * SNAP) & attracted, 0.0, new)


@triton.jit
def sparse_free(
    table, entry, at, mask, w, update, gain, law, DTYPE: tl.constexpr,
    TRIMMED: tl.constexpr, COUPLED: tl.constexpr, SATURATED: tl.constexpr, DEPTH: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """``reference.sparse_free`` at depth 2 on stored factors, split anew where somebody changed the weight."""
    places = address(table, entry, FACTOR_0, tl.float32, ALIGNED), address(table, entry, FACTOR_1, tl.float32, ALIGNED)
    a, b = get(places[0], at, mask), get(places[1], at, mask)
    c = law[4]
    stale = (a * b).to(DTYPE).to(tl.float32) != w
    heavy = tl.sqrt((c + tl.sqrt(c * c + 4 * w * w)) / 2)
    a = tl.where(stale, heavy, a)
    b = tl.where(stale, tl.where(heavy > 0, w / tl.maximum(heavy, TINY), 0.0), b)
    stored_a, stored_b = a, b
    if law[6] >= 0:  # a**2 - b**2 times the given factor, at the same product
        product, gap = tl.abs(a * b), law[6] * ((a - b) * (a + b))
        high = tl.sqrt((tl.abs(gap) + tl.sqrt(gap * gap + 4 * product * product)) / 2)
        low = tl.where(high > 0, product / tl.maximum(high, TINY), 0.0)
        new_a, new_b = tl.where(gap >= 0, high, low), tl.where(gap >= 0, low, high)
        a, b = tl.where(a < 0, -new_a, new_a), tl.where(b < 0, -new_b, new_b)
    decay, snaps = decays(w, gain, law, TRIMMED, COUPLED)
    delta = law[0] * update
    pull = tl.abs(delta)
    t = time_scale(a * a + b * b, pull, decay, law[5], SATURATED)
    attracted = (pull < decay) & snaps
    delta = t * delta
    rho = 1 - t * decay
    u, v = rho * a - delta * b, rho * b - delta * a
    new = u * v
    # A product rounds, so where no factor moved nothing is written: a step with lr 0 changes no bit.
    still = (u == a) & (v == b)
    u, v, new = tl.where(still, stored_a, u), tl.where(still, stored_b, v), tl.where(still, w, new)
    if SATURATED:
        snapped = (tl.abs(new) <= law[5] * SNAP) & attracted
        light = tl.abs(u) <= tl.abs(v)
        u, v = tl.where(snapped & light, 0.0, u), tl.where(snapped & (light == 0), 0.0, v)
        new = tl.where(snapped, 0.0, new)
    put(places[0], at, u, mask)
    put(places[1], at, v, mask)
    return new
