"""Rows of the table that the kernels read: where a parameter and its state lie, and how programs share its work.

Nothing here imports Triton; :mod:`symopt_kernels.triton.memory` gives the columns their names in kernels.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from symopt_kernels.groups import Groups
from symopt_kernels.native.binding import layout
from symopt_kernels.reference.gauge import SAMPLE

__all__ = [
    *("FIELDS", "INTERPRETED", "UNAVAILABLE", "Entry"),
    *("bits", "fill", "fill_samples", "fill_state", "fill_tiles", "tile", "unavailable"),
]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's interpreter runs the kernels on CPU tensors: for tests, thousands of times slower."""

OLDEST = (3, 7)
"""The oldest release of Triton that the kernels were run with; torch 2.13 brings it, torch 2.7 brings 3.3."""


def unavailable(release: str | None) -> str | None:
    """Why the Triton step cannot run with this release of Triton (None: there is none), or None."""
    if release is None:
        return "triton is not installed"
    if tuple(int(part) for part in release.split(".")[:2]) < OLDEST:
        return f"triton {release} is older than {OLDEST[0]}.{OLDEST[1]}, the oldest that the kernels were run with"
    return None


def _release() -> str | None:
    if find_spec("triton") is None:
        return None
    try:
        return version("triton")
    except PackageNotFoundError:  # builds for other devices have other names, and come with their torch
        return f"{OLDEST[0]}.{OLDEST[1]}"


UNAVAILABLE = unavailable(_release())
"""Why the Triton step cannot run here, or None."""

BLOCK = 2048  # weights of a program: 8 to each of 256 threads, which are 128 bits in half precision
WIDTHS = (1, 16, 128, 1024, 4096)  # columns that one group may take up in a tile
LINES_PER_PROGRAM = 16  # that one program surveys before it moves them; more are cut into parts
RESIDENT = 2048  # programs that run at a time on a large GPU, about: so far ahead of the moves does the survey go
UNITS = 128  # that one program combines
PARTIAL_SUMS = 8  # of a program, at most
GATE_NUMBERS = 8  # that a plane with one gate has in memory

FIELDS = (
    *("weight", "master", "first", "second", "peak", "factor_0", "factor_1", "imbalance", "metric_scale", "step"),
    *("budget", "has_momentum", "numel", "rows", "groups", "run", "pattern_n", "aligned", "begin", "count"),
    *("stride", "samples", "tiles", "parts", "lines", "lag", "scratch", "counters", "critical", "sqrt_dim"),
    *("weights", "main", "tensors", "places", "first_orbit"),
    *("units", "parameters", "unit_of", "unit_begins", "unit_slices", "unit_sizes", "unit_sums", "factor_squared"),
    *("first_unbound", "unbound_slices", "law_gain", "combine_begin", "combine_count"),
)
"""Columns of the table, all int64: addresses, the shape of the groups as ``native.layout`` has it, and how programs
share the work: ``count`` of them from ``begin`` on; groups in ``tiles`` of ``lines`` blocks, each cut into ``parts``;
``scratch`` and ``counters`` are where their partial sums and counters lie.  The imbalance's law looks at ``samples``
second moments, ``stride`` apart.

A plane of ``weights`` in all has a row for each of its tensors, the first of which is ``main``; ``sqrt_dim`` is an fp32
number by its bits.  Where its orbits are gathered, each segment of ``numel`` orbits with ``rows`` copies has a row too,
whose ``tensors``, ``places`` and ``first_orbit`` are those of an ``orbits.Segment``.

Units have a row for each of their ``parameters``, of ``groups`` slices each: ``unit_of`` is the unit of every slice (or
-1 - its place among the ``unbound_slices``), ``unit_slices`` from ``unit_begins[i]`` on are those of unit i.  The first
row also says how many ``units`` there are and where their sizes and sums lie; ``combine_count`` programs combine."""

_STATE = ("first", "second", "peak", "master", "factor_0", "factor_1", "imbalance", "metric_scale", "step", "budget")


class Entry:
    """One parameter and its state: a row of the table.  The caller sets ``grad`` and ``strength_kept``."""

    def __init__(self) -> None:
        self.fields: dict[str, int] = dict.fromkeys(FIELDS, 0)
        self.key: tuple[Any, ...] = ()
        """What its kernels are specialised by: retraction, dtype, which state there is, the form of its work."""
        self.grad = 0
        self.strength_kept: float | Tensor = 0.0
        self.strength_pruned: float | Tensor = 0.0
        self.plan: object = None
        """The ``LaunchPlan`` of the entries that it is the first of."""
        self.counted: tuple[Tensor, int] | None = None
        self.device = torch.device("cpu")
        self.has_momentum: Tensor | None = None
        self.scratch = 0
        """fp32 numbers that its programs leave for one another."""
        self.scratch_fields = {"scratch": 0}
        """Fields that say where in that memory something begins."""

    @property
    def table_rows(self) -> Sequence[Entry]:
        """Its rows in the table, which follow one another."""
        return (self,)

    @property
    def work(self) -> Iterator[tuple[Any, Entry, str, int]]:
        """Programs of its launches: the grid, the row they work on, the field for the first of them, how many."""
        yield "all", self, "begin", self.fields["count"]

    @property
    def zeros(self) -> int:
        """Exact zeros after the step; waits for it."""
        assert self.counted is not None
        counts, i = self.counted
        return int(counts[i])


def fill(
    entry: Entry,
    weight: Tensor,
    state: Mapping[str, Tensor],
    retraction: str,
    groups: Groups | None = None,
    *,
    depth: int = 2,
    pattern: tuple[int, int] | None = None,
    fresh: bool = False,
) -> None:
    """Point ``entry`` at a weight and its state, as ``native.fill``.

    ``depth`` is that of ``sparse``; ``pattern`` is N:M.  ``fresh`` says that the first moment holds nothing yet,
    which the kernel itself remembers from then on: a step that ``found_inf`` skips leaves it so.
    """
    shape = layout(weight, groups)
    assert shape is not None
    bands, rows, count, run = shape
    f = fill_state(entry, weight, state, shared_moment=groups is not None, fresh=fresh)
    f |= {"rows": rows, "groups": count, "run": run, "pattern_n": pattern[0] if pattern else 0}
    f["count"] = -(-weight.numel() // BLOCK)
    form: tuple[int, ...] = (depth,)
    if retraction == "group":
        _, c, p = form = fill_tiles(f, bands, weight.element_size())
        f["count"] = f["tiles"] * (1 if f["parts"] == 1 else 2 * f["parts"])
        entry.scratch = f["tiles"] * (4 * f["parts"] + 2) * (c // p) if f["parts"] > 1 else 0
        f["lag"] = max(1, min(f["tiles"], -(-RESIDENT // f["parts"])))
    elif pattern is not None:
        retraction, form = "nm", (pattern[1],)
    elif retraction == "sparse" and depth > 2:
        retraction = "sparse_deep"
    fill_samples(f, weight.numel() if groups is None else bands * count)
    entry.key = (retraction, *entry.key, form)


def fill_state(
    entry: Entry, weight: Tensor, state: Mapping[str, Tensor], *, shared_moment: bool, fresh: bool
) -> dict[str, int]:
    """Addresses of a weight and its state; ``shared_moment`` says that not every weight has an own second moment."""
    f = entry.fields = dict.fromkeys(FIELDS, 0)
    f |= {key: state[key].data_ptr() if key in state else 0 for key in _STATE}
    f |= {"weight": weight.data_ptr(), "numel": weight.numel()}
    if fresh:
        entry.has_momentum = torch.zeros((), dtype=torch.int32, device=weight.device)
    f["has_momentum"] = 0 if entry.has_momentum is None else entry.has_momentum.data_ptr()
    streams = ["weight", "master", "first", "factor_0", "factor_1"] + ["second", "peak"] * (not shared_moment)
    f["aligned"] = int(all(f[name] % 16 == 0 for name in streams))
    flags = (bool(f["master"]), bool(f["peak"]), bool(f["first"]), bool(f["budget"]))
    entry.key = (str(weight.dtype).removeprefix("torch."), *flags)
    entry.device, entry.plan, entry.scratch = weight.device, None, 0
    return f


def fill_tiles(f: dict[str, int], bands: int, element_size: int) -> tuple[int, int, int]:
    """Cut the groups that ``rows``, ``groups`` and ``run`` describe into tiles; returns their :func:`tile`."""
    r, c, p = tile(f["rows"], f["run"])
    f["aligned"] &= int((f["groups"] if p == 1 else f["run"]) % (16 // element_size) == 0)
    f["tiles"] = bands * -(-f["groups"] // (c // p))
    f["lines"] = -(-f["rows"] // r) * -(-f["run"] // p)
    f["parts"] = 1 if f["lines"] <= LINES_PER_PROGRAM else -(-f["lines"] // LINES_PER_PROGRAM)
    return r, c, p


def fill_samples(f: dict[str, int], moments: int) -> None:
    """Which of the second moments the imbalance's law looks at."""
    f["stride"] = max(1, moments // SAMPLE)
    f["samples"] = -(-moments // f["stride"])


def tile(rows: int, run: int) -> tuple[int, int, int]:
    """``(R, C, P)``: a tile has R rows and C columns, P of which belong to one group."""
    p = next((width for width in WIDTHS if run <= width), WIDTHS[-1])
    size = max(BLOCK, p)
    r = 1 if rows == 1 else max(1, min(16, size // max(p, BLOCK // 16)))
    return r, size // r, p


def bits(x: float) -> int:
    """Those of an fp32 number."""
    return struct.unpack("<i", struct.pack("<f", x))[0]  # type: ignore[no-any-return]
