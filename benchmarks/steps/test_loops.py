"""loops.cpp calls the kernel's inner functions by name, so a change of theirs must not pass it by."""

from __future__ import annotations

import subprocess

from benchmarks.steps import loops


def test_the_loops_compile() -> None:
    done = subprocess.run(loops.command("-fsyntax-only"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
