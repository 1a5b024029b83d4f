"""Where constraints are written down, so that no constrained weight silently becomes a plain one.

An :class:`Annotation` hangs on the module that owns the weights and names them; it survives ``deepcopy``, pickling,
``.to()``, sharding and everything else that replaces Parameter objects, because it is looked up by what the module
holds *now*.  Optimizers ask :func:`constraints_by_parameter`; forward passes are watched by :class:`Guard`.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from symopt.constraints import Constraint

__all__ = [
    "ATTRIBUTE",
    "Annotation",
    "Bond",
    "Factored",
    "Guard",
    "Owner",
    "bonds_by_parameter",
    "constraints_by_parameter",
    "epoch",
    "factors",
    "forget",
    "register_owner",
]

ATTRIBUTE = "_symopt_annotation"


class Owner(Protocol):
    """What this file needs of an optimizer: the parameters it steps, and a way to drop one's constraint."""

    def owns(self, param: Tensor) -> bool: ...

    def forget(self, param: Tensor) -> None: ...


_annotations: weakref.WeakSet[Annotation] = weakref.WeakSet()
_factored: weakref.WeakSet[Factored] = weakref.WeakSet()
_owners: weakref.WeakSet[Any] = weakref.WeakSet()
_epoch = 0


class Bond:
    """Several parameters under one joint constraint, in its order; each is looked up by what its module holds now."""

    def __init__(self, places: list[tuple[Annotation, str]]) -> None:
        self.places = places

    def parameters(self) -> tuple[Tensor | None, ...]:
        return tuple(annotation.module._parameters.get(name) for annotation, name in self.places)

    def names(self) -> tuple[str, ...]:
        """As seen from the module that was constrained."""
        return tuple(annotation.full[name] for annotation, name in self.places)


class Annotation:
    """The constraints of one module's own parameters, by name; ``module`` is the module they belong to."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.constraints: dict[str, Constraint] = {}
        self.bonds: dict[str, Bond] = {}
        self.full: dict[str, str] = {}
        """Names as seen from the module that was constrained, for messages."""
        self.warned: set[str] = set()
        self._register()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, warned=set())  # a copy is another model
        self._register()

    def _register(self) -> None:
        global _epoch
        _epoch += 1
        _annotations.add(self)

    def set(self, name: str, constraint: Constraint, full: str) -> None:
        self.constraints[name], self.full[name] = constraint, full
        self._register()

    def parameters(self) -> Iterator[tuple[str, Tensor | None, Constraint]]:
        """Name, the parameter of that name now (None if the module no longer has one), constraint."""
        for name, constraint in self.constraints.items():
            yield name, self.module._parameters.get(name), constraint


class Factored:
    """Marks the parameters of ``factors`` (a module) as factors of an explicit constraint, for as long as it lives."""

    def __init__(self, factors: Any) -> None:
        self.factors = factors
        _factored.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _factored.add(self)


class Guard:
    """Forward pre-hook: warns once if a constrained weight is being trained and no symopt optimizer owns it."""

    def __init__(self) -> None:
        self.seen: tuple[Any, ...] = ()

    def __reduce__(self) -> tuple[type[Guard], tuple[()]]:
        return Guard, ()  # a copy of the module watches for itself

    def __call__(self, module: Any, args: Any) -> None:
        if torch.compiler.is_compiling() or not module.training or not torch.is_grad_enabled():
            return
        now = (_epoch, *map(id, _owners))  # looked at again only when a constraint or an optimizer came or went
        if now == self.seen:
            return
        self.seen = now
        loose = []
        for prefix, sub in module.named_modules():
            annotation = sub.__dict__.get(ATTRIBUTE)
            for name, param, _ in annotation.parameters() if annotation else ():
                owned = param is not None and any(owner.owns(param) for owner in _owners)
                if not owned and name not in annotation.warned:
                    annotation.warned.add(name)
                    loose.append(f"{prefix}.{name}" if prefix else name)
        if loose:
            warnings.warn(
                f"constrained weights are being trained but belong to no symopt optimizer, so nothing imposes their "
                f"constraint: {', '.join(loose)}. Train with symopt.SGD, Adam or AdamW on this very module, or remove "
                "the constraints with symopt.release(module).",
                stacklevel=_callers_level(),
            )


def _callers_level() -> int:
    """``stacklevel`` of whoever called the module, past torch's own frames."""
    frame, level = sys._getframe(2), 2
    while frame.f_back is not None and frame.f_code.co_name in ("_wrapped_call_impl", "_call_impl", "inner"):
        frame, level = frame.f_back, level + 1
    return level


def constraints_by_parameter() -> dict[int, tuple[str, Constraint]]:
    """``id(parameter) -> (name, constraint)`` for every annotated parameter alive."""
    return {
        id(param): (annotation.full[name], constraint)
        for annotation in _annotations
        for name, param, constraint in annotation.parameters()
        if param is not None
    }


def bonds_by_parameter() -> dict[int, Bond]:
    """``id(parameter) -> bond`` for every parameter alive that shares a joint constraint with others."""
    found = {}
    for annotation in _annotations:
        for name, param, _ in annotation.parameters():
            if param is not None and name in annotation.bonds:
                found[id(param)] = annotation.bonds[name]
    return found


def factors() -> set[int]:
    """``id`` of every parameter that is a factor of an explicit constraint."""
    return {id(p) for mark in _factored for p in mark.factors._parameters.values()}


def epoch() -> int:
    """Changes whenever an annotation does; a cached lookup is valid while this number stays."""
    return _epoch


def forget(param: Tensor) -> None:
    """Tell every optimizer that ``param`` is free again."""
    global _epoch
    _epoch += 1
    for owner in list(_owners):
        owner.forget(param)


def register_owner(owner: Owner) -> None:
    """Count ``owner`` among the optimizers that :class:`Guard` asks, for as long as it lives."""
    _owners.add(owner)
