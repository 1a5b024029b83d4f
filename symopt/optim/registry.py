"""Which constraint binds a parameter now, which parameters are factors, which optimizers exist.

Knows tensors and constraints, no modules.  What writes a constraint down is a :class:`Source`; every look-up asks it
anew, because modules replace their Parameter objects (``deepcopy``, ``.to()``, sharding).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

from symopt.optim.binding import Binding

__all__ = [
    "FactorSource",
    "Owner",
    "Source",
    "add",
    "add_factors",
    "bindings",
    "epoch",
    "factors",
    "forget",
    "owners",
    "register_owner",
    "remove",
]


class Source(Protocol):
    """Where a constraint is written down."""

    def binding(self) -> Binding: ...


class FactorSource(Protocol):
    """Where the factors of an explicit constraint are."""

    def factors(self) -> Iterable[Tensor]: ...


class Owner(Protocol):
    """An optimizer: the parameters it steps, and a way to drop the constraint of one."""

    def owns(self, param: Tensor) -> bool: ...

    def forget(self, param: Tensor) -> None: ...


_sources: weakref.WeakSet[Source] = weakref.WeakSet()
_factor_sources: weakref.WeakSet[FactorSource] = weakref.WeakSet()
_owners: weakref.WeakSet[Owner] = weakref.WeakSet()
_epoch = 0


def add(source: Source) -> None:
    """Count the constraint of ``source``, while that exists or until :func:`remove`."""
    global _epoch
    _epoch += 1
    _sources.add(source)


def remove(source: Source) -> None:
    """The constraint of ``source`` no longer binds its parameters."""
    _sources.discard(source)
    for param in source.binding().parameters:
        forget(param)


def add_factors(source: FactorSource) -> None:
    """Count the parameters of ``source`` as factors, while that exists."""
    _factor_sources.add(source)


def register_owner(owner: Owner) -> None:
    """Count ``owner`` among the :func:`owners`, while it exists."""
    _owners.add(owner)


def bindings() -> dict[int, Binding]:
    """``id(parameter)`` -> what binds it, for every constrained parameter."""
    return {id(param): row for row in [source.binding() for source in _sources] for param in row.parameters}


def factors() -> set[int]:
    """``id`` of every parameter that is a factor of an explicit constraint."""
    return {id(param) for source in _factor_sources for param in source.factors()}


def owners() -> list[Owner]:
    """The optimizers that exist."""
    return list(_owners)


def epoch() -> int:
    """Changes whenever a constraint comes or goes; what was looked up stays right while this number does."""
    return _epoch


def forget(param: Tensor) -> None:
    """Tell every optimizer that no constraint binds ``param`` any more."""
    global _epoch
    _epoch += 1
    for owner in owners():
        owner.forget(param)
