"""The fixed gauge that every retraction shares: constants, the time scale and the law of the imbalance."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    *("AUTO_STRENGTH_MARGIN", "CRITICAL_EMA", "CRITICAL_FLOOR", "MIN_IMBALANCE_FACTOR", "SAMPLE", "SNAP"),
    *("imbalance_law", "math_dtype", "next_imbalance", "partial_products", "product", "sum_of_products"),
    *("sum_of_squares", "time_scale", "weight_scale"),
]

SNAP = 1e-6
"""A weight below ``SNAP * metric_scale`` that is still being attracted is set to exactly zero."""

MIN_IMBALANCE_FACTOR = 0.98
"""Least factor of the imbalance in one step of its automatic law."""

SAMPLE = 1024
"""Units from which the law of the imbalance takes its quantile, at least."""

AUTO_STRENGTH_MARGIN = 2.0
"""An automatic strength is this times the running estimate of the critical one."""

CRITICAL_EMA = 0.999
"""Factor per step by which the running estimate forgets: as slowly as Adam's second moment, or the strength behind it
would fade with the gradient before the plane is reached."""

CRITICAL_FLOOR = 0.25
"""Least estimate, in units of a typical gradient, for a plane that no gradient leaves."""


def math_dtype(w: Tensor) -> torch.dtype:
    """The precision in which ``w`` is stepped and its state kept."""
    return torch.float32 if w.dtype in (torch.float16, torch.bfloat16) else w.dtype


def time_scale(metric: Tensor, pull: Tensor, decay: Tensor | float, metric_scale: Tensor | None) -> Tensor:
    """The time scale ``t = 1 / max(metric, metric_scale, decay + 2 |pull|)``, or 1 without a ``metric_scale``.

    Above ``metric_scale`` a weight moves as under the plain optimizer; without it steps would be a fixed *factor* of
    the weight and large weights blow up.  ``t (decay + |pull|) <= 1`` keeps factors from overshooting zero, where decay
    and gradient agree and the weight still would not shrink; the 2 keeps a gradient alone from hitting it.  Without the
    time scale, which is the factor step to the letter, only ``t decay <= 1`` (rho >= 0).  Both scale delta and decay
    alike, so fixed points stay.
    """
    if metric_scale is None:
        return 1 / (torch.ones_like(metric) * decay).clamp(min=1)
    return 1 / torch.maximum(metric, torch.maximum(metric_scale, decay + 2 * pull.abs()))


def weight_scale(metric_scale: Tensor, depth: int) -> Tensor:
    """The weight whose metric is ``metric_scale``, times 2, so that depth 2 gives ``metric_scale`` itself."""
    return 2 * (metric_scale / depth) ** (depth / (2 * (depth - 1)))


def imbalance_law(
    imbalance: Tensor, decay: Tensor | float, metric_scale: Tensor, size: Tensor, *, saturated: bool = True
) -> Tensor:
    """One step of the imbalance's own decay, and 0 below ``SNAP * metric_scale``.

    Factors would have one imbalance and rate per coordinate; one number per tensor needs one rate.  If c dies before
    the slow coordinates have settled, zeros freeze in the wrong places, so ``c' = rho**4 c`` takes rho from the slow
    end: of ``decay`` a low quantile (from a strided sample), and of the time scale that of the size the tensor's mass
    has *now*, ``sum size**2 / sum size`` over the units, because weights may have to grow far beyond their initial
    ``metric_scale``.  At most 2 % per step, however large the steps: the weights need some hundred to settle in any
    case.  (Factors alone have rho**2 and no bound; measured in docs/imbalance.md.)
    """
    if isinstance(decay, Tensor):
        flat = decay.flatten()
        sample = flat[:: max(1, flat.numel() // SAMPLE)]
        decay = sample.kthvalue(1 + sample.numel() // 10).values
    if saturated:
        size = size.nan_to_num(0.0, 0.0, 0.0)  # a weight that is lost must not take its tensor with it
        typical = 2 * (size * size).sum() / size.sum().clamp(min=torch.finfo(size.dtype).tiny)
        decay = decay / torch.maximum(metric_scale, typical)
    new = imbalance * ((torch.ones_like(imbalance) - decay).clamp(min=0) ** 4).clamp(min=MIN_IMBALANCE_FACTOR)
    return torch.where(new <= SNAP * metric_scale, 0.0, new)


def product(factors: tuple[Tensor, ...], out: Tensor | None = None) -> Tensor:
    """Elementwise product, left to right."""
    w = factors[0]
    for u in factors[1:]:
        w = torch.mul(w, u, out=out)
    return w


def partial_products(factors: tuple[Tensor, ...]) -> list[Tensor]:
    """``prod_{j != i} u_j`` for every i, without dividing (a factor may be zero)."""
    return [product(factors[:i] + factors[i + 1 :]) for i in range(len(factors))]


def sum_of_squares(parts: list[Tensor]) -> Tensor:
    """The metric of a product: the squared length of its gradient in the factors."""
    total = parts[0] * parts[0]
    for part in parts[1:]:
        total = total + part * part
    return total


def sum_of_products(parts: Tensor) -> Tensor:
    """Derivative of the product of ``parts + m`` in m, at 0: the sum over i of the product of all others."""
    return torch.stack(partial_products(tuple(parts))).sum(0)


def next_imbalance(
    imbalance: Tensor,
    factor: Tensor | float | None,
    decay: Tensor | float,
    metric_scale: Tensor,
    size: Tensor,
    *,
    saturated: bool = True,
) -> Tensor:
    """The imbalance times a given ``factor``, 0 below ``SNAP * metric_scale``; by :func:`imbalance_law` without one."""
    if factor is None:
        return imbalance_law(imbalance, decay, metric_scale, size, saturated=saturated)
    new = imbalance * factor
    return torch.where(new <= SNAP * metric_scale, 0.0, new)
