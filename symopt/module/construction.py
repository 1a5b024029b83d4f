"""What a decorator does to the instances of a class, once they are complete."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

from torch import nn

__all__ = ["after_construction"]

Action = Callable[[nn.Module], None]
_PENDING = "_symopt_pending"


def after_construction(cls: type[nn.Module], action: Action) -> type[nn.Module]:
    """Make every new instance of ``cls`` go through ``action`` when the constructor of its own class has ended.

    A subclass may replace in its ``__init__`` what that of ``cls`` has made, so those of subclasses are wrapped, too,
    whether they exist already or are written later.
    """
    own: object = vars(cls).get("__init_subclass__")

    def __init_subclass__(new: type[nn.Module], /, **kwargs: object) -> None:
        if isinstance(own, classmethod):
            own.__get__(None, new)(**kwargs)
        else:
            super(cls, new).__init_subclass__(**kwargs)
        if "__init__" in vars(new):
            _wrap(new, None)

    setattr(cls, "__init_subclass__", classmethod(__init_subclass__))  # noqa: B010
    _wrap(cls, action)
    for existing in set(_subclasses(cls)):
        if "__init__" in vars(existing):
            _wrap(existing, None)
    return cls


def _subclasses(cls: type[nn.Module]) -> Iterator[type[nn.Module]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


def _wrap(cls: type[nn.Module], action: Action | None) -> None:
    """Let the constructor note ``action``, and carry out what was noted if no other one is around it."""
    original: Callable[..., None] = getattr(cls, "__init__")  # noqa: B009

    @functools.wraps(original)
    def __init__(self: nn.Module, *args: object, **kwargs: object) -> None:
        outermost = _PENDING not in vars(self)
        pending: list[Action] = vars(self).setdefault(_PENDING, [])
        try:
            original(self, *args, **kwargs)
        finally:
            if outermost:
                vars(self).pop(_PENDING, None)
        if action is not None:
            pending.append(action)
        if outermost:
            for noted in pending:
                noted(self)

    setattr(cls, "__init__", __init__)  # noqa: B010
