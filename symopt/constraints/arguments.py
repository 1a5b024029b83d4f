"""Arguments of constraints: only the first may be positional, and only where it is no number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, fields, is_dataclass
from numbers import Number

__all__ = ["check_positional", "shown"]


def check_positional(cls: type, args: tuple[object, ...], given: Mapping[str, object]) -> None:
    """Raise for a positional argument that a constraint takes by name alone, and say what to write."""
    if not args or not is_dataclass(cls):
        return
    own = [f for f in fields(cls) if f.init and f.repr]
    leading = [f for f in own if not f.kw_only]
    if leading and isinstance(args[0], Number) and not _numeric(leading[0]):
        first = leading[0].name
        calls = [f"{cls.__name__}({first}, {f.name}={args[0]!r})" for f in own if f.kw_only and _numeric(f)]
        raise TypeError(f"{cls.__name__}: {first} is no number like {args[0]!r}; write {_either(calls)}")
    if len(args) <= len(leading):
        return
    value, before = args[len(leading)], args[: len(leading)]
    names = [f.name for f in own if f.kw_only and f.name not in given]
    fits = [name for name in names if _accepts(cls, before, {**given, name: value})]
    start = "".join(f"{x!r}, " if isinstance(x, str) else f"{f.name}, " for f, x in zip(leading, before, strict=True))
    what = f"{cls.__name__}: what {value!r} means has to be said"
    if not fits:
        raise TypeError(f"{what}, by one of the keywords {', '.join(names)}")
    raise TypeError(f"{what}; write {_either([f'{cls.__name__}({start}{name}={value!r})' for name in fits])}")


def shown(own: tuple[Field[object], ...], of: object) -> list[str]:
    """The arguments of a call that makes ``of``: its fields that differ from their defaults."""
    given = [(f, getattr(of, f.name)) for f in own if f.repr]
    return [f"{f.name}={v!r}" for f, v in given if type(v) is not type(f.default) or v != f.default]


def _accepts(cls: type, args: tuple[object, ...], given: dict[str, object]) -> bool:
    try:
        cls(*args, **given)
    except Exception:  # whatever a value of the wrong kind runs into
        return False
    return True


def _numeric(field: Field[object]) -> bool:
    """Whether any number can be its value."""
    return str(field.type).startswith("float")


def _either(calls: list[str]) -> str:
    return " or ".join([", ".join(calls[:-1]), calls[-1]] if len(calls) > 1 else calls)
