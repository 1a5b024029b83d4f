"""The gate itself: whatever disagrees with the reference must not be printed, plotted or written down as a time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import report
from benchmarks.__main__ import main
from benchmarks.steps.cases import CONSTRAINTS, DTYPES, OPTIMIZERS, Case, Size
from benchmarks.steps.checks import check
from benchmarks.steps.peers import Explicit, Pat
from benchmarks.steps.training import FLAGS, NETS
from symopt_kernels.native import binding as native
from symopt_kernels.reference import directions, elementwise, gauge
from symopt_kernels.reference import group as group_kernel

SMALL = ["--sizes", "2x1k", "--repeats", "2", "--seconds", "0", "--parts", "kernels"]
PEERS = ["--peers", "torch-fused", "explicit"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    return captured(capsys, *SMALL, *arguments)


def captured(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout, and stderr without the lines that announce a case."""
    status = main([*arguments])
    out, err = capsys.readouterr()
    return status, out, "".join(line for line in err.splitlines(keepends=True) if not re.match(r"\[\d+/\d+\] ", line))


def bent(function: Callable[..., Any], by: float) -> Callable[..., Any]:
    """The same with its first result scaled."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        return result * by if isinstance(result, Tensor) else (result[0] * by, *result[1:])

    return wrapper


@pytest.mark.parametrize(
    "function, constraint, optimizer",
    [
        ("sparse", "sparse", "adamw"),
        ("group", "group-in", "sgd"),
        ("sparse_free", "sparse_free", "adam"),
        ("adam_lead", "group-block", "adamw"),
        ("adam_scale", "sparse", "adam"),
        ("sgd_lead", "group-out", "sgd-momentum"),
        ("imbalance_law", "sparse", "adamw"),
    ],
)
def test_a_wrong_step_prints_nothing_but_the_error(
    function: str,
    constraint: str,
    optimizer: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    module = next(m for m in (directions, elementwise, gauge, group_kernel) if function in m.__all__)
    monkeypatch.setattr(module, function, bent(getattr(module, function), 1 + 1e-4))
    written = tmp_path / "bench.json"
    files = ["--json", str(written), "--plot", str(tmp_path / "bench.png"), "--markdown", str(tmp_path / "bench.md")]
    readme = report.README.read_text(encoding="utf-8")
    monkeypatch.setattr(report, "README", copy := tmp_path / "README.md")
    copy.write_text(readme, encoding="utf-8")
    status, out, err = run(
        capsys, "--constraints", constraint, "--optimizers", optimizer, *PEERS, *files, "--write-readme"
    )
    assert status == 1
    assert out == ""
    (line,) = err.splitlines()
    name = f"{optimizer} {constraint} 2x1k, float32, {torch.get_num_threads()} thread"
    assert line.startswith(f"case {name}") and ": not timed, its correctness check failed: native against" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "bench.json"]
    (kernel,) = json.loads(written.read_text(encoding="utf-8"))["kernels"]
    assert kernel["failed"] and not {"symopt_ms", "peers", "share_of_bandwidth"} & kernel.keys()
    assert copy.read_text(encoding="utf-8") == readme


def test_only_the_wrong_case_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(group_kernel, "group", bent(group_kernel.group, float("nan")))
    status, out, err = run(capsys, "--constraints", "sparse", "group-out", "--optimizers", "sgd", *PEERS)
    assert status == 1 and len(err.splitlines()) == 1 and "case sgd group-out" in err
    assert "sgd sparse 2x1k" in out and "group-out" not in out


def test_memory_and_training_have_the_same_gate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(elementwise, "sparse", bent(elementwise.sparse, 1.01))
    parts = ["--parts", "memory", "training"]
    status, out, err = captured(capsys, "--quick", *parts, "--sizes", "1x1k", "--constraints", "sparse")
    assert (status, out) == (1, "")
    assert len(err.splitlines()) == 1 + len(NETS) * len(FLAGS)
    assert all("not timed, its correctness check failed: " in line for line in err.splitlines())


def test_a_peer_that_is_not_the_same_method_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = Explicit.step

    def twice(self: Explicit) -> None:
        step(self)
        step(self)

    monkeypatch.setattr(Explicit, "step", twice)
    status, out, err = run(capsys, "--constraints", "sparse_free", "--optimizers", "sgd", "--peers", "explicit")
    assert (status, out) == (1, "") and "native, time_scale='none', against explicit" in err
    status, out, err = run(
        capsys, "--constraints", "sparse", "--optimizers", "adamw", "--peers", "explicit", "parametrize"
    )
    assert (status, out) == (1, "") and "parametrize against explicit" in err


def test_a_right_step_is_timed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    before = torch.get_num_threads(), native.step.__kwdefaults__["instructions"]
    written, drawn = tmp_path / "out" / "bench.json", tmp_path / "bench.png"
    status, out, err = run(
        capsys,
        *("--constraints", "sparse", "group-block", "--optimizers", "sgd", "adamw", "--threads", "1"),
        *("--peers", "torch-fused", "torch-foreach", "parametrize", "explicit", "pat", "reference"),
        *("--json", str(written), "--plot", str(drawn), "--markdown", "--instructions", "baseline"),
    )
    assert (status, err) == (0, "")
    assert drawn.stat().st_size > 0
    found = json.loads(written.read_text(encoding="utf-8"))
    assert found["machine"]["instructions"] == "baseline"
    assert len(found["kernels"]) == 4
    assert "## One step" in out and "| sgd group-block 2x1k" in out
    for kernel in found["kernels"]:
        assert {"torch-fused", "reference"} <= kernel["peers"].keys()
        for pair in kernel["peers"].values():
            assert 0 < pair["ms"]["low"] <= pair["ms"]["median"] <= pair["ms"]["high"] and pair["ms"]["n"] == 2
        blocks = kernel["constraint"] == "group-block"
        assert ("pat" in kernel["absent"]) == (
            blocks or Pat.why_not(Case("sgd", "sparse", SIZE, "float32", 1)) is not None
        )
    assert (torch.get_num_threads(), native.step.__kwdefaults__["instructions"]) == before


SIZE = Size.parse("3x1k")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_case_passes_its_check(optimizer: str, constraint: str, dtype: str) -> None:
    case = Case(optimizer, constraint, SIZE, dtype, torch.get_num_threads())
    wrong, absent = check(case, ["torch-fused", "torch-foreach", "parametrize", "explicit", "pat", "reference"])
    assert wrong == []
    assert absent.keys() <= {"pat", "torch-fused"}


@pytest.mark.parametrize(
    "optimizer, constraint, dtype, expected",
    [
        ("sgd", "sparse", "float32", (8, 4)),
        ("sgd-momentum", "sparse", "float32", (12, 8)),
        ("adamw", "sparse", "float32", (16, 12)),
        ("adam", "group-in", "float32", (12, 8)),
        ("sgd", "sparse_free", "float32", (16, 12)),
        ("adamw", "sparse", "bfloat16", (16, 14)),
        ("adamw", "sparse", "float64", (32, 24)),
    ],
)
def test_bytes_per_weight(optimizer: str, constraint: str, dtype: str, expected: tuple[int, int]) -> None:
    assert Case(optimizer, constraint, SIZE, dtype, 1).traffic == expected


@pytest.mark.parametrize("text", ["", "1", "1x", "0x1k", "1x1T", "1x-1", "axb"])
def test_sizes_that_are_none(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--sizes", text])
    assert "size looks like 200x1k" in capsys.readouterr().err


def test_the_readme_is_filled_between_its_marks(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    copy = tmp_path / "README.md"
    copy.write_text(report.README.read_text(encoding="utf-8"), encoding="utf-8")
    results = report.Results({"cpu": "a", "cores": 1, "l2_bytes": None, "l3_bytes": None, "threads": [1], "torch": "2",
                              "instructions": "i", "os": "o", "python": "3", "symopt": "0", "date": "d"})  # fmt: skip
    results.memory = [{"case": "c", "size": "1x1", "method": "symopt", "weights_bytes": 4 << 20, "held_bytes": 16 << 20,
                       "extra_bytes": 8 << 20, "resolution_bytes": 0}]  # fmt: skip
    report.fill(results, copy)
    once = copy.read_text(encoding="utf-8")
    report.fill(results, copy)
    assert copy.read_text(encoding="utf-8") == once
    assert "| c | symopt | 4.00 | 2.00 | 8,192 |" in once and once.count("<!-- memory -->") == 1
