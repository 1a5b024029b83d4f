"""report: what is constrained, how far it has come, and what folding would save."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from symopt.constraints import Constraint
from symopt.folding.compare import Examples, Inputs, examples_of
from symopt.folding.fold import folded
from symopt.folding.recomputed import copy_of
from symopt.module.bindings import annotated_bindings, bindings, free
from symopt.module.explicit import plain_state_dict
from symopt.optim import ConstrainedOptimizer, registry
from symopt.report.rows import Row, rows_of, shares_of
from symopt.report.table import Axes, Report

__all__ = ["Axes", "Report", "Row", "report"]

Bound = tuple[tuple[str, ...], tuple[Tensor, ...], Constraint]
Found = list[Bound]


@torch.no_grad()
def report(
    model: nn.Module,
    optimizer: ConstrainedOptimizer | None = None,
    example_inputs: Tensor | Inputs | Mapping[str, object] | None = (),
    example_kwargs: Mapping[str, object] | None = None,
) -> Report:
    """State of every constraint of ``model``: zeros, living units, budgets, and with examples what folding would save.

    It looks at every constrained weight a few times, which takes milliseconds.  To log zeros in every step there is
    ``optimizer.zeros()``, which the fused steps count anyway; with ``example_inputs`` the model is run and folded,
    which takes longest.

    Args:
        model: a module constrained by :func:`symopt.constrain`.
        optimizer: the symopt optimizer that trains it; without it progress, strength, imbalance and steps left are
            unknown.
        example_inputs, example_kwargs: arguments of a forward pass, as of :func:`symopt.fold`, from which FLOPs are
            counted and what folding would leave.

    Returns:
        A :class:`Report`: prints as a table (with rich in a terminal, as HTML in a notebook), ``.to_dict()``,
        ``.plot()``.  The column "budget" says which share lives now, and of which target.

    Raises:
        TypeError: if ``model`` is no Module, ``optimizer`` no symopt optimizer, or the examples are no arguments.
        ValueError: if a constraint binds parameters outside of ``model``, or ``model`` cannot run on the examples.

    Example:
        >>> import torch, symopt
        >>> net = symopt.constrain(torch.nn.Linear(4, 2), {"weight": symopt.GroupSparse("out", keep=1)})
        >>> with torch.no_grad():
        ...     _ = net.weight[0].zero_()
        >>> found = symopt.report(net)
        >>> found.rows[0].live, found.rows[0].share, found.rows[0].target
        (1, 0.5, 0.5)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"report: model must be a torch.nn.Module, got {type(model).__name__}")
    if optimizer is not None and not isinstance(optimizer, ConstrainedOptimizer):
        raise TypeError(f"report: optimizer must be a symopt optimizer or None, got {type(optimizer).__name__}")
    examples = examples_of("report", model, example_inputs, example_kwargs)
    found, notes = _bound(model)
    shares = shares_of([(names[0], weights, constraint) for names, weights, constraint in found])
    owned = [] if optimizer is None else optimizer.bindings()
    stepped = {id(p): (group, binding) for group, binding in owned for p in binding.parameters}
    rows = [
        row
        for names, weights, constraint in found
        for row in rows_of(names, weights, constraint, shares.get(names[0]), optimizer, stepped)
    ]
    if stepped:
        every = [(name, w) for names, weights, _ in found for name, w in zip(names, weights, strict=True)]
        notes += [f"{name}: in no group of the optimizer" for name, w in every if id(w) not in stepped]
    flops = None if examples is None else _flops(model, examples)
    small = None
    if examples is not None:
        try:
            small = folded("report", model, example_inputs, example_kwargs).module
        except (ValueError, RuntimeError) as error:
            notes.append(f"not folded: {error}")
    return Report(
        rows=tuple(rows),
        unconstrained=tuple(free(model)),
        parameters=_count(model, found),
        constrained=sum(w.numel() for _, weights, _ in found for w in weights),
        zeros=sum(row.zeros for row in rows),
        parameters_folded=None if small is None else sum(p.numel() for p in small.parameters()),
        flops=flops,
        flops_folded=None if small is None or examples is None else _flops(small, examples),
        notes=tuple(notes),
    )


def _bound(model: nn.Module) -> tuple[Found, list[str]]:
    """Names, values and constraint of everything that is bound, and notes on what has no values to look at."""
    gone = {name for binding in annotated_bindings(model) for name in binding.binding().missing}
    notes = [f"{name}: constrained, but no longer a parameter of its module" for name in sorted(gone)]
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    found: Found = []
    for names, weights, constraint in _rows(model, named):
        if any(w.is_meta for w in weights):
            notes += [f"{name}: on the meta device, so it has no values" for name in names]
        else:
            found.append((names, weights, constraint))
    return found, notes


def _rows(model: nn.Module, named: dict[str, Tensor]) -> Iterator[Bound]:
    rows = [(names, constraint) for names, constraint in bindings(model) if names]
    if any(name not in named for names, _ in rows for name in names):
        named = plain_state_dict(model) | named  # explicit mode: what the factors make
    for names, constraint in rows:
        if all(name in named for name in names):
            yield names, tuple(named[name] for name in names), constraint


def _count(model: nn.Module, found: Found) -> int:
    """Parameters, with a composed weight in place of its factors."""
    factors, own = registry.factors(), dict(model.named_parameters(remove_duplicate=False))
    composed = [w for names, weights, _ in found for name, w in zip(names, weights, strict=True) if name not in own]
    return sum(p.numel() for p in model.parameters() if id(p) not in factors) + sum(w.numel() for w in composed)


def _flops(model: nn.Module, examples: Examples) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    mode = FlopCounterMode(display=False)
    copied = copy_of(model).eval()  # submodules may each have a mode of their own
    try:
        with mode:
            examples.run(copied)
    except Exception as error:
        raise ValueError(f"report: {examples} failed: {error}; give the arguments that forward takes") from error
    return int(mode.get_total_flops() // examples.batch)
