"""The whole suite with other releases of Python and torch, each in an environment of its own."""

from __future__ import annotations

import shutil
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from compatibility.test_packages import ROOT, call, environment

NAMES = "import torch, numpy, triton; print(torch.__version__, numpy.__version__, triton.__version__)"


def test_suite(release: str, tmp_path: Path, record_property: Any) -> None:
    """``release`` is INTERPRETER=TORCH; what else the suite needs is the newest that goes with both.

    The suite is that of the last commit, for some of it asks git.
    """
    interpreter, torch = release.rsplit("=", 1)
    call("git", "clone", "-q", ROOT, tmp_path / "source", cwd=tmp_path)
    commit = call("git", "rev-parse", "--short", "HEAD", cwd=tmp_path / "source").strip()
    python = environment(tmp_path / "venv", interpreter)
    version = call(python, "-c", "import platform; print(platform.python_version())", cwd=tmp_path).strip()
    try:
        call(python, "-m", "pip", "install", "-q", f"torch=={torch}", "./source[test]", cwd=tmp_path)
        shutil.rmtree(tmp_path / "source" / "build", ignore_errors=True)
        found, numpy, triton = call(python, "-c", NAMES, cwd=tmp_path).split()
        options = ("-q", "-n", "2", "--exhaustive", "--junitxml", tmp_path / "suite.xml")
        call(python, "-m", "pytest", *options, cwd=tmp_path / "source")
    finally:
        shutil.rmtree(tmp_path / "venv")  # gigabytes
    counts = next(ET.parse(tmp_path / "suite.xml").iter("testsuite")).attrib
    tests, skipped = int(counts["tests"]), int(counts["skipped"])
    what = f"Python {version}, torch {found}, NumPy {numpy}, Triton {triton}: the whole suite"
    record_property("what", f"{what} of {commit}, {tests - skipped} tests passed, {skipped} skipped")
