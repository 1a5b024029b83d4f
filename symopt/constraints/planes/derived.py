"""What is derived from a plane and a shape, and takes long enough to be kept: beside the constraint, not in it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar
from weakref import WeakKeyDictionary

from symopt.constraints.base import Constraint

__all__ = ["derived"]

T = TypeVar("T")

_kept: WeakKeyDictionary[Constraint, dict[Hashable, object]] = WeakKeyDictionary()


def derived(constraint: Constraint, key: Hashable, make: Callable[[], T]) -> T:
    """``make()``, the first time; ``key`` begins with the name of what it makes, and so determines its type."""
    kept = _kept.setdefault(constraint, {})
    if key not in kept:
        kept[key] = make()
    found: T = kept[key]  # type: ignore[assignment]
    return found
