"""Retractions of single weights: plain, sparse at any depth, and sparse with factors as state."""

from __future__ import annotations

import torch
from torch import Tensor

from symopt_kernels.reference.gauge import (
    SNAP,
    partial_products,
    product,
    sum_of_products,
    sum_of_squares,
    time_scale,
    weight_scale,
)

__all__ = [
    "nm_pruned_mask",
    "plain",
    "rebalance",
    "sparse",
    "sparse_deep",
    "sparse_free",
]


def plain(w: Tensor, delta: Tensor, decay: Tensor | float) -> Tensor:
    """No constraint: ``w' = rho w - delta``."""
    return (1 - decay) * w - delta


def sparse(
    w: Tensor,
    delta: Tensor,
    decay: Tensor | float,
    imbalance: Tensor,
    metric_scale: Tensor,
    *,
    saturated: bool = True,
    snaps: Tensor | bool = True,
) -> Tensor:
    """``w = u * v`` in the fixed gauge ``u**2 - v**2 = imbalance``: one gradient step on both factors at once,

        w' = (rho**2 + delta**2) w - rho delta sqrt(c**2 + 4 w**2),

    then exact zeros: ``|w'| <= SNAP * metric_scale`` while ``|delta| < decay`` (attracted), where ``snaps``.  A budget
    gives each weight one of two values of ``decay``, and ``snaps`` only where it is that of a pruned weight; a kept
    weight stays where it is instead of shrinking below that size.
    """
    metric = (imbalance * imbalance + 4 * w * w).sqrt()
    t = time_scale(metric, delta, decay, metric_scale if saturated else None)
    attracted = (delta.abs() < decay) & snaps
    delta, rho = t * delta, 1 - t * decay
    new = (rho * rho + delta * delta) * w - rho * delta * metric
    if isinstance(snaps, Tensor):
        new = torch.where(~snaps & (new.abs() < torch.minimum(w.abs(), SNAP * metric_scale)), w, new)
    return torch.where((new.abs() <= SNAP * metric_scale) & attracted, 0.0, new)


def sparse_deep(
    w: Tensor,
    delta: Tensor,
    decay: Tensor | float,
    metric_scale: Tensor,
    depth: int,
    *,
    saturated: bool = True,
    snaps: Tensor | bool = True,
) -> Tensor:
    """``w = u_1 * ... * u_D`` with all ``|u_i| = a = |w|**(1/D)`` (balanced fixed gauge):

        a' = rho a - sgn(w) delta a**(D-1),   w' = sgn(w) max(a', 0)**D = w max(rho - sgn(w) delta a**(D-2), 0)**D.

    Signs are locked and zeros absorb; equal to the factor step wherever ``a' > 0``.
    """
    a = w.abs() ** (1 / depth)
    lever = a ** (depth - 2)
    t = time_scale(depth * a ** (2 * (depth - 1)), delta * lever, decay, metric_scale if saturated else None)
    delta, decay = t * delta, t * decay
    new = w * (1 - decay - w.sign() * delta * lever).clamp(min=0) ** depth
    new = new + 0 * delta  # the clamp would turn an infinite gradient into a quiet zero
    snapped = (new.abs() <= SNAP * weight_scale(metric_scale, depth)) & (delta.abs() * lever < decay) & snaps
    return torch.where(snapped, 0.0, new)


def sparse_free(
    factors: tuple[Tensor, ...],
    delta: Tensor,
    decay: Tensor | float,
    metric_scale: Tensor,
    *,
    saturated: bool = True,
    snaps: Tensor | bool = True,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """``w = u_1 * ... * u_D`` with the factors as state (free gauge): ``u_i' = rho u_i - delta prod_{j != i} u_j``.

    Returns ``w', factors'``.  Without the time scale this is the literal method, step for step, and nothing is
    snapped; with it, a weight that snaps keeps its large factors and may revive through them.
    """
    others = partial_products(factors)
    t = time_scale(sum_of_squares(others), _drive(factors, delta), decay, metric_scale if saturated else None)
    delta, decay = t * delta, t * decay
    new = tuple((1 - decay) * u - delta * rest for u, rest in zip(factors, others, strict=True))
    w = product(new)
    if not saturated:
        return w, new
    snapped = (w.abs() <= SNAP * weight_scale(metric_scale, len(new))) & (_drive(new, delta) < decay) & snaps
    light = torch.stack([u.abs() for u in new]).argmin(0)
    new = tuple(torch.where(snapped & (light == i), 0.0, u) for i, u in enumerate(new))
    return torch.where(snapped, 0.0, w), new


def rebalance(factors: tuple[Tensor, ...], imbalance_factor: float) -> tuple[Tensor, ...]:
    """The same weight in a gauge where every difference ``u_i**2 - u_j**2`` is ``imbalance_factor`` times what it was.

    The squares become ``m + imbalance_factor (u_i**2 - mean)`` with the one m that leaves their product ``w**2``;
    Newton from the mean, which lies above it because shrinking the differences raises a product, so the descent is
    monotone.
    """
    if imbalance_factor == 0:
        size = product(factors).abs() ** (1 / len(factors))
        return tuple(torch.where(u < 0, -size, size) for u in factors)
    if len(factors) == 2:  # in closed form, which keeps the digits of a light factor
        a, b = factors
        size, c = (a * b).abs(), imbalance_factor * ((a - b) * (a + b))
        high = ((c.abs() + (c * c + 4 * size * size).sqrt()) / 2).sqrt()
        low = size / high.clamp(min=torch.finfo(a.dtype).tiny)
        pair = torch.where(c >= 0, high, low), torch.where(c >= 0, low, high)
        return tuple(torch.where(u < 0, -x, x) for u, x in zip(factors, pair, strict=True))
    squares = torch.stack([u * u for u in factors])
    mean, target = squares.mean(0), squares.prod(0)
    differences = imbalance_factor * (squares - mean)
    m = mean
    for _ in range(32):
        shifted = (m + differences).clamp(min=0)
        slope = sum_of_products(shifted)
        step = (shifted.prod(0) - target) / slope.clamp(min=torch.finfo(mean.dtype).tiny)
        m = m - step.clamp(min=0)
    # At a zero the root may be a double one, where Newton only halves: there the squares just shrink.
    new = torch.where(target == 0, imbalance_factor * (squares - squares.amin(0)), m + differences)
    return tuple(torch.where(u < 0, -size, size) for u, size in zip(factors, new.clamp(min=0).sqrt(), strict=True))


def nm_pruned_mask(w: Tensor, pattern_n: int, pattern_m: int) -> Tensor:
    """N:M: True at all but the n largest of every m neighbouring inputs; of equal ones the first stay."""
    size = w.detach().abs().unflatten(1, (-1, pattern_m))
    order = size.argsort(stable=True, dim=2, descending=True)
    pruned: Tensor = order.argsort(2) >= pattern_n
    return pruned.flatten(1, 2)


def _drive(factors: tuple[Tensor, ...], delta: Tensor) -> Tensor:
    """How fast the two smallest factors feed each other: ``|delta|`` times all the others."""
    magnitudes = torch.stack([u.abs() for u in factors]).sort(0).values
    return delta.abs() * magnitudes[2:].prod(0)
