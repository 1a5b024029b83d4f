"""Weights under fixed planes on two backends: runs side by side, put on the plane, near it, or moved along it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import symopt
from support.runs import Run, gradient
from support.table import OPTIMIZERS, PLANES, OptimizerRow, PlaneRow, plane_module


def planes(backend: str, device: str = "cpu") -> list[PlaneRow]:
    """Those that a fused backend steps."""

    def reason(row: PlaneRow) -> str | None:
        opt = symopt.AdamW(plane_module(row, dtype=torch.float32).to(device))
        return next(reasons[backend] for _, _, reasons in opt.backends())

    return [row for row in PLANES if reason(row) is None]


def constraint_of(module: torch.nn.Module) -> symopt.Constraint:
    return symopt.constraints(module)["w0"]


TIES = planes("native")


OTHERS = [row for row in PLANES if row not in TIES]


SIMPLE = [row for row in TIES if constraint_of(plane_module(row)).parameters_identical]
"""Ties of weights at one place of several tensors; of others the orbits are gathered."""


FEW = [row for row in OPTIMIZERS if row.id in ("sgd", "sgd-nesterov", "adam-amsgrad", "adamw")]


# The loops are written for two, three and four copies, and for any number.
MORE = [
    replace(row, id=f"{row.id}-{n}", shapes=row.shapes[:1] * n)
    for row in SIMPLE
    for n in (4, 5)
    if len(row.shapes) == 2
]


def large(row: PlaneRow, shape: tuple[int, int] = (37, 51)) -> PlaneRow:
    """Several blocks, the last one not full."""
    if row.id.startswith("equivariant"):
        return row  # its permutations have one size
    if row.id.startswith("mirror-basis"):
        basis = torch.linalg.qr(gradient(torch.zeros(len(row.shapes) * math.prod(shape), 3, dtype=torch.float64), 0)).Q
        row = replace(row, make=lambda k: symopt.Mirror(basis=basis, strength=k))
    if row.id == "zero-mean-two":
        return replace(row, shapes=((shape[0], 3, shape[1]),))
    if row.id in ("symmetric", "circulant"):
        shape = (shape[1], shape[1])
    return replace(row, shapes=(shape, shape[::-1]) if "transposed" in row.id else (shape,) * len(row.shapes))


def both(
    row: PlaneRow,
    opt_row: OptimizerRow,
    strength: float | None = None,
    dtype: torch.dtype = torch.float64,
    fused: str = "native",
    device: str = "cpu",
    **options: Any,
) -> list[Run]:
    """The same weights on the two backends, the fused one first."""
    runs: list[Run] = []
    for backend in (fused, "reference"):
        module = plane_module(row, strength, dtype=dtype).to(device)
        given = {"lr": opt_row.lr, **opt_row.options, **options}
        runs.append((module, opt_row.cls(module, backend=backend, **given)))
    return runs


def weights(run: Run) -> list[Tensor]:
    return [p.detach() for p in run[0].parameters()]


def bound_weight(run: Run) -> Tensor:
    """All weights as the constraint sees them."""
    parts = [w.double() for w in weights(run)]
    return torch.cat([w.flatten() for w in parts]) if len(parts) > 1 else parts[0]


def put(run: Run, whole: Tensor) -> None:
    with torch.no_grad():
        parts = weights(run)
        for w, part in zip(parts, whole.flatten().split([w.numel() for w in parts]), strict=True):
            w.copy_(part.reshape(w.shape))


def tied(run: Run) -> bool:
    constraint, w = constraint_of(run[0]), weights(run)[0]
    return float(constraint.violation(bound_weight(run))) <= constraint.rounding(w)


def make_equal(runs: list[Run], begin: float = 0.0, end: float = 1.0) -> None:
    """Onto the plane, from one share of the orbits that are tied, or of the groups that are centred, to another."""
    for run in runs:
        constraint, w = constraint_of(run[0]), bound_weight(run)
        orbits = constraint.partition(w)
        chosen = torch.zeros(orbits.count, dtype=torch.bool, device=w.device)
        ids = (orbits.size(w) > 1).nonzero().flatten()
        first = int(begin * len(ids))
        chosen[ids[first : max(first + 1, int(end * len(ids)))]] = True
        assert bool(chosen.any())
        put(run, torch.where(orbits.expand(chosen).reshape(w.shape), constraint.fold(w), w))


def nearly(runs: list[Run], far: float = 0.01) -> None:
    """Off the plane by little, alike in all runs."""
    w = constraint_of(runs[0][0]).fold(bound_weight(runs[0]))
    off = torch.sin(torch.arange(w.numel(), device=w.device) + 1.0)
    for run in runs:
        put(run, w + far * off.reshape(w.shape))


def along(run: Run, t: int) -> list[Tensor]:
    """Gradients that leave the plane by little."""
    g = torch.cat([gradient(w.cpu(), t + 7 * i).flatten() for i, w in enumerate(weights(run))])
    constraint, shape = constraint_of(run[0]), bound_weight(run).shape
    g = constraint.fold(g.reshape(shape)).flatten() + 0.01 * g
    like = weights(run)
    parts = g.split([w.numel() for w in like])
    return [part.reshape(w.shape).to(w.dtype) for part, w in zip(parts, like, strict=True)]


def three_views(k: float | None) -> symopt.Constraint:
    return symopt.Tied(k, views=[slice(1, 31), lambda w: w[:, 2:32].T, lambda w: w[0].reshape(-1, 40)[:30]])
