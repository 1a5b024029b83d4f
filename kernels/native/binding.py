"""The fused step on CPUs: ``native.cpp`` behind plain tensors and numbers.

One call steps any number of tensors, each with its own retraction, and moves the bytes of the plain optimizer.  The C++
is an optional extension that needs no torch headers: it is built when the package is installed with a compiler at hand,
and everything works without it (:data:`UNAVAILABLE` says why it is missing).
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Mapping, Sequence
from ctypes import POINTER, Structure, byref, c_double, c_float, c_int32, c_int64, c_void_p
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from symopt_kernels.groups import Groups
from symopt_kernels.orbits import Segment

__all__ = [
    *("DTYPES", "HISTOGRAM_SHIFT", "INSTRUCTIONS", "THREADS", "UNAVAILABLE", "Entry", "PlaneEntry", "Settings"),
    *("fill", "fill_plane", "histogram", "layout", "rank", "shares", "step"),
]

DIRECTIONS = ("sgd", "adam", "adamw")
RETRACTIONS = ("plain", "sparse", "sparse_free", "group", "mirror")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HISTOGRAM_SHIFT = 16
"""Bits of a float that a histogram of sizes leaves out: 7 of the mantissa stay, so its bins are 0.8 % wide."""


_BLOCK = 512
"""``BLOCK`` of ``types.h``."""


class Entry(Structure):
    """One tensor and its state, as ``struct Entry`` of ``native.cpp``."""

    _fields_: ClassVar = [
        *[(name, c_void_p) for name in ("weight", "grad", "master", "first", "second", "peak", "factor_0", "factor_1")],
        *[(name, c_void_p) for name in ("imbalance", "metric_scale", "step", "budget", "index")],
        *[(name, c_int64) for name in ("numel", "bands", "rows", "groups", "run")],
        *[(name, c_double) for name in ("strength_kept", "strength_pruned", "threshold")],
        ("zeros", c_int64),
        *[(name, c_int32) for name in ("retraction", "dtype", "fresh", "wide_step")],
        *[(name, c_int32) for name in ("pattern_n", "pattern_m", "decoupled")],
    ]


class _Segment(Structure):
    """:class:`symopt_kernels.orbits.Segment`, as ``struct Segment`` of ``types.h``."""

    _fields_: ClassVar = [
        *[(name, c_void_p) for name in ("of", "places", "begins", "tiles")],
        *[(name, c_int64) for name in ("copies", "orbits", "first", "count")],
    ]


class PlaneEntry(Structure):
    """Tensors under one plane, as ``struct PlaneEntry`` of ``types.h``; ``entries`` are those of each."""

    _fields_: ClassVar = [
        ("members", POINTER(c_void_p)),
        ("critical", c_void_p),
        ("segments", POINTER(_Segment)),
        *[(name, c_int64) for name in ("tensors", "count", "columns")],
        ("sqrt_dim_per_gate", c_double),
        *[(name, c_int32) for name in ("gate_per_orbit", "centred")],
    ]
    entries: list[Entry]
    kept: Any
    """Alive as long as this: what it points into."""


class Settings(Structure):
    """What a call's tensors share, as ``struct Settings`` of ``native.cpp``."""

    _fields_: ClassVar = [
        *[(name, c_double) for name in ("lr", "beta1", "beta2", "eps", "momentum", "dampening", "weight_decay")],
        ("imbalance_factor", c_double),
        ("grad_scale", c_void_p),
        ("found_inf", c_void_p),
        *[(name, c_int32) for name in ("direction", "nesterov", "maximize", "saturated", "threads", "instructions")],
        ("parallel", c_void_p),
    ]


def _find() -> tuple[Any, str | None]:
    names = [f"_native{suffix}" for suffix in EXTENSION_SUFFIXES]
    folder = Path(os.environ.get("SYMOPT_NATIVE", Path(__file__).parent))
    found = [folder / name for name in names if (folder / name).exists()]
    if not found:
        return None, "the C++ extension is not built (no compiler when symopt was installed?)"
    try:
        library = ctypes.CDLL(str(found[0]))
        sizes = library.symopt_sizes()
    except (OSError, AttributeError) as error:
        return None, f"the C++ extension does not load: {error}"
    if sizes != (ctypes.sizeof(Entry) * 1000 + ctypes.sizeof(Settings)) * 1000 + ctypes.sizeof(PlaneEntry):
        return None, "the C++ extension was built from another version of symopt; install symopt again"
    library.symopt_histogram.argtypes = [c_void_p, c_int64, c_void_p]
    library.symopt_histogram.restype = None
    library.symopt_rank.argtypes = [c_void_p, c_int64, c_void_p, c_int64]
    library.symopt_rank.restype = c_float
    library.symopt_shares.argtypes = [POINTER(c_void_p), c_int64, c_int64, c_double, c_double, c_void_p]
    for step in (library.symopt_step, library.symopt_step_mirror):
        step.argtypes = [POINTER(c_void_p), c_int64, POINTER(Settings)]
    return library, None


def _pool() -> int | None:
    """Address of ``GOMP_parallel`` in the OpenMP runtime that torch itself has loaded, whatever its file is called."""
    try:
        return ctypes.cast(ctypes.CDLL(torch._C.__file__).GOMP_parallel, c_void_p).value
    except (OSError, AttributeError, TypeError):
        return None


_library, UNAVAILABLE = _find()
"""Why the native step cannot run here, or None."""

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

if _library is not None:
    INSTRUCTIONS += tuple(name for bit, name in ((1, "avx2"), (2, "avx512")) if _library.symopt_instructions() & bit)


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

    ``fresh`` says that ``momentum_buffer`` holds nothing yet.  The gradient and the strengths are the caller's to set.
    """
    shape = layout(weight, groups)
    assert shape is not None
    keys = {"first": "exp_avg" if "exp_avg" in state else "momentum_buffer", "second": "exp_avg_sq"}
    keys |= {"peak": "max_exp_avg_sq", "index": "group_index"}
    keys |= {key: key for key in ("master", "factor_0", "factor_1", "imbalance", "metric_scale", "step", "budget")}
    entry.weight = weight.data_ptr()
    for name, key in keys.items():
        setattr(entry, name, state[key].data_ptr() if key in state else None)
    entry.numel = weight.numel()
    entry.bands, entry.rows, entry.groups, entry.run = shape
    entry.threshold = -1.0
    entry.retraction = RETRACTIONS.index(retraction)
    entry.dtype = DTYPES.index(weight.dtype)
    entry.fresh = fresh
    entry.wide_step = "step" in state and state["step"].dtype == torch.float64


def _tiled(basis: Tensor) -> Tensor:
    """``(k, weights)`` as ``(blocks, k, BLOCK)``, the last block filled up with zeros."""
    blocks = -(-basis.shape[1] // _BLOCK)
    full = basis.new_zeros(len(basis), blocks * _BLOCK)
    full[:, : basis.shape[1]] = basis
    return full.view(len(basis), blocks, _BLOCK).transpose(0, 1).contiguous()


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
    """Point ``mirror`` at contiguous weights; what they share is in the first of their states.

    Those of an orbit become equal.  Without ``segments`` they have one shape, and orbits are their weights at one
    place.  With ``centred`` there is one weight, whose means over these groups vanish; with an orthonormal ``basis``,
    ``(k, weights)`` and in the precision of the step, what vanishes is the coordinates of all weights one after the
    other.

    With ``each`` every orbit has its own gate.  ``spread`` turns a strength per coordinate into one per gate; a state
    ``critical`` makes the strength automatic, else that of ``entries[0]`` counts.
    """
    mirror.entries = [Entry() for _ in weights]
    for entry, weight, state in zip(mirror.entries, weights, states, strict=True):
        fill(entry, weight, state, "mirror", centred, fresh=fresh)
    mirror.members = (c_void_p * len(weights))(*map(ctypes.addressof, mirror.entries))
    mirror.critical = states[0]["critical"].data_ptr() if "critical" in states[0] else None
    tiles = () if basis is None else [_tiled(part) for part in basis.split([w.numel() for w in weights], dim=1)]
    for entry, tile in zip(mirror.entries, tiles, strict=False):
        entry.factor_0 = tile.data_ptr()
    mirror.kept, mirror.columns = (segments, tiles), 0 if basis is None else len(basis)
    rows = [
        _Segment(
            *(x.data_ptr() for x in (s.of, s.places, s.begins, s.tiles)), *s.places.shape, s.first, s.tiles.shape[1]
        )
        for s in segments or ()
    ] or [_Segment(None, None, None, None, len(weights), weights[0].numel())]
    mirror.segments, mirror.count, mirror.tensors = (_Segment * len(rows))(*rows), len(rows), len(weights)
    mirror.sqrt_dim_per_gate, mirror.gate_per_orbit = sqrt_dim_per_gate, gate_per_orbit
    mirror.centred = centred is not None


def step(
    entries: Sequence[Entry | PlaneEntry],
    direction: str,
    *,
    lr: float,
    beta1: float = 0.0,
    beta2: float = 0.0,
    eps: float = 0.0,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    maximize: bool = False,
    saturated: bool = True,
    imbalance_factor: float | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    instructions: str = INSTRUCTIONS[-1],
) -> None:
    """Step every entry: ``reference``'s direction, then each entry's retraction and the law of its imbalance, in place.

    A counter ``step`` is advanced first.  Gradients are divided by ``grad_scale``; a nonzero ``found_inf`` skips
    everything (both fp32 tensors).  ``weight_decay`` is torch's and acts on ``plain`` entries only.
    """
    settings = Settings(
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
        imbalance_factor=-1.0 if imbalance_factor is None else imbalance_factor,
        grad_scale=None if grad_scale is None else grad_scale.data_ptr(),
        found_inf=None if found_inf is None else found_inf.data_ptr(),
        direction=DIRECTIONS.index(direction),
        nesterov=nesterov,
        maximize=maximize,
        saturated=saturated,
        threads=torch.get_num_threads(),
        instructions=INSTRUCTIONS.index(instructions),
        parallel=_parallel,
    )
    for kind, function in ((Entry, _library.symopt_step), (PlaneEntry, _library.symopt_step_mirror)):
        found = [entry for entry in entries if isinstance(entry, kind)]
        table = (c_void_p * len(found))(*map(ctypes.addressof, found))
        if found and function(table, len(found), byref(settings)):
            raise MemoryError("the native step found no memory for its bookkeeping")


def histogram(x: Tensor) -> Tensor:
    """How many elements of a dense fp32 tensor have a size with these upper bits; as many counts as there are bits."""
    counts = torch.zeros(1 << (31 - HISTOGRAM_SHIFT), dtype=torch.int64)
    _library.symopt_histogram(x.data_ptr(), x.numel(), counts.data_ptr())
    return counts


def rank(x: Tensor, k: int, counts: Tensor) -> float:
    """The ``k``-th smallest size, counted from 1, in a dense fp32 tensor, given its :func:`histogram`; NaN is last."""
    found: float = _library.symopt_rank(x.data_ptr(), x.numel(), counts.data_ptr(), k)
    if found < 0:
        raise MemoryError("symopt: no memory for a selection")
    return found


def shares(counts: Sequence[Tensor], keep: int, far: float, rounding: float) -> Tensor:
    """How many weights live in each of several tensors, from their histograms (``symopt.budgets.selection``)."""
    live = torch.empty(len(counts), dtype=torch.int64)
    table = (c_void_p * len(counts))(*(count.data_ptr() for count in counts))
    if _library.symopt_shares(table, len(counts), keep, far, rounding, live.data_ptr()):
        raise MemoryError("symopt: no memory for a selection")
    return live
