"""What is timed: an optimizer, a constraint, sizes, a precision and a number of threads, with fixed random data."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import symopt
from symopt.constraints import Constraint

__all__ = ["CONSTRAINTS", "DTYPES", "OPTIMIZERS", "Case", "Direction", "Size", "cases"]

BLOCK = 16
DTYPES = ("float32", "bfloat16", "float64")
"""Not float16: torch.optim's own moments in float16 overflow and its eps is 0 there."""
_UNITS = {"": 1, "k": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Direction:
    """An optimizer of symopt and the torch.optim class it constrains."""

    ours: type[torch.optim.Optimizer]
    torch: type[torch.optim.Optimizer]
    options: dict[str, Any]
    moments: int


OPTIMIZERS: dict[str, Direction] = {
    "sgd": Direction(symopt.SGD, torch.optim.SGD, {"lr": 0.1}, 0),
    "sgd-momentum": Direction(symopt.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, 1),
    "adamw": Direction(symopt.AdamW, torch.optim.AdamW, {"lr": 1e-3}, 2),
    "adam": Direction(symopt.Adam, torch.optim.Adam, {"lr": 1e-3}, 2),
}

CONSTRAINTS: dict[str, Callable[[float | None], Constraint]] = {
    "sparse": lambda k: symopt.Sparse(strength=k),
    "group-out": lambda k: symopt.GroupSparse("out", strength=k),
    "group-in": lambda k: symopt.GroupSparse("in", strength=k),
    "group-block": lambda k: symopt.GroupSparse(f"block:{BLOCK}x{BLOCK}", strength=k),
    "sparse_free": lambda k: symopt.Sparse(strength=k, gauge="free"),
}


@dataclass(frozen=True)
class Size:
    """``count`` square-ish matrices of ``numel`` weights each; written ``200x1k``."""

    text: str
    count: int
    numel: int

    @staticmethod
    def parse(text: str) -> Size:
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)([kMG]?)", text)
        if match is None:
            raise ValueError(f"a size looks like 200x1k, 1x1M or 1x16M (count x weights; k = 1024), not {text!r}")
        return Size(text, int(match[1]), int(match[2]) * _UNITS[match[3]])

    @property
    def shape(self) -> tuple[int, int]:
        rows = next(r for r in range(math.isqrt(self.numel), 0, -1) if self.numel % r == 0)
        return rows, self.numel // rows

    @property
    def total(self) -> int:
        return self.count * self.numel


@dataclass(frozen=True)
class Case:
    optimizer: str
    constraint: str
    size: Size
    dtype: str
    threads: int

    def __str__(self) -> str:
        return f"{self.label}, {self.dtype}, {self.threads} thread{'s' * (self.threads > 1)}"

    @property
    def label(self) -> str:
        return f"{self.optimizer} {self.constraint} {self.size.text}"

    @property
    def direction(self) -> Direction:
        return OPTIMIZERS[self.optimizer]

    @property
    def options(self) -> dict[str, Any]:
        return self.direction.options

    @property
    def grouped(self) -> bool:
        return self.constraint.startswith("group")

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)  # type: ignore[no-any-return]

    @property
    def strength(self) -> float:
        return CONSTRAINTS[self.constraint](None).default_strength(decoupled=self.optimizer == "adamw")

    def make_constraint(self) -> Constraint:
        return CONSTRAINTS[self.constraint](self.strength)

    def why_not(self) -> str | None:
        rows, columns = self.size.shape
        if self.constraint == "group-block" and (rows % BLOCK or columns % BLOCK):
            return f"{rows} x {columns} does not split into blocks of {BLOCK} x {BLOCK}"
        return None

    def start(self) -> list[Tensor]:
        """The weights every variant starts from; small, as an initialised layer's are."""
        return self._draw(0, 0.05)

    def gradients(self, seed: int = 1, scale: float = 0.01) -> list[Tensor]:
        return self._draw(seed, scale)

    def _draw(self, seed: int, scale: float) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shape = self.size.shape
        return [
            torch.randn(shape, generator=generator).mul_(scale).to(self.torch_dtype) for _ in range(self.size.count)
        ]

    # -- bytes ---------------------------------------------------------------------------------------------------------

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes per weight that one step must read and write at least: gradient, weight and state, each once."""
        store = self.torch_dtype.itemsize
        wide = max(store, 4)  # state is fp32 where weights are in half precision
        state = wide * min(self.direction.moments, 1)
        if self.direction.moments == 2 and not self.grouped:
            state += wide  # groups share their second moment
        if self.constraint == "sparse_free":
            state += 2 * wide
        elif store == 2:
            state += wide  # the fp32 copy of the weight
        return 2 * store + state, store + state

    @property
    def touched(self) -> int:
        """Bytes of the memory a step works on; all that is written is also read."""
        return self.traffic[0] * self.size.total


def cases(
    optimizers: list[str], constraints: list[str], sizes: list[str], dtypes: list[str], threads: list[int]
) -> list[Case]:
    return [
        Case(optimizer, constraint, Size.parse(size), dtype, n)
        for n in threads
        for dtype in dtypes
        for optimizer in optimizers
        for constraint in constraints
        for size in sizes
    ]
