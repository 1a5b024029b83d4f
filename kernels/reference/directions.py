"""Directions: a gradient and its moments become an update, and the gain that multiplies the strength."""

from __future__ import annotations

import torch
from torch import Tensor

from symopt_kernels.groups import Groups

__all__ = [
    "adam",
    "adamw",
    "sgd",
]


def sgd(
    grad: Tensor, momentum_buffer: Tensor | None, *, momentum: float, dampening: float, nesterov: bool
) -> tuple[Tensor, float, Tensor | None]:
    """``torch.optim.SGD``'s direction.  Returns ``update, gain, momentum_buffer``.

    Momentum amplifies a constant gradient by ``(1 - dampening) / (1 - momentum)``; the strength is amplified alike
    (``gain``), so that the fixed points are those of loss + penalty whatever the momentum.
    """
    if momentum == 0:
        return grad, 1.0, None
    buffer = grad.clone() if momentum_buffer is None else momentum * momentum_buffer + (1 - dampening) * grad
    update = grad + momentum * buffer if nesterov else buffer
    return update, (1 - dampening) / (1 - momentum), buffer


def adam(
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    *,
    step: Tensor | float,
    beta1: Tensor | float,
    beta2: Tensor | float,
    eps: float,
    groups: Groups | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Adam's direction on the effective gradient.  Returns ``update, gain, exp_avg, exp_avg_sq, max_exp_avg_sq``.

    With ``groups`` the second moment is one number per group (the mean of ``grad**2``), because a preconditioner that
    differs inside a group breaks the symmetry that makes the group's zero attracting.  ``gain`` is the preconditioner
    itself, so the strength passes through it like the gradient does and fixed points are those of loss + penalty.
    """
    square = grad * grad if groups is None else groups.sum(grad * grad) / groups.size(grad)
    exp_avg = exp_avg + (1 - beta1) * (grad - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * square
    peak = exp_avg_sq if max_exp_avg_sq is None else torch.maximum(max_exp_avg_sq, exp_avg_sq)
    gain = 1 / ((peak * (1 / (1 - beta2**step))).sqrt() + eps)
    mean = exp_avg * (1 / (1 - beta1**step))
    update = gain * mean if groups is None else groups.scale(gain, mean)
    return update, gain, exp_avg, exp_avg_sq, None if max_exp_avg_sq is None else peak


def adamw(
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    *,
    step: Tensor | float,
    beta1: Tensor | float,
    beta2: Tensor | float,
    eps: float,
    groups: Groups | None = None,
) -> tuple[Tensor, Tensor | float, Tensor, Tensor, Tensor | None]:
    """AdamW's direction: :func:`adam` with a decoupled strength.  Returns the same five values.

    ``gain`` is 1 for single weights and the square root of the size for groups, which makes the strength a
    signal-to-noise ratio *per coordinate* whatever the size of the group.
    """
    update, _, exp_avg, exp_avg_sq, max_exp_avg_sq = adam(
        grad, exp_avg, exp_avg_sq, max_exp_avg_sq, step=step, beta1=beta1, beta2=beta2, eps=eps, groups=groups
    )
    gain = 1.0 if groups is None else groups.size(grad).sqrt()
    return update, gain, exp_avg, exp_avg_sq, max_exp_avg_sq
