"""report: what is constrained, how far it has come, and what folding would save."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Protocol, final

import torch
from torch import Tensor, nn

from symopt.budgets.state import BUDGET, BudgetState, is_committed
from symopt.constraints import Constraint
from symopt.constraints.planes.plane import flat
from symopt.folding.compare import Inputs
from symopt.folding.fold import fold
from symopt.module.bindings import bindings, constraints, free
from symopt.module.explicit import plain_state_dict
from symopt.optim import ConstrainedOptimizer, registry
from symopt.optim.binding import Binding
from symopt.optim.collapse import collapse_steps
from symopt.optim.direction import Options
from symopt.optim.schedule import in_force

__all__ = ["Axes", "Report", "Row", "report"]


class Axes(Protocol):
    """What a plot needs of matplotlib's axes, which symopt works without."""

    def barh(self, y: list[str], width: list[float], *, color: str = ...) -> object: ...

    def set(self, *, xlim: tuple[float, float], xlabel: str) -> object: ...

    def invert_yaxis(self) -> object: ...


class _ConsoleOptions(Protocol):
    """What a table needs of rich's options."""

    max_width: int


@final
@dataclass(frozen=True)
class Row:
    """One constrained tensor."""

    name: str
    constraint: str
    shape: tuple[int, ...]
    zeros: int
    """Weights that are exactly zero."""
    live: int
    """Units (weights, groups) that are not exactly zero."""
    units: int
    penalty: float
    """``||w||_1``, ``sum ||w_g||_2``, ..., of all parameters that the constraint binds."""
    violation: float
    """Relative change of the tensor if its nearly-zero units were rounded to zero; relative distance from a plane."""
    strength: float | None
    committed: bool
    """Whether :class:`symopt.Anneal` has fixed the support: the strength is 0 from then on."""
    imbalance: float | None
    """Plasticity c; zeros are permanent once it is 0.  None before the first step."""
    collapse_steps: float | None
    """Steps at the current rate until the median live unit is zero if no gradient holds it; None if unknown."""


@final
@dataclass(frozen=True)
class Report:
    """What :func:`report` returns; prints as a table."""

    rows: tuple[Row, ...]
    unconstrained: tuple[str, ...]
    parameters: int
    parameters_folded: int
    flops: int | None
    """Multiply-adds of one sample, times two; None without example inputs."""
    flops_folded: int | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, object]:
        """Plain numbers, strings, lists and dicts (JSON)."""
        return asdict(self)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Bar chart of the share of nonzero weights per tensor; returns the matplotlib axes."""
        import matplotlib.pyplot as plt

        axes: Axes = plt.subplots(figsize=(6, 0.5 * len(self.rows) + 1.5))[1] if ax is None else ax
        names = [row.name for row in self.rows]
        axes.barh(names, [1.0] * len(names), color="0.9")
        axes.barh(names, [1 - row.zeros / math.prod(row.shape) for row in self.rows])
        axes.set(xlim=(0, 1), xlabel="share of nonzero weights")
        axes.invert_yaxis()
        return axes

    def _cells(self) -> list[list[str]]:
        def number(x: float | None) -> str:
            return "-" if x is None else "inf" if math.isinf(x) else f"{x:.3g}"

        return [
            [
                row.name,
                row.constraint,
                "x".join(map(str, row.shape)),
                f"{row.zeros / math.prod(row.shape):.2%}",
                f"{row.live}/{row.units}",
                number(row.penalty),
                number(row.violation),
                "committed" if row.committed else number(row.strength),
                number(row.imbalance),
                "-" if row.committed else number(row.collapse_steps),
            ]
            for row in self.rows
        ]

    def _lines(self) -> list[str]:
        lines = [f"parameters {self.parameters:,} -> {self.parameters_folded:,} folded"]
        if self.flops is not None and self.flops_folded is not None:
            lines.append(f"FLOPs per sample {self.flops:,} -> {self.flops_folded:,} folded")
        if self.unconstrained:
            lines.append(f"unconstrained: {', '.join(self.unconstrained)}")
        return lines + [f"note: {note}" for note in self.notes]

    def _widths(self) -> list[int]:
        return [max(map(len, column)) for column in zip(_COLUMNS, *self._cells(), strict=True)]

    def __str__(self) -> str:
        table, widths = [_COLUMNS, *self._cells()], self._widths()
        text = ["  ".join(cell.ljust(n) for cell, n in zip(line, widths, strict=True)).rstrip() for line in table]
        return "\n".join(text + self._lines())

    def __rich_console__(self, console: object, options: _ConsoleOptions) -> Iterator[object]:
        from rich.table import Table

        widths = self._widths()
        if sum(widths) + 3 * len(widths) + 1 > options.max_width:
            # Too narrow: rich would cut names and numbers short.  A few words per tensor wrap without a loss.
            for name, constraint, shape, *figures in self._cells():
                yield f"{name}  {constraint}  {shape}"
                yield "   " + ",  ".join(f"{c} {figure}" for c, figure in zip(_COLUMNS[3:], figures, strict=True))
            yield "\n".join(self._lines())
            return
        table = Table(*_COLUMNS, title="symopt", caption="\n".join(self._lines()), caption_justify="left")
        for line in self._cells():
            table.add_row(*line)
        yield table

    def _repr_html_(self) -> str:
        from html import escape

        head = "".join(f"<th>{escape(c)}</th>" for c in _COLUMNS)
        body = "".join(f"<tr>{''.join(f'<td>{escape(c)}</td>' for c in line)}</tr>" for line in self._cells())
        foot = "<br>".join(map(escape, self._lines()))
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><p>{foot}</p>"


_COLUMNS = ("parameter", "constraint", "shape", "zeros", "live", "penalty", "violation", "strength", "c", "steps left")


@torch.no_grad()
def report(
    model: nn.Module, optimizer: ConstrainedOptimizer | None = None, example_inputs: Tensor | Inputs | None = None
) -> Report:
    """State of every constraint of ``model``, and what folding it would save.

    Args:
        model: a module constrained by :func:`symopt.constrain`.
        optimizer: the symopt optimizer that trains it; without it strength, imbalance and steps left are unknown.
        example_inputs: a tensor or tuple of tensors for a forward pass, from which FLOPs are counted.

    Returns:
        A :class:`Report`: prints as a table (with rich in a terminal, as HTML in a notebook), ``.to_dict()``,
        ``.plot()``.

    Raises:
        TypeError: if ``model`` is no Module or ``optimizer`` no symopt optimizer.

    Example:
        >>> import torch, symopt
        >>> net = symopt.constrain(torch.nn.Linear(4, 2), {"weight": symopt.GroupSparse("out")})
        >>> with torch.no_grad():
        ...     _ = net.weight[0].zero_()
        >>> symopt.report(net).rows[0].live
        1
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"report: model must be a torch.nn.Module, got {type(model).__name__}")
    if optimizer is not None and not isinstance(optimizer, ConstrainedOptimizer):
        raise TypeError(f"report: optimizer must be a symopt optimizer or None, got {type(optimizer).__name__}")
    bound = constraints(model)
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    composed = {name: w for name, w in plain_state_dict(model).items() if name in bound and name not in named}
    named |= composed  # explicit mode: what the factors make
    found = [] if optimizer is None else optimizer.bindings()
    live = {id(p): (group, binding) for group, binding in found for p in binding.parameters}
    rows = tuple(
        _row(name, named[name], flat(tuple(named[n] for n in names)), c, optimizer, live.get(id(named[name])))
        for names, c in bindings(model)
        for name in names
    )
    small = fold(model, example_inputs)
    return Report(
        rows=rows,
        unconstrained=tuple(free(model)),
        parameters=_count(model, composed),
        parameters_folded=_count(small),
        flops=_flops(model, example_inputs),
        flops_folded=_flops(small, example_inputs),
        notes=tuple(f"{name}: in no group of the optimizer" for name in bound if live and id(named[name]) not in live),
    )


def _row(
    name: str,
    p: Tensor,
    w: Tensor,
    constraint: Constraint,
    optimizer: ConstrainedOptimizer | None,
    stepped: tuple[Options, Binding] | None,
) -> Row:
    """``w`` is what the constraint sees: ``p``, or all parameters that it binds; ``stepped`` is how it is stepped."""
    strength = imbalance = steps = None
    committed = False
    if optimizer is not None and stepped is not None:
        group, binding = stepped
        group = in_force(group, optimizer.schedule.steps)
        state = optimizer.state.get(p, {})
        committed = group["committed"]
        strength = float(binding.strength(optimizer.direction, group, state))
        steps = collapse_steps(binding, optimizer.direction, group, state)
        imbalance = float(state["imbalance"]) if "imbalance" in state else None
        if BUDGET in state:  # the strength of what is kept, and no collapse to wait for
            strength, steps = float(BudgetState.read(state, state[BUDGET]).strength_kept), None
            committed = is_committed(state)
    size = constraint.size(w)
    return Row(
        name=name,
        constraint=str(constraint),
        shape=tuple(p.shape),
        zeros=int((p == 0).sum()),
        live=int((size > 0).sum()),
        units=size.numel(),
        penalty=float(constraint.penalty(w)),
        violation=float(constraint.violation(w)),
        strength=strength,
        committed=committed,
        imbalance=imbalance,
        collapse_steps=steps,
    )


def _count(model: nn.Module, composed: dict[str, Tensor] | None = None) -> int:
    """Parameters, with a composed weight in place of its factors."""
    factors = registry.factors()
    own = sum(p.numel() for p in model.parameters() if id(p) not in factors)
    return own + sum(int(w.numel()) for w in (composed or {}).values())


def _flops(model: nn.Module, example_inputs: Tensor | Inputs | None) -> int | None:
    if example_inputs is None:
        return None
    from torch.utils.flop_counter import FlopCounterMode

    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    mode = FlopCounterMode(display=False)
    with mode:
        copy.deepcopy(model).eval()(*inputs)  # a copy: submodules may each have a mode of their own
    return int(mode.get_total_flops() // max(1, getattr(inputs[0], "shape", (1,))[0]))
