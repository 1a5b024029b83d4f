"""Biases of dead units: a row of zeros has no bias either.

A channel whose weights are zero is its bias.  Behind it the running variance of a BatchNorm goes to zero while the bias
still moves and the running mean follows late, so that evaluation sees the difference, divided by the root of eps, where
training sees none.  So where rows are units, the bias goes as its row goes: from when a budget has chosen it, by a
factor per step that the running mean can follow, and it stays zero while the row is zero for good.  Whatever the
constraint, a bias on which the loss does not depend goes, too: in front of a BatchNorm its gradient is only rounding,
of which Adam makes steps of lr.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import final

import torch
from torch import Tensor

from symopt.budgets.state import BUDGET, BudgetState
from symopt.optim.direction import State
from symopt.optim.entry import Entry
from symopt.optim.options import ROWS
from symopt_kernels.reference.gauge import math_dtype

__all__ = ["EVERY", "Biases"]

EVERY = 20
"""Steps between two looks at the rows."""

DECAY = 0.8
"""What multiplies a bias per step while its row goes; a running mean with momentum .1 follows."""

DEAD = 2
"""In the state: the row is zero for good; 1: it goes, 0: it lives."""

NOISE = 1e-4
"""Relative to the gradient of its row, that of a bias on which nothing depends."""


@final
class Bias:
    """The bias of one weight's rows; which of them go is state of the weight, so that a resumed run knows it."""

    __slots__ = ("before", "bias", "entry", "goes", "i", "rows")

    def __init__(self, entry: Entry, i: int, bias: Tensor) -> None:
        self.entry, self.i, self.bias = entry, i, bias
        state = entry.states[i]
        if ROWS not in state:
            state[ROWS] = torch.zeros(bias.shape, dtype=torch.uint8, device=bias.device)
        self.rows: Tensor = state[ROWS]
        self.goes = self._any()
        self.before: Tensor | None = None

    def _any(self) -> bool:
        """Whether any row goes; on a device, where the host does not wait to know, perhaps."""
        return not self.rows.is_cpu or bool(self.rows.numpy().any())

    def look(self) -> None:
        """Which rows go, and which have gone."""
        binding, state = self.entry.binding, self.entry.states[0]
        p, constraint, imbalance = binding.parameters[self.i], binding.constrained_by, state.get("imbalance")
        if constraint.is_plane or constraint.is_matrix or not isinstance(imbalance, Tensor):
            return
        going = self._idle(p).expand(len(p)).clone()
        dead = torch.zeros_like(going)
        groups = None if binding.several else binding.groups(state)
        if groups is not None:  # rows are units, or parts of them
            dead = ~p.detach().flatten(1).any(1) & ~imbalance.any()
            going |= dead
            if isinstance(state.get(BUDGET), Tensor):
                threshold = BudgetState.read(state, p.new_empty(0, dtype=math_dtype(p))).threshold
                pruned = constraint.pruned(p.detach(), threshold, groups)
                going |= constraint.units(pruned, p.detach(), groups).reshape(p.shape).flatten(1).all(1)
        self.rows.copy_(torch.where(dead, DEAD, going))
        self.goes = self._any()

    def _idle(self, p: Tensor) -> Tensor:
        """Whether the loss does not depend on the bias at all, as in front of a BatchNorm: its gradient is rounding."""
        if p.grad is None or self.bias.grad is None:
            return torch.zeros((), dtype=torch.bool, device=p.device)
        rows, own = p.grad.flatten(1).abs().amax(1), self.bias.grad.abs()
        return (own <= NOISE * rows).all() & (rows > 0).any()

    def hold(self) -> None:
        """Remember the bias, which a step is about to move."""
        self.before = self.bias.detach().clone()

    def settle(self, state: State) -> None:
        """Undo what the step has done to those that go."""
        if self.before is None:
            return
        going = self.rows > 0
        self.bias.copy_(torch.where(going, DECAY * self.before, self.bias))
        self.bias.masked_fill_(self.rows == DEAD, 0.0)
        for value in state.values():
            if isinstance(value, Tensor) and value.shape == self.bias.shape and value.is_floating_point():
                value.masked_fill_(going, 0.0)


@final
class Biases:
    """Those that one optimizer steps beside the weights of their modules."""

    def __init__(self, entries: Iterable[Entry], own: Iterable[Tensor]) -> None:
        steps = {id(p) for p in own}
        self._all = [
            Bias(entry, i, bias)
            for entry in entries
            for i, bias in enumerate(entry.binding.biases)
            if bias is not None and id(bias) in steps
        ]
        self.going = [one for one in self._all if one.goes]
        """Those of which any row goes."""

    def look(self) -> None:
        """Look at the rows again."""
        for one in self._all:
            one.look()
        self.going = [one for one in self._all if one.goes]

    def hold(self) -> None:
        """Before a step."""
        for one in self.going:
            one.hold()

    def settle(self, states: Mapping[Tensor, State]) -> None:
        """After a step."""
        for one in self.going:
            one.settle(states.get(one.bias, {}))
