"""The fused step by ``reference`` in fp64 on the same numbers, and how far a kernel may be from it.

Every result is a sum, and rounding is relative to what is added up, not to what is left when it cancels.  So each
expected number comes with its *terms*, the same formula with every minus turned into a plus, and a tolerance counts
ulps of those: see :func:`expect`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import symopt
from support.kernel_cases import (
    BETA1,
    BETA2,
    EPS,
    FORMATS,
    OUTSIDE,
    SNAP,
    STEP,
    STRENGTH,
    THRESHOLD,
    Case,
    Problem,
    math_of,
    underflow,
)
from support.tolerances import tolerance
from symopt_kernels.groups import Groups
from symopt_kernels.reference import directions, elementwise, gauge
from symopt_kernels.reference import group as group_kernel


@dataclass
class Expected:
    """A number may be one of several where a decision hangs on rounding; ``terms`` is what its rounding is relative to.

    ``slack`` is an absolute error on top: half an ulp of a storage format.
    """

    values: tuple[Tensor, ...]
    terms: Tensor
    slack: Tensor | float = 0.0


def expect(case: Case, problem: Problem) -> dict[str, Expected]:
    """The step by ``reference`` in fp64.  Terms of every output, with |x| for x and plus for minus throughout:

    ==================  ===============================================================================================
    momentum_buffer     ``momentum |b| + (1 - dampening) |g|``
    exp_avg             ``|m| + (1 - beta1) |g - m|``: it cancels where the gradient turns
    exp_avg_sq, max     themselves: sums of squares (see :func:`unsummed`)
    w, plain            ``|w| + lr |u|``
    w, sparse           ``(rho**2 + delta**2) |w| + rho |delta| sqrt(c**2 + 4 w**2)``
    w, group            ``(rho + <|delta|, |w|> / s**2) (rho |w| + s**2 |delta|)``
    factors, w          ``rho |a| + |delta b|``, and the product of two such
    imbalance           itself
    ==================  ===============================================================================================

    where rho stands for ``1 + t decay`` and the update u in ``delta = t lr u`` for its own terms; t is as the step has
    it.  Nothing that is stored or squared in between counts as less than the smallest normal number.  A weight without
    a master is rounded to its format once more, half an ulp of that.
    """
    dtype, has_master = FORMATS[case.format]
    least = torch.finfo(math_of(case.format)).smallest_normal
    old = {k: v.double() if v.is_floating_point() else v for k, v in problem.start.items()}
    groups = problem.groups
    w, g = old["w"], old["g"]
    if has_master:
        w = torch.where(problem.start["master"].to(dtype) == problem.start["w"], old["master"], w)
    g = g * (-1.0 if case.maximize else 1.0) / (1.0 if case.grad_scale is None else case.grad_scale)
    weight_decay = case.weight_decay if case.retraction == "plain" else 0.0
    g_terms = g.abs()
    if weight_decay and case.kind != "adamw":
        g_terms = g.abs() + weight_decay * w.abs()
        g = g + weight_decay * w
    out: dict[str, Expected] = {}
    up, terms, gain = _direct(case, old, g, g_terms.clamp(min=least), groups, out, least)

    if case.retraction == "plain":
        decay = case.lr * weight_decay if case.kind == "adamw" else 0.0
        new = elementwise.plain(w, case.lr * up, decay)
        out |= _weights(case, (new,), w.abs() + case.lr * terms)
        return out

    size = w.abs() if groups is None else groups.sum(w * w).sqrt()
    decay: Any = case.lr * STRENGTH * gain
    flags: dict[str, Any] = {"saturated": case.saturated, "snaps": size <= THRESHOLD if case.budgeted else True}
    if case.budgeted:
        decay = case.lr * torch.where(size <= THRESHOLD, size.new_tensor(OUTSIDE), size.new_tensor(STRENGTH)) * gain
    delta, c, scale = case.lr * up, old["imbalance"], old["metric_scale"]
    if case.retraction == "sparse_free":
        return out | _free(case, problem, old, w, delta, (case.lr * terms).clamp(min=least), decay, flags)
    if case.retraction == "sparse":
        metric, pull = (c * c + 4 * w * w).sqrt(), delta.abs()
    else:
        assert groups is not None
        metric, pull = (c * c + 4 * groups.sum(w * w)).sqrt(), groups.sum(delta * delta).sqrt()
    t = gauge.time_scale(metric, pull, decay, scale if case.saturated else None)
    metric, terms = metric + underflow(math_of(case.format)), (case.lr * terms).clamp(min=least)
    if case.retraction == "sparse":
        news = snapped(lambda: elementwise.sparse(w, delta, decay, c, scale, **flags))
        rho, far = 1 + t * decay, t * terms
        out |= _weights(case, news, (rho * rho + far * far) * w.abs() + rho * far * metric)
    else:
        news = snapped(lambda: group_kernel.group(w, delta, decay, c, scale, groups, **flags))
        gate_sq, rho = (c + metric) / 2, 1 + t * decay
        far = groups.scale(t, terms)
        radial = groups.sum(far * w.abs()) / gate_sq.clamp(min=torch.finfo(torch.float64).tiny)
        shared = rho + radial
        new_terms = groups.scale(shared * rho, w.abs()) + groups.scale(shared * gate_sq, far)
        new_terms = groups.scale(unsummed(case, groups), new_terms)
        # group.h does not snap a group whose two terms cancel to below 2e-3 of them: that may be rounding.
        noise = 4e-6 if math_of(case.format) == torch.float32 else 4e-14
        doubtful = groups.sum(news[-1] ** 2) <= noise * groups.sum(new_terms**2)
        news = (*news[:-1], torch.where(groups.expand(doubtful).reshape(w.shape), news[-1], news[0]))
        out |= _weights(case, news, new_terms)
    if case.imbalance_factor is None:
        size = news[0].abs().flatten() if groups is None else groups.sum(news[0] * news[0]).sqrt()
        if isinstance(decay, Tensor) and case.order is not None and decay.shape == case.shape:
            decay = decay.permute(case.order)  # the kernel samples it as it lies in memory
        sizes = [size]
        if groups is None:  # the kernel takes a weight that snaps for as large as it was before
            sizes.append(news[-1].abs().flatten())
        laws = [gauge.imbalance_law(c, decay, scale, x, saturated=case.saturated) for x in sizes]
    else:
        laws = [torch.where(c * case.imbalance_factor <= SNAP * scale, 0.0, c * case.imbalance_factor)]
    out["imbalance"] = Expected(tuple(laws), laws[0])
    return out


def _direct(
    case: Case,
    old: dict[str, Tensor],
    g: Tensor,
    g_terms: Tensor,
    groups: Groups | None,
    out: dict[str, Expected],
    least: float,
) -> tuple[Tensor, Tensor, Any]:
    """The update, its terms, its gain; the moments go to ``out``."""
    if case.kind == "sgd":
        momentum, dampening = case.option("momentum"), case.option("dampening")
        nesterov, fresh = bool(case.option("nesterov")), bool(case.option("fresh"))
        buffer = None if fresh else old.get("momentum_buffer")
        up, new = directions.sgd_lead(g, buffer, momentum=momentum, dampening=dampening, nesterov=nesterov)
        gain = directions.amplification(momentum, dampening)
        terms = g_terms
        if new is not None:
            if buffer is not None:
                terms = momentum * buffer.abs() + (1 - dampening) * g_terms
            out["momentum_buffer"] = Expected((new,), terms)
            terms = g_terms + momentum * terms if nesterov else terms
        return up, terms, gain
    moments = (old["exp_avg"], old["exp_avg_sq"], old.get("max_exp_avg_sq"))
    beta1, beta2 = BETA1, BETA2
    lead, m = directions.adam_lead(g, moments[0], step=STEP + 1, beta1=beta1)
    square = g * g if groups is None else groups.sum(g * g) / groups.size(g)
    scale, v, peak = directions.adam_scale(square, *moments[1:], step=STEP + 1, beta2=beta2, eps=EPS)
    up = scale * lead if groups is None else groups.scale(scale, lead)
    gain: Any = scale
    if case.kind != "adam":
        gain = 1.0 if groups is None else groups.size(g).sqrt()
    m_terms = moments[0].abs() + (1 - beta1) * (g_terms - g.abs() + (g - moments[0]).abs())
    m_terms = m_terms.clamp(min=least)
    out["exp_avg"] = Expected((m,), m_terms)
    if case.weight_decay and case.kind == "adam":  # the square of a sum
        square = g_terms * g_terms
        square = square if groups is None else groups.sum(square) / groups.size(square)
        v_terms = beta2 * moments[1] + (1 - beta2) * square
    else:
        v_terms = v
    if groups is not None:
        v_terms = v_terms * unsummed(case, groups)
    out["exp_avg_sq"] = Expected((v,), v_terms)
    if peak is not None:
        out["max_exp_avg_sq"] = Expected((peak,), torch.maximum(peak, v_terms))
    high = v if peak is None else peak
    preconditioner = 1 / ((high / (1 - beta2 ** (STEP + 1))).sqrt() + EPS)
    mean = m_terms / (1 - beta1 ** (STEP + 1))
    return up, preconditioner * mean if groups is None else groups.scale(preconditioner, mean), gain


def unsummed(case: Case, groups: Groups) -> Tensor:
    """How much longer terms are because the *reference* sums n of them one by one, in fp64: its error is a random walk.

    In fp32 that does not count, and the kernel adds in lanes and blocks.
    """
    size = groups.size(torch.empty(case.shape, dtype=torch.float64))
    return 1 + size.sqrt() / 8 if case.format == "fp64" else torch.ones_like(size)


def _free(
    case: Case, problem: Problem, old: dict[str, Tensor], w: Tensor, delta: Tensor, far: Tensor, decay: Any, flags: Any
) -> dict[str, Expected]:
    dtype, _ = FORMATS[case.format]
    start = problem.start
    stale = (start["factor_0"] * start["factor_1"]).to(dtype) != start["w"]
    fresh = symopt.Sparse().split(w, old["imbalance"])
    factors = tuple(torch.where(stale, new, old[f"factor_{i}"]) for i, new in enumerate(fresh))
    stored = factors
    if case.imbalance_factor is not None:
        factors = rebalanced(*factors, case.imbalance_factor)
    a, b = factors
    scale = old["metric_scale"]
    steps = snapped(
        lambda: torch.stack(
            [x for part in elementwise.sparse_free(factors, delta, decay, scale, **flags) for x in
             (part if isinstance(part, tuple) else (part,))]
        )
    )  # fmt: skip
    t = gauge.time_scale(a * a + b * b, delta, decay, scale if case.saturated else None)
    rho, far = 1 + t * decay, t * far
    terms = [rho * a.abs() + far * b.abs(), rho * b.abs() + far * a.abs()]
    u, v = steps[2][1:]
    still = (u == a) & (v == b)  # then nothing is written, whatever a product or a rebalanced factor rounds to
    out = _weights(case, tuple(torch.where(still, w, s[0]) for s in steps), terms[0] * terms[1])
    # Where |u| = |v| up to rounding, either may be the factor that is zeroed.
    tie = (u.abs() - v.abs()).abs() <= 1e-6 * (terms[0] + terms[1])
    for i, free in enumerate((u, v)):
        values = [s[1 + i] for s in steps[:2]]
        values += [torch.where(tie, x, values[0]) for x in (torch.zeros_like(free), free)]
        values = [torch.where(still & ~tie, stored[i], x) for x in values] + [torch.where(still, stored[i], values[0])]
        out[f"factor_{i}"] = Expected(tuple(values), terms[i])
    return out


def rebalanced(a: Tensor, b: Tensor, keep: float) -> tuple[Tensor, Tensor]:
    """The factors of ``a * b`` whose ``a**2 - b**2`` is ``keep`` times what it was: the root of a quadratic.

    ``reference.rebalance`` is compared with it below.
    """
    c, product = keep * (a - b) * (a + b), (a * b).abs()
    high = ((c.abs() + torch.hypot(c, 2 * product)) / 2).sqrt()
    low = torch.where(high > 0, product / high, 0.0)
    high, low = torch.where(c >= 0, high, low), torch.where(c >= 0, low, high)
    return torch.where(a < 0, -high, high), torch.where(b < 0, -low, low)


def snapped(step: Any) -> tuple[Tensor, ...]:
    """``step`` with the threshold of snapping a little lower, a little higher, and out of reach."""
    results = []
    for factor in (1 - 1e-4, 1 + 1e-4, -1.0):
        with pytest.MonkeyPatch.context() as patch:
            for module in (elementwise, group_kernel):
                patch.setattr(module, "SNAP", SNAP * factor)
            results.append(step())
    return tuple(results)


def _weights(case: Case, values: tuple[Tensor, ...], terms: Tensor) -> dict[str, Expected]:
    """The last of three values (no snapping at all) counts only where the caller made it count."""
    dtype, has_master = FORMATS[case.format]
    if case.retraction in ("sparse", "sparse_free"):
        values = values[:2]
    if dtype == math_of(case.format):
        return {"w": Expected(values, terms)}
    info = torch.finfo(dtype)
    half_ulp = torch.maximum(values[0].abs() * info.eps, torch.tensor(info.smallest_normal * info.eps).double()) / 2
    half_ulp = half_ulp.where(torch.isfinite(half_ulp), torch.zeros(()).double())
    out = {"w": Expected(values, terms, 1.001 * half_ulp)}
    return out | {"master": Expected(values, terms)} if has_master else out


def distances(case: Case, problem: Problem, expected: dict[str, Expected]) -> dict[str, float]:
    """The largest error of every output, in ulps of its terms; NaN must stand where NaN is expected, infinities too."""
    info = torch.finfo(math_of(case.format))
    have, found = problem.all(), {}
    for key, want in expected.items():
        best = torch.full_like(want.terms, math.inf)
        for value in want.values:
            error = (have[key].double() - value).abs()
            error = torch.where((have[key].double() == value) | (have[key].isnan() & value.isnan()), 0.0, error)
            best = torch.minimum(best, error.nan_to_num(nan=math.inf))
        floor = info.smallest_normal  # below it an ulp is smallest_normal * eps
        ulp = info.eps * want.terms.abs().nan_to_num(0.0, 0.0, 0.0).clamp(min=floor)
        found[key] = float(((best - want.slack).clamp(min=0) / ulp).max()) if best.numel() else 0.0
    return found


def allowed(case: Case, key: str) -> float:
    kind = "native weight" if key in ("w", "master", "factor_0", "factor_1") else "native state"
    if kind == "native weight" and case.retraction == "sparse_free" and case.imbalance_factor is not None:
        kind = "native rebalanced"
    return tolerance(f"{kind}, fp64" if case.format == "fp64" and kind != "native rebalanced" else kind)


def same(x: Tensor, y: Tensor) -> bool:
    """Bit for bit, NaN included."""
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return torch.equal(x.contiguous().view(bits), y.contiguous().view(bits))
