"""The step of ``W = U V^T`` (U: m x r, V: n x r), readable, and the gauge it is taken in.

The loss cannot see a rotation ``U -> U R, V -> V R``.  The gauge is fixed by it: every so often (:func:`align`) columns
are turned into singular directions of ``W``, without a decomposition of ``W`` itself, and each pair ``u_j, v_j`` is
given equal norms.  There column j is one gated weight: its singular value is ``|u_j| |v_j|``, and its metric
``|u_j|**2 + |v_j|**2``, as a single weight's is ``u**2 + v**2`` in :func:`symopt_kernels.reference.sparse`.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["align", "column_norms", "column_sizes", "factorize", "lowrank", "pull_back", "unit_columns"]


def factorize(w: Tensor, imbalance: Tensor | float = 0.0, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """U and V of a matrix by its singular value decomposition, ``U^T U - V^T V = imbalance``, at most ``rank`` columns.

    Without imbalance singular values that are zero up to rounding get no column, as they could never grow.
    """
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


def unit_columns(f: Tensor) -> Tensor:
    """Every column divided by its norm; 0 stays 0."""
    return f / column_norms(f).clamp(min=torch.finfo(f.dtype).tiny)


def pull_back(grad: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """``G v_j / |v_j|`` and ``G^T u_j / |u_j|``."""
    tiny = torch.finfo(u.dtype).tiny
    return grad @ v / column_norms(v).clamp(min=tiny), grad.mT @ u / column_norms(u).clamp(min=tiny)


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

        u_j' = (1 - t_j decay_j D) u_j - t_j |v_j| delta_u,j,       v_j' = (1 - t_j decay_j E) v_j - t_j |u_j| delta_v,j.

    ``delta_u`` is the step that follows from the gradient pulled back by *unit* columns, ``lr D G v_j / |v_j|``, so
    that all directions share one scale; ``|v_j|`` gives the factor step back.  ``gains`` are the diagonals of the
    preconditioners D and E, one number per row, if the strength passes through them.  A preconditioner from the left
    commutes with the rotation, so fixed points are those of loss + strength * nuclear norm: ``G v_j = -strength u_j``.

    ``t_j = 1 / max(metric_j, metric_scale, decay_j + |delta_j|)`` as for single weights, 1 if not ``saturated``.  Rows
    whose preconditioner is so large that they would overshoot zero (their gradient is zero) are slowed down alone.
    """
    norm_u, norm_v = column_norms(u), column_norms(v)
    fastest = torch.as_tensor(decay, dtype=u.dtype, device=u.device)
    floor = metric_scale if saturated else torch.ones_like(metric_scale)
    rows = []
    for delta, gain in ((delta_u, gains[0]), (delta_v, gains[1])):
        if isinstance(gain, Tensor) and gain.numel() > 1:
            slow = 1 / (gain * fastest.max() / floor).clamp(min=1)
            rows.append(((slow * gain).unsqueeze(1), delta * slow.unsqueeze(1)))
        else:
            rows.append((torch.as_tensor(gain, dtype=u.dtype, device=u.device), delta))
    (gain_u, delta_u), (gain_v, delta_v) = rows
    top = fastest * torch.maximum(gain_u.max(), gain_v.max())
    if saturated:
        pull = torch.maximum(column_norms(delta_u), column_norms(delta_v))
        t = 1 / torch.maximum(norm_u**2 + norm_v**2, torch.maximum(metric_scale, top + pull))
    else:
        t = 1 / (torch.ones_like(norm_u) * top).clamp(min=1)
    decay = t * fastest
    return (1 - decay * gain_u) * u - delta_u * (t * norm_v), (1 - decay * gain_v) * v - delta_v * (t * norm_u)


def align(u: Tensor, v: Tensor, *, balance: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same ``U V^T`` with columns turned towards its singular directions, largest first.

    The rotation diagonalises ``U^T U + V^T V`` (r x r), whose eigenvectors are the singular directions once both parts
    are equal, which a decay of both factors brings about.  ``balance`` then gives ``u_j`` and ``v_j`` equal norms; it
    must not where the trajectory shall be that of the factors to the letter.  Returns ``U, V`` and two r x r matrices
    that take what was pulled back by the old unit columns of V and of U to the new ones.
    """
    gram = u.mT @ u + v.mT @ v
    turn = torch.linalg.eigh(gram.double()).eigenvectors.flip(1).to(u.dtype)
    new_u, new_v = u @ turn, v @ turn
    tiny = torch.finfo(u.dtype).tiny
    old = [column_norms(f) for f in (u, v)]
    now = [column_norms(f).clamp(min=tiny) for f in (new_u, new_v)]
    to_u, to_v = (before.unsqueeze(1) * turn / after for before, after in zip(old, now, strict=True))
    if balance:
        ratio = torch.where((new_u != 0).any(0) & (new_v != 0).any(0), (now[1] / now[0]).sqrt(), 1.0)
        new_u, new_v = new_u * ratio, new_v / ratio
        order = (now[0] * now[1]).argsort(descending=True)
        new_u, new_v, to_u, to_v = (x[:, order] for x in (new_u, new_v, to_u, to_v))
    return new_u, new_v, to_v, to_u
