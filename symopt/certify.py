"""certify: does every constraint hold, will it, and against what gradient; critical_strength: what it takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import final

import torch
from torch import Tensor, nn

from symopt.constraints import Constraint
from symopt.constraints.planes.plane import flat, parts
from symopt.module.bindings import bindings
from symopt.optim import ConstrainedOptimizer, registry
from symopt.optim.binding import Binding
from symopt.optim.collapse import collapse_steps
from symopt.optim.direction import Direction, Options, State

__all__ = ["Certificate", "Certificates", "certify", "critical_strength"]

Closure = Callable[[], Tensor]


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


def certify(model: nn.Module, opt: ConstrainedOptimizer, closure: Closure, samples: int = 1) -> Certificates:
    """Check every constraint of ``model`` against the gradient of the loss.

    For a fixed plane (:class:`symopt.Mirror`, :class:`symopt.Tied`, ...) kappa* is the dual norm of the gradient at
    the weight's projection: the plane attracts while the strength in force is larger, globally for a convex loss,
    locally otherwise.  For constraints that choose their structure it is the largest gradient of a unit that is zero.
    Verdicts:

    - ``exact``: the structure is exact, and the strength is above kappa* (above its upper confidence bound);
    - ``attracting``: the structure is not exact yet, but the strength is above kappa*: about ``steps`` more steps;
    - ``not reached``: the strength is not above kappa*, or there is no structure.

    With SGD and Adam all numbers are in the units of the loss's gradient.  With AdamW the gradient first passes
    the preconditioner, as in the step, and counts per coordinate; its Sparse is no minimiser of loss + penalty, so
    ``kkt`` does not vanish there.

    Args:
        model: a module constrained in optimizer mode.
        opt: the symopt optimizer that trains it.
        closure: returns the loss, a scalar; no ``backward``.  It is called once per sample, twice where a plane is not
            reached yet; weights and ``.grad`` are left as they were.
        samples: how often to call it.  With minibatches take 8 or more: kappa* is then that of the mean gradient, with
            its bias removed and an interval by the jackknife (Efron & Stein, 1981).

    Raises:
        TypeError: for other kinds of arguments, or a closure that returns no tensor.
        ValueError: for ``samples < 1``, a loss that is no scalar or has no gradient, or constraints that ``opt`` does
            not own.

    Source: L. Ziyin, ICML 2024 (arXiv 2309.16932), Theorem 1 (with enough decay all minima are on the plane); that the
    decay needed is a dual norm is the theory of exact penalties (Nocedal & Wright, 2006, Section 17.2).

    Example:
        >>> import torch, symopt
        >>> net = symopt.constrain(torch.nn.Linear(3, 3, bias=False), {"weight": symopt.Symmetric()})
        >>> opt = symopt.Adam(net, lr=1e-2)
        >>> target = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
        >>> loss = lambda: (net.weight - target).square().sum() / 2
        >>> for _ in range(1500):
        ...     opt.zero_grad()
        ...     loss().backward()
        ...     opt.step()
        >>> print(symopt.certify(net, opt, loss))
        weight: exact: the strength 2.83 is above the critical 1.41, so it stays
    """
    if not isinstance(opt, ConstrainedOptimizer):
        raise TypeError(f"certify: opt must be a symopt optimizer, got {type(opt).__name__}")
    rows = _bound("certify", model)
    owners = {p: (group, binding) for group, binding in opt.bindings() for p in binding.parameters}
    for row in rows:
        if row.constrained_by.is_matrix:
            raise ValueError(
                f"certify: {row.label} is bound by {row.constrained_by}, for whose singular values certify has no "
                "certificate; pass a submodule without it"
            )
        if any(p not in owners for p in row.parameters):
            raise ValueError(
                f"certify: {', '.join(row.names)} is in no group of opt; pass the optimizer that trains it"
            )
        if opt.direction.decoupled(owners[row.parameters[0]][0]) and opt.direction.scaled_by != "gradient":
            raise ValueError(
                f"certify: the strength of {type(opt).__name__} is compared with its updates, not with a gradient that "
                "could be certified; train with symopt.SGD, Adam or AdamW to certify"
            )
    now = _gradients("certify", closure, rows, samples)
    on_plane = now
    planes = [row for row in rows if row.constrained_by.is_plane]
    if any(float(row.constrained_by.violation(row.weight())) > 0 for row in planes):
        with _on_planes(rows):
            on_plane = _gradients("certify", closure, rows, samples)
    found = []
    for i, row in enumerate(rows):
        group, binding = owners[row.parameters[0]]
        found.append(_certificate(opt, group, row, binding, [g[i] for g in now], [g[i] for g in on_plane]))
    return Certificates(tuple(found))


def critical_strength(model: nn.Module, closure: Closure, samples: int = 1, steps: int = 0) -> dict[str, float]:
    """The strength above which each fixed plane of ``model`` holds: the dual norm of the gradient on the plane.

    It belongs to the minimum on the plane.  ``steps`` L-BFGS steps on the plane, all parameters included, go there from
    the projection of the weights as they are; with 0 it is that of the projection itself.  Weights are put back.

    Args:
        model: a module with fixed planes (:class:`symopt.Mirror`, :class:`symopt.Tied`, ...).
        closure: returns the loss, a scalar; no ``backward``.
        samples: how often to call it at the end; with minibatches kappa* is that of the mean gradient.
        steps: L-BFGS steps; the closure should then be deterministic.

    Returns:
        Name of every parameter on a plane -> kappa*, in the units of the loss's gradient (SGD and Adam).

    Raises:
        TypeError, ValueError: as :func:`certify`; also if ``model`` has no fixed plane.

    Source: L. Ziyin, ICML 2024 (arXiv 2309.16932), Theorem 1.

    Example:
        >>> import torch, symopt
        >>> net = symopt.constrain(torch.nn.Linear(2, 2, bias=False), {"weight": symopt.Symmetric()})
        >>> target = torch.tensor([[0.0, 2.0], [0.0, 0.0]])
        >>> found = symopt.critical_strength(net, lambda: (net.weight - target).square().sum() / 2, steps=20)
        >>> round(found["weight"], 4)
        1.4142
    """
    rows = [row for row in _bound("critical_strength", model) if row.constrained_by.is_plane]
    if not rows:
        raise ValueError("critical_strength: the model has no fixed plane; Sparse and GroupSparse choose their own")
    others = [p for p in model.parameters() if p.requires_grad]
    evaluating = _Evaluating()
    registry.register_owner(evaluating)  # no optimizer trains these weights here, so there is nothing to warn of
    with _on_planes(rows, others):
        if steps:
            _descend(closure, rows, others, steps)
        grads = _gradients("critical_strength", closure, rows, samples)
    found = {}
    for i, row in enumerate(rows):
        value, _ = _jackknife(row.constrained_by, [g[i] for g in grads])
        found.update(dict.fromkeys(row.names, value))
    return found


# ------------------------------------------------------------------------------------------------------------ gradients


@final
class _Evaluating:
    """Counts as the optimizer of every weight while it exists."""

    def owns(self, param: Tensor) -> bool:
        return True

    def forget(self, param: Tensor) -> None:
        pass


def _bound(owner: str, model: nn.Module) -> list[Binding]:
    given: object = model
    if not isinstance(given, nn.Module):
        raise TypeError(f"{owner}: model must be a torch.nn.Module, got {type(model).__name__}")
    named = dict(model.named_parameters(remove_duplicate=False))
    rows = bindings(model)
    if missing := [name for names, _ in rows for name in names if name not in named]:
        raise ValueError(f"{owner}: {missing[0]} is constrained in explicit mode, which this does not look into")
    return [Binding(constraint, names, tuple(named[name] for name in names)) for names, constraint in rows]


def _gradients(owner: str, closure: Closure, rows: list[Binding], samples: int) -> list[list[Tensor]]:
    """Per sample the gradient of what every constraint sees: flat if it binds several parameters."""
    given: object = samples
    if isinstance(given, bool) or not isinstance(given, int):
        raise TypeError(f"{owner}: samples must be an integer, got {samples!r}")
    if samples < 1:
        raise ValueError(f"{owner}: samples must be >= 1, got {samples}")
    params = [p for row in rows for p in row.parameters]
    found = []
    for _ in range(samples):
        grads = iter(_gradient(owner, closure, params))
        found.append([flat(tuple(next(grads) for _ in row.parameters)) for row in rows])
    return found


def _gradient(owner: str, closure: Closure, params: Sequence[Tensor]) -> list[Tensor]:
    with torch.enable_grad():
        loss: object = closure()
    if not isinstance(loss, Tensor):
        raise TypeError(f"{owner}: closure must return the loss as a tensor, got {type(loss).__name__}")
    if loss.numel() != 1 or not loss.requires_grad:
        raise ValueError(f"{owner}: closure must return a scalar loss with a graph, and not call backward itself")
    try:
        grads: Sequence[Tensor | None] = torch.autograd.grad(loss.reshape(()), params, allow_unused=True)
    except RuntimeError as error:
        raise ValueError(f"{owner}: closure must return the loss without calling backward ({error})") from error
    return [torch.zeros_like(p) if g is None else g.detach() for g, p in zip(grads, params, strict=True)]


@contextmanager
def _on_planes(rows: list[Binding], others: Sequence[Tensor] = ()) -> Iterator[None]:
    """Every weight that a plane binds is on it, for as long as the block lasts; then all weights are put back."""
    touched = [*(p for row in rows for p in row.parameters), *others]
    before = [p.detach().clone() for p in touched]
    try:
        with torch.no_grad():
            for row in rows:
                if row.constrained_by.is_plane:
                    on_plane = parts(row.constrained_by.fold(flat(row.parameters)), row.parameters)
                    _copy(row.parameters, on_plane)
        yield
    finally:
        with torch.no_grad():
            _copy(touched, before)


def _copy(params: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for p, value in zip(params, values, strict=True):
        p.copy_(value)


def _descend(closure: Closure, rows: list[Binding], params: list[nn.Parameter], steps: int) -> None:
    """L-BFGS on the plane: with projected gradients all its steps are on it."""
    search = torch.optim.LBFGS(params, max_iter=steps, line_search_fn="strong_wolfe", tolerance_grad=1e-10)
    saved = [p.grad for p in params]

    def projected() -> Tensor:
        with torch.enable_grad():
            loss = closure()
        for p, g in zip(params, _gradient("critical_strength", lambda: loss, params), strict=True):
            p.grad = g
        for row in rows:
            grads = flat(tuple(p.grad for p in row.parameters if p.grad is not None))
            for q, part in zip(row.parameters, parts(row.constrained_by.fold(grads), row.parameters), strict=True):
                q.grad = part
        return loss.detach()

    search.step(projected)
    for p, grad in zip(params, saved, strict=True):
        p.grad = grad


def _jackknife(constraint: Constraint, grads: list[Tensor], sizes: Tensor | None = None) -> tuple[float, float]:
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


# -------------------------------------------------------------------------------------------------------------- verdict


def _certificate(
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
    sizes = constraint.size(w)
    now, on_plane = ([_seen(binding, direction, group, state, g) for g in grads] for grads in (now, on_plane))
    residual, strength = float(constraint.violation(w)), float(binding.strength(direction, group, state))
    steps = collapse_steps(binding, direction, group, state)
    critical = interval = None
    if constraint.is_plane or bool((sizes == 0).any()):
        critical, error = _jackknife(constraint, on_plane, sizes)
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
