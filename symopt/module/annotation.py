"""Where constraints are written down, so that no constrained weight silently becomes an unconstrained one.

A :class:`Annotation` is stored on every module that owns one of its parameters, with the parameter's name.  It survives
``deepcopy``, pickling, ``.to()``, sharding and everything else that replaces Parameter objects, because it looks up the
module's parameter of that name anew each time.  Optimizers find it through :mod:`symopt.optim.registry`; a
:class:`Guard` warns if a constrained parameter is trained without.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from typing import final

import torch
from torch import Tensor, nn

from symopt.constraints import Constraint
from symopt.optim import registry
from symopt.optim.binding import Binding

__all__ = ["Annotation", "Factored", "Guard", "annotated", "watch"]

_ATTRIBUTE = "_symopt_annotations"


@final
class Annotation:
    """A constraint and the parameters it binds, in its order: parameter i is ``owners[i].<attributes[i]>``."""

    def __init__(
        self,
        constraint: Constraint,
        names: tuple[str, ...],
        owners: tuple[nn.Module, ...],
        attributes: tuple[str, ...],
    ) -> None:
        self.constraint, self.owners, self.attributes = constraint, owners, attributes
        self.names = names
        """As seen from the module that was constrained, for messages."""
        self.warned: set[int] = set()

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
        for owner, attribute in zip(self.owners, self.attributes, strict=True):
            written = vars(owner).get(_ATTRIBUTE, {})
            written.pop(attribute, None)
            if not written:
                vars(owner).pop(_ATTRIBUTE, None)
        registry.remove(self)

    def parameter(self, i: int) -> Tensor | None:
        """Parameter i as it is now; None if its module no longer has it."""
        return self.owners[i]._parameters.get(self.attributes[i])

    def binding(self) -> Binding:
        """All parameters as they are now."""
        found = [(name, self.parameter(i)) for i, name in enumerate(self.names)]
        return Binding(
            self.constraint,
            tuple(name for name, param in found if param is not None),
            tuple(param for _, param in found if param is not None),
            tuple(name for name, param in found if param is None),
        )


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

    def __reduce__(self) -> tuple[type[Guard], tuple[()]]:
        return Guard, ()  # a copy of the module watches for itself

    def __call__(self, module: nn.Module, args: object) -> None:
        if torch.compiler.is_compiling() or not module.training or not torch.is_grad_enabled():
            return
        optimizers = registry.owners()
        now = (registry.epoch(), *map(id, optimizers))
        if now == self.seen:
            return  # no constraint and no optimizer came or went since the last look
        self.seen = now
        unowned = []
        for prefix, sub in module.named_modules():
            for name, binding, i in annotated(sub):
                param = binding.parameter(i)
                owned = param is not None and any(optimizer.owns(param) for optimizer in optimizers)
                if not owned and i not in binding.warned:
                    binding.warned.add(i)
                    unowned.append(f"{prefix}.{name}" if prefix else name)
        if unowned:
            warnings.warn(
                f"constrained weights are being trained but belong to no symopt optimizer, so nothing imposes their "
                f"constraint: {', '.join(unowned)}. Train with symopt.SGD, Adam or AdamW on this very module, or "
                "remove the constraints with symopt.release(module).",
                stacklevel=_callers_level(),
            )


def watch(module: nn.Module) -> None:
    """Register a :class:`Guard` on ``module``, once."""
    if not any(isinstance(hook, Guard) for hook in module._forward_pre_hooks.values()):
        module.register_forward_pre_hook(Guard())


def _callers_level() -> int:
    """``stacklevel`` of the code that called the module, past torch's own frames."""
    frame, level = sys._getframe(2), 2
    while frame.f_back is not None and frame.f_code.co_name in ("_wrapped_call_impl", "_call_impl", "inner"):
        frame, level = frame.f_back, level + 1
    return level
