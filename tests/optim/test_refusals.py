"""What a backend cannot step: an error that names it where the backend is named, else the reference and the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import symopt
from support.cases import cases
from support.runs import (
    FEW,
    ROWS,
    SOME,
    Run,
    close,
    equal,
    gradient,
    kind_of,
    made,
    optimizer,
    start,
    step,
    stepped,
)
from support.table import ANY_SHAPE, ConstraintRow, OptimizerRow, available, constrained_parameter
from symopt_kernels.native import binding as native

# -- what cannot be stepped natively ---------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "depth": (symopt.Sparse(strength=0.3, depth=3), {}, "with the retraction 'sparse_deep'"),
    "group depth": (symopt.GroupSparse("out", strength=0.3, depth=4), {}, "with the retraction 'group_deep'"),
    "free depth": (symopt.Sparse(strength=0.3, depth=3, gauge="free"), {}, "with the retraction 'sparse_free_deep'"),
    "list": (
        [symopt.Sparse(strength=0.3), symopt.GroupSparse("in", strength=0.3)],
        {},
        "with the retraction 'composed'",
    ),
    "differentiable": (symopt.Sparse(strength=0.3), {"differentiable": True}, "differentiable=True needs a step"),
}


@cases(case=REFUSED, cls=[symopt.SGD, symopt.Adam, symopt.AdamW])
def test_native_by_name_names_the_parameter_and_the_reason(cls: Any, case: str) -> None:
    constraint, options, reason = REFUSED[case]
    module = nn.Sequential(nn.Linear(4, 3).double())
    symopt.constrain(module, {"0.weight": constraint})
    before = {name: value.clone() for name, value in module.state_dict().items()}
    opt = cls(module, lr=0.01, backend="native", **options)
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    message = rf"^0\.weight: backend='native' cannot step it: .*{reason}.*; use backend=None for one that can$"
    if options:
        message = message.replace(r"0\.weight", r"0\.(weight|bias)")
    with pytest.raises(ValueError, match=message):
        opt.step()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@cases(case=REFUSED)
def test_without_a_name_the_reference_steps_it_and_explain_says_why(case: str) -> None:
    constraint, options, reason = REFUSED[case]
    runs = []
    for backend in (None, "reference"):
        module = made((4, 3), constraint)
        opt = symopt.AdamW(module, lr=0.01, backend=backend, **options)
        for t in range(0 if options.get("differentiable") else 3):  # torch differentiates steps of non-leaves only
            for p in module.parameters():
                p.grad = gradient(p, t)
            opt.step()
        text = symopt.explain(opt).splitlines()
        assert text[0].startswith("weight  reference")
        assert reason in text[0].partition("native: ")[2].partition("; triton")[0]
        assert text[1].split()[:2] == ["bias", "torch"]
        runs.append((module, opt))
    assert torch.equal(runs[0][0].weight, runs[1][0].weight)


def test_explain_names_the_native_step() -> None:
    module = made((4, 3), symopt.Sparse())
    lines = symopt.explain(symopt.AdamW(module)).splitlines()
    assert lines[0] == "weight  native" and lines[1].split()[:2] == ["bias", "torch"]
    assert native.INSTRUCTIONS[-1] in lines[2]
    lines = symopt.explain(symopt.AdamW(module, backend="native")).splitlines()
    assert [line.split() for line in lines[:2]] == [["weight", "native"], ["bias", "native"]]


def test_other_dtypes_are_torchs() -> None:
    p = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"not torch\.complex64"):
        symopt.AdamW([p], backend="native").step()
    symopt.AdamW([p]).step()
    assert not torch.equal(p, torch.ones_like(p))


@cases(opt_row=ANY_SHAPE, backend=["cuda", "", "NATIVE", 3, True])
def test_an_unknown_backend_is_refused(opt_row: OptimizerRow, backend: Any) -> None:
    module = made((4, 3), symopt.Sparse())
    with pytest.raises(ValueError, match=r"backend must be None or one of \('native', 'triton', 'reference'\)"):
        optimizer(module, opt_row, backend=backend)
    opt = optimizer([module.weight], opt_row)
    with pytest.raises(ValueError, match="backend must be"):
        opt.add_param_group({"params": [module.bias], "backend": backend})
    assert len(opt.param_groups) == 1


def test_an_unknown_backend_written_into_a_group_is_refused_at_the_step() -> None:
    module = made((4, 3), symopt.Sparse())
    opt = symopt.AdamW(module)
    opt.param_groups[0]["backend"] = "cuda"
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="backend"):
        opt.step()


def test_the_backend_is_an_option_of_a_group() -> None:
    def run(backends: list[str | None]) -> Run:
        module = nn.Module()
        for i, row in enumerate(SOME):
            module.register_parameter(f"w{i}", nn.Parameter(constrained_parameter(row).weight.detach().clone()))
        symopt.constrain(module, {f"w{i}": row.make(0.3) for i, row in enumerate(SOME)})
        groups = [{"params": [p], "backend": b} for p, b in zip(module.parameters(), backends, strict=True)]
        opt = symopt.AdamW(groups, lr=0.01)
        assert [group["backend"] for group in opt.param_groups] == backends
        assert [backend for _, backend, _ in opt.backends()] == [b or "native" for b in backends]
        return stepped((module, opt))

    want = run(["reference"] * len(SOME))
    for backends in (["native", "reference", None, "reference"], [None, None, "reference", "native"]):
        close(run(backends), want)


@cases(lambda row, opt_row: available(row, opt_row, "native"), row=ROWS, opt_row=ANY_SHAPE)
def test_backends_may_change_from_step_to_step(row: ConstraintRow, opt_row: OptimizerRow) -> None:
    mixed, want = start(row, opt_row), start(row, opt_row, backend="reference")
    for t in range(8):
        mixed[1].param_groups[0]["backend"] = ["native", "reference", None, "reference", "reference"][t % 5]
        step(mixed, t)
        step(want, t)
        close(mixed, want, kind_of(row))


# -- no extension ----------------------------------------------------------------------------------------------------


@cases(row=ROWS)
def test_without_the_extension_the_reference_steps(row: ConstraintRow, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "no compiler, no kernel"
    monkeypatch.setattr(native, "UNAVAILABLE", reason)
    monkeypatch.setattr(native, "LIBRARY", None)
    run, want = start(row, FEW[2]), start(row, FEW[2], backend="reference")
    assert equal(stepped(run), stepped(want))
    text = symopt.explain(run[1])
    assert text.split()[:2] == ["weight", "reference"] and f"native: {reason}" in text
    assert native.INSTRUCTIONS[-1] not in text
    strict = start(row, FEW[2], backend="native")
    with pytest.raises(ValueError, match=f"^weight: backend='native' cannot step it: {reason}"):
        step(strict, 0)
