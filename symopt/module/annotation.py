"""Where constraints are written down, so that no constrained weight silently becomes an unconstrained one.

A :class:`Annotation` is stored on every module that owns one of its parameters, with the parameter's name.  It survives
``deepcopy``, pickling, ``.to()``, sharding and everything else that replaces Parameter objects, because it looks up the
module's parameter of that name anew each time.  Optimizers find it through :mod:`symopt.optim.registry`; a
:class:`Guard` warns if a constrained parameter is trained without.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Sequence
from typing import Protocol, final

import torch
from torch import Tensor, nn

from symopt.constraints import Constraint
from symopt.optim import registry
from symopt.optim.binding import Binding
from symopt.optim.callers import callers_level

__all__ = [
    "REMEMBERED",
    "Annotation",
    "Factored",
    "Finder",
    "Guard",
    "Seen",
    "annotated",
    "guard_of",
    "watch",
]

_ATTRIBUTE = "_symopt_annotations"
REMEMBERED = "_symopt_remembered"
"""Attribute of a module that ``constrain`` was called on: what it was told, a :class:`Finder`."""


class Finder(Protocol):
    """Finds constraints again whose module was replaced."""

    def find(self) -> None: ...


@final
class Seen:
    """A parameter as an optimizer saw it.  It is not kept: a weak reference would forbid ``swap_tensors``."""

    def __init__(self, p: Tensor, holder: registry.Holder) -> None:
        self.id, self.holder = id(p), weakref.ref(holder)
        self.sharded = hasattr(p, "to_local")

    def gathered(self, p: Tensor) -> bool:
        """Whether ``p`` is the whole of what the optimizer has a shard of, which FSDP puts in its place for a while."""
        return self.sharded and not hasattr(p, "to_local") and self.holder() is not None


@final
class Annotation:
    """A constraint and the parameters it binds, in its order: parameter i is ``owners[i].<attributes[i]>``.

    Args:
        constraint: ready to be used.
        key: the pattern that it was given for.
        parameters: each with its name, the module that owns it and its name there.
    """

    def __init__(
        self, constraint: Constraint, key: str, parameters: Sequence[tuple[str, nn.Module, str, Tensor]]
    ) -> None:
        self.constraint, self.key = constraint, key
        self.owners = tuple(owner for _, owner, _, _ in parameters)
        self.attributes = tuple(attribute for _, _, attribute, _ in parameters)
        self.names = tuple(name for name, _, _, _ in parameters)
        """As seen from the module that was constrained, for messages."""
        self.shapes = tuple(p.shape for _, _, _, p in parameters)
        self.released = False
        self.seen: dict[int, Seen] = {}
        """By place, the parameter that an optimizer had when it last looked."""
        self.warned: set[int] = set()

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "seen": {}}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, warned=set())  # a copy is another model
        registry.add(self)

    def annotate(self) -> None:
        """Write this on the modules, where optimizers find it."""
        for i, (owner, attribute) in enumerate(zip(self.owners, self.attributes, strict=True)):
            vars(owner).setdefault(_ATTRIBUTE, {})[attribute] = (self, i)
            watch(owner)
        registry.add(self)

    def release(self) -> None:
        """Remove this from the modules; optimizers treat the parameters as unconstrained from then on."""
        self.released = True
        self._erase()
        registry.remove(self)

    def replace(self, parameters: Sequence[tuple[str, nn.Module, str, Tensor]]) -> Annotation:
        """The same constraint on these parameters, written down in place of this."""
        new = Annotation(self.constraint, self.key, parameters)
        new.seen = self.seen
        if len(self.owners) > 1 or any(self.parameter(i) is p for i, (_, _, _, p) in enumerate(parameters)):
            self.retire()
        new.annotate()
        return new

    def retire(self) -> None:
        """Remove this from the modules; optimizers that have bound it keep what they have."""
        self._erase()
        registry.retire(self)

    def _erase(self) -> None:
        for owner, attribute in zip(self.owners, self.attributes, strict=True):
            written = vars(owner).get(_ATTRIBUTE, {})
            if attribute in written and written[attribute][0] is self:
                del written[attribute]
            if not written:
                vars(owner).pop(_ATTRIBUTE, None)

    def seen_by(self, holder: registry.Holder, i: int) -> int | None:
        """The ``id`` of parameter i when this optimizer last looked; None if another has since, or it never held it."""
        found = self.seen.get(i)
        return found.id if found is not None and found.holder() is holder else None

    def parameter(self, i: int) -> Tensor | None:
        """Parameter i as it is now; None if its module no longer has it."""
        return self.owners[i]._parameters.get(self.attributes[i])

    def binding(self) -> Binding:
        """All parameters as they are now."""
        found = [(name, self.parameter(i), self._bias(i)) for i, name in enumerate(self.names)]
        return Binding(
            self.constraint,
            tuple(name for name, param, _ in found if param is not None),
            tuple(param for _, param, _ in found if param is not None),
            tuple(name for name, param, _ in found if param is None),
            tuple(bias for _, param, bias in found if param is not None),
        )

    def _bias(self, i: int) -> Tensor | None:
        """The bias of the rows of parameter i, if its module has one that nothing constrains."""
        owner, attribute, p = self.owners[i], self.attributes[i], self.parameter(i)
        name = attribute.removesuffix("weight") + "bias"
        bias = owner._parameters.get(name)
        if not attribute.endswith("weight") or bias is None or p is None or p.dim() < 2 or bias is p:
            return None
        return bias if bias.shape == p.shape[:1] and name not in vars(owner).get(_ATTRIBUTE, {}) else None


def annotated(module: nn.Module) -> Iterator[tuple[str, Annotation, int]]:
    """Attribute, binding and place in it of every constrained parameter of ``module`` itself."""
    for attribute, (binding, i) in vars(module).get(_ATTRIBUTE, {}).items():
        yield attribute, binding, i


@final
class Factored:
    """Marks the parameters of ``holder`` as factors of an explicit constraint, while this exists."""

    def __init__(self, holder: nn.Module) -> None:
        self.holder = holder
        registry.add_factors(self)

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        registry.add_factors(self)

    def factors(self) -> list[Tensor]:
        """The factors."""
        return [p for p in self.holder._parameters.values() if p is not None]


@final
class Guard:
    """Forward pre-hook: warns once if a constrained weight is being trained and no symopt optimizer owns it."""

    def __init__(self) -> None:
        self.seen: tuple[int, ...] = ()
        self.memory: Finder | None = None
        """That of the module; quantisation moves hooks, so it is not lost with a layer that is quantised."""

    def __reduce__(self) -> tuple[type[Guard], tuple[()], dict[str, object]]:
        return Guard, (), {"memory": self.memory}  # a copy of the module watches for itself

    def __call__(self, module: nn.Module, args: object) -> None:
        if torch.compiler.is_compiling() or not module.training or not torch.is_grad_enabled():
            return
        optimizers = registry.owners()
        now = (registry.changes.count, *map(id, optimizers))
        if now == self.seen:
            return  # no constraint and no optimizer came or went since the last look
        memory: Finder | None = vars(module).get(REMEMBERED)
        if memory is not None:
            memory.find()
        self.seen = registry.changes.count, *now[1:]
        unowned = []
        for prefix, sub in module.named_modules():
            for name, binding, i in annotated(sub):
                if not _imposed(binding, i, optimizers) and i not in binding.warned:
                    binding.warned.add(i)
                    unowned.append(f"{prefix}.{name}" if prefix else name)
        if unowned:
            warnings.warn(
                f"constrained weights are being trained but belong to no symopt optimizer, so nothing imposes their "
                f"constraint: {', '.join(unowned)}. Train with symopt.SGD, Adam or AdamW on this very module, or "
                "remove the constraints with symopt.release(module).",
                stacklevel=callers_level(),
            )


def _imposed(binding: Annotation, i: int, optimizers: list[registry.Owner]) -> bool:
    """Whether an optimizer steps parameter i, or what it has become.

    A parametrization keeps the Parameter object if it can, so an optimizer that was built before still imposes the
    constraint on it.
    """
    param, seen = binding.parameter(i), binding.seen.get(i)
    if param is not None:
        return any(o.owns(param) for o in optimizers) or (seen is not None and seen.gathered(param))
    constraint, name = binding.constraint, binding.names[i]
    for p in binding.owners[i].parameters():
        known = [o.binding(p) for o in optimizers if isinstance(o, registry.Stepper) and o.owns(p)]
        if any(b.constraint is constraint and b.name(p) == name for b in known):
            return True
    return False


def guard_of(module: nn.Module) -> Guard | None:
    """The one that watches ``module``."""
    return next((hook for hook in module._forward_pre_hooks.values() if isinstance(hook, Guard)), None)


def watch(module: nn.Module) -> None:
    """Register a :class:`Guard` on ``module``, once."""
    if guard_of(module) is None:
        module.register_forward_pre_hook(Guard())
