"""The loops over cases: none is left out, and one that fails is named."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from support import cases as module
from support.cases import cases, covering, pairs, some

AXES = {"a": range(5), "b": "xyz", "c": [True, False], "d": [1.5]}


@pytest.fixture(autouse=True)
def as_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EXHAUSTIVE", False)
    monkeypatch.setattr(module, "ONLY", "")


def run(kind: Any, where: Any = None) -> list[tuple[Any, ...]]:
    seen: list[tuple[Any, ...]] = []

    @kind(where, **AXES)
    def test(a: Any, b: Any, c: Any, d: Any) -> None:
        seen.append((a, b, c, d))

    test()
    assert len(set(seen)) == len(seen)
    return seen


def occurring(found: list[tuple[Any, ...]], size: int) -> set[Any]:
    return {part for values in found for part in itertools.combinations(enumerate(values), size)}


def test_all_combinations_run(monkeypatch: pytest.MonkeyPatch) -> None:
    every = list(itertools.product(*AXES.values()))
    assert run(cases) == every
    monkeypatch.setattr(module, "EXHAUSTIVE", True)
    assert run(pairs) == run(some) == every
    monkeypatch.setattr(module, "MOST_CASES", 29)
    assert occurring(run(some), 3) == occurring(every, 3)


@pytest.mark.parametrize("where", [None, lambda a, b, c, d: a != 3 or (b == "x" and c)])
def test_any_two_values_meet_that_may_and_every_value_occurs(where: Any) -> None:
    every = run(cases, where)
    for kind, size, most in ((pairs, 2, 20), (some, 1, 6)):
        found = run(kind, where)
        assert set(found) <= set(every) and len(found) <= most
        assert occurring(found, size) == occurring(every, size)


def test_values_that_are_not_new_rotate() -> None:
    found = covering([6, 3], 1, lambda indices: True)
    assert sorted(b for _, b in found) == [0, 0, 1, 1, 2, 2]


def test_a_failure_names_its_cases_and_the_rest_run() -> None:
    seen = []

    @cases(a=AXES["a"], b=AXES["b"])
    def test(a: int, b: str) -> None:
        seen.append(a)
        assert (a, b) not in ((1, "y"), (4, "x")), "they are not alike"

    with pytest.raises(AssertionError, match=r"(?s)1-y: they are not alike.*4-x: they are not alike") as error:
        test()
    assert len(seen) == 15 and "they are not alike" in str(error.value.__cause__)


def test_one_case_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ONLY", "2-y")
    assert {(a, b) for a, b, _, _ in run(cases)} == {(2, "y")}


def test_an_argument_that_is_not_there_is_noticed() -> None:
    with pytest.raises(AssertionError, match="no argument"):
        cases(x=[1])(lambda a: None)
