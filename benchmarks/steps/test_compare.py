"""The comparison of two checkouts has the gate, too: what steps differently is named and not timed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import symopt
import symopt_kernels
from benchmarks.steps.compare import main

CASE = ["--only", "adamw sparse 200x1k", "--backends", "native", "--threads", "1", "--rounds", "2", "--seconds", "0"]
BENT = """
_right = sparse


def sparse(*args, **kwargs):
    return _right(*args, **kwargs) * (1 + 1e-4)
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder laid out as a checkout, with what is installed."""
    (tmp_path / "symopt").symlink_to(Path(symopt.__file__).parent)
    shutil.copytree(Path(symopt_kernels.__file__).parent, tmp_path / "kernels")
    return tmp_path


def test_equal_steps_are_timed(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(checkout), str(checkout), *CASE]) == 0
    out, err = capsys.readouterr()
    assert "1 of 1 cases take the same steps" in err
    (row,) = (line for line in out.splitlines() if line.startswith("| adamw sparse 200x1k, native |"))
    assert row.count("|") == 6 and float(row.split("|")[2]) > 0


def test_other_steps_are_not(checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bent = tmp_path / "bent"
    shutil.copytree(checkout / "kernels", bent / "kernels")
    (bent / "symopt").symlink_to((checkout / "symopt").resolve())
    with (bent / "kernels" / "reference" / "elementwise.py").open("a", encoding="utf-8") as file:
        file.write(BENT)
    assert main([str(checkout), str(bent), *CASE]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("adamw sparse 200x1k, reference: ") and "0 of 1 cases" in err


BEFORE = """

class Anneal:
    def __init__(self, opt, total_steps):
        self.opt = opt
        opt.reschedule(total_steps=total_steps)

    def step(self):
        assert int(self.opt.state[self.opt.param_groups[0]["params"][0]]["progress"])


def _without_total_steps(make):
    def made(*args, **kwargs):
        assert "total_steps" not in kwargs
        return make(*args, **kwargs)

    return made


AdamW = _without_total_steps(AdamW)
"""


def test_a_checkout_from_before_the_schedule_was_the_optimizers(
    checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tmp_path / "before"
    shutil.copytree(checkout / "symopt", before / "symopt")
    (before / "kernels").symlink_to(checkout / "kernels")
    with (before / "symopt" / "__init__.py").open("a", encoding="utf-8") as file:
        file.write(BEFORE)
    budgets = ["--only", "2:4", "global budget", "--check", "--threads", "1"]
    assert main([str(before), str(checkout), *budgets]) == 0
    assert "2 of 2 cases take the same steps" in capsys.readouterr().err


def test_a_folder_without_extension_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="has no built extension: run"):
        main([str(tmp_path), str(tmp_path)])
