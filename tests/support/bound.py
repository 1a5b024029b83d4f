"""What an optimizer has found to be constrained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

import symopt
from symopt.optim import ConstrainedOptimizer

__all__ = ["constrained"]


def constrained(opt: ConstrainedOptimizer) -> Iterator[tuple[dict[str, Any], Tensor, str, symopt.Constraint]]:
    """Group, parameter, name and constraint of every constrained parameter."""
    for group, binding in opt.bindings():
        for p, name in zip(binding.parameters, binding.names, strict=True):
            yield group, p, name, binding.constrained_by
