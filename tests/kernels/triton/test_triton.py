"""The Triton step: interpreted in processes of their own (or run on a GPU), and its machine code read in this one."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from support.machine_code import TARGETS, VARIANTS, Variant, build, traffic
from symopt_kernels.triton import launch as triton_launch
from symopt_kernels.triton import table as triton_table

HERE = Path(__file__).resolve().parent
MODES = ["interpreted", *(["gpu"] if torch.cuda.is_available() else [])]


PARTS = [
    ("triton_cases", "test"),
    ("triton_mirror_cases", "many"),
    ("triton_mirror_cases", "not many"),
    ("triton_units_cases", "test"),
]


@pytest.mark.parametrize(("cases", "part"), PARTS)
@pytest.mark.parametrize("mode", MODES)
def test_numbers(mode: str, cases: str, part: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The interpreter replaces the compiler when the kernels are imported, so it needs a process of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "TRITON_INTERPRET"))}
    if mode == "interpreted":
        environment["TRITON_INTERPRET"] = "1"
    settings = str(HERE.parents[2] / "pyproject.toml")
    options = ["-q", "-x", "-n", "0", "-p", "no:cacheprovider", "-c", settings, "-k", part]
    options += ["--exhaustive"] * request.config.getoption("exhaustive")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(HERE / f"{cases}.py")],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


# One of every kind on one target each; `make sass` compiles all on all.
_ROW, _COLUMN = (*triton_launch.tile(1, 4096), True), (*triton_launch.tile(4096, 1), True)
_TIE = (True, False, True, False, True)
COMPILED = [
    (Variant("adamw", "sparse"), "sm_90"),
    (Variant("adamw", "sparse"), "gfx942"),
    (Variant("lion", "plain"), "sm_90"),
    (Variant("sgd", "sparse_free"), "sm_90"),
    (Variant("adamw", "nm", budgeted=True, form=(4,)), "sm_100"),
    (Variant("adamw", "sparse_deep", form=(3,)), "sm_80"),
    (Variant("adamw", "group", form=_ROW), "sm_90"),
    (Variant("adamw", "group", form=_COLUMN), "gfx942"),
    (Variant("adamw", "orbit", form=_TIE, kernel="survey_orbits"), "sm_90"),
    (Variant("adam", "orbit", "bfloat16", master=True, form=_TIE, kernel="move_orbits"), "sm_100"),
    (Variant("sgd", "orbit", form=_TIE, kernel="snap_orbits"), "sm_80"),
    (Variant("adam", "orbit", form=(False, True, True, True, False), kernel="move_orbits"), "sm_90"),
    (Variant("adamw", "centred", form=(*_ROW[:3], 1, True, True), kernel="survey_means"), "sm_90"),
    (Variant("adam", "centred", form=(*_ROW[:3], 1, True, True), kernel="combine_coordinates"), "sm_100"),
    (Variant("sgd", "centred", form=(*_COLUMN[:3], 32, True, True), kernel="move_means"), "sm_80"),
    (Variant("adamw", "basis", form=(2, 1024, True, True), kernel="survey_basis"), "sm_90"),
    (Variant("adamw", "units", form=((*_ROW[:3], False, True),), kernel="survey_units"), "sm_100"),
    (Variant("adamw", "units", form=((*_ROW[:3], True, False),), kernel="survey_units"), "sm_90"),
    (Variant("adam", "units", form=((*_ROW[:3], False, True),), kernel="combine_units"), "gfx942"),
    (Variant("adamw", "units", form=((*_COLUMN[:3], False, True),), kernel="move_units"), "sm_80"),
]
MORE_COMPILED = [
    (Variant("adamw", "sparse"), "sm_80"),
    (Variant("adamw", "sparse"), "sm_100"),
    (Variant("adamw", "plain"), "sm_90"),
    (Variant("adam", "sparse", peak=True), "sm_80"),
    (Variant("adamw", "sparse", "bfloat16", master=True), "sm_90"),
    (Variant("lion", "sparse"), "sm_90"),
    (Variant("sgd", "group", form=_COLUMN), "sm_80"),
    (Variant("adam", "orbit", form=(True, True, False, False, True), kernel="move_orbits"), "sm_80"),
    (Variant("adamw", "orbit", form=(False, False, True, True, False), kernel="survey_orbits"), "gfx942"),
    (Variant("adam", "orbit", form=(False, *_TIE[1:]), kernel="move_orbits"), "gfx942"),
    (Variant("adam", "basis", form=(2, 1024, True, True), kernel="combine_coordinates"), "gfx942"),
]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is read here was compiled here."""
    os.environ["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))


@pytest.mark.parametrize(
    ("variant", "target"),
    [*COMPILED, *(pytest.param(*row, marks=pytest.mark.exhaustive) for row in MORE_COMPILED)],
    ids=str,
)
def test_machine_code(variant: Variant, target: str) -> None:
    code = build(variant, target)
    assert code.stack == 0, "spills"
    assert code.calls == 0 and code.doubles == 0
    if target != "gfx942" and variant.aligned:
        # Nothing but 128-bit accesses is counted, so this is also the test that there are no narrower ones.
        assert (code.read, code.written) == traffic(variant)


def test_the_count_notices_what_it_should() -> None:
    assert traffic(Variant("adamw", "sparse")) == (16, 12)
    assert (HERE.parents[2] / "Makefile").read_text(encoding="utf-8").count("machine_code") == 1
    unaligned = Variant("sgd", "group", form=(*_COLUMN[:3], False))
    code = build(unaligned, "sm_80")
    assert code.read == 0 and code.written == 0


def test_every_kind_is_compiled() -> None:
    kinds = {variant.retraction for variant in VARIANTS}
    assert kinds == {variant.retraction for variant, _ in COMPILED}
    assert {target for _, target in COMPILED} == set(TARGETS)
    assert all(replace(v).key == v.key for v in VARIANTS)


def test_an_old_triton_is_not_used() -> None:
    assert triton_table.unavailable("3.7.1") is None and triton_table.unavailable("10.0.0+git1") is None
    assert "3.3.0 is older than 3.7" in str(triton_table.unavailable("3.3.0"))
    assert triton_table.unavailable(None) == "triton is not installed"
