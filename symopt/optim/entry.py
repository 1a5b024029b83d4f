"""Entry: a constrained binding under way, on the clock and the course of its training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from symopt.budgets.schedule import Course
from symopt.optim.binding import Binding
from symopt.optim.direction import ParamGroup, State

__all__ = ["Clock", "Entry"]


@final
class Clock:
    """Steps counted on the host, and one tensor per device for the states of all parameters that share the count."""

    __slots__ = ("steps", "tensors", "versions")

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.tensors: list[Tensor] = []
        self.versions: list[int] = []
        """Those of the tensors as last written here: a checkpoint that is loaded in place changes them."""

    def tensor(self, device: torch.device) -> Tensor:
        """The state of parameters whose steps are counted on ``device``."""
        for found in self.tensors:
            if found.device == device:
                return found
        made = torch.full((), float(self.steps), dtype=torch.float32, device=device)
        self.tensors.append(made)
        self.versions.append(made._version)
        return made


@final
@dataclass(eq=False)
class Entry:
    """A constrained binding under way."""

    group: ParamGroup
    binding: Binding
    states: list[State]
    clock: Clock
    course: Course | None
    """None without a budget or a length."""
    committed: bool = False

    @property
    def budgeted(self) -> bool:
        """Whether it has a budget."""
        return self.binding.constrained_by.budget is not None

    @property
    def frozen(self) -> bool:
        """Whether nothing of it trains."""
        return not any(p.requires_grad for p in self.binding.parameters)
