"""Group options and state keys that torch.optim does not have, and what they must look like."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from symopt.backends import check_backend
from symopt.constraints.base import check_number

__all__ = ["DEFAULTS", "check_group"]

DEFAULTS: dict[str, Any] = {
    "strength": None,
    "backend": None,
    "time_scale": "saturated",
    "imbalance": 1.0,
    # Anneal's: the factor of the imbalance per step (None: the automatic law), and whether the support is final.
    "imbalance_factor": None,
    "committed": False,
}


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
