"""Tables of addresses: how tensors become buckets, and a bucket's programs share its work.

Tensors that share a dtype and a retraction form a bucket, and a bucket is one launch, however many they are.  Addresses
of weights and state lie in a table on the device that is made once; what changes from step to step, the gradients and
the strengths, follows by one asynchronous copy, and only if it did change.
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from symopt_kernels.groups import Groups
from symopt_kernels.native.binding import layout
from symopt_kernels.orbits import Segment

__all__ = [
    *("DTYPES", "INTERPRETED", "PATTERNS", "UNAVAILABLE", "Entry", "PlaneEntry", "LaunchPlan"),
    *("fill", "fill_plane", "straight", "tile"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
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
SHARE = 16  # lines that one program sums before it moves them; more are cut into parts
PATTERNS = (2, 4, 8, 16)
SAMPLE = 1024  # units from which the imbalance takes its quantile, at least
RESIDENT = 2048  # programs that run at a time on a large GPU, about: so far ahead of the moves do the sums go
SUMS = 8  # partial sums of a program, at most
GATE = 8  # numbers of a tie's gate

_STATE = {"peak": "max_exp_avg_sq", "second": "exp_avg_sq"}
_STATE |= {k: k for k in ("master", "factor_0", "factor_1", "imbalance", "metric_scale", "step", "budget")}


class Entry:
    """One tensor and its state: addresses, shape, and what the last step left.

    ``room`` numbers are between its launches; programs work on the rows ``working``, if any, instead of its own.
    """

    def __init__(self) -> None:
        self.fields: dict[str, int] = {}
        self.key: tuple[Any, ...] = ()
        self.grad = 0
        self.strength_kept: float | Tensor = 0.0
        self.plan: LaunchPlan | None = None
        self.counted: tuple[Tensor, int] | None = None
        self.device = torch.device("cpu")
        self.seen: Tensor | None = None
        self.room = 0
        self.working: Sequence[Entry] = ()

    @property
    def zeros(self) -> int:
        """Exact zeros after the step; waits for it."""
        assert self.counted is not None
        counts, i = self.counted
        return int(counts[i])


class PlaneEntry(Entry):
    """Tensors under a plane; ``entries`` are those of each, ``parts`` those of segments whose orbits are gathered."""

    entries: list[Entry]
    parts: list[Entry]
    kept: list[tuple[Tensor, ...]]
    """Alive as long as addresses point at them."""


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

    ``depth`` is that of ``sparse``; ``pattern`` is N:M.  ``fresh`` says that ``momentum_buffer`` holds nothing yet,
    which the kernel itself remembers from then on: a step that ``found_inf`` skips leaves it so.
    """
    shape = layout(weight, groups)
    assert shape is not None
    bands, rows, count, run = shape
    first = state.get("exp_avg", state.get("momentum_buffer"))
    places = {name: state[key].data_ptr() if key in state else 0 for name, key in _STATE.items()}
    places |= {"weight": weight.data_ptr(), "first": 0 if first is None else first.data_ptr()}
    if fresh:
        entry.seen = torch.zeros((), dtype=torch.int32, device=weight.device)
    f = entry.fields = {**places, "seen": 0 if entry.seen is None else entry.seen.data_ptr(), "numel": weight.numel()}
    f |= {"rows": rows, "groups": count, "run": run, "keep": pattern[0] if pattern else 0}
    f |= dict.fromkeys(("begin", "units", "parts", "lines", "lag", "room", "marks", "critical", "spread"), 0)
    f |= dict.fromkeys(("weights", "main", "of", "places", "skip"), 0)
    wide = 16 // weight.element_size()
    streams = [f[name] for name in ("weight", "master", "first", "factor_0", "factor_1")]
    streams += [f["second"], f["peak"]] if groups is None else []
    f["aligned"] = int(all(place % 16 == 0 for place in streams))
    form: tuple[int, ...] = (depth,)
    f["count"] = -(-weight.numel() // BLOCK)
    if retraction == "group":
        r, c, p = form = tile(rows, run)
        f["aligned"] &= int((count if p == 1 else run) % wide == 0)
        f["units"] = bands * -(-count // (c // p))
        f["lines"] = -(-rows // r) * -(-run // p)
        f["parts"] = 1 if f["lines"] <= SHARE else -(-f["lines"] // SHARE)
        f["count"] = f["units"] * (1 if f["parts"] == 1 else 2 * f["parts"])
        entry.room = f["units"] * (4 * f["parts"] + 2) * (c // p) if f["parts"] > 1 else 0
        f["lag"] = max(1, min(f["units"], -(-RESIDENT // f["parts"])))
    elif pattern is not None:
        retraction, form = "nm", (pattern[1],)
    elif retraction == "sparse" and depth > 2:
        retraction = "sparse_deep"
    units = weight.numel() if groups is None else bands * count
    f["stride"] = max(1, units // SAMPLE)
    f["samples"] = -(-units // f["stride"])
    flags = (bool(f["master"]), bool(f["peak"]), bool(f["first"]), bool(f["budget"]))
    entry.key = (retraction, str(weight.dtype).removeprefix("torch."), *flags, form)
    entry.device, entry.plan = weight.device, None


def fill_plane(
    mirror: PlaneEntry,
    weights: Sequence[Tensor],
    states: Sequence[Mapping[str, Tensor]],
    *,
    sqrt_dim_per_gate: float,
    gate_per_orbit: bool,
    segments: Sequence[Segment] | None = None,
    centred: Groups | None = None,
    basis: Tensor | None = None,
    fresh: bool = False,
) -> None:
    """Point ``mirror`` at contiguous weights under a plane, as ``native.fill_plane``."""
    mirror.entries = [Entry() for _ in weights]
    first, retraction = mirror.entries[0], "mirror" if centred is None else "group"
    for entry, weight, state in zip(mirror.entries, weights, states, strict=True):
        fill(entry, weight, state, retraction, centred, fresh=fresh and entry is first)
    critical, f = states[0].get("critical"), first.fields
    f["spread"], f["weights"] = _bits(sqrt_dim_per_gate), sum(weight.numel() for weight in weights)
    f["critical"] = 0 if critical is None else critical.data_ptr()
    wide = 16 // weights[0].element_size()  # accesses of 128 bits must not cross the end
    if centred is None:
        f["aligned"] = int(all(e.fields["aligned"] and e.fields["numel"] % wide == 0 for e in mirror.entries))
    mirror.parts, mirror.kept, mirror.working, mirror.room = [], [], (), 0
    if centred is not None:
        retraction, form = "centred", _centre(mirror, *first.key[-1])
    elif basis is not None:
        retraction, form = "basis", _span(mirror, basis)
    else:
        form = (not segments and len(weights) == 2, gate_per_orbit)
        _tie(mirror, segments or ())
    automatic: tuple[Any, ...] = (critical is not None, *((bool(segments),) if retraction == "mirror" else ()))
    mirror.key = (retraction, *first.key[1:-1], (*form, *automatic))
    mirror.fields, mirror.device, mirror.plan = f, first.device, None


def _tie(mirror: PlaneEntry, segments: Sequence[Segment]) -> None:
    """Weights of orbits become equal."""
    first, half = mirror.entries[0], BLOCK // 2
    f = first.fields
    f |= {"rows": len(mirror.entries), "count": -(-f["numel"] // half)}
    for s in segments:
        found = tuple(x.to(first.device) for x in (s.of, s.places))
        copies, orbits = s.places.shape
        where = dict(zip(("of", "places"), (x.data_ptr() for x in found), strict=True)) | {"skip": s.first}
        part = Entry()
        part.fields = dict.fromkeys(f, 0) | where | {"rows": copies, "numel": orbits, "count": -(-orbits // half)}
        mirror.parts.append(part)
        mirror.kept.append(found)
    if segments:
        mirror.working = mirror.parts
        orbits = sum(s.places.shape[1] for s in segments)
        f |= {"count": sum(part.fields["count"] for part in mirror.parts), "aligned": 0}
        f["stride"] = max(1, orbits // SAMPLE)
        f["samples"] = -(-orbits // f["stride"])


def _centre(mirror: PlaneEntry, r: int, c: int, p: int) -> tuple[int, ...]:
    """Means of groups vanish: tiles as those of groups, and three numbers of every group."""
    f = mirror.entries[0].fields
    per_band, f["count"] = -(-f["groups"] // (c // p)), f["units"] * f["parts"]
    mirror.room = f["count"] * 4 * (c // p) + 3 * (f["units"] // per_band * f["groups"])
    return r, c, p, _together(f["parts"])


def _span(mirror: PlaneEntry, basis: Tensor) -> tuple[int, ...]:
    """Coordinates in a basis, a direction per row, vanish: one tile of as many groups, whose parts are programs."""
    basis = basis.to(torch.float32).contiguous()
    mirror.kept, mirror.working = [(basis,)], mirror.entries
    columns, f, half = len(basis), mirror.entries[0].fields, BLOCK // 2
    width, at = 1 << (columns - 1).bit_length(), 0
    f["lines"] = max(1, -(-f["weights"] // (half * RESIDENT)))
    for entry in mirror.entries:
        numel = entry.fields["numel"]
        entry.fields |= {"places": basis.data_ptr() + 4 * at, "count": -(-numel // (half * f["lines"]))}
        at += numel
    programs = sum(entry.fields["count"] for entry in mirror.entries)
    f |= {"groups": columns, "units": 1, "parts": programs, "stride": 1, "samples": 1}
    f["aligned"] &= int(basis.data_ptr() % 16 == 0)
    mirror.room = programs * 4 * width + 3 * columns
    return width, _together(programs)


def _together(parts: int) -> int:
    """Parts that are added up side by side."""
    return next(n for n in (1, 32, 1024) if parts <= n or n == 1024)


def _bits(x: float) -> int:
    """Those of an fp32 number."""
    return struct.unpack("<i", struct.pack("<f", x))[0]  # type: ignore[no-any-return]


def members(entry: Entry) -> Sequence[Entry]:
    """Its rows in the table."""
    return [*entry.entries, *entry.parts] if isinstance(entry, PlaneEntry) else (entry,)


def tile(rows: int, run: int) -> tuple[int, int, int]:
    """``(R, C, P)``: a tile has R rows and C columns, P of which belong to one group."""
    p = next((width for width in WIDTHS if run <= width), WIDTHS[-1])
    size = max(BLOCK, p)
    r = 1 if rows == 1 else max(1, min(16, size // max(p, BLOCK // 16)))
    return r, size // r, p


class Bucket:
    """The tables of one launch."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        from symopt_kernels.triton.memory import FIELDS

        self.rows, device = [row for entry in entries for row in members(entry)], entries[0].device
        rows, owners, marks, room = array("q"), array("i"), 0, 0
        self.programs, i = 0, 0
        for entry in entries:
            f = entry.fields | {"begin": self.programs, "main": i, "room": room, "marks": marks}
            if f["parts"] > 1:
                marks += f["units"]
            room += entry.room
            held = members(entry)
            for part in entry.working:
                part.fields |= {"begin": self.programs, "main": i}
                owners.extend([i + held.index(part)] * part.fields["count"])
                self.programs += part.fields["count"]
            for row in (f, *(other.fields for other in held[1:])):
                rows.extend(row[name] for name in FIELDS)
            if not entry.working:
                owners.extend([i] * f["count"])
                self.programs += f["count"]
            i += len(held)

        def put(values: array[int], dtype: torch.dtype) -> Tensor:
            return torch.frombuffer(values, dtype=dtype).to(device, copy=True)

        self.table, self.owners = put(rows, torch.int64), put(owners, torch.int32)
        self.arrived = torch.zeros(i, dtype=torch.int32, device=device)
        self.zeros = torch.zeros(i, dtype=torch.int64, device=device)
        self.partial = torch.empty(SUMS * self.programs, dtype=torch.float32, device=device)
        self.gates = torch.zeros(GATE * i, dtype=torch.float32, device=device)
        self.ticket = torch.zeros(1, dtype=torch.int32, device=device)
        self.room = torch.empty(max(1, room), dtype=torch.float32, device=device)
        self.marks = torch.zeros(max(1, marks), dtype=torch.int32, device=device)
        self.live = torch.zeros(3 * i, dtype=torch.int64, device=device)
        self._sent: array[int] | None = None
        self._host: Tensor | None = None

    def send(self) -> None:
        """Gradients and strengths to the device, if they differ from what lies there."""
        values = array("q")
        for entry in self.rows:
            given = isinstance(entry.strength_kept, Tensor)
            bits = 0 if given else _bits(entry.strength_kept)  # type: ignore[arg-type]
            values.extend((entry.grad, bits, entry.strength_kept.data_ptr() if given else 0))  # type: ignore[union-attr]
        if values == self._sent:
            return
        self._sent = values
        host = torch.frombuffer(values, dtype=torch.int64)
        # torch's pinned allocator reuses memory only once the copies out of it are done.  A captured graph copies from
        # it at every replay, so it is kept.
        self._host = host if self.live.device.type == "cpu" else host.pin_memory()
        self.live.copy_(self._host, non_blocking=True)


def straight(entries: Sequence[Entry]) -> list[bool]:
    """Which gradients lie at multiples of 16 bytes."""
    return [row.grad % 16 == 0 for entry in entries for row in members(entry)]


class LaunchPlan:
    """Which launches a list of entries makes."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries, self.straight = list(entries), straight(entries)
        found: dict[Any, list[Entry]] = {}
        for entry in entries:
            *key, form = entry.key
            if key[0] in ("group", "mirror", "centred", "basis"):
                form = (*form, bool(entry.fields["aligned"]) and all(straight([entry])))
            found.setdefault((entry.device, (*key, form)), []).append(entry)
        self.buckets = [(key, Bucket(members)) for (_, key), members in found.items()]
        for _, bucket in self.buckets:
            for i, entry in enumerate(bucket.rows):
                entry.counted = bucket.zeros, i
