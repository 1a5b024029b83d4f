"""A report as numbers, text, a table of rich, HTML and a plot."""

from __future__ import annotations

import math
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Protocol, final

from symopt.report.rows import Row

__all__ = ["Axes", "Report"]


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
class Report:
    """What :func:`report` returns; prints as a table."""

    rows: tuple[Row, ...]
    unconstrained: tuple[str, ...]
    parameters: int
    """Their number, with a composed weight in place of its factors."""
    constrained: int
    """Those of them that a constraint binds."""
    zeros: int
    """Constrained ones that are exactly zero."""
    parameters_folded: int | None
    """What :func:`symopt.fold` leaves; None without example inputs."""
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
                textwrap.shorten(row.constraint, 80, placeholder=" ..."),  # an index tensor has many lines
                "x".join(map(str, row.shape)),
                f"{row.zeros / math.prod(row.shape):.2%}",
                row.lives,
                row.budget,
                number(row.penalty),
                number(row.violation),
                "committed" if row.committed else number(row.strength),
                number(row.imbalance),
                "-" if row.committed else number(row.collapse_steps),
            ]
            for row in self.rows
        ]

    def _lines(self) -> list[str]:
        share = f" ({self.zeros / self.constrained:.2%})" if self.constrained else ""
        left = "" if self.parameters_folded is None else f"; {self.parameters_folded:,} left when folded"
        lines = [
            f"{self.parameters:,} parameters, {self.constrained:,} constrained, {self.zeros:,} of these zero"
            f"{share}{left}"
        ]
        if progress := self._progress():
            lines.insert(0, progress)
        if self.flops is not None:
            lines.append(f"FLOPs per sample: {self.flops:,}")
            lines[-1] += "" if self.flops_folded is None else f", {self.flops_folded:,} when folded"
        if self.unconstrained:
            lines.append(f"unconstrained: {', '.join(self.unconstrained)}")
        return lines + [f"note: {note}" for note in self.notes]

    def _progress(self) -> str:
        """How far training is; of tensors that count differently, the first and the last."""
        counted = [row for row in self.rows if row.step is not None]
        if not counted:
            return ""
        steps = sorted({row.step for row in counted if row.step is not None})
        totals = sorted({row.total_steps for row in counted if row.total_steps is not None})
        step, total = ("/".join(f"{n}" for n in sorted({found[0], found[-1]})) for found in (steps, totals or [0]))
        return f"step {step}" + (f" of {total}" if totals else "")

    def _widths(self) -> list[int]:
        return [max(map(len, column)) for column in zip(_COLUMNS, *self._cells(), strict=True)]

    def __str__(self) -> str:
        """Plain text; where standard output is a terminal, and rich is installed, its table."""
        if sys.stdout is not None and sys.stdout.isatty():
            try:
                from rich.console import Console
            except ImportError:
                pass
            else:
                console = Console(color_system=None)
                with console.capture() as captured:
                    console.print(self)
                return captured.get().rstrip("\n")
        table, widths = [_COLUMNS, *self._cells()], self._widths()
        text = ["  ".join(cell.ljust(n) for cell, n in zip(line, widths, strict=True)).rstrip() for line in table]
        return "\n".join(text + self._lines())

    def __rich_console__(self, console: object, options: _ConsoleOptions) -> Iterator[object]:
        from rich.table import Table
        from rich.text import Text

        widths, foot = self._widths(), Text("\n".join(self._lines()))  # Text: names in brackets are no markup
        if sum(widths) + 3 * len(widths) + 1 > options.max_width:
            # Too narrow: rich would cut names and numbers short.  A few words per tensor wrap without a loss.
            for name, constraint, shape, *figures in self._cells():
                yield Text(f"{name}  {constraint}  {shape}")
                yield Text("   " + ",  ".join(f"{c} {figure}" for c, figure in zip(_COLUMNS[3:], figures, strict=True)))
            yield foot
            return
        table = Table(*_COLUMNS, title="symopt", caption=foot, caption_justify="left")
        for line in self._cells():
            table.add_row(*map(Text, line))
        yield table

    def _repr_html_(self) -> str:
        from html import escape

        head = "".join(f"<th>{escape(c)}</th>" for c in _COLUMNS)
        body = "".join(f"<tr>{''.join(f'<td>{escape(c)}</td>' for c in line)}</tr>" for line in self._cells())
        foot = "<br>".join(map(escape, self._lines()))
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><p>{foot}</p>"


_COLUMNS = [
    *("parameter", "constraint", "shape", "zeros", "live", "budget"),
    *("penalty", "violation", "strength", "c", "steps left"),
]
