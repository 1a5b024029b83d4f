"""Units given as a mapping ``{pattern: (dim, index)}``: checked, and made of the parameters that it matches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from symopt_kernels.units import Part, Units

__all__ = ["Index", "check_mapping", "first_pattern", "spanning_units"]

Index = Tensor | Sequence[int] | None
"""Unit of every slice, -1 for none; None: slice i is unit i."""

_OWNER = "GroupSparse"


def check_mapping(groups: Mapping[str, tuple[int, Index]], factors: Mapping[str, float] | None, depth: int) -> None:
    """Raise unless the mapping can make units of some parameters."""
    if not groups:
        raise ValueError(f"{_OWNER}: groups is an empty mapping; give {{pattern: (dim, index)}}")
    if depth != 2:
        raise ValueError(f"{_OWNER}: units that span parameters need depth=2, got depth={depth}")
    for pattern, value in groups.items():
        key: object = pattern
        if not isinstance(key, str):
            raise TypeError(f"{_OWNER}: a key of groups must be a pattern, got {type(key).__name__}")
        pair: object = value
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise TypeError(f"{_OWNER}: groups[{pattern!r}] must be a pair (dim, index), got {value!r}")
        dim, index = value
        if isinstance(dim, bool) or not isinstance(dim, int):
            raise TypeError(f"{_OWNER}: the dimension of groups[{pattern!r}] must be an integer, got {dim!r}")
        if index is not None:
            _checked_index(pattern, index)
    for pattern, factor in ({} if factors is None else factors).items():
        if pattern not in groups:
            raise ValueError(f"{_OWNER}: factors[{pattern!r}] is no key of groups; there are {', '.join(groups)}")
        if isinstance(factor, bool) or not isinstance(factor, (int, float)):
            raise TypeError(f"{_OWNER}: factors[{pattern!r}] must be a number, got {type(factor).__name__}")
        if not (math.isfinite(factor) and factor > 0):
            raise ValueError(f"{_OWNER}: factors[{pattern!r}] must be finite and > 0, got {factor}")


def first_pattern(groups: Mapping[str, tuple[int, Index]], name: str) -> str | None:
    """The first pattern that matches a parameter's name, or None."""
    return next((pattern for pattern in groups if name == pattern or fnmatchcase(name, pattern)), None)


def spanning_units(
    groups: Mapping[str, tuple[int, Index]],
    factors: Mapping[str, float] | None,
    names: tuple[str, ...],
    weights: tuple[Tensor, ...],
) -> Units:
    """The units of parameters, all of which the mapping matches; numbers that no slice has are left out."""
    rows: list[tuple[tuple[int, ...], int, Tensor, float]] = []
    used = set()
    for name, w in zip(names, weights, strict=True):
        pattern = first_pattern(groups, name)
        assert pattern is not None
        used.add(pattern)
        dim, given = groups[pattern]
        shape = tuple(w.shape)
        if not -w.dim() <= dim < w.dim():
            raise ValueError(f"{_OWNER} on {name}: shape {shape} has no dimension {dim}")
        dim %= w.dim()
        index = torch.arange(shape[dim]) if given is None else _checked_index(pattern, given)
        if len(index) != shape[dim]:
            raise ValueError(
                f"{_OWNER} on {name}: the index of {pattern!r} has {len(index)} entries, dimension {dim} of shape "
                f"{shape} has {shape[dim]}; give one unit (or -1) per slice"
            )
        rows.append((shape, dim, index, 1.0 if factors is None else float(factors.get(pattern, 1.0))))
    if lacking := [pattern for pattern in groups if pattern not in used]:
        raise ValueError(
            f"{_OWNER}: groups[{lacking[0]!r}] matches none of the parameters that the key of constrain matches "
            f"({', '.join(names)}); widen the key or remove the pattern"
        )
    numbers = torch.unique(torch.cat([index for _, _, index, _ in rows]))
    numbers = numbers[numbers >= 0]
    if numbers.numel() == 0:
        raise ValueError(f"{_OWNER} on {', '.join(names)}: every index is -1, so there is no unit to constrain")
    parts = []
    for shape, dim, index, factor in rows:
        renamed = torch.where(index < 0, -1, torch.searchsorted(numbers, index.clamp(min=0)))
        parts.append(Part(shape, dim, renamed, factor))
    return Units(len(numbers), tuple(parts))


def _checked_index(pattern: str, given: Tensor | Sequence[int]) -> Tensor:
    index = torch.as_tensor(given).detach().cpu()
    if index.dim() != 1 or index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise TypeError(f"{_OWNER}: the index of groups[{pattern!r}] must be a list or 1-d tensor of integers")
    if index.numel() and int(index.min()) < -1:
        raise ValueError(f"{_OWNER}: the index of groups[{pattern!r}] holds {int(index.min())}; use -1 for no unit")
    return index.long()
