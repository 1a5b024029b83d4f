"""The fused step on CPUs: the C++ library behind plain tensors and numbers.

One call steps any number of tensors, each with its own retraction, and moves the bytes of the plain optimizer.  The C++
is an optional extension that needs no torch headers: it is built when the package is installed with a compiler at hand,
and everything works without it (:data:`UNAVAILABLE` says why it is missing).
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from ctypes import byref, c_void_p
from typing import Any

import torch
from torch import Tensor

from symopt_kernels.groups import Groups
from symopt_kernels.native.library import (
    BLOCK,
    DIRECTIONS,
    FORMATS,
    LIBRARY,
    RETRACTIONS,
    UNAVAILABLE,
    Entry,
    PlaneEntry,
    Settings,
    UnitsEntry,
    UnitsPart,
)
from symopt_kernels.native.library import Segment as _Segment
from symopt_kernels.orbits import Segment
from symopt_kernels.reference.directions import amplification
from symopt_kernels.settings import NAMES, check_settings
from symopt_kernels.units import Units

__all__ = [
    "DTYPES",
    "INSTRUCTIONS",
    "RETRACTIONS",
    "ROWS",
    "THREADS",
    "UNAVAILABLE",
    "Entry",
    "PlaneEntry",
    "UnitsEntry",
    "fill",
    "fill_plane",
    "fill_units",
    "layout",
    "step",
]

DTYPES = tuple(FORMATS.values())

_ALL = "plain sparse nm sparse_free group units orbit centred basis"
_HAS = {
    "sgd": _ALL,
    "adam": _ALL,
    "adamw": _ALL,
    "lion": "plain sparse nm",
}
ROWS = frozenset((direction, retraction) for direction, has in _HAS.items() for retraction in has.split())
"""The pairs of a direction and a retraction that it has."""


def _pool() -> int | None:
    """Address of ``GOMP_parallel`` in the OpenMP runtime that torch itself has loaded, whatever its file is called."""
    try:
        return ctypes.cast(ctypes.CDLL(torch._C.__file__).GOMP_parallel, c_void_p).value
    except (OSError, AttributeError, TypeError):
        return None


_parallel = _pool()

THREADS = "torch's own OpenMP pool" if _parallel else "one thread: torch's OpenMP runtime offers no GOMP_parallel"
"""On what the native step runs."""


def _forked() -> None:
    """A forked process has the pool's bookkeeping but not its threads, and would wait for them forever."""
    global _parallel, THREADS
    _parallel, THREADS = None, "one thread: this process was forked, which leaves the threads of OpenMP's pool behind"


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)

INSTRUCTIONS: tuple[str, ...] = ("neon" if platform.machine() in ("aarch64", "arm64") else "baseline",)
"""Instruction sets this processor has, the best last."""

if LIBRARY is not None:
    INSTRUCTIONS += tuple(name for bit, name in ((1, "avx2"), (2, "avx512")) if LIBRARY.symopt_instructions() & bit)


def layout(w: Tensor, groups: Groups | None = None) -> tuple[int, int, int, int] | None:
    """``(bands, rows, groups, run)``: where in memory the groups of a dense tensor lie; None if it has no such form.

    In memory order, element ``((band * rows + row) * groups + group) * run + member`` belongs to group
    ``band * groups + group``.  Without ``groups`` every weight is its own.
    """
    view = w if groups is None or groups.index is not None else w.view(groups.view)
    inner = () if groups is None or groups.index is not None else groups.dims
    order = sorted((d for d in range(view.dim()) if view.shape[d] > 1), key=lambda d: -view.stride()[d])
    dense = 1
    for d in reversed(order):
        if view.stride(d) != dense:
            return None
        dense *= view.shape[d]
    if groups is None:
        return (1, 1, w.numel(), 1)
    if groups.index is not None:
        return (1, 1, groups.count, 1)
    kept = [d for d in order if d not in inner]
    if kept != sorted(kept):
        return None
    sizes, slot = [1, 1, 1, 1], 3
    for d in reversed(order):
        # Slots alternate: 3 and 1 are inside a group, 2 and 0 tell groups apart.
        if (d in inner) != (slot % 2 == 1):
            slot -= 1
        if slot < 0:
            return None
        sizes[slot] *= view.shape[d]
    if sizes[1] == 1:
        sizes[2], sizes[0] = sizes[2] * sizes[0], 1
    return (sizes[0], sizes[1], sizes[2], sizes[3])


def fill(
    entry: Entry,
    weight: Tensor,
    state: Mapping[str, Tensor],
    retraction: str,
    groups: Groups | None = None,
    *,
    fresh: bool = False,
) -> None:
    """Point ``entry`` at a weight and its state; every tensor has the weight's strides, group values are flat.

    Moments are under their roles: ``first``, ``second`` and ``peak``, the largest second moment so far.  ``fresh`` says
    that the first one holds nothing yet.  The gradient, the strengths and the pattern of ``nm`` are the caller's to
    set.
    """
    shape = layout(weight, groups)
    assert shape is not None
    keys = {key: key for key in ("first", "second", "peak", "master", "factor_0", "factor_1")}
    keys |= {key: key for key in ("imbalance", "metric_scale", "step", "budget")} | {"index": "group_index"}
    entry.weight = weight.data_ptr()
    for name, key in keys.items():
        setattr(entry, name, state[key].data_ptr() if key in state else None)
    entry.numel = weight.numel()
    entry.bands, entry.rows, entry.groups, entry.run = shape
    entry.threshold = -1.0
    entry.retraction = RETRACTIONS.index("sparse" if retraction == "nm" else retraction)
    entry.dtype = DTYPES.index(weight.dtype)
    entry.fresh = fresh
    entry.wide_step = "step" in state and state["step"].dtype == torch.float64


def _tiled(basis: Tensor) -> Tensor:
    """``(k, weights)`` as ``(blocks, k, BLOCK)``, the last block filled up with zeros."""
    blocks = -(-basis.shape[1] // BLOCK)
    full = basis.new_zeros(len(basis), blocks * BLOCK)
    full[:, : basis.shape[1]] = basis
    return full.view(len(basis), blocks, BLOCK).transpose(0, 1).contiguous()


def _entries(
    weights: Sequence[Tensor], states: Sequence[Mapping[str, Tensor]], groups: Groups | None, fresh: bool
) -> tuple[list[Entry], Any]:
    """Entries of parameters that are stepped together, and the table of their addresses."""
    entries = [Entry() for _ in weights]
    for entry, weight, state in zip(entries, weights, states, strict=True):
        fill(entry, weight, state, "group", groups, fresh=fresh)
    return entries, (c_void_p * len(entries))(*map(ctypes.addressof, entries))


def fill_plane(
    plane: PlaneEntry,
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
    """Point ``plane`` at contiguous weights; what they have in common is in the first of their states.

    Those of an orbit become equal.  Without ``segments`` they have one shape, and orbits are their weights at one
    place.  With ``centred`` there is one weight, whose means over these groups vanish; with an orthonormal ``basis``,
    ``(k, weights)`` and in the precision of the step, what vanishes is the coordinates of all weights one after the
    other.

    With ``gate_per_orbit`` every orbit has its own gate.  ``sqrt_dim_per_gate`` turns a strength per coordinate into
    one per gate; a state ``critical`` makes the strength automatic, else that of ``entries[0]`` counts.
    """
    plane.entries, plane.parameters = _entries(weights, states, centred, fresh)
    plane.critical = states[0]["critical"].data_ptr() if "critical" in states[0] else None
    tiles = () if basis is None else [_tiled(part) for part in basis.split([w.numel() for w in weights], dim=1)]
    for entry, tile in zip(plane.entries, tiles, strict=False):
        entry.factor_0 = tile.data_ptr()
    plane.owned, plane.columns = (segments, tiles), 0 if basis is None else len(basis)
    rows = [
        _Segment(
            *(x.data_ptr() for x in (s.of, s.places, s.begins, s.tiles)), *s.places.shape, s.first, s.tiles.shape[1]
        )
        for s in segments or ()
    ] or [_Segment(None, None, None, None, len(weights), weights[0].numel())]
    plane.segments, plane.segment_count = (_Segment * len(rows))(*rows), len(rows)
    plane.parameter_count, plane.centred = len(weights), centred is not None
    plane.sqrt_dim_per_gate, plane.gate_per_orbit = sqrt_dim_per_gate, gate_per_orbit


def fill_units(
    entry: UnitsEntry,
    weights: Sequence[Tensor],
    states: Sequence[Mapping[str, Tensor]],
    units: Units,
    *,
    fresh: bool = False,
) -> None:
    """Point ``entry`` at contiguous weights, one per part; what they have in common is in the first of their states.

    Second moments are one flat vector as :class:`~symopt_kernels.units.Units` has it.  The gradients are the caller's
    to set in ``entries``, and the strengths (and ``decoupled``) in ``entries[0]``.
    """
    entry.entries, entry.parameters = _entries(weights, states, None, fresh)
    indices = [part.index.to("cpu", torch.int64).contiguous() for part in units.parts]
    for one, part in zip(entry.entries, units.parts, strict=True):
        one.bands, one.rows, one.groups = 1, math.prod(part.shape[: part.dim]), part.shape[part.dim]
        one.run = math.prod(part.shape[part.dim + 1 :])
    rows = [UnitsPart(index.data_ptr(), part.factor) for index, part in zip(indices, units.parts, strict=True)]
    sizes = units.sizes(torch.empty((), dtype=torch.float64))
    entry.unit_sums = torch.zeros(4, units.count, dtype=torch.float64)
    entry.parts, entry.sizes, entry.sums = (UnitsPart * len(rows))(*rows), sizes.data_ptr(), entry.unit_sums.data_ptr()
    entry.parameter_count, entry.count, entry.owned = len(weights), units.count, (indices, sizes)


def step(
    entries: Sequence[Entry | PlaneEntry | UnitsEntry],
    direction: str,
    *,
    lr: float,
    weight_decay: float = 0.0,
    maximize: bool = False,
    saturated: bool = True,
    imbalance_factor: float | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    combine: Callable[[Tensor], None] | None = None,
    instructions: str = INSTRUCTIONS[-1],
    **settings: float,
) -> None:
    """Step every entry: the reference's direction, then each entry's retraction and the law of its imbalance, in place.

    ``settings`` are those of the direction (:data:`~symopt_kernels.settings.SETTINGS`), all of them and no others.  A
    counter ``step`` is advanced first.  Gradients are divided by ``grad_scale``; a nonzero ``found_inf`` skips
    everything (both fp32 tensors).  ``weight_decay`` is torch's and acts on ``plain`` entries only.  ``combine`` gets,
    for every :class:`UnitsEntry`, the sums ``gg, mm, mw, ww`` of its units over its parameters, ``(4, count)`` in
    fp64, to reduce them in place over other processes before anything moves.
    """
    _check(entries, direction)
    if settings.keys() != NAMES[direction]:
        check_settings("native", direction, settings)
    given = Settings(
        lr=lr,
        amplification=amplification(momentum, settings["dampening"]) if (momentum := settings.get("momentum")) else 1.0,
        weight_decay=weight_decay,
        imbalance_factor=-1.0 if imbalance_factor is None else imbalance_factor,
        grad_scale=None if grad_scale is None else grad_scale.data_ptr(),
        found_inf=None if found_inf is None else found_inf.data_ptr(),
        direction=DIRECTIONS.index(direction),
        maximize=maximize,
        saturated=saturated,
        threads=torch.get_num_threads(),
        instructions=INSTRUCTIONS.index(instructions),
        parallel=_parallel,
        **settings,
    )
    if set(map(type, entries)) <= {Entry}:
        _call(LIBRARY.symopt_step_tensors, entries, given)
        return
    _call(LIBRARY.symopt_step_tensors, [entry for entry in entries if isinstance(entry, Entry)], given)
    _call(LIBRARY.symopt_step_planes, [entry for entry in entries if isinstance(entry, PlaneEntry)], given)
    units = [entry for entry in entries if isinstance(entry, UnitsEntry)]
    _call(LIBRARY.symopt_survey_units, units, given)
    if combine is not None and (found_inf is None or not bool(found_inf)):
        for entry in units:
            combine(entry.unit_sums)
    _call(LIBRARY.symopt_move_units, units, given)


def _check(entries: Sequence[Entry | PlaneEntry | UnitsEntry], direction: str) -> None:
    """Raise for a direction that would run as another one."""
    if direction not in _HAS:
        raise ValueError(f"native: no direction {direction!r}; it has {', '.join(_HAS)}")
    if _HAS[direction] == _ALL:
        return
    for entry in entries:
        name = RETRACTIONS[entry.retraction] if isinstance(entry, Entry) else type(entry).__name__
        if (direction, name) not in ROWS:
            raise ValueError(f"native: no direction {direction!r} with the retraction {name!r}")


def _call(function: Any, entries: Sequence[Entry | PlaneEntry | UnitsEntry], settings: Settings) -> None:
    table = (c_void_p * len(entries))(*map(ctypes.addressof, entries))
    if entries and function(table, len(entries), byref(settings)):
        raise MemoryError("the native step found no memory for its bookkeeping")
