"""Rows of the table of parameters whose slices make up units."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from symopt_kernels.reference.gauge import SAMPLE
from symopt_kernels.triton import table
from symopt_kernels.triton.table import Entry, bits, fill_samples, fill_state, fill_tiles
from symopt_kernels.units import Part, Units

__all__ = ["UnitsEntry", "fill_units"]


class UnitsEntry(Entry):
    """Parameters whose slices make up units.  The strength of the first of ``entries`` counts, unless there is a budget
    in the state."""

    entries: list[Entry]
    """Those of each parameter."""
    tiles: list[tuple[int, int, int]]
    """The shape of each parameter's tiles."""
    unbound: list[bool]
    """Whether a parameter has weights without a unit."""
    units: int
    """How many there are."""
    referenced: list[Tensor]
    """Alive as long as addresses point at them."""

    @property
    def table_rows(self) -> Sequence[Entry]:
        """One per parameter."""
        return self.entries

    @property
    def work(self) -> Iterator[tuple[Any, Entry, str, int]]:
        """Parameters of one tile shape share launches for survey and move; units have one of their own."""
        for row, tile, unbound in zip(self.entries, self.tiles, self.unbound, strict=True):
            aligned = bool(row.fields["aligned"]) and row.grad % 16 == 0
            yield (*tile, unbound, aligned), row, "begin", row.fields["count"]
        yield "combine", self.entries[0], "combine_begin", self.fields["combine_count"]


def fill_units(
    entry: UnitsEntry,
    weights: Sequence[Tensor],
    states: Sequence[Mapping[str, Tensor]],
    units: Units,
    *,
    fresh: bool = False,
) -> None:
    """Point ``entry`` at contiguous parameters; what they share is in the first of their states."""
    entry.entries = [Entry() for _ in weights]
    entry.tiles, entry.unbound, entry.referenced, entry.units = [], [], [], units.count
    first, at, device = entry.entries[0], 6 * units.count, weights[0].device
    unbound = units.count
    for own, weight, state, part in zip(entry.entries, weights, states, units.parts, strict=True):
        f = fill_state(own, weight, state, shared_moment=True, fresh=fresh and own is first)
        f |= {"rows": math.prod(part.shape[: part.dim]), "groups": part.shape[part.dim]}
        f["run"] = math.prod(part.shape[part.dim + 1 :])
        entry.tiles.append(fill_tiles(f, 1, weight.element_size()))
        f["count"] = f["tiles"] * f["parts"]
        own.scratch_fields = {"scratch": at}
        at += 4 * f["parts"] * f["groups"]
        f |= {"factor_squared": bits(part.factor**2), "first_unbound": unbound}
        entry.referenced += _fill_slices(f, part, units.count, device)
        entry.unbound.append(f["unbound_slices"] > 0)
        unbound += part.unbound
    sizes = units.sizes(torch.empty(0, dtype=torch.float32)).to("cpu", torch.float32)
    entry.referenced.append(sizes.to(device))
    f = first.fields
    f |= {"units": units.count, "parameters": len(weights), "unit_sizes": entry.referenced[-1].data_ptr()}
    f |= {"law_gain": bits(_low_decile(sizes.sqrt())), "combine_count": max(1, -(-units.count // table.UNITS))}
    fill_samples(f, units.count)
    first.scratch_fields["unit_sums"] = 0
    entry.fields, entry.scratch, entry.device, entry.plan = f, at, device, None
    entry.key = ("units", *first.key, ())


def _fill_slices(f: dict[str, int], part: Part, units: int, device: torch.device) -> list[Tensor]:
    """Units by slice, and slices by unit; returns what the addresses point at."""
    index = part.index.cpu()
    bound = index >= 0
    unit_of = torch.where(bound, index, -(~bound).cumsum(0))  # without a unit: -1 - the place among those
    slices = bound.nonzero().flatten()
    slices = slices[index[slices].argsort(stable=True)]
    begins = torch.zeros(units + 1, dtype=torch.int64)
    begins[1:] = torch.bincount(index[slices], minlength=units).cumsum(0)
    tensors = [x.to(device=device, dtype=torch.int32) for x in (unit_of, begins, slices)]
    f |= dict(zip(("unit_of", "unit_begins", "unit_slices"), (x.data_ptr() for x in tensors), strict=True))
    f["unbound_slices"] = int((~bound).sum())
    return tensors


def _low_decile(gains: Tensor) -> float:
    """What ``reference.imbalance_law`` takes of one number per unit."""
    sample = gains[:: max(1, gains.numel() // SAMPLE)]
    return float(sample.kthvalue(1 + sample.numel() // 10).values) if sample.numel() else 1.0
