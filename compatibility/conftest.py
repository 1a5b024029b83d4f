"""Writes docs/compatibility.md from what was run, and only from that."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).resolve().parents[1] / "docs" / "compatibility.md"
SHOWN = "torch numpy transformers accelerate lightning onnxruntime safetensors".split()
_rows: list[tuple[str, str, str]] = []


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call":
        file, name = Path(report.fspath).stem, report.nodeid.split("::")[-1]
        _rows.append((file.removeprefix("test_"), name.removeprefix("test_").replace("_", " "), report.outcome))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("keyword") or not _rows:
        return  # a part is not the table
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in SHOWN)
    lines = [
        "# Compatibility",
        "",
        "Written by `make trainers`; there is no row that was not run. What the suite itself runs in every CI",
        "(torch's own optimizer tests, schedulers, GradScaler, `torch.compile`, checkpoints both ways) is in `tests/`.",
        "",
        f"Python {platform.python_version()}, {versions}, {platform.system()} {platform.machine()}.",
        "",
        "| file | what | outcome |",
        "|---|---|---|",
        *(f"| {file} | {name} | {outcome} |" for file, name, outcome in _rows),
        "",
        "Not tested: other versions of any of these, Windows and macOS, GPUs, FSDP, DeepSpeed.",
        "",
    ]
    PAGE.write_text("\n".join(lines), encoding="utf-8")
