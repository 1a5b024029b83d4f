"""One constraint against the gradient of the loss: the numbers and the verdict."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import final

import torch
from torch import Tensor

from symopt.constraints import Constraint
from symopt.optim import ConstrainedOptimizer
from symopt.optim.binding import Binding
from symopt.optim.collapse import collapse_steps
from symopt.optim.direction import Direction, Options, State
from symopt.optim.schedule import in_force

__all__ = ["Certificate", "Certificates", "certificate", "jackknife"]


@final
@dataclass(frozen=True)
class Certificate:
    """One constraint: numbers in the units of its ``strength`` (see :func:`certify`)."""

    names: tuple[str, ...]
    constraint: str
    verdict: str
    """``"exact"``, ``"attracting"`` or ``"not reached"``."""
    words: str
    """The verdict and its reason, as a sentence."""
    residual: float
    """Relative distance from the structure; 0 (of a :class:`symopt.Mirror`, rounding) where it is exact."""
    critical: float | None
    """Critical strength kappa*: above it the structure holds against the loss's gradient.  None where that is of units
    that are zero and none is."""
    interval: tuple[float, float] | None
    """95 % confidence interval of ``critical``; None from a single evaluation."""
    strength: float
    """In force now."""
    kkt: float
    """Norm of what is left of the optimality conditions of loss + strength * penalty."""
    balance: float | None
    """Imbalance c relative to the typical metric; at 0 what is exact stays so whatever the gradient.  None: no step."""
    steps: float | None
    """Still needed at the current rate and gradient; inf if it is not attracted, None if unknown."""


@final
@dataclass(frozen=True)
class Certificates:
    """What :func:`certify` returns; prints as one sentence per constraint."""

    rows: tuple[Certificate, ...]

    def to_dict(self) -> dict[str, object]:
        """Plain numbers, strings, lists and dicts (JSON)."""
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join(f"{', '.join(row.names)}: {row.verdict}: {row.words}" for row in self.rows)


def certificate(
    opt: ConstrainedOptimizer,
    group: Options,
    row: Binding,
    binding: Binding,
    now: list[Tensor],
    on_plane: list[Tensor],
) -> Certificate:
    """``now`` and ``on_plane`` are gradients, one per sample: at the weights, and at their projection."""
    constraint, direction = row.constrained_by, opt.direction
    w, state = binding.weight(), opt.state.get(binding.parameters[0], {})
    sizes, group = constraint.size(w), in_force(group, opt.schedule.steps)
    now, on_plane = ([_seen(binding, direction, group, state, g) for g in grads] for grads in (now, on_plane))
    residual, strength = float(constraint.violation(w)), float(binding.strength(direction, group, state))
    steps = collapse_steps(binding, direction, group, state)
    critical = interval = None
    if constraint.is_plane or bool((sizes == 0).any()):
        critical, error = jackknife(constraint, on_plane, sizes)
        interval = None if len(on_plane) == 1 else (max(0.0, critical - 1.96 * error), critical + 1.96 * error)
    on = critical is not None and residual <= constraint.rounding(w)
    if on and constraint.is_plane:
        steps = 0.0
    elif steps is not None and critical is not None:
        steps = steps * strength / (strength - critical) if strength > critical else math.inf
    verdict, words = _verdict(strength, critical, interval, on, residual, steps)
    scale = state.get("metric_scale")
    return Certificate(
        names=row.names,
        constraint=str(constraint),
        verdict=verdict,
        words=words,
        residual=residual,
        critical=critical,
        interval=interval,
        strength=strength,
        # What is on the plane up to rounding has no direction off it.
        kkt=_kkt(constraint, w, torch.stack(now).mean(0), sizes * 0 if on and constraint.is_plane else sizes, strength),
        balance=None if scale is None else float(state["imbalance"] / scale),
        steps=steps,
    )


def jackknife(constraint: Constraint, grads: list[Tensor], sizes: Tensor | None = None) -> tuple[float, float]:
    """Critical strength of the mean gradient, bias removed, and its standard error."""

    def critical(total: Tensor, n: int) -> float:
        mean = constraint.dual(total / n)
        norms = constraint.inner(mean, mean).clamp(min=0).sqrt()
        norms = norms if sizes is None or constraint.is_plane else norms[sizes == 0]
        return float(norms.max()) if norms.numel() else 0.0

    n, total = len(grads), torch.stack(grads).sum(0)
    whole = critical(total, n)
    if n == 1:
        return whole, 0.0
    left = [critical(total - g, n - 1) for g in grads]
    mean = sum(left) / n
    error = math.sqrt((n - 1) / n * sum((x - mean) ** 2 for x in left))
    return max(0.0, n * whole - (n - 1) * mean), error


def _verdict(
    strength: float,
    critical: float | None,
    interval: tuple[float, float] | None,
    on: bool,
    residual: float,
    steps: float | None,
) -> tuple[str, str]:
    """The verdict and its reason; ``on``: whether the structure is exact now."""
    to_go = f"about {'an unknown number of' if steps is None else f'{steps:.0f}'} steps"
    if critical is None:
        when = "its strength is 0" if strength == 0 else f"{to_go} until the median unit is, if no gradient holds it"
        return "not reached", f"no unit is zero yet, so no gradient can be compared with the strength; {when}"
    most = critical if interval is None else interval[1]
    verdict = "not reached" if not strength > most else "exact" if on else "attracting"
    if most == 0 and strength > 0:
        ends = "so it stays" if on else f"so it attracts; {to_go} to go, {residual:.1e} away"
        return verdict, f"no gradient pulls at what the strength {strength:.3g} holds, {ends}"
    bound = f"{critical:.3g}" if interval is None else f"{critical:.3g} (at most {most:.3g}, 95 %)"
    if math.isnan(strength):
        return verdict, f"the strength is automatic and unknown before the first step; the critical one is {bound}"
    if verdict == "exact":
        return verdict, f"the strength {strength:.3g} is above the critical {bound}, so it stays"
    if verdict == "attracting":
        above = f"the strength {strength:.3g} is above the critical {bound}"
        return verdict, f"{above}; {to_go} to go, {residual:.1e} away"
    where = "it is exact, but " if on else ""
    fix = "raise it" + (", or take more samples" if interval is not None and strength > interval[0] else "")
    return verdict, f"{where}the strength {strength:.3g} is not above the critical {bound}; {fix}"


def _seen(binding: Binding, direction: Direction, options: Options, state: State, grad: Tensor) -> Tensor:
    """The gradient as the strength meets it: with AdamW behind its preconditioner and per coordinate."""
    scale = binding.preconditioner(direction, options, state) if direction.decoupled(options) else None
    if scale is None:
        return grad
    size = binding.size(state)
    unit = 1.0 if size is None else size.sqrt()
    multiplier = torch.as_tensor(binding.constrained_by.strength_multiplier(grad, decoupled=True))
    if binding.units is not None:
        return grad * binding.units.flat(scale[: binding.units.count] / (unit * multiplier)).reshape(grad.shape)
    groups = binding.groups(state)
    scaled = scale / (unit * multiplier)
    return grad * scaled if groups is None else groups.scale(scaled.expand(groups.count), grad)


def _kkt(constraint: Constraint, w: Tensor, grad: Tensor, sizes: Tensor, strength: float) -> float:
    dual = constraint.dual(grad)
    slope, along = constraint.inner(dual, dual).clamp(min=0), constraint.inner(dual, w)
    live = (slope + 2 * strength * along / sizes.clamp(min=torch.finfo(w.dtype).tiny) + strength**2).clamp(min=0).sqrt()
    rest = torch.where(sizes > 0, live, (slope.sqrt() - strength).clamp(min=0))
    tangent = constraint.fold(grad) if constraint.is_plane else torch.zeros_like(grad)
    return float((rest.square().sum() + tangent.square().sum()).sqrt())
