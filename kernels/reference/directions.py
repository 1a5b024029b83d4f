"""Directions: a gradient and its moments become an update, in two parts.

The *lead* advances the first moment and is the update before the scale of its unit; it needs nothing from other
weights.  The *scale* advances the second moment of a unit (a weight, or a group that shares one) from the mean square
of the gradient or of the lead over the unit.  The update is ``scale * lead``.  This split lets a unit span several
tensors: leads are taken per tensor, sums are added, and then every unit has its scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["adam_lead", "adam_scale", "amplification", "lion_lead", "lion_scale", "sgd_lead"]


def sgd_lead(
    grad: Tensor, momentum_buffer: Tensor | None, *, momentum: float, dampening: float, nesterov: bool
) -> tuple[Tensor, Tensor | None]:
    """``torch.optim.SGD``'s direction, whose scale is 1.  Returns ``lead, momentum_buffer``."""
    if momentum == 0:
        return grad, None
    buffer = grad.clone() if momentum_buffer is None else momentum * momentum_buffer + (1 - dampening) * grad
    return (grad + momentum * buffer if nesterov else buffer), buffer


def amplification(momentum: float, dampening: float) -> float:
    """By how much momentum amplifies a constant gradient: ``(1 - dampening) / (1 - momentum)``, 1 without momentum.

    The strength is amplified alike, so that the fixed points are those of loss + penalty whatever the momentum.
    """
    return (1 - dampening) / (1 - momentum) if momentum else 1.0


def adam_lead(grad: Tensor, exp_avg: Tensor, *, step: Tensor | float, beta1: Tensor | float) -> tuple[Tensor, Tensor]:
    """``m_hat``, the bias-corrected mean of the gradient.  Returns ``lead, exp_avg``."""
    exp_avg = exp_avg + (1 - beta1) * (grad - exp_avg)
    return exp_avg * (1 / (1 - beta1**step)), exp_avg


def adam_scale(
    square: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    *,
    step: Tensor | float,
    beta2: Tensor | float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The preconditioner ``1 / (sqrt(v_hat) + eps)``.  Returns ``scale, exp_avg_sq, max_exp_avg_sq``.

    ``square`` is ``grad**2``, or its mean over a unit: one second moment per unit, because a preconditioner that
    differs inside a unit breaks the symmetry that makes the unit's zero attracting.
    """
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * square
    peak = exp_avg_sq if max_exp_avg_sq is None else torch.maximum(max_exp_avg_sq, exp_avg_sq)
    scale = 1 / ((peak * (1 / (1 - beta2**step))).sqrt() + eps)
    return scale, exp_avg_sq, None if max_exp_avg_sq is None else peak


def lion_lead(grad: Tensor, exp_avg: Tensor, *, beta1: float, beta2: float) -> tuple[Tensor, Tensor]:
    """``beta1 m + (1 - beta1) g``, then ``m' = beta2 m + (1 - beta2) g``.  Returns ``lead, exp_avg``."""
    return beta1 * exp_avg + (1 - beta1) * grad, beta2 * exp_avg + (1 - beta2) * grad


def lion_scale(lead_square: Tensor) -> Tensor:
    """``1 / rms(lead)`` over the unit, 0 where the lead is 0: of a single weight, what makes the lead its sign."""
    return torch.where(lead_square == 0, 0.0, lead_square.rsqrt())
