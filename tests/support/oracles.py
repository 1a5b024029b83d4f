"""The step on explicit factors, written out without the library: the oracle of the reference.

Units are found by a loop over indices, sums run through a 0/1 matrix, directions are torch's formulas, and the step is
the plain simultaneous gradient step on a gate and a direction,

    s' = rho s - <delta, d>,        d' = rho d - delta s,        w' = s' d',

in the gauge ``s**2 - ||d||**2 = c``.  A single weight is a group of one: ``s = u``, ``d = v``.
"""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import torch
from torch import Tensor

import symopt
from support.table import ConstraintRow, OptimizerRow
from support.tolerances import tolerance
from symopt.constraints import Constraint

STRENGTH = 0.3


SNAP = 1e-6


def labels(constraint: Constraint, shape: tuple[int, ...]) -> Tensor:
    """Unit of every weight, flat; units are numbered in the order of their names."""
    names = [_unit(constraint, index, shape) for index in itertools.product(*map(range, shape))]
    number = {name: i for i, name in enumerate(sorted(set(names)))}
    return torch.tensor([number[name] for name in names])


def _unit(constraint: Constraint, index: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    if isinstance(constraint, symopt.Sparse):
        return index
    if not isinstance(constraint, (symopt.GroupSparse, symopt.GroupBridge)):
        raise NotImplementedError(f"{type(constraint).__name__} needs an oracle of its own")
    kind = constraint.groups
    if callable(kind):
        kind = kind(torch.zeros(shape))
    if isinstance(kind, Tensor):
        return (int(kind[index] if kind.shape == shape else kind[index[0]]),)
    if kind in ("out", "in"):
        return (index[0 if kind == "out" else 1],)
    numbers = [int(n) for n in re.findall(r"\d+", kind)]
    if kind.startswith("head:"):
        packed = len(shape) == 2 and shape[0] == 3 * shape[1]
        rows = shape[0] // 3 if packed else shape[0]  # rows of q, of k and of v, each cut into heads by itself
        return (index[0] % rows // (rows // numbers[0]),)
    return (index[0] // numbers[0], index[1] // numbers[1])


class Orthogonal:
    """What torch's Muon subtracts at lr 1 from a matrix that it holds at zero."""

    def __init__(self, shape: tuple[int, ...], options: dict[str, Any]) -> None:
        self.p = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        self.opt = torch.optim.Muon([self.p], lr=1.0, weight_decay=0.0, **options)
        rows, columns = shape
        adjusted = {None: math.sqrt(max(1, rows / columns)), "match_rms_adamw": 0.2 * math.sqrt(max(rows, columns))}
        self.rms = adjusted[options.get("adjust_lr_fn")] * math.sqrt(min(rows, columns) / (rows * columns))
        """Its root mean square with min(m, n) singular values of 1 on m n weights."""

    @property
    def momentum_buffer(self) -> Tensor:
        found: Tensor = self.opt.state[self.p]["momentum_buffer"]
        return found

    def __call__(self, grad: Tensor) -> Tensor:
        self.p.data.zero_()
        self.p.grad = grad.clone()
        self.opt.step()
        return -self.p.detach()


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
        label = labels(row.make(None), row.shape)
        self.member = torch.nn.functional.one_hot(label).to(w.dtype)  # weights x units
        self.count = self.member.sum(0)
        self.w, self.shape = w.detach().flatten().clone(), row.shape
        self.orthogonal: Orthogonal | None = None
        self.lr, self.strength, self.saturated = lr or opt_row.lr, strength, time_scale == "saturated"
        self.name = opt_row.torch_cls.__name__
        self.options = opt_row.options
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
        """What torch subtracts at lr = 1, and what multiplies the strength of each unit."""
        options, state = self.options, self.state
        g = -grad.flatten() if options.get("maximize") else grad.flatten()
        ones = torch.ones_like(self.count)
        if self.name == "SGD":
            momentum, dampening = options.get("momentum", 0.0), options.get("dampening", 0.0)
            if momentum == 0:
                return g, ones
            buffer = state.get("momentum_buffer")
            buffer = g.clone() if buffer is None else momentum * buffer + (1 - dampening) * g
            state["momentum_buffer"] = buffer
            d = g + momentum * buffer if options.get("nesterov") else buffer
            return d, ones * (1 - dampening) / (1 - momentum)
        if self.name == "Muon":
            self.orthogonal = self.orthogonal or Orthogonal(self.shape, options)
            update = self.orthogonal(g.reshape(self.shape)).flatten()
            state["momentum_buffer"] = self.orthogonal.momentum_buffer
            return update, self.orthogonal.rms * self.count.sqrt()
        zero = torch.zeros_like(g)
        if self.name == "Lion":
            beta1, beta2 = options.get("betas", (0.9, 0.99))
            mean = beta1 * state.get("exp_avg", zero) + (1 - beta1) * g
            state["exp_avg"] = beta2 * state.get("exp_avg", zero) + (1 - beta2) * g
            rms = ((mean * mean @ self.member) / self.count).sqrt()
            return mean / (self.member @ torch.where(rms > 0, rms, 1.0)), self.count.sqrt()
        beta1, beta2 = options.get("betas", (0.9, 0.999))
        step = state["step"] = state.get("step", torch.tensor(0.0)) + 1
        state["exp_avg"] = beta1 * state.get("exp_avg", zero) + (1 - beta1) * g
        square = (g * g @ self.member) / self.count  # one second moment per unit
        peak = state["exp_avg_sq"] = beta2 * state.get("exp_avg_sq", 0 * square) + (1 - beta2) * square
        if options.get("amsgrad"):
            peak = state["max_exp_avg_sq"] = torch.maximum(state.get("max_exp_avg_sq", peak), peak)
        k = int(step)
        preconditioner = 1 / (peak.sqrt() / math.sqrt(1 - beta2**k) + 1e-8)
        d = state["exp_avg"] / (1 - beta1**k) * (self.member @ preconditioner)
        return d, self.count.sqrt() if self.name == "AdamW" else preconditioner

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
