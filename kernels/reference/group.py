"""Retractions of groups of weights that share one gate."""

from __future__ import annotations

import torch
from torch import Tensor

from symopt_kernels.groups import Groups
from symopt_kernels.reference.gauge import SNAP, time_scale, weight_scale

__all__ = [
    "group",
    "group_deep",
]


def group(
    w: Tensor,
    delta: Tensor,
    decay: Tensor | float,
    imbalance: Tensor,
    metric_scale: Tensor,
    groups: Groups,
    *,
    saturated: bool = True,
    snaps: Tensor | bool = True,
) -> Tensor:
    """``w_g = s_g d_g`` (scalar gate ``s_g``) in the fixed gauge ``s_g**2 - ||d_g||**2 = imbalance``:

        w_g' = (rho - <delta, w_g> / s**2) (rho w_g - s**2 delta),   s**2 = (c + sqrt(c**2 + 4 ||w_g||**2)) / 2,

    then exact zeros as in :func:`sparse`, by the norm of the group.  ``decay`` is a number or one value per group.
    """
    squares = groups.sum(w * w)
    metric = (imbalance * imbalance + 4 * squares).sqrt()
    pull = groups.sum(delta * delta).sqrt()
    t = time_scale(metric, pull, decay, metric_scale if saturated else None)
    delta, rho = groups.scale(t, delta), 1 - t * decay
    gate_sq = (imbalance + metric) / 2
    radial = groups.sum(delta * w) / gate_sq.clamp(min=torch.finfo(w.dtype).tiny)
    shared = rho - radial
    new = groups.scale(shared * rho, w) - groups.scale(shared * gate_sq, delta)
    size = groups.sum(new * new).sqrt()
    small = size <= SNAP * metric_scale
    if isinstance(snaps, Tensor):
        stays = small & ~snaps & (size < squares.sqrt())
        new = torch.where(groups.expand(stays).reshape(w.shape), w, new)
    return torch.where(groups.expand(small & (pull < decay) & snaps).reshape(w.shape), 0.0, new)


def group_deep(
    w: Tensor,
    delta: Tensor,
    decay: Tensor | float,
    metric_scale: Tensor,
    groups: Groups,
    depth: int,
    *,
    saturated: bool = True,
    snaps: Tensor | bool = True,
) -> Tensor:
    """``w_g = s_1 ... s_{D-1} d_g`` with all ``|s_i| = ||d_g|| = ||w_g||**(1/D)`` (balanced fixed gauge):

    w_g' = max(rho - <delta, w_g> / s**2, 0)**(D-1) (rho w_g - s**(2D-2) delta),   s = ||w_g||**(1/D).
    """
    norm = groups.sum(w * w).sqrt()
    s_sq = norm ** (2 / depth)
    lever, bulk = s_sq ** (depth / 2 - 1), s_sq ** (depth - 1)
    pull = groups.sum(delta * delta).sqrt() * lever
    t = time_scale(depth * bulk, pull, decay, metric_scale if saturated else None)
    delta, decay = groups.scale(t, delta), t * decay
    rho = 1 - decay
    gate = (rho - groups.sum(delta * w) / s_sq.clamp(min=torch.finfo(w.dtype).tiny)).clamp(min=0) ** (depth - 1)
    new = groups.scale(gate * rho, w) - groups.scale(gate * bulk, delta)
    small = groups.sum(new * new).sqrt() <= SNAP * weight_scale(metric_scale, depth)
    snapped = small & (groups.sum(delta * delta).sqrt() * lever < decay) & snaps
    return torch.where(groups.expand(snapped).reshape(w.shape), 0.0, new)
