"""What optimizers make of a gradient, written out from their papers without the library: formulas of the table's rows.

A formula gets a gradient, its moments so far, the options of the optimizer and how weights make up units.  It advances
the moments, under the names that they have in a checkpoint, and returns what is subtracted at lr 1 and a number: what
multiplies the strength of each unit, or, where the strength is decoupled, the root mean square of the update that a
steady gradient gives.  Sums over units and back run through :class:`Units`; everything else is weight by weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]
"""Moments of one weight or of several: those per weight have the gradient's shape, those per unit are as ``mean``."""

Options = Mapping[str, Any]
"""Settings of the optimizer, defaults included."""

Formula = Callable[[Tensor, State, Options, "Units"], "tuple[Tensor, Tensor | float]"]


@dataclass(frozen=True)
class Units:
    """Which weights make up units; as it is, each weight is its own."""

    shape: tuple[int, ...]
    """Of the weight, which a formula may see as one flat vector."""
    mean: Callable[[Tensor], Tensor] = lambda x: x
    """Numbers of weights -> their mean over each unit."""
    spread: Callable[[Tensor], Tensor] = lambda x: x
    """Numbers of units -> that of its unit for each weight."""

    def rms(self, x: Tensor) -> Tensor:
        """Root mean square over each unit; 1 where everything is zero."""
        found = self.mean(x * x).sqrt()
        return torch.where(found == 0, 1.0, found)


def sgd(g: Tensor, state: State, options: Options, units: Units) -> tuple[Tensor, Tensor | float]:
    """Momentum amplifies the strength as it does a constant gradient."""
    momentum, dampening = options["momentum"], options["dampening"]
    if not momentum:
        return g, 1.0
    old = state.get("momentum_buffer")
    state["momentum_buffer"] = buffer = g if old is None else momentum * old + (1 - dampening) * g
    return g + momentum * buffer if options["nesterov"] else buffer, (1 - dampening) / (1 - momentum)


def _adam(g: Tensor, state: State, options: Options, units: Units) -> tuple[Tensor, Tensor]:
    """The update, and the preconditioner of every unit: of a unit's mean square there is one second moment."""
    beta1, beta2 = options["betas"]
    state["step"] = state.get("step", torch.tensor(0.0)) + 1
    k, square = int(state["step"]), units.mean(g * g)
    state["exp_avg"] = beta1 * state.get("exp_avg", 0 * g) + (1 - beta1) * g
    peak = state["exp_avg_sq"] = beta2 * state.get("exp_avg_sq", 0 * square) + (1 - beta2) * square
    if options["amsgrad"]:
        peak = state["max_exp_avg_sq"] = torch.maximum(state.get("max_exp_avg_sq", peak), peak)
    scale = 1 / (peak.sqrt() / math.sqrt(1 - beta2**k) + options["eps"])
    return units.spread(scale) * state["exp_avg"] / (1 - beta1**k), scale


def adam(g: Tensor, state: State, options: Options, units: Units) -> tuple[Tensor, Tensor | float]:
    """The strength passes the preconditioner, as the gradient does."""
    return _adam(g, state, options, units)


def adamw(g: Tensor, state: State, options: Options, units: Units) -> tuple[Tensor, Tensor | float]:
    """Decoupled; a steady gradient has updates of 1."""
    return _adam(g, state, options, units)[0], 1.0


def lion(g: Tensor, state: State, options: Options, units: Units) -> tuple[Tensor, Tensor | float]:
    """X. Chen et al., NeurIPS 2023 (arXiv 2302.06675), Algorithm 2; of a single weight the update is a sign."""
    beta1, beta2 = options["betas"]
    old = state.get("exp_avg", 0 * g)
    lead, state["exp_avg"] = beta1 * old + (1 - beta1) * g, beta2 * old + (1 - beta2) * g
    return lead / units.spread(units.rms(lead)), 1.0


def muon(g: Tensor, state: State, options: Options, units: Units) -> tuple[Tensor, Tensor | float]:
    """What torch's subtracts at lr 1 from a matrix that it holds at zero."""
    p = torch.nn.Parameter(torch.zeros(units.shape, dtype=g.dtype))
    opt = torch.optim.Muon([p], **{**options, "lr": 1.0, "weight_decay": 0.0})
    if (old := state.get("momentum_buffer")) is not None:
        opt.state[p]["momentum_buffer"] = old.reshape(units.shape).clone()
    p.grad = g.reshape(units.shape).clone()
    opt.step()
    state["momentum_buffer"] = opt.state[p]["momentum_buffer"].reshape(g.shape)
    rows, columns = units.shape
    adjusted = {None: math.sqrt(max(1, rows / columns)), "match_rms_adamw": 0.2 * math.sqrt(max(rows, columns))}
    # min(m, n) singular values of 1 on m n weights
    rms = adjusted[options["adjust_lr_fn"]] * math.sqrt(min(rows, columns) / (rows * columns))
    return -p.detach().reshape(g.shape), rms


class Plain(torch.optim.Optimizer):
    """Abstract: the plain optimizer of a formula, with torch's decoupled weight decay, where torch has none."""

    formula: Formula

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    g = -p.grad if group["maximize"] else p.grad
                    update, _ = type(self).formula(g, self.state[p], group, Units(tuple(p.shape)))
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])
        return loss


def plain(formula: Formula, **defaults: Any) -> type[Plain]:
    """The class of a formula; ``defaults`` are those of its own options."""

    def begin(self: Plain, params: Iterable[Any], lr: float = 1e-3, weight_decay: float = 0.0, **options: Any) -> None:
        if unknown := options.keys() - defaults.keys() - {"maximize"}:
            raise TypeError(f"{type(self).__name__} has no option {', '.join(sorted(unknown))}")
        given = {"lr": lr, "weight_decay": weight_decay, "maximize": False, **defaults, **options}
        torch.optim.Optimizer.__init__(self, params, given)

    body = {"__init__": begin, "formula": staticmethod(formula), "__module__": __name__}
    return type(f"Plain{getattr(formula, '__name__', '').title()}", (Plain,), body)
