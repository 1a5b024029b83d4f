"""Factors of a weight in a given gauge."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["heavy_factor", "light_factor"]


def heavy_factor(size: Tensor, imbalance: Tensor | float, depth: int) -> Tensor:
    """The factor ``s`` of a weight ``s**(depth-1) * d`` in the gauge ``s**2 - |d|**2 = imbalance``."""
    if depth == 2:
        return ((imbalance + (imbalance**2 + 4 * size * size).sqrt()) / 2).sqrt()
    x = imbalance + size ** (2 / depth)
    for _ in range(64):  # Newton on x**(D-1) (x - c) = size**2; convex and started on the right, so monotone
        slope = x ** (depth - 2) * (depth * x - (depth - 1) * imbalance)
        x = x - (x ** (depth - 1) * (x - imbalance) - size * size) / slope.clamp(min=torch.finfo(size.dtype).tiny)
    return x.clamp(min=0).sqrt()


def light_factor(w: Tensor, heavy: Tensor, depth: int) -> Tensor:
    """The rest of ``w`` once ``depth - 1`` factors are ``heavy``; 0 where they are."""
    power = heavy ** (depth - 1)
    return torch.where(power > 0, w / power.clamp(min=torch.finfo(w.dtype).tiny), 0.0)
