"""Weights under fixed planes on two backends: runs side by side, put on the plane, near it, or moved along it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import symopt
from support.directions import Units
from support.runs import Run, gradient
from support.table import OPTIMIZERS, PLANES, OptimizerRow, PlaneRow, plane_module
from support.tolerances import tolerance


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
    return symopt.Tied(strength=k, views=[slice(1, 31), lambda w: w[:, 2:32].T, lambda w: w[0].reshape(-1, 40)[:30]])


F64 = {"dtype": torch.float64}


def close(a, b, kind="projection", scale=1.0):
    tol = tolerance(kind)
    torch.testing.assert_close(a, b, rtol=tol, atol=tol * scale)


def matrix(row):
    """The projection off the plane, ``I - P``."""
    n = sum(torch.Size(shape).numel() for shape in row.shapes)
    equations = torch.stack(row.equations(torch.eye(n, **F64)))
    return torch.linalg.pinv(equations) @ equations


def bound(row, strength=0.3):
    module = plane_module(row, strength)
    return module, tuple(module.parameters()), symopt.constraints(module)["w0"]


def randn(shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), **F64)


def orbits(off):
    """Label of every weight: those that the projection mixes, directly or not, share one."""
    label = torch.arange(len(off))
    for _ in range(len(off)):
        label = torch.where(off.abs() > 1e-12, label, len(off)).amin(1).minimum(label)
    return label


class Pair(torch.nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a, self.b, self.out = torch.nn.Linear(5, 4), torch.nn.Linear(5, 4), torch.nn.Linear(4, 1)
        for p in self.parameters():
            torch.nn.init.normal_(p, 0.0, 0.3, generator=generator)

    def forward(self, x):
        return self.out(self.a(x[:, :5]).relu() + self.b(x[:, 5:]).relu())


KEYS = {("a.weight", "b.weight"): symopt.Tied(), ("a.bias", "b.bias"): symopt.Tied(mode="elementwise")}


def pair():
    return symopt.constrain(Pair(), KEYS)


def fit(net, opt, steps):
    x = randn((30, 10), 7).float()
    for _ in range(steps):
        opt.zero_grad()
        loss = (net(x) - 1).square().mean()
        (-loss if opt.param_groups[0]["maximize"] else loss).backward()
        opt.step()


class ExplicitPlane:
    """One step on factors, from a weight in the gauge of the optimizer's imbalance."""

    def __init__(self, row, constraint, opt_row):
        self.off, self.row, self.decoupled = matrix(row), opt_row, opt_row.decoupled
        self.label = orbits(self.off)
        self.coordinates = getattr(constraint, "form", "gate") == "coordinates"
        gate = self.label if getattr(constraint, "mode", "joint") == "elementwise" else torch.zeros_like(self.label)
        self.gate = torch.nn.functional.one_hot(torch.unique(gate, return_inverse=True)[1]).double()
        self.member = torch.nn.functional.one_hot(torch.unique(self.label, return_inverse=True)[1]).double()
        self.state = {}
        sizes = self.member.sum(0)
        self.units = Units(row.shapes[0], lambda x: (x @ self.member) / sizes, lambda x: self.member @ x)

    def step(self, w, g, c, scale, lr, strength, saturated):
        update, number = self.row.direction(g, self.state, self.units)
        delta, on = lr * update, w - self.off @ w
        sizes = self.gate.sum(0)
        if self.decoupled:
            spread = (self.off.trace() if len(sizes) == 1 else (sizes - 1).clamp(min=1)) ** 0.5
            decay = number * lr * strength * (self.gate @ torch.as_tensor(spread).expand(len(sizes)).double())
        else:
            decay = lr * strength * self.units.spread(number * torch.ones(self.member.shape[1], **F64))
        off, pull = self.off @ w, self.off @ delta
        if self.coordinates:
            q = self.basis
            z, dz = q.T @ w, q.T @ delta
            rate = decay[0] / (self.off.trace() ** 0.5 if self.decoupled else 1.0)
            metric = (c * c + 4 * z * z).sqrt()
            t = 1 / torch.maximum(metric, torch.maximum(scale, rate + dz.abs())) if saturated else 1.0
            u = ((c + metric) / 2).sqrt()
            v = z / u
            rho = 1 - t * rate
            new = (rho * u - t * dz * v) * (rho * v - t * dz * u)
            return on - (delta - pull) + q @ new
        uniform = self.decoupled  # else the gate's rate is the harmonic mean
        own = (decay @ self.gate) / sizes if uniform else sizes / ((1 / decay) @ self.gate)
        metric = (c * c + 4 * (off * off) @ self.gate).sqrt()
        norm = ((pull * pull) @ self.gate).sqrt()
        t = 1 / torch.maximum(metric, torch.maximum(scale, own + norm)) if saturated else 1 / own.clamp(min=1)
        s = ((c + metric) / 2).sqrt()
        d = torch.where(self.gate @ s > 0, off / (self.gate @ s), 0.0)
        seen = pull if uniform else pull * (self.gate @ own) / decay  # the gradient behind its preconditioner
        t_each = self.gate @ t
        s_new = (1 - t * own) * s - t * ((seen * d) @ self.gate)
        d_new = (1 - t_each * decay) * d - t_each * pull * (self.gate @ s)
        return on - (delta - pull) + (self.gate @ s_new) * d_new
