"""The step on explicit factors, written out without the library: the oracle of the reference.

Units are found by a loop over indices, sums run through a 0/1 matrix, directions are the formulas of the rows, and the
step is the plain simultaneous gradient step on a gate and a direction,

    s' = rho s - <delta, d>,        d' = rho d - delta s,        w' = s' d',

in the gauge ``s**2 - ||d||**2 = c``.  A single weight is a group of one: ``s = u``, ``d = v``.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import symopt
from support.directions import Units
from support.table import ConstraintRow, OptimizerRow
from support.tolerances import tolerance
from symopt.constraints import Constraint

STRENGTH = 0.3


SNAP = 1e-6


def labels(row: ConstraintRow) -> Tensor:
    """Unit of every weight, flat; units are numbered in the order of their names."""
    return _numbered(row.unit or _unit(row.make(None), row.shape), row.shape)


def labels_of(constraint: Constraint, shape: tuple[int, ...]) -> Tensor:
    """The same of ``Sparse`` or ``GroupSparse`` on a weight of this shape."""
    return _numbered(_unit(constraint, shape), shape)


def _numbered(unit: Callable[[tuple[int, ...]], Any], shape: tuple[int, ...]) -> Tensor:
    names = [unit(place) for place in itertools.product(*map(range, shape))]
    number = {name: i for i, name in enumerate(sorted(set(names)))}
    return torch.tensor([number[name] for name in names])


def _unit(constraint: Constraint, shape: tuple[int, ...]) -> Callable[[tuple[int, ...]], Any]:
    if isinstance(constraint, symopt.Sparse):
        return lambda place: place
    if not isinstance(constraint, symopt.GroupSparse):
        raise NotImplementedError(f"{type(constraint).__name__}: its row needs unit=, which names the unit of a weight")
    kind = constraint.groups
    if callable(kind):
        kind = kind(torch.zeros(shape))
    if isinstance(kind, Tensor):
        return lambda place: int(kind[place] if kind.shape == shape else kind[place[0]])
    if kind in ("out", "in"):
        return lambda place: place[0 if kind == "out" else 1]
    numbers = [int(n) for n in re.findall(r"\d+", kind)]
    if kind.startswith("head:"):
        packed = len(shape) == 2 and shape[0] == 3 * shape[1]
        rows = shape[0] // 3 if packed else shape[0]  # rows of q, of k and of v, each cut into heads by itself
        return lambda place: place[0] % rows // (rows // numbers[0])
    return lambda place: (place[0] // numbers[0], place[1] // numbers[1])


class Explicit:
    """A weight kept as explicit factors for the length of one step, then brought back into the gauge ``c``."""

    def __init__(
        self,
        row: ConstraintRow,
        opt_row: OptimizerRow,
        w: Tensor,
        *,
        lr: float | None = None,
        strength: float = STRENGTH,
        imbalance: float = 1.0,
        time_scale: str = "saturated",
    ):
        label = labels(row)
        self.member = torch.nn.functional.one_hot(label).to(w.dtype)  # weights x units
        self.count = self.member.sum(0)
        self.w, self.shape = w.detach().flatten().clone(), row.shape
        self.lr, self.strength, self.saturated = lr or opt_row.lr, strength, time_scale == "saturated"
        self.row = opt_row
        self.units = Units(row.shape, lambda x: (x @ self.member) / self.count, lambda x: self.member @ x)
        rms = self.size().square().mean().sqrt()
        c = imbalance * (rms if rms > 0 else (self.count.mean() * w.shape[0] / w.numel()).sqrt())
        self.state = {"imbalance": c, "metric_scale": self.metric(c).square().mean().sqrt()}

    def norm(self, x: Tensor) -> Tensor:
        return (x * x @ self.member).sqrt()

    def size(self) -> Tensor:
        return self.norm(self.w)

    def metric(self, c: Tensor) -> Tensor:
        return (c * c + 4 * self.size() ** 2).sqrt()

    def direction(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """What is subtracted at lr = 1, and what multiplies the strength of each unit."""
        update, number = self.row.direction(grad.flatten(), self.state, self.units)
        return update, self.row.gain(number, self.count)

    def step(self, grad: Tensor) -> None:
        c, scale, member = self.state["imbalance"], self.state["metric_scale"], self.member
        d, gain = self.direction(grad)
        delta, decay = self.lr * d, self.lr * self.strength * gain
        metric = self.metric(c)
        t = 1 / metric.clamp(min=float(scale)) if self.saturated else torch.ones_like(metric)
        t = torch.minimum(t, 1 / (decay + 2 * self.norm(delta)) if self.saturated else 1 / decay)
        delta, rho = delta * (member @ t), 1 - decay * t
        gate = ((c + metric) / 2).sqrt()
        part = torch.where(member @ gate > 0, self.w / (member @ gate), 0.0)
        new_gate = rho * gate - (delta * part) @ member
        new_part = (member @ rho) * part - delta * (member @ gate)
        self.w = (member @ new_gate) * new_part
        snapped = (self.size() <= SNAP * scale) & (self.norm(delta) < decay * t)
        self.w = torch.where(member @ snapped.to(self.w) > 0, 0.0, self.w)
        self.state["imbalance"] = self.next_imbalance(decay)

    def next_imbalance(self, decay: Tensor) -> Tensor:
        """rho**4 c, with rho from the slowest tenth of the units and from where the weight's mass is now."""
        c, scale, size = self.state["imbalance"], self.state["metric_scale"], self.size()
        slow = decay.sort().values[len(decay) // 10]
        if self.saturated:
            slow = slow / torch.maximum(scale, 2 * (size @ size) / size.sum())
        c = c * ((1 - slow).clamp(min=0) ** 4).clamp(min=0.98)
        return torch.where(c <= SNAP * scale, 0.0, c)

    def compare(self, p: Tensor, opt: torch.optim.Optimizer) -> None:
        close = {"rtol": tolerance("factor step"), "atol": tolerance("factor step"), "check_dtype": False}
        torch.testing.assert_close(p.detach().flatten(), self.w, **close)
        state = opt.state[p]
        assert set(state) - {"group_index", "progress"} == set(self.state)
        for key, value in self.state.items():
            mine, theirs = state[key].flatten(), value.flatten()
            torch.testing.assert_close(mine, theirs, **close, msg=lambda m, k=key: f"{k}: {m}")
