"""The table is complete, and the suite it drives notices a relative error of 1e-9."""

import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import symopt
from support import cases as cases_module
from support.cases import cases
from support.directions import plain
from support.newcomers import SCALED, SIGNUM
from support.runs import follow
from support.table import (
    CONSTRAINTS,
    EVERY,
    EVERY_OPTIMIZER,
    MATRICES,
    OPTIMIZERS,
    OWN_FACTORS,
    PLANES,
    bound_module,
    ids,
    taken,
)
from support.tolerances import tolerance
from symopt.backends import FUSED
from symopt.constraints import CONSTRAINTS as PUBLIC_CONSTRAINTS
from symopt.optim import OPTIMIZERS as PUBLIC_OPTIMIZERS
from symopt.optim import ConstrainedOptimizer
from symopt_kernels.native.capability import NATIVE
from symopt_kernels.triton.backend import BACKEND as TRITON

TESTS = Path(__file__).parent
FEW_FILES = ["test_table.py", "kernels/reference", "optim/test_promises.py", "optim/test_checkpoint.py"] + [
    f"constraints/test_{name}.py" for name in ("laws", "planes", "lowrank", "spanning")
]


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
        if row.torch_cls.__module__.startswith("torch.optim"):
            assert issubclass(row.cls, row.torch_cls)
        else:  # torch has none
            assert issubclass(row.torch_cls, torch.optim.Optimizer) and not issubclass(
                row.torch_cls, ConstrainedOptimizer
            )
        for written_out in (row.torch_cls, row.formula):
            assert "symopt" not in written_out.__module__, f"{row.id}: the library would be compared with itself"


@cases(row=EVERY_OPTIMIZER)
def test_rows_name_the_fused_backends_that_have_the_direction(row):
    opt = row.cls([torch.nn.Parameter(torch.zeros(2, 2))], lr=row.lr, **row.options)
    direction = row.cls.direction.row(opt.param_groups[0])
    for backend in (NATIVE, TRITON):
        listed = {retraction for name, retraction in backend.rows if name == direction}
        assert ("plain" in listed) == bool(listed) == (backend.name in row.fused), backend.name
    assert set(row.fused) <= set(FUSED)


@cases(row=EVERY, opt_row=EVERY_OPTIMIZER)
def test_an_optimizer_refuses_exactly_the_constraints_that_its_row_leaves_out(row, opt_row):
    module = bound_module(row)
    if taken(row, opt_row):
        opt_row.cls(module, lr=opt_row.lr, **opt_row.options)
        return
    with pytest.raises(ValueError, match=opt_row.cls.__name__):
        opt_row.cls(module, lr=opt_row.lr, **opt_row.options)


def test_rows_have_their_own_names_and_pass_the_strength_on():
    assert max(Counter(row.id for row in [*EVERY, *EVERY_OPTIMIZER]).values()) == 1
    for row in PLANES:
        assert row.make(0.25).strength == 0.25 and row.make(None).strength is None and row.make(None).is_plane
    for row in [*CONSTRAINTS, *MATRICES, *OWN_FACTORS]:
        assert row.make(0.25).strength == 0.25 and row.make(None).strength is None
        assert row.make(None).bind("w", torch.ones(row.shape)) is not None  # fits its shape
    names = {(type(row.make(None)), row.make(None).retraction) for row in [*CONSTRAINTS, *MATRICES, *OWN_FACTORS]}
    assert max(Counter(retraction for _, retraction in names).values()) == 1


def test_an_unknown_tolerance_is_refused():
    with pytest.raises(KeyError):
        tolerance("unknown")


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=lambda row: row.id)
def test_the_suite_notices_a_wrong_retraction(constraint, monkeypatch):
    """A retraction that is off by 1e-9 of its value fails the comparison with explicit factors."""
    opt_row = next(row for row in OPTIMIZERS if row.cls is symopt.AdamW)
    follow(constraint, opt_row, "saturated", 1.0, backend="reference")
    kind = type(constraint.make(None))
    original = kind.retract
    monkeypatch.setattr(kind, "retract", lambda *args, **kwargs: original(*args, **kwargs) * (1 + 1e-9))
    with pytest.raises(AssertionError, match="not close"):
        follow(constraint, opt_row, "saturated", 1.0, backend="reference")


@pytest.mark.parametrize("part", ["gain", "update"])
@pytest.mark.parametrize("opt_row", EVERY_OPTIMIZER, ids=ids)
def test_the_suite_notices_a_wrong_direction(opt_row, part, monkeypatch):
    """The same for a gain or an update that is off by 1e-9: the strength or the gradient would mean something else."""
    kind = type(opt_row.cls.direction)
    # Of a lead that is divided by its own size only the proportions count.
    name = part if part == "gain" else "scale" if kind.scaled_by == "lead" else "lead"
    row = next(row for row in CONSTRAINTS if taken(row, opt_row))
    follow(row, opt_row, "saturated", 1.0, backend="reference")  # as it is, it agrees
    original = getattr(kind, name)

    def wrong(*args, **kwargs):
        found = original(*args, **kwargs)
        return (found[0] * (1 + 1e-9), *found[1:]) if isinstance(found, tuple) else found * (1 + 1e-9)

    monkeypatch.setattr(kind, name, wrong)
    with pytest.raises(AssertionError, match="not close"):
        follow(row, opt_row, "saturated", 1.0, backend="reference")


# -- one row is all that a newcomer needs ------------------------------------------------------------------------------


def test_newcomers_run_through_the_suite_by_their_rows_alone():
    """Two optimizers and a constraint that nothing but their rows in ``support/newcomers.py`` knows."""
    call = "import pytest, sys; sys.exit(pytest.main(sys.argv[1:]))"  # in tests/, which is then on sys.path
    options = ["-q", "-p", "no:cacheprovider", "-p", "support.newcomers", "--case", "newcomer"]
    command = [sys.executable, "-c", call, *options, *([] if cases_module.EXHAUSTIVE else FEW_FILES)]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 50


def test_the_suite_notices_the_formula_of_another_direction():
    for row, other in ((SIGNUM, SCALED), (SCALED, SIGNUM)):
        follow(CONSTRAINTS[0], row, "saturated", 1.0, backend="reference")
        wrong = replace(row, formula=other.formula, options={**other.settings, **row.settings})
        wrong = replace(wrong, torch_cls=plain(other.formula, **wrong.options), options=row.options)
        with pytest.raises(AssertionError, match="not close"):
            follow(CONSTRAINTS[0], wrong, "saturated", 1.0, backend="reference")
