"""Arguments of constraints: by name, except for a first one that is no number; and what `repr` makes of them."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import symopt
from support.cases import cases
from symopt.constraints import CONSTRAINTS, Composed, Constraint
from symopt.constraints.spanning import SpanningGroups

Class = Callable[..., Constraint]

FIRST: dict[Any, Any] = {
    symopt.GroupSparse: "in",
    symopt.GroupBridge: "head:2",
    symopt.Mirror: torch.relu,
    symopt.Equivariant: [[1, 0]],
    Composed: (symopt.Sparse(), symopt.Sparse()),
}
"""Something that fits, of constraints whose first argument is no number."""

ALL = (*CONSTRAINTS, Composed)


@cases(cls=(*ALL, SpanningGroups))
def test_only_a_first_argument_that_is_no_number_may_be_positional(cls: Class) -> None:
    kinds = {name: p.kind for name, p in inspect.signature(cls).parameters.items()}
    positional = [name for name, kind in kinds.items() if kind is not inspect.Parameter.KEYWORD_ONLY]
    assert positional == (["label"] if cls is SpanningGroups else list(kinds)[:1] if cls in FIRST else [])


@cases(cls=ALL, number=[0.05, 8, 1, 0.5])
def test_a_number_without_a_name_is_refused_with_what_to_write(cls: Any, number: float) -> None:
    before = (FIRST[cls],) if cls in FIRST else ()
    with pytest.raises(TypeError) as caught:
        cls(*before, number)
    said = re.findall(rf"{cls.__name__}\(.*?(\w+)=([^)]+)\)", str(caught.value))
    assert said and said[0] == ("strength", repr(number)) and all(value == repr(number) for _, value in said)
    for name, _ in said:
        cls(*before, **{name: number})  # every proposal is a call that works


@cases(number=[0.3, 7])
def test_a_number_in_place_of_the_first_argument_is_refused_too(number: float) -> None:
    for cls in FIRST:
        with pytest.raises(TypeError) as caught:
            cls(number)
        name = next(iter(inspect.signature(cls).parameters))
        assert f"{cls.__name__}({name}, strength={number!r})" in str(caught.value)


def test_the_proposals_fit_what_is_given() -> None:
    wrong: dict[str, Callable[[], Any]] = {
        "Sparse(density=0.1)": lambda: symopt.Sparse(0.1, scope="global"),
        "Sparse(pattern='2:4')": lambda: symopt.Sparse("2:4"),
        "Tied(mode='elementwise')": lambda: symopt.Tied("elementwise"),
        "Tied(strength=0.2)": lambda: symopt.Tied(0.2, "elementwise"),
        "ZeroMean(strength=0) or ZeroMean(dim=0)": lambda: symopt.ZeroMean(0),
        "LowRank(strength=8), LowRank(rank=8) or LowRank(max_rank=8)": lambda: symopt.LowRank(8),
        "GroupSparse('out', strength=0.5) or GroupSparse('out', keep=0.5)": lambda: symopt.GroupSparse("out", 0.5),
        "keywords strength, density": lambda: symopt.Sparse(torch.tensor(0.1)),
    }
    for right, call in wrong.items():
        with pytest.raises(TypeError) as caught:
            call()
        assert right in str(caught.value)


def plain() -> list[Constraint]:
    """A constraint of every class, with each argument away from its default somewhere."""
    return [
        symopt.Sparse(),
        symopt.Sparse(strength=0.25, depth=3, gauge="free"),
        symopt.Sparse(density=0.5, scope="global"),
        symopt.Sparse(pattern="2:4"),
        symopt.GroupSparse("out"),
        symopt.GroupSparse("head:4", keep=300),
        symopt.GroupSparse("in", keep=0.5, scope="global"),
        symopt.GroupSparse({"a.*": (0, None)}, keep=2),
        symopt.GroupBridge("block:1x2", strength=1.0),
        symopt.LowRank(),
        symopt.LowRank(rank=1000, max_rank=2000),
        symopt.Tied(mode="elementwise", views=[None, "T"]),
        symopt.Symmetric(strength=3.0),
        symopt.Circulant(),
        symopt.Equivariant([[1, 0]]),
        symopt.ZeroMean(dim=(0, 1)),
        symopt.Mirror(torch.relu, strength=2.0),
        symopt.Mirror(basis=torch.eye(3)[:, :1], form="coordinates"),
        Composed((symopt.Sparse(), symopt.GroupSparse("out", strength=0.1))),
    ]


@cases(copied=[copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_repr_is_the_same_of_a_copy(copied: Callable[[Constraint], Constraint]) -> None:
    assert {type(c) for c in plain()} == {*ALL}
    for constraint in plain():
        assert repr(copied(constraint)) == repr(constraint)


def test_repr_is_a_call_that_makes_an_equal_one() -> None:
    names = {cls.__name__: cls for cls in ALL}
    literal = [c for c in plain() if not isinstance(c, (symopt.Mirror, symopt.Equivariant)) and "{" not in repr(c)]
    assert len(literal) > 10
    for constraint in literal:
        assert repr(eval(repr(constraint), names)) == repr(constraint)
