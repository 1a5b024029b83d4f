"""Constraints that are not stepped by a retraction of the weight but have state and a step of their own."""

from __future__ import annotations

from typing import Any

from symopt.constraints import Constraint, LowRank
from symopt.optim.lowrank import step as lowrank

__all__ = ["STEPPERS", "stepper"]

STEPPERS: dict[type[Constraint], Any] = {LowRank: lowrank}
"""By constraint, a module with ``step``, ``ready``, ``gain``, ``per_weight``, ``sizes``, ``align`` and ``cut``."""


def stepper(constraint: Constraint) -> Any:
    """The module that steps ``constraint``; None where its retraction does."""
    return STEPPERS.get(type(constraint))
