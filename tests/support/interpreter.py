"""Triton's kernels on the CPU, interpreted: rounding as on a GPU, small tiles, and fresh memory that is NaN."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import triton.runtime.interpreter as interpreter
from torch import Tensor

from symopt_kernels.triton import launch as triton_launch
from symopt_kernels.triton import product as triton_explicit
from symopt_kernels.triton import selection as triton_select
from symopt_kernels.triton import table as triton_table

DEVICE = "cpu" if triton_launch.INTERPRETED else "cuda"


TILES = {"BLOCK": 128, "WIDTHS": (1, 4, 16, 64, 256), "LINES_PER_PROGRAM": 2, "RESIDENT": 8}


# numpy, which the interpreter computes with, warns of the NaN and infinities that some cases are about.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def _bfloat(data: Any, source: Any, target: Any, rounding: Any) -> Any:
    """Triton's interpreter truncates to bf16, and loses subnormals; GPUs round to nearest, as torch does."""
    if str(source) == "bf16" and str(target) == "fp32":
        return data.view("uint16").astype("uint32") << 16
    assert (str(source), str(target)) == ("fp32", "bf16")
    wide = torch.from_numpy(data.copy().reshape(-1).view("float32"))
    return wide.to(torch.bfloat16).view(torch.uint16).numpy().reshape(data.shape)


class _Patched:
    """The interpreter replaces Triton's language at every call of a function; here once, which saves half the time."""

    def __init__(self, patch: Any) -> None:
        self.patch, self.done = patch, set[int]()

    def __call__(self, function: Any) -> Any:
        if id(function.__globals__) not in self.done:
            self.done.add(id(function.__globals__))
            self.patch(function)
        return self

    def restore(self) -> None:
        """Nobody in this process needs the compiler."""


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles, and fresh memory that is NaN."""
    for name, value in TILES.items():
        monkeypatch.setattr(triton_table, name, value)
    for module in (triton_explicit, triton_select):
        monkeypatch.setattr(module, "BLOCK", 128)
    empty, like = torch.empty, torch.empty_like

    def poison(x: Tensor) -> Tensor:
        return x.fill_(math.nan) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(like(*a, **k)))


if triton_launch.INTERPRETED:
    interpreter._convert_float = _bfloat
    interpreter._patch_lang = _Patched(interpreter._patch_lang)
