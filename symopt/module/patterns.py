"""Which parameters of a module the patterns of :func:`symopt.constrain` bind, and whether they may."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import final

import torch
from torch import nn

from symopt.constraints import Composed, Constraint
from symopt.module import advice
from symopt.module.annotation import Annotation
from symopt.module.roles import Named, axes, is_matrix, unit_dims
from symopt.optim import registry
from symopt.optim.binding import Binding

__all__ = ["KeyTable", "Match", "Patterns", "Rows", "checked", "match", "named"]

Patterns = Mapping[str | tuple[str, ...], Constraint | list[Constraint] | None]
Rows = list[tuple[tuple[str, ...], Constraint | None]]


@final
@dataclass(frozen=True)
class Match:
    """What the patterns bind in a module."""

    annotations: list[Annotation]
    left: frozenset[str]
    """Names of the parameters that are left free: by a pattern, or because a wildcard does not decide."""
    rows: Rows
    """The patterns, with constraints as they were bound where that is one parameter: those can be pickled."""


def named(module: nn.Module) -> list[Named]:
    """The parameters of ``module`` and its submodules; one that several modules own, under each of its names."""
    return [
        (f"{prefix}.{name}" if prefix else name, sub, name, p)
        for prefix, sub in module.named_modules()
        for name, p in sub.named_parameters(recurse=False)
    ]


def checked(patterns: object) -> Rows:
    """The mapping that ``constrain`` was given, as rows."""
    if not isinstance(patterns, Mapping):
        raise TypeError(f"constrain: patterns must be a mapping, got {type(patterns).__name__}")
    if not patterns:
        raise ValueError("constrain: patterns is empty, so nothing would be constrained")
    rows: Rows = []
    for key, value in patterns.items():
        keys = key if isinstance(key, tuple) else (key,)
        if not keys or not all(isinstance(k, str) for k in keys):
            raise TypeError(f"constrain: a pattern must be a string or a tuple of strings, got {key!r}")
        if isinstance(value, list):
            value = Composed(tuple(value))
        if value is not None and not isinstance(value, Constraint):
            kind = f"class {value.__name__}; call it" if isinstance(value, type) else type(value).__name__
            raise TypeError(f"constrain: the value of {key!r} must be a Constraint or None, got {kind}")
        rows.append((keys, value))
    return rows


def match(module: nn.Module, rows: Rows) -> Match:
    """What ``rows`` bind in ``module``; everything is checked first, so that an error leaves the module as it was."""
    parameters = named(module)
    chosen: dict[int, tuple[str, Constraint | None]] = {}
    found: list[Annotation] = []
    bound, left = list(rows), set[str]()
    shared: dict[int, list[tuple[int, Named]]] = {}
    # Looked up once, because both go through every constraint.
    factors, known = registry.factors(), registry.bindings()
    roles = axes(module, parameters)
    keys = KeyTable(rows, [frozenset(p for p, dim in roles if dim in unit_dims(value)) for _, value in rows])
    spared: list[tuple[str, nn.Parameter, str]] = []
    wild = dict[str, Constraint]()
    hits = [dict.fromkeys(row, 0) for row, _ in rows]
    for full, sub, name, p in parameters:
        if (first := keys.first(full, p)) is None:
            for wanted, axis in keys.spared(full, p):
                advice.check_layout(full, sub, name, p, wanted, told=False)
                spared += [(full, p, roles[axis])] if axis in roles else []
            continue
        row, place = first
        row_keys, constraint = rows[row]
        told = row_keys[place] == full
        hits[row][row_keys[place]] += 1
        if id(p) in chosen and (chosen[id(p)][1] != constraint or (constraint is not None and constraint.binds_many)):
            other, before = chosen[id(p)]  # one tensor under two names
            if constraint is not None and constraint == before:
                raise ValueError(f"constrain: {other} and {full} are the same tensor already; name one of them")
            raise ValueError(
                f"constrain: {other} and {full} are the same tensor but get different constraints, {before} and "
                f"{constraint}; give both names one constraint"
            )
        chosen[id(p)] = (full, constraint)
        if constraint is None:
            left.add(full)
            continue
        _check_free(full, p, factors, known)
        _check(full, p)
        advice.check_layout(full, sub, name, p, constraint, told=told)
        if not told:
            wild[full] = constraint
        if constraint.binds_many:
            shared.setdefault(row, []).append((place, (full, sub, name, p)))
        else:
            fitted = constraint.bind(full, p)
            bound[row] = row_keys, fitted
            found.append(Annotation(fitted, row_keys[place], [(full, sub, name, p)]))
    for (_, value), counts in zip(rows, hits, strict=True):
        for key, n in counts.items():
            if n == 0:
                raise ValueError(_nothing(key, value, parameters, {full: what for full, _, what in spared}))
    for row, ranked in shared.items():
        several = rows[row][1]
        assert several is not None
        ranked.sort(key=lambda r: r[0])
        found.append(_bind_all(several, rows[row][0][ranked[0][0]], [parameter for _, parameter in ranked]))
    matched = {full for full, *_ in parameters if any(_fits(full, key) for row, _ in rows for key in row)}
    kept = {full: what for full, p, what in spared if id(p) not in chosen}
    advice.warn(advice.notes(parameters, kept, wild, found, _open_keys(rows), matched))
    return Match(found, frozenset(left | kept.keys()), bound)


def _open_keys(rows: Rows) -> list[str]:
    """Wildcards that bind what is called ``weight``."""
    own = [keys for keys, value in rows if value is not None and not value.binds_many]
    return [key for keys in own for key in keys if _wild(key) and key.endswith("weight")]


def _bind_all(constraint: Constraint, key: str, parameters: list[Named]) -> Annotation:
    """One constraint on several parameters, in the order of the key."""
    names, _, _, weights = zip(*parameters, strict=True)
    first: nn.Parameter = weights[0]
    for full, _, _, w in parameters:
        if (w.dtype, w.device) != (first.dtype, first.device):
            raise ValueError(
                f"constrain: {full} is {w.dtype} on {w.device}, {names[0]} {first.dtype} on {first.device}; "
                "a joint constraint needs one of each"
            )
    return Annotation(constraint.bind_all(names, tuple(w.detach() for w in weights)), key, parameters)


def _wild(key: str) -> bool:
    return any(c in key for c in "*?[")


@final
class _Keys:
    """The keys of one row, so that exact names are found at once."""

    def __init__(self, keys: tuple[str, ...], constraint: Constraint | None, spared: frozenset[int]) -> None:
        self.keys, self.constraint, self.spared = keys, constraint, spared
        self.place = {key: i for i, key in reversed(list(enumerate(keys)))}
        self.wild = [(i, key) for i, key in enumerate(keys) if _wild(key)]

    def first(self, name: str, p: nn.Parameter) -> int | None:
        """The place of the first key that binds a parameter."""
        exact = self.place.get(name, len(self.keys))
        for i, key in self.wild:
            fits = i < exact and id(p) not in self.spared and fnmatchcase(name, key)
            if fits and _selects(self.constraint, name, p, wild=True):
                return i
        found = exact < len(self.keys) and _selects(self.constraint, name, p, wild=False)
        return exact if found else None


@final
class KeyTable:
    """The keys of all rows, and per row the ``id`` of the parameters that its wildcards leave free."""

    def __init__(self, rows: Rows, spared: Sequence[frozenset[int]] | None = None) -> None:
        self.rows = rows
        self.keys = [_Keys(*row, free) for row, free in zip(rows, spared or [frozenset()] * len(rows), strict=True)]
        self.wild = [i for i, keys in enumerate(self.keys) if keys.wild]
        self.exact: dict[str, list[int]] = {}
        for i, (row, _) in enumerate(rows):
            for key in row:
                self.exact.setdefault(key, []).append(i)

    def first(self, name: str, p: nn.Parameter) -> tuple[int, int] | None:
        """The row whose constraint a parameter gets, and the place of the key in it."""
        for i in sorted({*self.exact.get(name, ()), *self.wild}):
            if (place := self.keys[i].first(name, p)) is not None:
                return i, place
        return None

    def spared(self, name: str, p: nn.Parameter) -> Iterator[tuple[Constraint, tuple[int, int]]]:
        """Constraints whose wildcard fits ``name`` and would make units of ``p`` if it might, and along what."""
        for keys in self.keys:
            fits = any(fnmatchcase(name, key) for _, key in keys.wild)
            if id(p) in keys.spared and keys.constraint is not None and fits:
                yield from ((keys.constraint, (id(p), dim)) for dim in unit_dims(keys.constraint))


def _fits(name: str, key: str) -> bool:
    return name == key or (_wild(key) and fnmatchcase(name, key))


def _selects(constraint: Constraint | None, name: str, p: nn.Parameter, *, wild: bool) -> bool:
    """Whether a key that fits ``name`` binds ``p``; ``wild`` if it only fits as a pattern."""
    selected = None if constraint is None else constraint.selects(name)
    return selected if selected is not None else constraint is None or not wild or is_matrix(p)


def _nothing(key: str, value: Constraint | None, parameters: list[Named], kept: dict[str, str]) -> str:
    matched = [full for full, *_ in parameters if _fits(full, key)]
    small = [full for full, _, _, p in parameters if _fits(full, key) and not is_matrix(p)]
    if not matched:
        names = ", ".join(full for full, *_ in parameters[:8]) + (", ..." if len(parameters) > 8 else "")
        return f"constrain: pattern {key!r} matches no parameter; there are: {names or 'none'}"
    if value is not None and not any(value.selects(full) is not False for full in matched):
        return f"constrain: pattern {key!r} matches {', '.join(matched[:4])}, but {value} selects none of them"
    if value is not None and len(small) == len(matched) and value.selects(matched[0]) is None:
        return (
            f"constrain: pattern {key!r} matches only parameters of fewer than two dimensions "
            f"({', '.join(small[:4])}); a wildcard does not bind those, name them in full"
        )
    if free := [full for full in matched if full in kept]:
        return (
            f"constrain: pattern {key!r} binds nothing: {advice.listed(f'{full} ({kept[full]})' for full in free)} "
            f"would lose units of that, which a wildcard does not decide; name it in full, {{{free[0]!r}: ...}}"
        )
    before = ", ".join(matched[:4])
    return f"constrain: pattern {key!r} binds nothing: earlier patterns already bind {before}; put it first"


def _check_free(full: str, p: nn.Parameter, factors: set[int], known: dict[int, Binding]) -> None:
    if id(p) in factors:
        raise ValueError(
            f"constrain: {full} is a factor of an explicit constraint already; call symopt.release(module) first"
        )
    if id(p) in known:
        name, constraint = known[id(p)].name(p), known[id(p)].constraint
        alias = "" if name == full else f" under the name {name}"
        raise ValueError(
            f"constrain: {full} is already constrained by {constraint}{alias}; call symopt.release(module) first"
        )


def _check(full: str, p: nn.Parameter) -> None:
    if isinstance(p, nn.parameter.UninitializedParameter):
        raise ValueError(f"constrain: {full} is uninitialised; run the lazy module once before constraining it")
    if p.is_complex() or not p.is_floating_point():
        raise TypeError(f"constrain: {full} has dtype {p.dtype}; only real floating-point weights can be constrained")
    if not p.requires_grad:
        raise ValueError(
            f"constrain: {full} is frozen (requires_grad=False) and would never move; unfreeze it or leave it out, "
            f"e.g. with {{{full!r}: None}} as the first pattern"
        )
    if p.dim() == 0 or p.numel() == 0:
        raise ValueError(f"constrain: {full} has shape {tuple(p.shape)}; there is nothing to constrain, leave it out")
    if p.device.type != "meta" and not bool(torch.isfinite(p).all()):
        raise ValueError(f"constrain: {full} contains NaN or infinite values; initialise it before constraining")
