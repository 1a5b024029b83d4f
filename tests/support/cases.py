"""Many cases that are alike in one test, and which of them are enough.

:func:`cases` runs all combinations of the values of some arguments; :func:`pairs`, for arguments that are independent,
so many that any two values of two arguments meet; :func:`some` so many that every value occurs.  With ``--exhaustive``
(``make test-all``) these two run all combinations too, or, where those are very many, so that any three values meet.
A failure names the cases that failed, and ``--case TEXT`` runs only those whose name has the text in it, in these
tests and in parametrised ones.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

EXHAUSTIVE = False
ONLY = ""
MOST_CASES = 5000
"""More combinations than these are never all run."""
MOST_FAILURES = 5
"""So many are shown; then the test stops."""

Test = Callable[..., None]
Where = Callable[..., bool]


def cases(where: Where | None = None, /, **axes: Sequence[Any]) -> Callable[[Test], Test]:
    """A test of all combinations, or of those for which ``where(**combination)`` is true."""
    return lambda test: _loop(test, axes, where, 0)


def pairs(where: Where | None = None, /, **axes: Sequence[Any]) -> Callable[[Test], Test]:
    """A test of combinations in which any two values of two arguments meet, where they ever do."""
    return lambda test: _loop(test, axes, where, 2)


def some(where: Where | None = None, /, **axes: Sequence[Any]) -> Callable[[Test], Test]:
    """A test of combinations in which every value of every argument occurs."""
    return lambda test: _loop(test, axes, where, 1)


Indices = tuple[int, ...]


def exhaustive(*values: Any) -> list[Any]:
    """Values of ``pytest.mark.parametrize`` that run with ``--exhaustive`` only."""
    wrapped = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*value, marks=pytest.mark.exhaustive) for value in wrapped]


def covering(sizes: Sequence[int], strength: int, allowed: Callable[[Indices], bool]) -> list[Indices]:
    """Few tuples of indices below ``sizes`` that have any ``strength`` indices that an allowed one has, greedily."""
    left = {
        part: None
        for places in itertools.combinations(range(len(sizes)), strength)
        for part in itertools.product(*([(place, i) for i in range(sizes[place])] for place in places))
    }
    used: Counter[tuple[int, int]] = Counter()
    found = []

    def extended(part: tuple[tuple[int, int], ...]) -> Indices:
        """With the indices that cover most with those that are chosen already, and have occurred least."""
        chosen = dict(part)
        for place in range(len(sizes)):
            if place not in chosen:
                rest = [tuple(sorted(x)) for x in itertools.combinations(chosen.items(), strength - 1)]

                def gain(i: int, place: int = place, rest: list[Any] = rest) -> tuple[int, int]:
                    return sum(tuple(sorted((*x, (place, i)))) in left for x in rest), -used[place, i]

                chosen[place] = max(range(sizes[place]), key=gain)
        return tuple(chosen[place] for place in range(len(sizes)))

    def first(part: tuple[tuple[int, int], ...]) -> Indices | None:
        fixed = dict(part)
        axes = ([fixed[place]] if place in fixed else range(size) for place, size in enumerate(sizes))
        return next(filter(allowed, itertools.product(*axes)), None)

    while left:
        part = next(iter(left))
        best: Indices | None = extended(part)
        if not allowed(best):
            best = first(part)
        if best is None:
            del left[part]
            continue
        found.append(best)
        used.update(enumerate(best))
        for part in itertools.combinations(enumerate(best), strength):
            left.pop(part, None)
    return found


def combinations(axes: dict[str, Sequence[Any]], where: Where | None, strength: int) -> Iterator[dict[str, Any]]:
    """The cases to run, by how many values are to meet; 0 for all."""
    sizes = [len(values) for values in axes.values()]

    def named(indices: Indices) -> dict[str, Any]:
        return {name: values[i] for (name, values), i in zip(axes.items(), indices, strict=True)}

    def allowed(indices: Indices) -> bool:
        return where is None or where(**named(indices))

    if strength and EXHAUSTIVE:
        strength = 0 if math.prod(sizes) <= MOST_CASES else 3
    if 0 < strength < len(sizes):
        return map(named, covering(sizes, strength, allowed))
    return map(named, filter(allowed, itertools.product(*map(range, sizes))))


def name_of(case: dict[str, Any], axes: dict[str, Sequence[Any]]) -> str:
    def text(name: str, value: Any) -> str:
        found = str(getattr(value, "id", None) or getattr(value, "__name__", None) or value)
        number = next(i for i, other in enumerate(axes[name]) if other is value)
        return found if len(found) < 60 and "<lambda>" not in found else f"{name}[{number}]"

    return "-".join(itertools.starmap(text, case.items()))


def has(test: object, text: str) -> bool:
    """Whether a test loops over a case with ``text`` in its name."""
    names: Callable[[], Iterator[str]] = getattr(test, "names", lambda: iter(()))
    return any(text in name for name in names())


def _loop(test: Test, axes: dict[str, Sequence[Any]], where: Where | None, strength: int) -> Test:
    axes = {name: list(values) for name, values in axes.items()}

    def loop(**fixtures: Any) -> None:
        failures: dict[str, BaseException] = {}
        for case in combinations(axes, where, strength):
            if ONLY not in (name := name_of(case, axes)):
                continue
            try:
                test(**case, **fixtures)
            except (Exception, pytest.fail.Exception) as error:
                failures[name] = error
                if len(failures) == MOST_FAILURES:
                    break
        if failures:
            listed = "".join(f"\n  {name}: {(str(error).splitlines() or [''])[0]}" for name, error in failures.items())
            raise AssertionError(f"failed for{listed}") from next(iter(failures.values()))

    def names() -> Iterator[str]:
        return (name_of(case, axes) for case in combinations(axes, where, strength))

    loop.names = names  # type: ignore[attr-defined]
    signature = inspect.signature(test)
    assert axes.keys() <= signature.parameters.keys(), f"{test.__name__} has no argument {axes.keys()}"
    rest = [p for name, p in signature.parameters.items() if name not in axes]
    loop.__signature__ = signature.replace(parameters=rest)  # type: ignore[attr-defined]
    for attribute in ("__name__", "__doc__", "__module__", "__qualname__"):
        setattr(loop, attribute, getattr(test, attribute))
    loop.pytestmark = list(getattr(test, "pytestmark", []))  # type: ignore[attr-defined]
    return loop
