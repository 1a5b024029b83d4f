"""How far a reader walks: the files that one warm step of one weight leads through."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import symopt
import symopt_kernels

OURS = tuple(str(Path(package.__path__[0]).resolve()) for package in (symopt, symopt_kernels))
TORCH = (str(Path(torch.optim.__path__[0]).resolve()),)


def called(step: Callable[[], Any], folders: tuple[str, ...]) -> list[str]:
    """The files of the functions that a step calls, in order, without repetitions."""
    names: list[str] = []
    sys.setprofile(lambda frame, event, _: names.append(frame.f_code.co_filename) if event == "call" else None)
    try:
        step()
    finally:
        sys.setprofile(None)
    files = (str(Path(name).resolve()) for name in names if not name.startswith("<"))
    return [file for file, _ in groupby(file for file in files if file.startswith(folders))]


def walk(step: Callable[[], Any], folders: tuple[str, ...] = OURS) -> tuple[int, int]:
    """How often a step enters another file, and how often one that it was in before."""
    files = called(step, folders)
    return len(files), len(files) - len(set(files))


def steps(cls: Any, constraint: symopt.Constraint | None, **options: Any) -> Callable[[], Any]:
    layer = nn.Linear(6, 5, bias=False)
    if constraint is not None:
        symopt.constrain(layer, {"weight": constraint})
    opt = cls(layer.parameters() if constraint is None else layer, lr=0.01, **options)
    layer.weight.grad = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        opt.step()
    return opt.step


def test_a_step_of_torchs_own_is_a_short_walk() -> None:
    entered, returned = walk(steps(torch.optim.AdamW, None, foreach=False), TORCH)  # 7 and 5 in torch 2.13
    assert 2 <= entered <= 12 and 0 < returned < entered


@pytest.mark.parametrize("strength", [0.1, None])
def test_a_reference_step(strength: float | None) -> None:
    entered, returned = walk(steps(symopt.AdamW, symopt.Sparse(strength=strength), backend="reference"))
    print(f"reference: {entered} files entered, {returned} of them again")
    assert entered <= 20 and returned <= 8


def test_a_native_step() -> None:
    entered, returned = walk(steps(symopt.AdamW, symopt.Sparse(strength=0.1), backend="native"))
    print(f"native: {entered} files entered, {returned} of them again")
    assert entered <= 12


def test_the_base_class_is_short() -> None:
    assert len((Path(OURS[0]) / "optim" / "base.py").read_text(encoding="utf-8").splitlines()) < 200
