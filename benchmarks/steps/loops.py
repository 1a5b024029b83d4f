"""``python -m benchmarks.steps.loops`` compiles loops.cpp with the flags of setup.py and runs it (a C++ compiler)."""

from __future__ import annotations

import ast
import os
import subprocess
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent


def command(*more: str) -> list[str]:
    """The compiler's, with the literal strings of ``extra_compile_args``."""
    for node in ast.walk(ast.parse((FOLDER.parents[1] / "setup.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.keyword) and node.arg == "extra_compile_args":
            words = [n.value for n in ast.walk(node.value) if isinstance(n, ast.Constant)]
            flags = [word for word in words if word.startswith("-")]
            return [os.environ.get("CXX", "c++"), *flags, "-w", str(FOLDER / "loops.cpp"), *more]
    raise RuntimeError("setup.py names no extra_compile_args")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "loops")
        subprocess.run(command("-o", str(program)), check=True)
        print(subprocess.run([program], check=True, capture_output=True, text=True).stdout, end="")


if __name__ == "__main__":
    main()
