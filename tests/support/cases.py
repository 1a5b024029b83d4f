"""Many cases that are alike in one test, and which of them are enough.

:func:`cases` runs all combinations of the values of some arguments; :func:`pairs`, for arguments that are independent,
so many that any two values of two arguments meet; :func:`some` so many that every value occurs.  With ``--exhaustive``
(``make test-all``) all three run all combinations.  A failure names the cases that failed, and ``--case TEXT`` runs
only those whose name has the text in it.
"""

from __future__ import annotations

import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

EXHAUSTIVE = False
ONLY = ""
MOST_FAILURES = 5
"""So many are shown; then the test stops."""

Test = Callable[..., None]
Where = Callable[..., bool]


def cases(where: Where | None = None, **axes: Sequence[Any]) -> Callable[[Test], Test]:
    """A test of all combinations, or of those for which ``where(**combination)`` is true."""
    return lambda test: _loop(test, axes, where, None)


def pairs(where: Where | None = None, **axes: Sequence[Any]) -> Callable[[Test], Test]:
    """A test of combinations in which any two values of two arguments meet, where they ever do."""
    return lambda test: _loop(test, axes, where, 2)


def some(where: Where | None = None, **axes: Sequence[Any]) -> Callable[[Test], Test]:
    """A test of combinations in which every value of every argument occurs."""
    return lambda test: _loop(test, axes, where, 1)


def covering(combinations: Sequence[tuple[int, ...]], size: int) -> list[tuple[int, ...]]:
    """Few of the combinations in which all ``size`` values at as many places occur that occur in any: greedily."""

    def parts(combination: tuple[int, ...]) -> Iterator[tuple[tuple[int, int], ...]]:
        return itertools.combinations(enumerate(combination), size)

    having: dict[tuple[tuple[int, int], ...], list[tuple[int, ...]]] = {}
    for combination in combinations:
        for part in parts(combination):
            having.setdefault(part, []).append(combination)
    left, chosen = dict.fromkeys(having), []
    used: Counter[tuple[int, int]] = Counter()

    def gain(combination: tuple[int, ...]) -> tuple[int, int]:
        """Of equally good ones, that whose values have occurred least."""
        return sum(part in left for part in parts(combination)), -sum(used[value] for value in enumerate(combination))

    while left:
        best = max(having[next(iter(left))], key=gain)
        chosen.append(best)
        used.update(enumerate(best))
        for part in parts(best):
            left.pop(part, None)
    return chosen


def combinations(axes: dict[str, Sequence[Any]], where: Where | None, size: int | None) -> Iterator[dict[str, Any]]:
    """The cases to run."""

    def named(indices: tuple[int, ...]) -> dict[str, Any]:
        return {name: values[i] for (name, values), i in zip(axes.items(), indices, strict=True)}

    found = list(itertools.product(*(range(len(values)) for values in axes.values())))
    if where is not None:
        found = [indices for indices in found if where(**named(indices))]
    if size is not None and size < len(axes) and not EXHAUSTIVE:
        found = covering(found, size)
    return map(named, found)


def name_of(case: dict[str, Any]) -> str:
    def text(value: Any) -> str:
        return str(getattr(value, "id", None) or getattr(value, "__name__", None) or value)

    return "-".join(map(text, case.values()))


def _loop(test: Test, axes: dict[str, Sequence[Any]], where: Where | None, size: int | None) -> Test:
    axes = {name: list(values) for name, values in axes.items()}

    def loop(**fixtures: Any) -> None:
        failures: dict[str, BaseException] = {}
        for case in combinations(axes, where, size):
            if ONLY not in (name := name_of(case)):
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

    signature = inspect.signature(test)
    assert axes.keys() <= signature.parameters.keys(), f"{test.__name__} has no argument {axes.keys()}"
    rest = [p for name, p in signature.parameters.items() if name not in axes]
    loop.__signature__ = signature.replace(parameters=rest)  # type: ignore[attr-defined]
    for attribute in ("__name__", "__doc__", "__module__", "__qualname__"):
        setattr(loop, attribute, getattr(test, attribute))
    loop.pytestmark = list(getattr(test, "pytestmark", []))  # type: ignore[attr-defined]
    return loop
