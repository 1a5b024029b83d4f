"""Many cases that are alike in one test: :func:`cases` runs all combinations, :func:`pairs` enough of them.

A failure names the cases that failed.  ``--exhaustive`` (``make test-all``) makes of every ``pairs`` a ``cases``;
``--case TEXT`` runs only the cases whose name has the text in it.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

EXHAUSTIVE = False
ONLY = ""
MOST_FAILURES = 5
"""So many are shown; then the test stops."""


def cases(**axes: Sequence[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A test of all combinations of the values of some of its arguments, one after the other."""
    return lambda test: _loop(test, axes, every_pair=False)


def pairs(**axes: Sequence[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A test of some combinations: any two values of two arguments meet.  For arguments that are independent."""
    return lambda test: _loop(test, axes, every_pair=True)


def exhaustive(*values: Any) -> Sequence[Any]:
    """Values of ``pytest.mark.parametrize`` that only ``make test-all`` runs."""
    return [pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=pytest.mark.exhaustive) for v in values]


def covering(sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Few tuples of indices below ``sizes`` in which all pairs of indices at two places occur, greedily."""
    places = range(len(sizes))
    left = {
        ((i, a), (j, b)): None
        for i, j in itertools.combinations(places, 2)
        for a, b in itertools.product(range(sizes[i]), range(sizes[j]))
    }

    def gain(chosen: dict[int, int], place: int, index: int) -> int:
        return sum(tuple(sorted([(place, index), other])) in left for other in chosen.items())

    while left:
        chosen = dict(next(iter(left)))
        for place in places:
            if place not in chosen:
                chosen[place] = max(range(sizes[place]), key=lambda index, place=place: gain(chosen, place, index))
        for pair in itertools.combinations(sorted(chosen.items()), 2):
            left.pop(pair, None)
        yield tuple(chosen[place] for place in places)


def combinations(axes: dict[str, Sequence[Any]], every_pair: bool) -> Iterator[dict[str, Any]]:
    if every_pair and not EXHAUSTIVE and len(axes) > 2:
        for indices in covering([len(values) for values in axes.values()]):
            yield {name: values[i] for (name, values), i in zip(axes.items(), indices, strict=True)}
    else:
        for combination in itertools.product(*axes.values()):
            yield dict(zip(axes, combination, strict=True))


def name_of(case: dict[str, Any]) -> str:
    def text(value: Any) -> str:
        return str(getattr(value, "id", None) or getattr(value, "__name__", None) or value)

    return "-".join(map(text, case.values()))


def _loop(test: Callable[..., None], axes: dict[str, Sequence[Any]], every_pair: bool) -> Callable[..., None]:
    def loop(**fixtures: Any) -> None:
        failures: dict[str, BaseException] = {}
        for case in combinations(axes, every_pair):
            if ONLY not in (name := name_of(case)):
                continue
            try:
                test(**case, **fixtures)
            except (Exception, pytest.fail.Exception) as error:
                failures[name] = error
                if len(failures) == MOST_FAILURES:
                    break
        if failures:
            listed = "".join(f"\n  {name}: {str(error).splitlines()[:1]}" for name, error in failures.items())
            raise AssertionError(f"failed for{listed}") from next(iter(failures.values()))

    signature = inspect.signature(test)
    assert axes.keys() <= signature.parameters.keys(), f"{test.__name__} has no argument {axes.keys()}"
    loop.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[p for name, p in signature.parameters.items() if name not in axes]
    )
    loop.__name__, loop.__doc__, loop.__module__, loop.__qualname__ = (
        test.__name__,
        test.__doc__,
        test.__module__,
        test.__qualname__,
    )
    loop.pytestmark = list(getattr(test, "pytestmark", []))  # type: ignore[attr-defined]
    return loop
