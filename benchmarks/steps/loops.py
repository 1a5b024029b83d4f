"""``python -m benchmarks.steps.loops`` compiles loops.cpp with the flags of setup.py and runs it (a C++ compiler)."""

from __future__ import annotations

import ast
import os
import subprocess
import tempfile
from pathlib import Path

from symopt_kernels.native.binding import INSTRUCTIONS

FOLDER = Path(__file__).parent


def command(instructions: str, *more: str) -> list[str]:
    """The compiler's, with the literal strings of ``extra_compile_args``."""
    source = FOLDER.parents[1] / "kernels" / "native" / f"{instructions.replace('neon', 'baseline')}.cpp"
    for node in ast.walk(ast.parse((FOLDER.parents[1] / "setup.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.keyword) and node.arg == "extra_compile_args":
            words = [n.value for n in ast.walk(node.value) if isinstance(n, ast.Constant)]
            flags = [word for word in words if word.startswith("-")]
            flags += [f'-DSYMOPT_SOURCE="{source}"', f'-DSYMOPT_SET="{instructions}"', "-w", str(FOLDER / "loops.cpp")]
            return [os.environ.get("CXX", "c++"), *flags, *more]
    raise RuntimeError("setup.py names no extra_compile_args")


def main() -> None:
    print("ns per 16 weights")
    with tempfile.TemporaryDirectory() as folder:
        for instructions in INSTRUCTIONS:
            program = Path(folder, instructions)
            # The instruction sets' sources refer to each other nowhere, so each is a program of its own.
            subprocess.run(command(instructions, "-o", str(program)), check=True)
            print(subprocess.run([program], check=True, capture_output=True, text=True).stdout, end="")


if __name__ == "__main__":
    main()
