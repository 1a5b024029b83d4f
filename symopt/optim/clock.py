"""Clock: how many steps of its training a parameter has seen, as optimizer state and on the host."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

__all__ = ["PROGRESS", "Clock"]

PROGRESS = "progress"
"""Key of the state tensor, 0-dim float32: steps counted."""


@final
class Clock:
    """One count, and one tensor per device for the states of all parameters that share it."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._tensors: dict[torch.device, Tensor] = {}
        self._versions: list[int] = []

    def tensor(self, device: torch.device) -> Tensor:
        """The state of parameters whose steps are counted on ``device``."""
        if device not in self._tensors:
            self._tensors[device] = torch.full((), float(self.steps), dtype=torch.float32, device=device)
            self._note()
        return self._tensors[device]

    def _note(self) -> None:
        self._versions = [t._version for t in self._tensors.values()]

    @property
    def holds(self) -> bool:
        """Whether nobody else has written to the tensors, as a checkpoint that is loaded in place does."""
        return self._versions == [t._version for t in self._tensors.values()]

    def advance(self, found_inf: Tensor | None) -> None:
        """Count a step; on a device, not one that GradScaler skips."""
        self.steps += 1
        for device, tensor in self._tensors.items():
            if found_inf is not None and found_inf.device == device and device.type != "cpu":
                tensor.add_(1 - found_inf.to(tensor.dtype).reshape(()))
            else:
                tensor.add_(1)
        self._note()

    def read(self) -> None:
        """Let the host count what a device has counted, as in replays of a captured graph."""
        for tensor in self._tensors.values():
            self.steps = int(tensor)
