"""Group options and state keys that torch.optim does not have, and what they must look like."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor
from torch.optim.optimizer import ParamsT

from symopt.backends import check_backend
from symopt.constraints.base import check_number

__all__ = ["DEFAULTS", "PROGRESS", "ROWS", "Params", "check_group", "check_length", "parameters_of"]

PROGRESS = "progress"
"""State key of a 0-dim float32 tensor: steps that the schedule has counted."""

ROWS = "bias_rows"
"""State key, uint8, one per row of a weight whose module has a bias: whether that goes, because the row does."""

DEFAULTS: dict[str, Any] = {
    "strength": None,
    "backend": None,
    "time_scale": "saturated",
    "imbalance": 1.0,
    "total_steps": None,
    "commit": None,
}


class HasParameters(Protocol):
    """A module, of which nothing more is known here."""

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]: ...


Params = ParamsT | HasParameters
"""What an optimizer of this package takes: a module, or whatever torch.optim does."""


def parameters_of(params: Params) -> ParamsT:
    """What torch.optim takes."""
    named = getattr(params, "named_parameters", None)
    return params if named is None else named()  # type: ignore[return-value]


def check_group(group: dict[str, Any], owner: str) -> None:
    """Raise if one of the options that torch.optim does not have is no good."""
    for field in ("strength", "imbalance"):
        value = group.get(field, DEFAULTS[field])
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(f"{owner}: {field} as a tensor must have one element, got shape {tuple(value.shape)}")
            value = value.item()
        if value is None and field == "imbalance":
            raise TypeError(f"{owner}: imbalance must be a number, got NoneType")
        check_number(owner, field, value)
    if group.get("time_scale", "saturated") not in ("saturated", "none"):
        raise ValueError(f"{owner}: time_scale must be 'saturated' or 'none', got {group['time_scale']!r}")
    check_backend(owner, group.get("backend"))
    # A group without a length has the optimizer's.
    check_length(owner, group.get("total_steps", 1), group.get("commit"))


def check_length(owner: str, total_steps: object, commit: object, *, optional: bool = True) -> None:
    """Raise unless this is the length of a training in steps (or None where it is optional), and a share of it."""
    if not (optional and total_steps is None) and (isinstance(total_steps, bool) or not isinstance(total_steps, int)):
        raise TypeError(f"{owner}: total_steps must be an integer, got {type(total_steps).__name__}")
    if isinstance(total_steps, int) and total_steps < 1:
        raise ValueError(f"{owner}: total_steps must be >= 1, got {total_steps}")
    if commit is None:
        return
    if isinstance(commit, bool) or not isinstance(commit, (int, float)):
        raise TypeError(f"{owner}: commit must be a number or None, got {commit!r}")
    if not 0 < commit < 1:
        raise ValueError(f"{owner}: commit must be None or a share of training in (0, 1), got {commit}")
    if total_steps is None:
        raise ValueError(f"{owner}: commit is a share of the training, so it needs total_steps, its number of steps")
