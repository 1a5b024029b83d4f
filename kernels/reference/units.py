"""The step of units that span several tensors: survey -> combine -> move.

``survey`` takes, per unit, the sums over all of its weights; ``combine`` decides the step of every unit from them, and
is where sums of several processes would be added; ``move`` applies it to each tensor.  With ``v_t = w_t / a_t``
(``a_t`` = ``Part.factor``) a unit is one gate times one direction over all its slices, ``v = s d``, and its step is
that of :func:`symopt_kernels.reference.group.group`:

    w_t' = shrink w_t - shift a_t**2 lead_t,        delta_v = lr scale a_t lead_t,
    shrink = (rho - <delta_v, v> / s**2) rho,       shift = (rho - <delta_v, v> / s**2) s**2 lr scale.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from symopt_kernels.reference.gauge import SNAP, time_scale
from symopt_kernels.units import Part, Units

__all__ = ["combine", "move", "survey"]


def survey(units: Units, grads: Sequence[Tensor], leads: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """``(4, count)``: per unit the sums of ``a**2 g**2``, ``a**2 lead**2``, ``lead w`` and ``w**2 / a**2``."""
    factors = [part.factor**2 for part in units.parts]
    return torch.stack(
        [
            units.sum([a * g * g for a, g in zip(factors, grads, strict=True)]),
            units.sum([a * x * x for a, x in zip(factors, leads, strict=True)]),
            units.sum([x * w for x, w in zip(leads, weights, strict=True)]),
            units.sum([w * w / a for a, w in zip(factors, weights, strict=True)]),
        ]
    )


def combine(
    sums: Tensor,
    rate: Tensor | float,
    decay: Tensor | float,
    imbalance: Tensor,
    metric_scale: Tensor,
    *,
    saturated: bool = True,
    snaps: Tensor | bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """``shrink``, ``shift`` and the new size of every unit; ``rate`` is ``lr * scale``, ``decay`` as in ``group``.

    The new size follows from the sums, ``shrink**2 ww - 2 shrink shift mw + shift**2 mm``; what is below the rounding
    of its terms counts as that rounding, so that no unit snaps because two large terms cancel.
    """
    _, mm, mw, ww = sums
    metric = (imbalance * imbalance + 4 * ww).sqrt()
    pull = rate * mm.sqrt()
    t = time_scale(metric, pull, decay, metric_scale if saturated else None)
    rho = 1 - t * decay
    gate_sq = (imbalance + metric) / 2
    shared = rho - t * rate * mw / gate_sq.clamp(min=torch.finfo(ww.dtype).tiny)
    shrink, shift = shared * rho, shared * gate_sq * t * rate
    terms = shrink * shrink * ww + shift * shift * mm
    size = torch.maximum(terms - 2 * shrink * shift * mw, terms * (8 * torch.finfo(ww.dtype).eps)).sqrt()
    small = size <= SNAP * metric_scale
    stays = small & ~torch.as_tensor(snaps, device=ww.device) & (size < ww.sqrt())
    snapped = small & (pull < decay) & snaps
    shrink = torch.where(snapped, 0.0, torch.where(stays, 1.0, shrink))
    shift = torch.where(snapped | stays, 0.0, shift)
    return shrink, shift, torch.where(snapped, 0.0, torch.where(stays, ww.sqrt(), size))


def move(units: Units, part: Part, w: Tensor, lead: Tensor, shrink: Tensor, shift: Tensor) -> Tensor:
    """The new weight of one part; slices without a unit are left as they are."""
    new = units.expand(shrink, part, 1.0) * w - units.expand(shift, part) * part.factor**2 * lead
    return torch.where(part.bound, new, w)
