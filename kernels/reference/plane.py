"""The constrained step of a fixed plane, readable: reflection through it, in gate form.

``Theta = P Theta + s d``: the part on the plane takes the plain step, the part off it the retraction of a gate.  The
projections are the caller's, so these functions know tensors and numbers only, as those of ``reference`` do.

The symmetry is the reflection ``I - 2 (I - P)`` of L. Ziyin, *Symmetry Induces Structure and Constraint of Learning*,
ICML 2024 (arXiv 2309.16932), Section 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from symopt_kernels.groups import Groups
from symopt_kernels.reference.gauge import CRITICAL_EMA, CRITICAL_FLOOR, SNAP, time_scale

__all__ = ["gate_decay", "needed", "plane_step"]


def needed(running: Tensor, critical: Tensor, typical: Tensor) -> Tensor:
    """The running estimate of the critical strength: the largest of about the last thousand steps.

    On a fixed plane a larger strength has no cost, because what lies on the plane is never shrunk, and a smaller one
    misses the plane; hence the largest, not the mean.
    """
    return torch.maximum(CRITICAL_EMA * running, torch.maximum(critical, CRITICAL_FLOOR * typical))


def gate_decay(decay: Tensor, gates: Groups) -> Tensor:
    """The decay of each gate: the harmonic mean over its weights, so that weights without a gradient do not count."""
    return gates.size(decay) / gates.sum(1 / decay)


def plane_step(
    w: Tensor,
    on: Tensor,
    delta_on: Tensor,
    delta_off: Tensor,
    decay: Tensor | float,
    imbalance: Tensor,
    metric_scale: Tensor,
    gates: Groups,
    *,
    saturated: bool = True,
    snaps: Tensor | bool = True,
) -> Tensor:
    """``w_g = on_g + s_g d_g`` in the fixed gauge ``s_g**2 - ||d_g||**2 = imbalance``, with ``off = w - on``:

        w_g' = on_g - delta_on + (rho - <delta_off, off_g> / s**2) (rho off_g - s**2 delta_off),

    then exactly ``on_g - delta_on`` where what is off the plane is below ``SNAP * metric_scale`` and attracted.

    ``on`` and ``delta_on`` are the projections of the weight and of the step, ``delta_off`` the rest of the step.
    ``decay`` is a number, or one value per weight that is the same wherever the projection mixes weights: a strength
    behind a preconditioner.  The gate then takes its :func:`gate_decay`; ``||delta_off / decay|| < 1`` is attracted.
    """
    off = w - on
    rates = decay if isinstance(decay, Tensor) and decay.dim() > 0 else None
    metric = (imbalance * imbalance + 4 * gates.sum(off * off)).sqrt()
    pull = gates.sum(delta_off * delta_off).sqrt()
    decay_of_gate = decay if rates is None else gate_decay(rates, gates)
    t = time_scale(metric, pull, decay_of_gate, metric_scale if saturated else None)
    gradient = delta_off
    if rates is not None and isinstance(decay_of_gate, Tensor):
        ratio = delta_off / rates
        attracted = gates.sum(ratio * ratio).sqrt() < 1
        # The gate sees the gradient through its own preconditioner; else the threshold would not be that of the norm.
        own = gates.expand(decay_of_gate).reshape(w.shape) / rates
        gradient = torch.where(own.isfinite(), own, 1.0) * delta_off
    else:
        attracted = pull < decay
    gate_sq = (imbalance + metric) / 2
    tiny = torch.finfo(w.dtype).tiny
    shared = 1 - t * decay_of_gate - t * gates.sum(gradient * off) / gate_sq.clamp(min=tiny)
    # As a change of w, which is then exactly zero where the step is.
    if rates is not None:
        # A weight that has no gradient has a decay without bounds; its factor must not overshoot zero.
        rate = gates.scale(t, rates)
        fits = 1 / rate.clamp(min=1)
        shrink_less_one = gates.scale(shared, 1 - fits * rate) - 1
        shift = gates.scale(shared * gate_sq * t, fits)
    else:
        per_gate = shared * (1 - t * decay) - 1, shared * gate_sq * t
        shrink_less_one, shift = (gates.expand(x).reshape(w.shape) for x in per_gate)
    change = shrink_less_one * off - shift * delta_off
    rest = off + change
    snapped = (gates.sum(rest * rest).sqrt() <= SNAP * metric_scale) & attracted & snaps
    return torch.where(gates.expand(snapped).reshape(w.shape), on - delta_on, w - delta_on + change)
