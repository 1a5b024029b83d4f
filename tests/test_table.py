"""The table is complete, and the suite it drives notices a relative error of 1e-9."""

from collections import Counter

import pytest
import torch

import symopt
from support.runs import follow
from support.table import BRIDGES, CONSTRAINTS, EVERY, EVERY_OPTIMIZER, MATRICES, OPTIMIZERS, PLANES, ids, taken
from support.tolerances import tolerance
from symopt.constraints import CONSTRAINTS as PUBLIC_CONSTRAINTS
from symopt.optim import OPTIMIZERS as PUBLIC_OPTIMIZERS
from symopt.optim import ConstrainedOptimizer
from symopt_kernels.reference import elementwise
from symopt_kernels.reference import group as group_kernel


def exported(base):
    found = {getattr(symopt, name) for name in symopt.__all__}
    return {cls for cls in found if isinstance(cls, type) and issubclass(cls, base) and cls is not base}


def test_every_constraint_has_a_row():
    assert exported(symopt.Constraint) == set(PUBLIC_CONSTRAINTS)
    assert {type(row.make(None)) for row in EVERY} == set(PUBLIC_CONSTRAINTS)


def test_every_optimizer_has_a_row():
    assert exported(ConstrainedOptimizer) == set(PUBLIC_OPTIMIZERS)
    assert {row.cls for row in EVERY_OPTIMIZER} == set(PUBLIC_OPTIMIZERS)
    for row in EVERY_OPTIMIZER:
        if row.cls is symopt.Lion:  # torch has none, so the suite has one
            assert issubclass(row.torch_cls, torch.optim.Optimizer) and "symopt" not in row.torch_cls.__module__
        else:
            assert issubclass(row.cls, row.torch_cls) and row.torch_cls.__module__.startswith("torch.optim")


def test_rows_have_their_own_names_and_pass_the_strength_on():
    assert max(Counter(row.id for row in [*EVERY, *EVERY_OPTIMIZER]).values()) == 1
    for row in PLANES:
        assert row.make(0.25).strength == 0.25 and row.make(None).strength is None and row.make(None).is_plane
    for row in [*CONSTRAINTS, *MATRICES, *BRIDGES]:
        assert row.make(0.25).strength == 0.25 and row.make(None).strength is None
        assert row.make(None).bind("w", torch.ones(row.shape)) is not None  # fits its shape
    names = {(type(row.make(None)), row.make(None).retraction) for row in [*CONSTRAINTS, *MATRICES, *BRIDGES]}
    assert max(Counter(retraction for _, retraction in names).values()) == 1


def test_an_unknown_tolerance_is_refused():
    with pytest.raises(KeyError):
        tolerance("unknown")


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=lambda row: row.id)
def test_the_suite_notices_a_wrong_retraction(constraint, monkeypatch):
    """A retraction that is off by 1e-9 of its value fails the comparison with explicit factors."""
    opt_row = next(row for row in OPTIMIZERS if row.cls is symopt.AdamW)
    follow(constraint, opt_row, "saturated", 1.0, backend="reference")
    name = constraint.make(None).retraction
    module = group_kernel if name == "group" else elementwise
    original = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **kwargs: original(*args, **kwargs) * (1 + 1e-9))
    with pytest.raises(AssertionError, match="not close"):
        follow(constraint, opt_row, "saturated", 1.0, backend="reference")


@pytest.mark.parametrize("part", ["gain", "update"])
@pytest.mark.parametrize("opt_row", EVERY_OPTIMIZER, ids=ids)
def test_the_suite_notices_a_wrong_direction(opt_row, part, monkeypatch):
    """The same for a gain or an update that is off by 1e-9: the strength or the gradient would mean something else."""
    kind = type(opt_row.cls.direction)
    # Of Lion's lead only the proportions count.
    name = part if part == "gain" else "scale" if opt_row.cls is symopt.Lion else "lead"
    original = getattr(kind, name)

    def wrong(*args, **kwargs):
        found = original(*args, **kwargs)
        return (found[0] * (1 + 1e-9), *found[1:]) if isinstance(found, tuple) else found * (1 + 1e-9)

    monkeypatch.setattr(kind, name, wrong)
    row = next(row for row in CONSTRAINTS if taken(row, opt_row))
    with pytest.raises(AssertionError, match="not close"):
        follow(row, opt_row, "saturated", 1.0, backend="reference")
