"""The C++ library: its structures, as ctypes sees them, and whether the one that is found is the one meant here."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from ctypes import POINTER, Structure, c_double, c_int32, c_int64, c_void_p
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, ClassVar

import torch

from symopt_kernels.reference import gauge

__all__ = [
    *("BLOCK", "DIRECTIONS", "FORMATS", "HISTOGRAM_SHIFT", "LIBRARY", "RETRACTIONS", "UNAVAILABLE"),
    *("Entry", "PlaneEntry", "Segment", "Settings", "UnitsEntry", "UnitsPart"),
]

DIRECTIONS = ("sgd", "adam", "adamw", "lion")
"""In the order of the C++ enumeration, as are the next two."""

RETRACTIONS = ("plain", "sparse", "sparse_free", "group")

FORMATS = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}

BLOCK = 512
"""Weights that a direction hands to a retraction."""

HISTOGRAM_SHIFT = 16
"""Bits of a float that a histogram of sizes leaves out: 7 of the mantissa stay, so its bins are 0.8 % wide."""


class Entry(Structure):
    """One tensor and its state; ``types.h`` says what each field is."""

    _fields_: ClassVar = [
        *[(name, c_void_p) for name in ("weight", "grad", "master", "first", "second", "peak", "factor_0", "factor_1")],
        *[(name, c_void_p) for name in ("imbalance", "metric_scale", "step", "budget", "index")],
        *[(name, c_int64) for name in ("numel", "bands", "rows", "groups", "run")],
        *[(name, c_double) for name in ("strength_kept", "strength_pruned", "threshold")],
        ("zeros", c_int64),
        *[(name, c_int32) for name in ("retraction", "dtype", "fresh", "wide_step")],
        *[(name, c_int32) for name in ("pattern_n", "pattern_m", "decoupled")],
    ]


class Segment(Structure):
    """:class:`symopt_kernels.orbits.Segment`."""

    _fields_: ClassVar = [
        *[(name, c_void_p) for name in ("of", "places", "begins", "tiles")],
        *[(name, c_int64) for name in ("copies", "orbits", "first", "count")],
    ]


class PlaneEntry(Structure):
    """Tensors under one plane; ``entries`` are those of its parameters."""

    _fields_: ClassVar = [
        ("parameters", POINTER(c_void_p)),
        ("critical", c_void_p),
        ("segments", POINTER(Segment)),
        *[(name, c_int64) for name in ("parameter_count", "segment_count", "columns")],
        ("sqrt_dim_per_gate", c_double),
        *[(name, c_int32) for name in ("gate_per_orbit", "centred")],
    ]
    entries: list[Entry]
    owned: object
    """What it points into, alive as long as this."""


class UnitsPart(Structure):
    """:class:`symopt_kernels.units.Part`; its shape is in the entry."""

    _fields_: ClassVar = [("index", c_void_p), ("factor", c_double)]


class UnitsEntry(Structure):
    """Units that span several tensors; ``entries`` are those of its parameters."""

    _fields_: ClassVar = [
        ("parameters", POINTER(c_void_p)),
        ("parts", POINTER(UnitsPart)),
        *[(name, c_void_p) for name in ("sizes", "sums")],
        *[(name, c_int64) for name in ("parameter_count", "count")],
    ]
    entries: list[Entry]
    unit_sums: Any
    """``(4, count)``, fp64: what the survey finds and the move phase reads."""
    owned: object


class Settings(Structure):
    """What the tensors of a call have in common."""

    _fields_: ClassVar = [
        *[(name, c_double) for name in ("lr", "beta1", "beta2", "eps", "momentum", "dampening", "weight_decay")],
        *[(name, c_double) for name in ("amplification", "imbalance_factor")],
        ("grad_scale", c_void_p),
        ("found_inf", c_void_p),
        *[(name, c_int32) for name in ("direction", "nesterov", "maximize", "saturated", "threads", "instructions")],
        ("parallel", c_void_p),
    ]


def _layout() -> Iterator[str]:
    """Fields, constants and names as ``layout.h`` writes them."""
    for kind in (Entry, Segment, PlaneEntry, UnitsPart, UnitsEntry, Settings):
        yield f"{kind.__name__} {ctypes.sizeof(kind)}"
        for name, *_ in kind._fields_:
            field = getattr(kind, name)
            yield f"  {name} {field.offset} {field.size}"
    numbers: dict[str, float] = {
        name: getattr(gauge, name)
        for name in (
            *("SNAP", "MIN_IMBALANCE_FACTOR", "SAMPLE"),
            *("AUTO_STRENGTH_MARGIN", "CRITICAL_EMA", "CRITICAL_FLOOR"),
        )
    }
    numbers |= {"BLOCK": BLOCK, "HISTOGRAM_SHIFT": HISTOGRAM_SHIFT}
    for names in (DIRECTIONS, RETRACTIONS, FORMATS):
        numbers |= {name.upper(): i for i, name in enumerate(names)}
    yield from (f"{name} {number:.17g}" for name, number in numbers.items())


def _find() -> tuple[Any, str | None]:
    names = [f"_native{suffix}" for suffix in EXTENSION_SUFFIXES]
    folder = Path(os.environ.get("SYMOPT_NATIVE", Path(__file__).parent))
    found = [folder / name for name in names if (folder / name).exists()]
    if not found:
        return None, "the C++ extension is not built (no compiler when symopt was installed?)"
    try:
        library = ctypes.CDLL(str(found[0]))
        library.symopt_layout.restype = ctypes.c_char_p
        layout: str = library.symopt_layout().decode()
    except (OSError, AttributeError) as error:
        return None, f"the C++ extension does not load: {error}"
    if layout.splitlines() != list(_layout()):
        return None, "the C++ extension was built from another version of symopt; install symopt again"
    for name in ("step_tensors", "step_planes", "survey_units", "move_units"):
        library[f"symopt_{name}"].argtypes = [POINTER(c_void_p), c_int64, POINTER(Settings)]
    library.symopt_histogram.argtypes = [c_void_p, c_int64, c_void_p]
    library.symopt_histogram.restype = None
    library.symopt_rank.argtypes = [c_void_p, c_int64, c_void_p, c_int64, c_void_p]
    library.symopt_shares.argtypes = [POINTER(c_void_p), c_int64, c_int64, c_double, c_double, c_void_p]
    return library, None


LIBRARY, UNAVAILABLE = _find()
"""The library, and why the native step cannot run here, or None."""
