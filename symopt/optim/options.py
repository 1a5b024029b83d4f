"""Group options and state keys that torch.optim does not have, and what they must look like."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor
from torch.optim.optimizer import ParamsT

from symopt.backends import check_backend
from symopt.constraints.base import check_number

__all__ = ["DEFAULTS", "Params", "check_group", "parameters_of"]

DEFAULTS: dict[str, Any] = {
    "strength": None,
    "backend": None,
    "time_scale": "saturated",
    "imbalance": 1.0,
    # Anneal's: the factor of the imbalance per step (None: the automatic law), and whether the support is final.
    "imbalance_factor": None,
    "committed": False,
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
