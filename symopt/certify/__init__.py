"""certify: does every constraint hold, will it, and against what gradient; critical_strength: what it takes."""

from __future__ import annotations

from typing import final

from torch import Tensor, nn

from symopt.certify.certificate import Certificate, Certificates, certificate, jackknife
from symopt.certify.gradients import Closure, bound, descend, gradients, on_planes
from symopt.optim import ConstrainedOptimizer, registry

__all__ = ["Certificate", "Certificates", "certify", "critical_strength"]


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
    rows = bound("certify", model)
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
    now = gradients("certify", closure, rows, samples)
    on_plane = now
    planes = [row for row in rows if row.constrained_by.is_plane]
    if any(float(row.constrained_by.violation(row.weight())) > 0 for row in planes):
        with on_planes(rows):
            on_plane = gradients("certify", closure, rows, samples)
    found = []
    for i, row in enumerate(rows):
        group, binding = owners[row.parameters[0]]
        found.append(certificate(opt, group, row, binding, [g[i] for g in now], [g[i] for g in on_plane]))
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
    rows = [row for row in bound("critical_strength", model) if row.constrained_by.is_plane]
    if not rows:
        raise ValueError("critical_strength: the model has no fixed plane; Sparse and GroupSparse choose their own")
    others = [p for p in model.parameters() if p.requires_grad]
    evaluating = _Evaluating()
    registry.register_owner(evaluating)  # no optimizer trains these weights here, so there is nothing to warn of
    with on_planes(rows, others):
        if steps:
            descend(closure, rows, others, steps)
        grads = gradients("critical_strength", closure, rows, samples)
    found = {}
    for i, row in enumerate(rows):
        value, _ = jackknife(row.constrained_by, [g[i] for g in grads])
        found.update(dict.fromkeys(row.names, value))
    return found


@final
class _Evaluating:
    """Counts as the optimizer of every weight while it exists."""

    def owns(self, param: Tensor) -> bool:
        return True

    def forget(self, param: Tensor) -> None:
        pass
