"""Which entries share launches: tensors of one key are a bucket, and a bucket is one launch, however many they are.

Addresses of weights and state lie in a table on the device that is made once; what changes from step to step, the
gradients and the strengths, follows by one asynchronous copy, and only if it did change.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from symopt_kernels.triton.table import FIELDS, GATE_NUMBERS, PARTIAL_SUMS, Entry, bits

__all__ = ["Bucket", "Grid", "LaunchPlan", "gradients_aligned"]


class Grid:
    """The programs of a launch: ``owners`` says which row of the table each works on."""

    def __init__(self, owners: array[int], device: torch.device) -> None:
        self.programs, self.owners = len(owners), _put(owners, torch.int32, device)


class Bucket:
    """The tables of the launches that some entries share."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        device = entries[0].device
        self.entries, self.rows = list(entries), [row for entry in entries for row in entry.table_rows]
        owners: dict[Any, array[int]] = {}
        counters, scratch, main = 0, 0, 0
        for entry in entries:
            rows = list(entry.table_rows)
            f = rows[0].fields
            f |= {"begin": len(owners.get("all", ())), "counters": counters}
            for row in rows:
                row.fields |= {name: scratch + at for name, at in row.scratch_fields.items()} | {"main": main}
            for grid, row, begin, count in entry.work:
                programs = owners.setdefault(grid, array("i"))
                row.fields[begin] = len(programs)
                programs.extend([main + rows.index(row)] * count)
            counters += f["tiles"] if f["parts"] > 1 else 0
            scratch += entry.scratch
            main += len(rows)
        table = array("q", [row.fields[name] for row in self.rows for name in FIELDS])
        self.grids = {name: Grid(programs, device) for name, programs in owners.items()}
        most = max(grid.programs for grid in self.grids.values())
        self.table = _put(table, torch.int64, device)
        self.arrived = torch.zeros(main, dtype=torch.int32, device=device)
        self.zeros = torch.zeros(main, dtype=torch.int64, device=device)
        self.partial = torch.empty(PARTIAL_SUMS * most, dtype=torch.float32, device=device)
        self.gates = torch.zeros(GATE_NUMBERS * main, dtype=torch.float32, device=device)
        self.ticket = torch.zeros(1, dtype=torch.int32, device=device)
        self.scratch = torch.empty(max(1, scratch), dtype=torch.float32, device=device)
        self.counters = torch.zeros(max(1, counters), dtype=torch.int32, device=device)
        self.per_step = torch.zeros(3 * main, dtype=torch.int64, device=device)
        self._sent: array[int] | None = None
        self._host: Tensor | None = None
        for i, row in enumerate(self.rows):
            row.counted = self.zeros, i

    @property
    def forms(self) -> tuple[Any, ...]:
        """Shapes of tiles that have launches of their own."""
        return tuple(sorted(name for name in self.grids if isinstance(name, tuple)))

    def unit_sums(self, entry: Entry) -> Tensor:
        """Where the survey leaves the sums of an entry's units, ``(4, count)``."""
        f = entry.table_rows[0].fields
        return self.scratch[f["unit_sums"] :][: 4 * f["units"]].view(4, f["units"])

    def send(self) -> None:
        """Gradients and strengths to the device, if they differ from what lies on it."""
        values = array("q")
        for row in self.rows:
            strength = row.strength_kept
            if isinstance(strength, Tensor):
                values.extend((row.grad, 0, strength.data_ptr()))
            else:
                values.extend((row.grad, bits(strength), 0))
        if values == self._sent:
            return
        self._sent = values
        host = torch.frombuffer(values, dtype=torch.int64)
        # torch's pinned allocator reuses memory only once the copies out of it are done.  A captured graph copies from
        # it at every replay, so it is kept.
        self._host = host if self.per_step.device.type == "cpu" else host.pin_memory()
        self.per_step.copy_(self._host, non_blocking=True)


class LaunchPlan:
    """Which launches a list of entries makes."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries, self.gradients_aligned = list(entries), gradients_aligned(entries)
        found: dict[Any, list[Entry]] = {}
        for entry in entries:
            *key, form = entry.key
            if key[0] in ("group", "orbit", "centred", "basis"):
                form = (*form, bool(entry.fields["aligned"]) and all(gradients_aligned([entry])))
            found.setdefault((entry.device, (*key, form)), []).append(entry)
        self.buckets: list[tuple[tuple[Any, ...], Bucket]] = []
        for (_, key), sharing in found.items():
            bucket = Bucket(sharing)
            self.buckets.append(((*key[:-1], bucket.forms) if key[0] == "units" else key, bucket))

    def holds(self, entries: Sequence[Entry]) -> bool:
        """Whether it is still that of these entries."""
        return self.entries == list(entries) and self.gradients_aligned == gradients_aligned(entries)


def gradients_aligned(entries: Sequence[Entry]) -> list[bool]:
    """Which gradients lie at multiples of 16 bytes."""
    return [row.grad % 16 == 0 for entry in entries for row in entry.table_rows]


def _put(values: array[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.frombuffer(values, dtype=dtype).to(device, copy=True)
