"""The constrained step, readable: a *direction* times a *retraction*.

A direction turns a gradient into an ``update`` and a ``gain``; a retraction moves the weight by ``delta = lr * update``
while its factors shrink by ``rho = 1 - decay`` with ``decay = lr * strength * gain``::

    direction    grad, moments          ->  update, gain, moments
    retraction   w, delta, decay, c     ->  w'

so m directions and n retractions make m * n optimizers out of m + n functions.  Everything here is a pure function of
tensors and numbers; ``decay`` is passed instead of ``rho`` because ``1 - rho`` would lose the last bits of a small one.

The retractions are the fixed gauge (one imbalance ``c`` per tensor) of gradient descent on factors, for the rescaling
symmetry of L. Ziyin, *Symmetry Induces Structure and Constraint of Learning*, ICML 2024 (arXiv 2309.16932), Section 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from symopt_kernels.groups import Groups

__all__ = [
    "FASTEST",
    "SNAP",
    "adam",
    "adamw",
    "group",
    "group_deep",
    "imbalance_law",
    "losers",
    "math_dtype",
    "partial_products",
    "plain",
    "product",
    "rebalance",
    "sgd",
    "sparse",
    "sparse_deep",
    "sparse_free",
    "time_scale",
    "weight_scale",
]

SNAP = 1e-6
"""A weight below ``SNAP * metric_scale`` that is still being attracted is set to exactly zero."""

FASTEST = 0.98
"""Least factor of the imbalance in one step of its automatic law."""

_SAMPLE = 1024


def math_dtype(w: Tensor) -> torch.dtype:
    """The precision in which ``w`` is stepped and its state kept."""
    return torch.float32 if w.dtype in (torch.float16, torch.bfloat16) else w.dtype


# ---------------------------------------------------------------------------------------------------- directions


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


# --------------------------------------------------------------------------------------------------- retractions


def plain(w: Tensor, delta: Tensor, decay: Tensor | float) -> Tensor:
    """No constraint: ``w' = rho w - delta``."""
    return (1 - decay) * w - delta


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
    gives each weight one of two values of ``decay``, and ``snaps`` only where it is the one outside the budget; inside,
    a weight stays where it is instead of shrinking below that size.
    """
    metric = (imbalance * imbalance + 4 * w * w).sqrt()
    t = time_scale(metric, delta, decay, metric_scale if saturated else None)
    attracted = (delta.abs() < decay) & snaps
    delta, rho = t * delta, 1 - t * decay
    new = (rho * rho + delta * delta) * w - rho * delta * metric
    if isinstance(snaps, Tensor):
        new = torch.where(~snaps & (new.abs() < torch.minimum(w.abs(), SNAP * metric_scale)), w, new)
    return torch.where((new.abs() <= SNAP * metric_scale) & attracted, 0.0, new)


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


def losers(w: Tensor, keep: int, of: int) -> Tensor:
    """N:M: True at all but the ``keep`` largest of every ``of`` neighbouring inputs; of equals the first stay."""
    size = w.detach().abs().unflatten(1, (-1, of))
    order = size.argsort(stable=True, dim=2, descending=True)
    lost: Tensor = order.argsort(2) >= keep
    return lost.flatten(1, 2)


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


def rebalance(factors: tuple[Tensor, ...], keep: float) -> tuple[Tensor, ...]:
    """The same weight in a gauge where every difference ``u_i**2 - u_j**2`` is ``keep`` times what it was.

    The squares become ``m + keep (u_i**2 - mean)`` with the one m that leaves their product ``w**2``; Newton from the
    mean, which lies above it because shrinking the differences raises a product, so the descent is monotone.
    """
    if keep == 0:
        size = product(factors).abs() ** (1 / len(factors))
        return tuple(torch.where(u < 0, -size, size) for u in factors)
    if len(factors) == 2:  # in closed form, which keeps the digits of a light factor
        a, b = factors
        size, c = (a * b).abs(), keep * ((a - b) * (a + b))
        high = ((c.abs() + (c * c + 4 * size * size).sqrt()) / 2).sqrt()
        low = size / high.clamp(min=torch.finfo(a.dtype).tiny)
        pair = torch.where(c >= 0, high, low), torch.where(c >= 0, low, high)
        return tuple(torch.where(u < 0, -x, x) for u, x in zip(factors, pair, strict=True))
    squares = torch.stack([u * u for u in factors])
    mean, target = squares.mean(0), squares.prod(0)
    spread = keep * (squares - mean)
    m = mean
    for _ in range(32):
        shifted = (m + spread).clamp(min=0)
        slope = sum_of_products(shifted)
        step = (shifted.prod(0) - target) / slope.clamp(min=torch.finfo(mean.dtype).tiny)
        m = m - step.clamp(min=0)
    # At a zero the root may be a double one, where Newton only halves: there the squares just shrink.
    new = torch.where(target == 0, keep * (squares - squares.amin(0)), m + spread)
    return tuple(torch.where(u < 0, -size, size) for u, size in zip(factors, new.clamp(min=0).sqrt(), strict=True))


def sum_of_products(parts: Tensor) -> Tensor:
    """Derivative of the product of ``parts + m`` in m, at 0: the sum over i of the product of all others."""
    return torch.stack(partial_products(tuple(parts))).sum(0)


def _drive(factors: tuple[Tensor, ...], delta: Tensor) -> Tensor:
    """How fast the two smallest factors feed each other: ``|delta|`` times all the others."""
    magnitudes = torch.stack([u.abs() for u in factors]).sort(0).values
    return delta.abs() * magnitudes[2:].prod(0)


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
        sample = flat[:: max(1, flat.numel() // _SAMPLE)]
        decay = sample.kthvalue(1 + sample.numel() // 10).values
    if saturated:
        size = size.nan_to_num(0.0, 0.0, 0.0)  # a weight that is lost must not take its tensor with it
        typical = 2 * (size * size).sum() / size.sum().clamp(min=torch.finfo(size.dtype).tiny)
        decay = decay / torch.maximum(metric_scale, typical)
    new = imbalance * ((torch.ones_like(imbalance) - decay).clamp(min=0) ** 4).clamp(min=FASTEST)
    return torch.where(new <= SNAP * metric_scale, 0.0, new)
