"""Group options and state keys that torch.optim does not have, and what they must look like."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from symopt.backends import check_backend
from symopt.constraints.base import check_number
from symopt_kernels.groups import Groups

__all__ = ["DEFAULTS", "OWN_STATE", "TRIM", "check_group", "is_cut", "shared_moment"]

DEFAULTS: dict[str, Any] = {
    "strength": None,
    "backend": None,
    "time_scale": "saturated",
    "imbalance": 1.0,
    # Anneal's: the factor of the imbalance per step (None: the automatic law), and whether the support is final.
    "imbalance_factor": None,
    "committed": False,
}


OWN_STATE = ("imbalance", "metric_scale", "master", "group_index", "budget", "critical")

TRIM = ("strength_kept", "strength_pruned", "threshold", "imbalance_factor")
"""What the state tensor ``trim`` of a weight with a budget holds, in float64: the strengths of the units that have a
place in the budget and of those that have none, the size up to which they have none (negative: all have one), and the
factor of the imbalance per step."""


def is_cut(state: dict[str, Any]) -> bool:
    """Whether what is outside a weight's budget has been cut, so that its support is final."""
    return "budget" in state and float(state["budget"][TRIM.index("imbalance_factor")]) == 0


def shared_moment(per_weight: Tensor, groups: Groups) -> Tensor:
    """Mean over each group, exact where all its members are equal (so that saving and loading changes no bit)."""
    first = groups.first(per_weight)
    return first + groups.sum(per_weight - groups.expand(first).reshape(per_weight.shape)) / groups.size(per_weight)


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
