"""Orbits as fused kernels read them: in segments of equally many copies, and those in tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from symopt_kernels.groups import Groups

__all__ = ["PlaneLayout", "Segment", "ordered", "ranked"]

_TILE = (8, 512)
"""Rows and orbits of a tile at most.  ns per weight and step of a transposed tie on the plane, AdamW, 1024 x 1024 and
1000 x 1000, whose rows are not whole cache lines: 8 x 64 2.2 and 2.1, 16 x 32 3.2 and 3.7, 16 x 16 2.5 and 4.4."""

_SQUARE = 128
"""Side of the squares in which tiles follow one another: a number of pages that the processor remembers.  ns as above,
tiles of 16 x 16: 64 2.6, 128 and 256 2.1, 1024 4.2."""


@dataclass(frozen=True, eq=False)
class Segment:
    """Orbits of equally many weights, those from ``first`` on: copy j of the i-th is weight ``places[j, i]`` of tensor
    ``of[j]``.  int32, on the CPU.

    They come in tiles, rows and columns of the matrix in which their first copies lie: tile t holds the i-th from
    ``begins[t]`` on.  Where copy j of a tile is a piece of a matrix as well, ``tiles[j, t]`` is ``(at, down, across,
    rows)``, and the one in row r and column c lies at ``at + r * down + c * across``; elsewhere ``rows`` is 0.
    """

    of: Tensor
    places: Tensor
    first: int
    begins: Tensor
    tiles: Tensor


@dataclass(frozen=True, eq=False)
class PlaneLayout:
    """A plane as fused kernels see it: weights of one orbit become equal, or means or coordinates vanish."""

    sqrt_dim_per_gate: float
    """What turns a strength per coordinate into one per gate."""
    gate_per_orbit: bool = False
    """Whether every orbit has one gate, instead of the plane."""
    identical: bool = False
    """Whether the parameters are the same in shape and order."""
    segments: list[Segment] | None = None
    """Orbits that have to be gathered; None: they are the weights of the parameters at one place."""
    basis: Tensor | None = None
    """An orthonormal basis of what vanishes, one direction per row."""
    centred: Groups | None = None
    """Groups whose means vanish."""


def ordered(groups: Groups, shapes: Sequence[tuple[int, ...]]) -> tuple[Groups, list[Segment]]:
    """The orbits of several tensors, whose weights ``groups.index`` counts one after the other, in a new order: that of
    the segments, in which they can be read with few cache misses.
    """
    assert groups.index is not None
    label, order = groups.index.flatten().cpu().sort(stable=True)
    numels = torch.tensor([math.prod(shape) for shape in shapes])
    ends = numels.cumsum(0)
    tensor, starts = torch.bucketize(order, ends, right=True), ends - numels
    kind = torch.zeros(groups.count, dtype=torch.int64)
    for t in range(len(shapes)):  # which groups have as many elements as each other of every tensor
        own = torch.bincount(label[tensor == t], minlength=groups.count)
        kind = ranked(kind * (int(own.max()) + 1) + own)
    counts = torch.bincount(label, minlength=groups.count)
    begin = counts.cumsum(0) - counts
    renamed, found, first = torch.empty(groups.count, dtype=torch.int64), list[Segment](), 0
    for k in range(int(kind.max()) + 1):
        ids = (kind == k).nonzero().flatten()
        which = begin[ids] + torch.arange(int(counts[ids[0]]))[:, None]
        of = tensor[which[:, 0]]
        columns = shapes[int(of[0])][-1] if len(shapes[int(of[0])]) > 1 else 1
        places = order[which] - starts[of][:, None]
        by_tile, begins, tiles = _tiled(places, columns)
        found.append(Segment(of.int(), places[:, by_tile].int().contiguous(), first, begins, tiles))
        renamed[ids[by_tile]] = torch.arange(first, first + len(ids))
        first += len(ids)
    return Groups(groups.count, groups.view, groups.dims, renamed[groups.index.cpu()]), found


def _tiled(places: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """An order of orbits of these ``places``, ``(copies, orbits)``; where tiles begin in it, and what they are."""
    row, column = ranked(places[0] // columns), places[0] % columns
    column = column - column.min()
    height, width = (int(x.max()) + 1 for x in (row, column))
    across = min(width, _TILE[1] // min(height, _TILE[0]))
    down = min(height, _TILE[1] // across)
    side = [n * max(1, _SQUARE // n) for n in (down, across)]
    square = row // side[0] * (width // side[1] + 1) + column // side[1]
    tile = (square * (side[0] // down) + row % side[0] // down) * (side[1] // across) + column % side[1] // across
    room = [(end - x // n * n).clamp(max=n) for x, n, end in ((row, down, height), (column, across, width))]
    gaps = torch.bincount(tile)[tile] < room[0] * room[1]  # as on a diagonal: most of its squares have none
    name = tile * (across // down + 1) + torch.where(gaps, column % across // down, 0)
    order = ((name * down + row % down) * across + column % across).argsort()
    tile = torch.unique_consecutive(name[order], return_inverse=True)[1]
    return order, *_cut(places[:, order], row[order], tile)


def ranked(x: Tensor) -> Tensor:
    """Of each number, how many smaller ones occur."""
    return (torch.bincount(x) > 0).cumsum(0)[x] - 1


def _cut(places: Tensor, row: Tensor, tile: Tensor) -> tuple[Tensor, Tensor]:
    """``begins`` and ``tiles`` of a segment, from the row and tile of every orbit."""
    orbits, size = torch.arange(len(tile)), torch.bincount(tile)
    start = size.cumsum(0) - size
    offset, last = orbits - start[tile], len(tile) - 1
    breadth = torch.zeros_like(size).index_add_(0, tile, (row == row[start][tile]).long())  # of its first row
    rows, at = size // breadth, places[:, start]
    step = [places[:, (start + by).clamp(max=last)] - at for by in (breadth, torch.ones_like(breadth))]
    step = [torch.where(several > 1, by, 0) for several, by in zip((rows, breadth), step, strict=True)]
    i, j = offset // breadth[tile], offset % breadth[tile]
    misses = places != at[:, tile] + i * step[0][:, tile] + j * step[1][:, tile]
    misses = torch.zeros_like(at).index_add_(1, tile, misses.long())
    rows = torch.where((misses == 0) & (rows * breadth == size), rows, 0)
    # What has to be looked up in any case is better looked up in large pieces, counted from where it begins.
    odd = 2 * (rows > 0).sum(0) < len(rows)
    opens = odd & ~torch.cat([odd.new_zeros(1), odd[:-1]])
    since = torch.where(opens[tile] & (offset == 0), orbits, 0).cummax(0).values
    begins = torch.where(odd[tile], (orbits - since) % _TILE[1] == 0, offset == 0).nonzero().flatten()
    tiles = torch.where(odd, 0, torch.stack([at, *step, rows]))[..., tile[begins]]
    return torch.cat([begins, begins.new_tensor([len(tile)])]), tiles.permute(1, 2, 0).int().contiguous()
