"""The step of ``W = U V^T`` (U: m x r, V: n x r), readable, and the gauge it is taken in.

The loss cannot see a rotation ``U -> U R, V -> V R``.  The gauge is fixed by it: every so often (:func:`align`) columns
are turned into singular directions of ``W``, without a decomposition of ``W`` itself, and each pair ``u_j, v_j`` is
given equal norms.  There column j is one gated weight: its singular value is ``|u_j| |v_j|``, and its metric
``|u_j|**2 + |v_j|**2``, as a single weight's is ``u**2 + v**2`` in :func:`symopt_kernels.reference.sparse`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    *("align", "column_norms", "column_sizes", "factorize", "inverse", "lowrank", "pull_back", "scale_of"),
    "singular_values",
]


def _spoilt(w: Tensor) -> bool:
    """Whether there is NaN or Inf, on which decompositions raise; everything else lets it pass on, and so do these."""
    return not bool(w.isfinite().all())


def singular_values(w: Tensor) -> Tensor:
    """Of a matrix, largest first."""
    return w.flatten()[: min(w.shape)] * math.nan if _spoilt(w) else torch.linalg.svdvals(w)


def inverse(f: Tensor) -> Tensor:
    """The pseudoinverse."""
    return torch.full_like(f.mT, math.nan) if _spoilt(f) else torch.linalg.pinv(f)


def factorize(w: Tensor, imbalance: Tensor | float = 0.0, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """U and V of a matrix by its singular value decomposition, ``U^T U - V^T V = imbalance``, at most ``rank`` columns.

    Without imbalance singular values that are zero up to rounding get no column, as they could never grow.
    """
    if _spoilt(w):
        count = min(*w.shape, *([] if rank is None else [rank]))
        return w.new_full((w.shape[0], count), math.nan), w.new_full((w.shape[1], count), math.nan)
    left, size, right = torch.linalg.svd(w, full_matrices=False)
    count = len(size) if rank is None else min(rank, len(size))
    if isinstance(imbalance, (int, float)) and imbalance == 0:
        tiny = max(w.shape) * torch.finfo(w.dtype).eps * size[:1]
        count = min(count, int((size > tiny).sum()))
    left, size, right = left[:, :count], size[:count], right[:count].mT
    heavy = ((imbalance + (imbalance**2 + 4 * size * size).sqrt()) / 2).sqrt()
    light = torch.where(heavy > 0, size / heavy.clamp(min=torch.finfo(w.dtype).tiny), 0.0)
    return (left * heavy).contiguous(), (right * light).contiguous()


def column_norms(f: Tensor) -> Tensor:
    """``|f_j|`` of every column; ``norm(dim=0)`` takes ten times as long where rows lie one after the other."""
    return (f * f).sum(0).sqrt()


def column_sizes(u: Tensor, v: Tensor) -> Tensor:
    """``|u_j| |v_j|``: the singular values, in the aligned gauge."""
    return column_norms(u) * column_norms(v)


def scale_of(f: Tensor) -> Tensor:
    """Root mean square of the norms of the columns; no rotation changes it."""
    flat = f.reshape(-1)
    return (flat.dot(flat) / max(1, f.shape[1])).sqrt().clamp(min=_tiny(f))


def pull_back(grad: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """``G V / s`` and ``G^T U / s`` with s the :func:`scale_of` V and of U.

    Divided by it, moments of what is pulled back keep the scale of G while factors grow; and as s is one number, they
    turn with the factors exactly.
    """
    return grad @ v / scale_of(v), grad.mT @ u / scale_of(u)


def lowrank(
    u: Tensor,
    v: Tensor,
    delta_u: Tensor,
    delta_v: Tensor,
    decay: Tensor | float,
    metric_scale: Tensor,
    *,
    gains: tuple[Tensor | float, Tensor | float] = (1.0, 1.0),
    saturated: bool = True,
) -> tuple[Tensor, Tensor]:
    """One gradient step on both factors at once, with one time scale ``t_j`` per column:

        u_j' = (1 - t_j decay_j D) u_j - t_j delta_u,j,       v_j' = (1 - t_j decay_j E) v_j - t_j delta_v,j.

    ``delta`` is lr times the direction of what :func:`pull_back` gives, times its s again.  ``decay`` is a number or
    one per column; ``gains`` are the diagonals of the preconditioners D and E, one number per row, if the
    strength passes through them.  A preconditioner from the left commutes with the rotation, so fixed points are those
    of loss + strength * nuclear norm: ``G v_j = -strength u_j``.

    ``t_j = 1 / max(metric_j, metric_scale, decay_j + pull_j)`` as for single weights, 1 if not ``saturated``; the pull
    is the step relative to the factor.  Rows whose preconditioner is so large that they would overshoot zero (because
    they have no gradient) are slowed down alone.
    """
    norm_u, norm_v = column_norms(u), column_norms(v)
    metric = norm_u**2 + norm_v**2
    decay = torch.as_tensor(decay, dtype=u.dtype, device=u.device)
    floor = metric_scale if saturated else torch.ones_like(metric_scale)
    deltas, rows = [], []
    for delta, gain in ((delta_u, gains[0]), (delta_v, gains[1])):
        gain = torch.as_tensor(gain, dtype=u.dtype, device=u.device)
        if gain.numel() > 1:
            slow = 1 / (gain * decay.max() / floor).clamp(min=1)
            gain, delta = (slow * gain).unsqueeze(1), delta * slow.unsqueeze(1)
        deltas.append(delta)
        rows.append(gain)
    top = decay * torch.maximum(rows[0].max(), rows[1].max())
    if saturated:
        pull = torch.maximum(*(column_norms(delta) for delta in deltas)) / (metric / 2).sqrt().clamp(min=_tiny(u))
        t = 1 / torch.maximum(metric, torch.maximum(metric_scale, top + pull))
    else:
        t = 1 / (torch.ones_like(metric) * top).clamp(min=1)
    decay = t * decay
    new = (torch.addcmul((1 - decay * row) * f, d, t, value=-1) for f, d, row in zip((u, v), deltas, rows, strict=True))
    return next(new), next(new)


def align(u: Tensor, v: Tensor, *, balance: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same ``U V^T`` with columns turned towards its singular directions, largest first.

    The rotation diagonalises ``U^T U + V^T V`` (r x r), whose eigenvectors are the singular directions once both parts
    are equal, which a decay of both factors brings about.  ``balance`` then gives ``u_j`` and ``v_j`` equal norms; it
    must not where the trajectory shall be that of the factors to the letter.  Returns ``U, V`` and two r x r matrices:
    ``new_u = u @ turn_u``, ``new_v = v @ turn_v``.
    """
    gram = u.mT @ u + v.mT @ v
    if _spoilt(gram):
        return u, v, torch.eye(len(gram)).to(u), torch.eye(len(gram)).to(u)
    turn = torch.linalg.eigh(gram.double()).eigenvectors.flip(1).to(u.dtype)
    if not balance:
        return u @ turn, v @ turn, turn, turn
    norm_u, norm_v = column_norms(u @ turn), column_norms(v @ turn)
    order = (norm_u * norm_v).argsort(descending=True)
    live = (norm_u > 0) & (norm_v > 0)
    ratio = torch.where(live, (norm_v / norm_u.clamp(min=_tiny(u))).sqrt(), 1.0)
    turn_u, turn_v = (turn * ratio)[:, order], (turn / ratio)[:, order]
    return u @ turn_u, v @ turn_v, turn_u, turn_v


def _tiny(f: Tensor) -> float:
    return torch.finfo(f.dtype).tiny
