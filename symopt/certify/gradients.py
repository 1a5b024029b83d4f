"""Gradients of the loss as constraints see them: at the weights, and on the planes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from symopt.constraints.planes.plane import flat, parts
from symopt.module.bindings import bindings
from symopt.optim.binding import Binding

__all__ = ["Closure", "bound", "descend", "gradients", "on_planes"]

Closure = Callable[[], Tensor]


def bound(owner: str, model: nn.Module) -> list[Binding]:
    """Every constraint of ``model`` with its parameters; raises for ``owner`` where there are factors instead."""
    given: object = model
    if not isinstance(given, nn.Module):
        raise TypeError(f"{owner}: model must be a torch.nn.Module, got {type(model).__name__}")
    named = dict(model.named_parameters(remove_duplicate=False))
    rows = bindings(model)
    if missing := [name for names, _ in rows for name in names if name not in named]:
        raise ValueError(f"{owner}: {missing[0]} is constrained in explicit mode, which this does not look into")
    return [Binding(constraint, names, tuple(named[name] for name in names)) for names, constraint in rows]


def gradients(owner: str, closure: Closure, rows: list[Binding], samples: int) -> list[list[Tensor]]:
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
def on_planes(rows: list[Binding], others: Sequence[Tensor] = ()) -> Iterator[None]:
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


def descend(closure: Closure, rows: list[Binding], params: list[nn.Parameter], steps: int) -> None:
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
