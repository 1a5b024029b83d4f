"""Which constraint binds a parameter now, which parameters are factors, which optimizers exist.

Knows tensors and constraints, no modules.  What writes a constraint down is a :class:`Source`; every look-up asks it
anew, because modules replace their Parameter objects (``deepcopy``, ``.to()``, sharding).  What knows of constraints
that have lost their module is a :class:`Memory`; optimizers ask it when they are built and in their first step.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Container, Iterable, Set
from typing import Protocol, final, runtime_checkable

from torch import Tensor

from symopt.optim.binding import Binding

__all__ = [
    "FactorSource",
    "Holder",
    "Memory",
    "Owner",
    "Source",
    "Stepper",
    "add",
    "add_factors",
    "bindings",
    "changes",
    "check",
    "factors",
    "forget",
    "memories",
    "owners",
    "register_owner",
    "remember",
    "remove",
    "retire",
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


@runtime_checkable
class Stepper(Owner, Protocol):
    """An owner that says under which constraint it steps a parameter."""

    def binding(self, p: Tensor) -> Binding: ...


class Holder(Protocol):
    """What an optimizer is while it asks."""

    owner: str
    """Its name, for messages."""


class Memory(Protocol):
    """What was once said about the parameters of a network, wherever they are now."""

    def check(self, holder: Holder, owned: Set[int], *, stepping: bool) -> None: ...


_sources: weakref.WeakSet[Source] = weakref.WeakSet()
_factor_sources: weakref.WeakSet[FactorSource] = weakref.WeakSet()
_owners: weakref.WeakSet[Owner] = weakref.WeakSet()
_memories: weakref.WeakSet[Memory] = weakref.WeakSet()


@final
class Changes:
    """``count`` rises whenever a constraint comes or goes; what was looked up stays right while it does not."""

    count = 0


changes = Changes()


def add(source: Source) -> None:
    """Count the constraint of ``source``, while that exists or until :func:`remove`."""
    changes.count += 1
    _sources.add(source)


def remove(source: Source) -> None:
    """The constraint of ``source`` no longer binds its parameters."""
    _sources.discard(source)
    for param in source.binding().parameters:
        forget(param)


def retire(source: Source) -> None:
    """Nothing is to be looked up in ``source`` any more."""
    changes.count += 1
    _sources.discard(source)


def add_factors(source: FactorSource) -> None:
    """Count the parameters of ``source`` as factors, while that exists."""
    _factor_sources.add(source)


def register_owner(owner: Owner) -> None:
    """Count ``owner`` among the :func:`owners`, while it exists."""
    _owners.add(owner)


def remember(memory: Memory) -> None:
    """Let every optimizer ask ``memory``, while that exists."""
    _memories.add(memory)


def memories() -> list[Memory]:
    """All that exist."""
    return list(_memories)


def check(holder: Holder, owned: Set[int], *, stepping: bool) -> None:
    """Let every memory look at what an optimizer holds: the ``id`` of its parameters.

    Constraints whose module was replaced bind the new one from then on.  ``stepping``: in the first step, from which on
    nothing that is missing will come.

    Raises:
        ValueError: if a constrained parameter would be trained without its constraint, or a part of a shared budget.
    """
    for memory in memories():
        memory.check(holder, owned, stepping=stepping)


def bindings(checked: Container[int] = ()) -> dict[int, Binding]:
    """``id(parameter)`` -> what binds it, for every constrained parameter.

    Raises:
        ValueError: if two constraints bind one of the ``checked`` parameters.
    """
    found, clash = _bindings(checked)
    if clash:
        gc.collect()  # a module that was given up may be waiting for this
        found, clash = _bindings(checked)
    if clash:
        raise ValueError(clash)
    return found


def _bindings(checked: Container[int]) -> tuple[dict[int, Binding], str]:
    """What binds each parameter, and what is wrong with it."""
    found: dict[int, Binding] = {}
    clash = ""
    for row in [source.binding() for source in _sources]:
        for name, param in zip(row.names, row.parameters, strict=True):
            before = found.setdefault(id(param), row)
            if id(param) not in checked:
                continue
            if row.name(param) != name:
                clash = (
                    f"{row.name(param)} and {name}, which {row.constraint} binds, are one tensor now; untie them, or "
                    "release them (symopt.release) and name one of them"
                )
            elif before is not row and (before.constraint != row.constraint or before.several or row.several):
                clash = (
                    f"{before.name(param)} and {name} are one tensor now but have different constraints, "
                    f"{before.constraint} and {row.constraint}; release one of them, symopt.release(its module)"
                )
    return found, clash


def factors() -> set[int]:
    """``id`` of every parameter that is a factor of an explicit constraint."""
    return {id(param) for source in _factor_sources for param in source.factors()}


def owners() -> list[Owner]:
    """The optimizers that exist."""
    return list(_owners)


def forget(param: Tensor) -> None:
    """Tell every optimizer that no constraint binds ``param`` any more."""
    changes.count += 1
    for owner in owners():
        owner.forget(param)
