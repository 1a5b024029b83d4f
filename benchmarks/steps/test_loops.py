"""loops.cpp calls the kernel's inner functions by name, so a change of theirs must not pass it by."""

from __future__ import annotations

import subprocess

import pytest

from benchmarks.steps import loops
from symopt_kernels.native.binding import INSTRUCTIONS


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
def test_the_loops_compile(instructions: str) -> None:
    done = subprocess.run(loops.command(instructions, "-fsyntax-only"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
