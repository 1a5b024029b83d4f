"""Rows of the table of tensors under a plane."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from symopt_kernels.groups import Groups
from symopt_kernels.orbits import Segment
from symopt_kernels.triton import table
from symopt_kernels.triton.table import Entry, bits, fill, fill_samples

__all__ = ["PlaneEntry", "fill_plane"]


class PlaneEntry(Entry):
    """Tensors under a plane.  The strength of the first of ``entries`` counts, unless it is automatic."""

    entries: list[Entry]
    """Those of each tensor."""
    segments: list[Entry]
    """Those of segments whose orbits are gathered."""
    working: Sequence[Entry]
    """Those that programs are given to, if not the first."""
    referenced: list[tuple[Tensor, ...]]
    """Alive as long as addresses point at them."""

    @property
    def table_rows(self) -> Sequence[Entry]:
        """Of the tensors, then of the segments."""
        return [*self.entries, *self.segments]

    @property
    def work(self) -> Iterator[tuple[Any, Entry, str, int]]:
        """All launches have the same programs."""
        for row in self.working or self.entries[:1]:
            yield "all", row, "begin", row.fields["count"]


def fill_plane(
    entry: PlaneEntry,
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
    """Point ``entry`` at contiguous weights under a plane, as ``native.fill_plane``."""
    entry.entries = [Entry() for _ in weights]
    first, retraction = entry.entries[0], "orbit" if centred is None else "group"
    for own, weight, state in zip(entry.entries, weights, states, strict=True):
        fill(own, weight, state, retraction, centred, fresh=fresh and own is first)
    critical, f = states[0].get("critical"), first.fields
    f["sqrt_dim"], f["weights"] = bits(sqrt_dim_per_gate), sum(weight.numel() for weight in weights)
    f["critical"] = 0 if critical is None else critical.data_ptr()
    wide = 16 // weights[0].element_size()  # accesses of 128 bits must not cross the end
    if centred is None:
        f["aligned"] = int(all(e.fields["aligned"] and e.fields["numel"] % wide == 0 for e in entry.entries))
    entry.segments, entry.referenced, entry.working, entry.scratch = [], [], (), 0
    form: tuple[Any, ...]
    if centred is not None:
        retraction, form = "centred", (*_fill_centred(entry, *first.key[-1]), critical is not None)
    elif basis is not None:
        retraction, form = "basis", (*_fill_basis(entry, basis), critical is not None)
    else:
        form = (not segments and len(weights) == 2, gate_per_orbit, critical is not None, bool(segments))
        _fill_orbits(entry, segments or ())
    entry.key = (retraction, *first.key[1:-1], form)
    entry.fields, entry.device, entry.plan = f, first.device, None


def _fill_orbits(entry: PlaneEntry, segments: Sequence[Segment]) -> None:
    """Weights of orbits become equal."""
    first, half = entry.entries[0], table.BLOCK // 2
    f = first.fields
    f |= {"rows": len(entry.entries), "count": -(-f["numel"] // half)}
    for s in segments:
        referenced = tuple(x.to(first.device) for x in (s.of, s.places))
        copies, orbits = s.places.shape
        row = Entry()
        row.fields |= dict(zip(("tensors", "places"), (x.data_ptr() for x in referenced), strict=True))
        row.fields |= {"first_orbit": s.first, "rows": copies, "numel": orbits, "count": -(-orbits // half)}
        entry.segments.append(row)
        entry.referenced.append(referenced)
    if segments:
        entry.working = entry.segments
        f |= {"count": sum(row.fields["count"] for row in entry.segments), "aligned": 0}
        fill_samples(f, sum(s.places.shape[1] for s in segments))


def _fill_centred(entry: PlaneEntry, r: int, c: int, p: int) -> tuple[int, ...]:
    """Means of groups vanish: tiles as those of groups, and three numbers of every group."""
    f = entry.entries[0].fields
    per_band, f["count"] = -(-f["groups"] // (c // p)), f["tiles"] * f["parts"]
    entry.scratch = f["count"] * 4 * (c // p) + 3 * (f["tiles"] // per_band * f["groups"])
    return r, c, p, _side_by_side(f["parts"])


def _fill_basis(entry: PlaneEntry, basis: Tensor) -> tuple[int, ...]:
    """Coordinates in a basis, a direction per row, vanish: one tile of as many groups, whose parts are programs."""
    basis = basis.to(torch.float32).contiguous()
    entry.referenced, entry.working = [(basis,)], entry.entries
    columns, f, half = len(basis), entry.entries[0].fields, table.BLOCK // 2
    width, at = 1 << (columns - 1).bit_length(), 0
    f["lines"] = max(1, -(-f["weights"] // (half * table.RESIDENT)))
    for own in entry.entries:
        numel = own.fields["numel"]
        own.fields |= {"places": basis.data_ptr() + 4 * at, "count": -(-numel // (half * f["lines"]))}
        at += numel
    programs = sum(own.fields["count"] for own in entry.entries)
    f |= {"groups": columns, "tiles": 1, "parts": programs, "stride": 1, "samples": 1}
    f["aligned"] &= int(basis.data_ptr() % 16 == 0)
    entry.scratch = programs * 4 * width + 3 * columns
    return width, _side_by_side(programs)


def _side_by_side(parts: int) -> int:
    """Parts that are added up side by side."""
    return next(n for n in (1, 32, 1024) if parts <= n or n == 1024)
