"""Modules in explicit mode: weights of every row as products of factors, and what the tests of them share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import symopt
from support.table import CONSTRAINTS, ConstraintRow, ids
from support.tolerances import tolerance

S, G = symopt.Sparse, symopt.GroupSparse


ROWS = [
    *CONSTRAINTS,
    *(ConstraintRow(f"sparse-depth-{d}", lambda k, d=d: S(strength=k, depth=d), (6, 5)) for d in (3, 4, 5)),
    ConstraintRow("group-out-depth-3", lambda k: G("out", strength=k, depth=3), (6, 5)),
]


SMALL = [row for row in ROWS if row.id in ("sparse", "sparse-depth-3", "group-out", "group-index", "group-out-depth-3")]


KEEPS = ("imbalanced", "balanced", "gates", 1.0, 0.0)


small_rows = pytest.mark.parametrize("row", SMALL, ids=ids)


in_any_memory = pytest.mark.usefixtures("memory")


class Cell(nn.Module):
    """A weight of any shape and a bias, used in a way that tells all entries apart."""

    def __init__(self, shape: tuple[int, ...], seed: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(randn(shape, seed))
        self.bias = nn.Parameter(randn(shape[:1], seed + 1))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x).sin().sum() + self.bias.sum()


def randn(shape: Any, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def explicit(row: ConstraintRow, init: str | float = "imbalanced", seed: int = 0, strength: float | None = 0.3) -> Cell:
    return symopt.constrain(Cell(row.shape, seed), {"weight": row.make(strength)}, mode="explicit", init=init)


def factors(module: nn.Module, name: str = "weight") -> list[nn.Parameter]:
    return list(module.parametrizations[name].parameters())


def random_factors(row: ConstraintRow, seed: int = 7) -> tuple[Any, tuple[Tensor, ...]]:
    """The bound constraint, and factors in no gauge at all, one entry of each zero."""
    module = explicit(row)
    values = [randn(f.shape, seed + i) for i, f in enumerate(factors(module))]
    for i, value in enumerate(values):
        value.view(-1)[i] = 0
    return symopt.constraints(module)["weight"], tuple(v.requires_grad_() for v in values)


def close(a: Any, b: Any, kind: str = "identity") -> None:
    torch.testing.assert_close(a, b, rtol=tolerance(kind), atol=tolerance(kind))


def net() -> nn.Sequential:
    """Layers, a module inside a module, and buffers."""
    torch.manual_seed(3)
    head = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), head).double()


PATTERNS = {"0.weight": S(strength=0.1), "3.0.weight": G("out", strength=0.2), "3.2.weight": S(strength=0.1, depth=3)}


def explicit_net(init: str | float = "imbalanced") -> nn.Sequential:
    return symopt.constrain(net(), PATTERNS, mode="explicit", init=init)


def gradients(module: nn.Module, output: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(output, list(module.parameters())))
