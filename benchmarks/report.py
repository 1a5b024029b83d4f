"""Results as tables (rich where it is installed, Markdown), a figure, and the marked parts of README.md."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.steps.kernels import KernelResult
from benchmarks.steps.training import TrainingResult
from benchmarks.timing import Summary

__all__ = ["Results", "fill", "markdown", "plot", "progress", "show"]

Rows = list[list[str]]
README = Path(__file__).with_name("README.md")


class Results:
    """Everything one run measured."""

    def __init__(self, described: dict[str, Any]) -> None:
        self.machine = described
        self.kernels: list[KernelResult] = []
        self.memory: list[dict[str, Any]] = []
        self.training: list[TrainingResult] = []

    def timed(self) -> list[KernelResult]:
        return [r for r in self.kernels if not r.wrong]

    def empty(self) -> bool:
        return not (self.timed() or self.memory or any(not r.wrong for r in self.training))

    def to_dict(self) -> dict[str, Any]:
        return {
            "machine": self.machine,
            "kernels": [r.to_dict() for r in self.kernels],
            "memory": self.memory,
            "training": [r.to_dict() for r in self.training],
        }

    # -- tables: a header and rows ------------------------------------------------------------------------------------

    def kernel_rows(self) -> Rows:
        peers = list(dict.fromkeys(name for r in self.timed() for name in (*r.pairs, *r.absent)))
        several = len({(r.case.dtype, r.case.threads) for r in self.timed()}) > 1
        rows = [["step", "bytes per weight", "symopt, ms", "of bandwidth", *peers]]
        for r in self.timed():
            assert r.ours_ms is not None
            name = str(r.case) if several else r.case.label
            read, written = r.case.traffic
            rows.append([
                name + (" *" if machine.in_cache(r.case.touched, self.machine) else ""),
                f"{read} + {written}",
                _number(r.ours_ms.median),
                f"{100 * r.share:.0f} %",
                *(_ratio(r.pairs[p].ratio) if p in r.pairs else "-" for p in peers),
            ])  # fmt: skip
        return rows

    def memory_rows(self) -> Rows:
        rows = [["step", "method", "held, in weights", "extra in a step, in weights", "extra, KiB"]]
        for r in self.memory:
            if "absent" in r:
                continue
            unit = r["weights_bytes"]
            small = r["extra_bytes"] <= max(r["resolution_bytes"], RESOLUTION)
            extra = [f"{r['extra_bytes'] / unit:.2f}", f"{r['extra_bytes'] / 1024:,.0f}"]
            extra = ["0", f"below {max(r['resolution_bytes'], RESOLUTION) / 1024:,.0f}"] if small else extra
            rows.append([r["case"], r["method"], f"{r['held_bytes'] / unit:.2f}", *extra])
        return rows

    def training_rows(self) -> Rows:
        rows = [["network", "flags", "weights", "constrained", "torch.optim, ms", "symopt, ms", "symopt / torch.optim"]]
        for r in self.training:
            if r.ours_ms and r.torch_ms and r.ratio:
                counts = [f"{r.weights:,}", f"{r.constrained:,}"]
                times = [_number(r.torch_ms.median), _number(r.ours_ms.median)]
                rows.append([r.net, r.flags, *counts, *times, _ratio(r.ratio)])
        return rows

    def absences(self) -> list[str]:
        """Why some cells are empty, each reason once."""
        found: dict[str, list[str]] = {}
        every = len({r.case.label for r in self.timed()})
        for r in self.timed():
            for peer, reason in r.absent.items():
                found.setdefault(f"{peer}: {reason}", []).append(r.case.label)
        for row in self.memory:
            if "absent" in row:
                found.setdefault(f"memory of {row['method']}: {row['absent']}", []).append(row["case"])
        where = {reason: list(dict.fromkeys(labels)) for reason, labels in found.items()}
        return [r if len(labels) == every else f"{r} ({', '.join(labels)})" for r, labels in where.items()]


RESOLUTION = 256 << 10
"""Linux counts resident pages per core in batches, so differences of a few dozen pages mean nothing."""


def _number(ms: float) -> str:
    digits = 3 if ms < 1 else 2 if ms < 10 else 1 if ms < 100 else 0
    return f"{ms:.{digits}f}"


def _ratio(r: Summary) -> str:
    digits = 2 if r.median < 10 else 1
    return f"{r.median:.{digits}f} ({r.low:.{digits}f}-{r.high:.{digits}f})"


# ------------------------------------------------------------------------------------------------------------ output


def sections(results: Results) -> dict[str, tuple[str, Rows, str]]:
    """Per part of the run: title, table, what is to be said under it."""
    found = {}
    if results.timed():
        cached = any(machine.in_cache(r.case.touched, results.machine) for r in results.timed())
        notes = ["Columns of peers: the peer's time over symopt's, median (quartiles); above 1 symopt is faster."]
        if cached:
            notes.append("* in cache: the bytes touched are below twice the last-level cache.")
        first = results.timed()[0].case
        if all((r.case.dtype, r.case.threads) == (first.dtype, first.threads) for r in results.timed()):
            notes.insert(0, f"{first.dtype}, {first.threads} thread{'s' * (first.threads > 1)}.")
        notes += [f"Missing: {line}." for line in results.absences()]
        found["kernels"] = ("One step", results.kernel_rows(), "\n".join(notes))
    if results.memory:
        note = "Held: parameters, optimizer state and the weight's gradient. Extra: peak of one step beyond that."
        found["memory"] = ("Memory", results.memory_rows(), note)
    if len(results.training_rows()) > 1:
        note = "Forward, backward and step. Last column: median (quartiles); below 1 symopt is faster."
        found["training"] = ("Whole training steps", results.training_rows(), note)
    return found


def _table(rows: Rows) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _notes(note: str) -> str:
    # A list, because Markdown would join the lines; an asterisk would be emphasis.
    return "\n".join(f"- {line}" for line in note.replace("*", "\\*").splitlines())


def markdown(results: Results) -> str:
    parts = [machine.line(results.machine)]
    for title, rows, note in sections(results).values():
        parts += [f"## {title}", _table(rows), _notes(note)]
    return "\n\n".join(parts) + "\n"


def show(results: Results) -> None:
    """Print the tables for a person."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(markdown(results), end="")
        return
    console = Console()
    if not console.is_terminal:
        print(markdown(results), end="")
        return
    console.print(machine.line(results.machine), highlight=False)
    for title, (head, *rows), note in sections(results).values():
        table = Table(title=title, title_justify="left")
        for i, name in enumerate(head):
            table.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        console.print(note, highlight=False, markup=False)


def fill(results: Results, path: Path) -> None:
    """Replace what stands between ``<!-- name -->`` and ``<!-- /name -->`` for every part this run measured."""
    text = path.read_text(encoding="utf-8")
    for name, (_, rows, note) in sections(results).items():
        opening, closing = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if text.count(opening) != 1 or text.count(closing) != 1:
            raise ValueError(f"{path.name} does not have one place for {name!r}")
        before, _, rest = text.partition(opening)
        _, _, after = rest.partition(closing)
        body = f"{machine.line(results.machine)}\n\n{_table(rows)}\n\n{_notes(note)}"
        text = f"{before}{opening}\n{body}\n\n{closing}{after}"
    path.write_text(text, encoding="utf-8")


def plot(results: Results, path: Path) -> bool:
    """Time of every method over that of fused torch.optim, on a logarithmic axis; False if that was never timed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [(r, r.to_floor()) for r in results.timed() if r.to_floor()]
    if not shown:
        return False
    methods = list(dict.fromkeys(name for _, ratios in shown for name in ratios))
    colors = {name: f"C{i}" for i, name in enumerate(methods)}
    every = [1.0, *(ratio for _, ratios in shown for ratio in ratios.values())]
    columns = min(3, len(shown))
    lines = -(-len(shown) // columns)
    size = (4.4 * columns, 0.9 + lines * (0.5 + 0.26 * len(methods)))
    figure, axes = plt.subplots(lines, columns, figsize=size, layout="constrained", sharex=True, squeeze=False)
    for axis, (result, ratios) in zip(axes.flat, shown, strict=False):
        names = [m for m in reversed(methods) if m in ratios]
        bars = axis.barh(names, [ratios[n] - 1 for n in names], left=1, color=[colors[n] for n in names])
        axis.bar_label(bars, [f"{ratios[n]:.2g}" if ratios[n] < 100 else f"{ratios[n]:.0f}" for n in names], padding=3)
        axis.axvline(1, color="0.2", linewidth=1)
        axis.set_xscale("log")
        axis.set_title(str(result.case), fontsize=9)
        axis.set_xlim(min(every) / 3, max(every) * 3)
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    label = "time of one step / time of torch.optim's fused, unconstrained step (log scale; 1 is the floor)"
    figure.supxlabel(label, fontsize=9)
    figure.suptitle(textwrap.fill(machine.line(results.machine), 70 * columns), fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


@contextmanager
def progress(total: int) -> Iterator[Any]:
    """Yields ``say(text)``, which announces the next of ``total`` jobs: a bar in a terminal, else a line on stderr."""
    done = 0

    def plain(text: str) -> None:
        nonlocal done
        done += 1
        print(f"[{done}/{total}] {text}", file=sys.stderr, flush=True)

    if not sys.stderr.isatty():
        yield plain
        return
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        yield plain
        return
    # Drawn only when a job begins: a thread that draws in between would disturb what is timed.
    with Progress(console=Console(stderr=True), transient=True, auto_refresh=False) as bar:
        task = bar.add_task("", total=total)

        def say(text: str) -> None:
            nonlocal done
            bar.update(task, description=text, completed=done, refresh=True)
            done += 1

        yield say
