"""Anneal: tells the optimizer how long training is, so that structure has settled when it ends."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch

from symopt.constraints import Composed
from symopt.optim import ConstrainedOptimizer

__all__ = ["Anneal"]

_RATE = 25.0  # exp(-25 k / N) passes SNAP after 55 % of training: the rest settles what is left with zeros permanent


class Anneal:
    """Schedule of the imbalance (the plasticity of zeros) over a known number of steps; used like an LR scheduler.

    Each step multiplies every tensor's imbalance by ``exp(-25 / total_steps)``: it reaches 0 after about 55 % of
    training, whatever the learning rate, strength or preconditioner.  Without Anneal it decays at the rate of the
    slowest weights, which is safe but can take long.  In the free gauge, where every weight has its own, all of them
    are multiplied alike.

    With ``commit``, structure found by then is final: from that share of training on the strength is 0, so what is zero
    stays zero and what lives trains without shrinkage (no bias, but no longer the optimum of loss + penalty).

    Before the first step it warns if ``lr * steps * strength`` is too small to bring even the median weight of some
    tensor to zero, and says what would do.  It knows the steps with strength (up to ``commit``) and the largest lr the
    group names (``lr``, and ``initial_lr`` and ``max_lr``, which torch's schedulers leave there), not the schedule.

    Args:
        optimizer: a symopt optimizer.
        total_steps: number of optimizer steps in the whole training, >= 1.
        commit: share of training in (0, 1) after which the support is fixed; None keeps the strength to the end.

    Raises:
        TypeError: for another kind of optimizer or a non-integer ``total_steps``.
        ValueError: for ``total_steps < 1`` or a ``commit`` outside (0, 1).

    Example:
        >>> import torch, symopt
        >>> net = symopt.constrain(torch.nn.Linear(8, 4), {"weight": symopt.Sparse(strength=1.0)})
        >>> opt = symopt.AdamW(net, lr=1e-2)
        >>> anneal = symopt.Anneal(opt, total_steps=500)
        >>> for _ in range(500):
        ...     opt.zero_grad()
        ...     net(torch.randn(16, 8)).square().mean().backward()
        ...     opt.step()
        ...     anneal.step()
        >>> opt.state[net.weight]["imbalance"]
        tensor(0.)
    """

    def __init__(self, optimizer: ConstrainedOptimizer, total_steps: int, commit: float | None = None) -> None:
        if not isinstance(optimizer, ConstrainedOptimizer):
            raise TypeError(
                f"Anneal: optimizer must be a symopt optimizer (SGD, Adam, AdamW), got {type(optimizer).__name__}"
            )
        if isinstance(total_steps, bool) or not isinstance(total_steps, int):
            raise TypeError(f"Anneal: total_steps must be an integer, got {type(total_steps).__name__}")
        if total_steps < 1:
            raise ValueError(f"Anneal: total_steps must be >= 1, got {total_steps}")
        if commit is not None and (isinstance(commit, bool) or not isinstance(commit, (int, float))):
            raise TypeError(f"Anneal: commit must be a number or None, got {commit!r}")
        if commit is not None and not 0 < commit < 1:
            raise ValueError(f"Anneal: commit must be None or a share of training in (0, 1), got {commit}")
        self.optimizer = optimizer
        self.total_steps = total_steps
        self.commit = commit
        self.last_step = 0
        self._warned: set[int] = set()
        self._set()
        self._check()

    def _set(self) -> None:
        committed = self.commit is not None and self.last_step >= self.commit * self.total_steps
        rate = _RATE if self.commit is None else max(_RATE, math.log(1e7) / self.commit)
        for group in self.optimizer.param_groups:
            group["imbalance_decay"] = 0.0 if committed else math.exp(-rate / self.total_steps)
            group["committed"] = committed

    def step(self) -> None:
        """Call once after every ``optimizer.step()``."""
        self.last_step += 1
        if self.last_step == 1:
            self._check()  # Adam's preconditioner is known only now
        self._set()

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers; save it beside the optimizer's."""
        return {"total_steps": self.total_steps, "commit": self.commit, "last_step": self.last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken."""
        self.total_steps, self.commit = state_dict["total_steps"], state_dict["commit"]
        self.last_step = state_dict["last_step"]
        self._set()

    def _check(self) -> None:
        for group, p, name, constraint in self.optimizer.constrained():
            lr = max(float(group[key]) for key in ("lr", "initial_lr", "max_lr") if key in group)
            needed = collapse_steps(self.optimizer, {**group, "lr": lr}, p, constraint)
            active = self.total_steps if self.commit is None else self.commit * self.total_steps
            if needed is None or id(p) in self._warned or needed <= active:
                continue
            self._warned.add(id(p))
            factor, strength = needed / active, float(self.optimizer.strength(group, constraint))
            listed = isinstance(constraint, Composed)  # its strength multiplies those in the list
            if math.isinf(factor):
                fix = "give an lr > 0" if lr == 0 else "give a strength > 0"
            else:
                more = f"strengths {factor:.2g} times as large" if listed else f"strength >= {strength * factor:.2g}"
                fix = f"use lr >= {lr * factor:.2g}, {more}, or {math.ceil(self.total_steps * factor)} steps"
            at = f"lr {lr:.2g}" if listed else f"lr {lr:.2g} and strength {strength:.2g}"
            before = "" if self.commit is None else " before the commit"
            warnings.warn(
                f"{name}: {math.floor(active)} steps{before} at {at} are too few to bring even its median weight to "
                f"zero without a gradient; {fix}",
                stacklevel=3,
            )


@torch.no_grad()
def collapse_steps(
    optimizer: ConstrainedOptimizer, group: dict[str, Any], p: torch.Tensor, constraint: Any
) -> float | None:
    """Steps at the current rate until the median live unit of ``p`` is zero if no gradient holds it.

    None while the preconditioner is unknown (Adam before its first step), 0 if nothing is left alive.
    """
    gain = optimizer.gain(group, p, constraint)
    if gain is None:
        return None
    groups, state, w = optimizer.groups(p, constraint), optimizer.state.get(p, {}), p.detach().float()
    scale = state["metric_scale"] if "metric_scale" in state else constraint.start(w, group["imbalance"], groups)[1]
    size = constraint.size(w, groups)
    live = size > 0
    if not bool(live.any()):
        return 0.0
    charge = torch.as_tensor(constraint.charge(w, decoupled=optimizer.decoupled(group))).flatten()
    rate = group["lr"] * optimizer.strength(group, constraint) * torch.as_tensor(gain).flatten() * charge
    need = constraint.collapse(size, scale, saturated=group["time_scale"] == "saturated") / rate
    return float(need[live].median())
