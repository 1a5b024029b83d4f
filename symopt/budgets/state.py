"""BudgetState: the numbers of a budget that a kernel reads, and the one place that knows their order."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields
from typing import final

import torch
from torch import Tensor

__all__ = ["BUDGET", "BudgetState", "is_committed"]

BUDGET = "budget"
"""Key of the state tensor, float64 of shape ``(7,)``; kernels read the first five numbers."""


@final
@dataclass(frozen=True)
class BudgetState:
    """How a weight with a budget decays until the next selection.

    The strengths are AdamW's (dimensionless) under every direction that normalises the gradient, and in units of the
    gradient's root mean square under SGD; so a binding with a budget is stepped as decoupled.
    """

    strength_kept: float | Tensor = 0.0
    """Of the units that the budget keeps."""
    strength_pruned: float | Tensor = 0.0
    """Of the units that it prunes."""
    threshold: float | Tensor = -1.0
    """The size up to which a unit is pruned; negative: none is."""
    imbalance_factor: float | Tensor = 1.0
    """What multiplies the imbalance in every step; 0: the support is committed."""
    largest_decay: float | Tensor = math.inf
    """Bound on ``lr * strength`` of pruned units, whatever lr becomes: one that is pruned must outlive a selection."""
    target: float | Tensor = 0.0
    """The budget as :attr:`~symopt.budgets.pools.BudgetedWeight.target` has it: another one starts anew."""
    run: float | Tensor = 0.0
    """Neighbours that compete in an N:M pattern, else 0."""

    def pruned_within(self, lr: float | Tensor) -> Tensor:
        """``strength_pruned``, so that ``lr`` times it keeps to the bound."""
        return torch.as_tensor(self.strength_pruned).minimum(torch.as_tensor(self.largest_decay) / lr)

    def tensor(self, device: torch.device) -> Tensor:
        """As the state keeps it; numbers that are tensors on ``device`` are not read back."""
        found = torch.zeros(len(fields(self)), dtype=torch.float64, device=device)
        for i, value in enumerate(astuple(self)):
            found[i] = value
        return found

    @staticmethod
    def read(state: Mapping[str, object], like: Tensor) -> BudgetState:
        """From a parameter's state, in the precision and on the device of ``like``."""
        stored = state[BUDGET]
        assert isinstance(stored, Tensor)
        return BudgetState.of(stored.to(like))

    @staticmethod
    def of(stored: Tensor) -> BudgetState:
        """Its numbers as 0-dim tensors, which nothing waits for."""
        kept, pruned, threshold, factor, largest, target, run = stored.unbind()
        return BudgetState(kept, pruned, threshold, factor, largest, target, run)

    @staticmethod
    def fits(value: Tensor) -> bool:
        """Whether a loaded tensor can be one."""
        return value.shape == (len(fields(BudgetState)),) and value.is_floating_point()


def is_committed(state: Mapping[str, object]) -> bool:
    """Whether the pruned units have been set to zero, so that the support is final; waits for the device."""
    stored = state.get(BUDGET)
    return isinstance(stored, Tensor) and float(stored[3]) == 0
