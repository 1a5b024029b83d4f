"""What a fused backend is asked, and what it answers: a step is a direction times a retraction, and nothing else.

A backend is opt-in.  It lists the pairs of a direction and a retraction that it has, and the formats; what it does not
list it is never given.  Beyond the list :meth:`Backend.refuses` says what stands in the way of one tensor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from symopt_kernels.groups import Groups
from symopt_kernels.units import Units

__all__ = ["Backend", "Request"]


@final
@dataclass(frozen=True, eq=False)
class Request:
    """One binding that is to be stepped."""

    direction: str
    """Row of the direction: ``"sgd"``, ``"adam"``, ``"adamw"``, ``"lion"``, or one that no backend lists."""
    retraction: str
    """Row of the constraint's retraction; ``"plain"`` without a constraint."""
    weights: tuple[Tensor, ...]
    groups: Groups | None = None
    """Which weights share a second moment, of a single tensor."""
    units: Units | None = None
    """The same of slices of several tensors."""
    pattern: tuple[int, int] | None = None
    """N:M."""
    depth: int = 2
    """Number of factors."""
    differentiable: bool = False


class Backend(ABC):
    """Abstract: the capabilities of one backend."""

    name: ClassVar[str]
    rows: ClassVar[frozenset[tuple[str, str]]]
    """The pairs of a direction and a retraction that it has."""
    dtypes: ClassVar[tuple[torch.dtype, ...]]

    @property
    @abstractmethod
    def unavailable(self) -> str | None:
        """Why it cannot run here at all, or None."""

    @abstractmethod
    def refuses(self, request: Request) -> str | None:
        """What about these tensors it cannot step, although it has the row; None if nothing."""

    @final
    def why_not(self, request: Request) -> str | None:
        """Why it cannot step a request, or None if it can."""
        if (reason := self.unavailable) is not None:
            return reason
        if (request.direction, request.retraction) not in self.rows:
            return f"it has no step for the direction {request.direction!r} with the retraction {request.retraction!r}"
        for w in request.weights:
            if type(w).__torch_dispatch__ is not Tensor.__torch_dispatch__:
                return f"a {type(w).__name__} wraps its memory"
            if w.dtype not in self.dtypes:
                known = ", ".join(str(d).removeprefix("torch.") for d in self.dtypes)
                return f"it knows {known}, not {w.dtype}"
        if request.differentiable:
            return "differentiable=True needs a step that autograd can follow"
        return self.refuses(request)
