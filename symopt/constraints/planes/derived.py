"""What is derived from a plane and a shape, and takes long enough to be kept: beside the constraint, not in it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import TypeVar

from symopt.constraints.base import Constraint

__all__ = ["derived"]

T = TypeVar("T")

_kept: dict[int, dict[Hashable, object]] = {}
"""By identity: constraints that are equal come and go one by one."""


def derived(constraint: Constraint, key: Hashable, make: Callable[[], T]) -> T:
    """``make()``, the first time; ``key`` begins with the name of what it makes, and so determines its type."""
    if id(constraint) not in _kept:
        _kept[id(constraint)] = {}
        weakref.finalize(constraint, _kept.pop, id(constraint))
    kept = _kept[id(constraint)]
    if key not in kept:
        kept[key] = make()
    found: T = kept[key]  # type: ignore[assignment]
    return found
