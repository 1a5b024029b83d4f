"""Every study is a program that can be run as its docstring says."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


def programs() -> list[str]:
    """Files of this folder that begin to run when they are called."""
    found = []
    for path in sorted(FOLDER.glob("*.py")):
        last = ast.parse(path.read_text(encoding="utf-8")).body[-1]
        if isinstance(last, ast.If) and ast.unparse(last.test) == "__name__ == '__main__'":
            found.append(path.stem)
    return found


@pytest.mark.parametrize("name", programs())
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_help_names_the_command(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"benchmarks.studies.{name}", run_name="__main__")
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: python -m benchmarks.studies.{name} ")
    assert text.count(f"python -m benchmarks.studies.{name}") >= 2
