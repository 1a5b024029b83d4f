"""Writes docs/compatibility.md from what was run, and only from that: one part a make target, each replaced whole.

Of ``make versions`` the rows of releases that were not run again stay: each names the commit that it is of.
"""

from __future__ import annotations

import platform
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).resolve().parents[1] / "docs" / "compatibility.md"
HEAD = """\
# Compatibility

Each part is written by the target that it is named after; there is no row that was not run. What the suite itself
runs in every CI (torch's own optimizer tests, schedulers, GradScaler, `torch.compile`, checkpoints both ways) is in
`tests/`.
"""
PARTS: dict[str, tuple[set[str], list[str], str]] = {
    "make trainers": (
        {"battery", "export", "trainers"},
        "torch numpy transformers accelerate lightning onnxruntime safetensors pytorch-optimizer".split(),
        "Not tested: other versions of any of these, Windows and macOS, GPUs, FSDP, DeepSpeed.",
    ),
    "make versions": (
        {"versions"},
        [],
        "Not tested: releases that no row names.",
    ),
    "make packages": (
        {"packages"},
        ["pip", "setuptools"],
        "Not tested: a training step with any Python, torch or NumPy that no row above names; Windows and macOS.",
    ),
}
_rows: list[tuple[str, str, str]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--python", action="append", default=[], help="a further interpreter to build the package with")
    parser.addoption("--release", action="append", default=[], help="INTERPRETER=TORCH to run the suite with")
    parser.addoption("--torch", help="the release of torch to install, where not that of constraints.txt")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for fixture, option in (("interpreter", "python"), ("release", "release")):
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, metafunc.config.getoption(option))


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.failed:
        file, name = Path(report.fspath).stem, report.nodeid.split("::")[1].split("[")[0]
        what = dict(report.user_properties).get("what", name.removeprefix("test_").replace("_", " "))
        _rows.append((file.removeprefix("test_"), what, report.outcome))


def _sum(file: str, what: str) -> str:
    """The outcome of all cases of one test."""
    outcomes = Counter(outcome for *which, outcome in _rows if which == [file, what])
    return ", ".join(outcome if count == 1 else f"{count} {outcome}" for outcome, count in outcomes.items())


def pytest_sessionfinish(session: pytest.Session) -> None:
    target = next((name for name, (files, *_) in PARTS.items() if files == {row[0] for row in _rows}), None)
    if session.config.getoption("keyword") or target is None:
        return  # a piece is not the table
    _, names, untested = PARTS[target]
    versions = [f"Python {platform.python_version()}", *(f"{name} {metadata.version(name)}" for name in names)]
    rows = [f"| {file} | {what} | {_sum(file, what)} |" for file, what in dict.fromkeys(row[:2] for row in _rows)]
    old = PAGE.read_text(encoding="utf-8").split("\n## ")[1:]
    parts = dict(text.strip().split("\n\n", 1) for text in old)
    if target == "make versions":
        again = {row.partition(": ")[0] for row in rows}
        before = [
            line
            for line in parts.get(target, "").splitlines()
            if line.startswith("| versions |") and line.endswith("| passed |")
        ]
        rows = sorted(rows + [line for line in before if line.partition(": ")[0] not in again])
    part = [
        ", ".join([*(versions if names else []), f"{platform.system()} {platform.machine()}"]) + ".",
        "",
        "| file | what | outcome |",
        "|---|---|---|",
        *rows,
        "",
        untested,
    ]
    parts[target] = "\n".join(part)
    PAGE.write_text("\n".join([HEAD, *(f"## {name}\n\n{parts[name]}\n" for name in PARTS if name in parts)]), "utf-8")
