"""Budget: how many units of a weight may live, as a hard constraint."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["Budget", "BudgetPlan", "check_keep", "check_scope", "check_share", "parse_pattern"]

_PATTERN = re.compile(r"([1-9]\d*):([1-9]\d*)")
_LONGEST = 64  # neighbours that compete in an N:M pattern; kernels compare each with all others


@dataclass(frozen=True)
class Budget:
    """``amount`` of the units live: a count if it is an integer, else a share; or ``pattern``, N of every M.

    With scope ``"flops"`` it is a share of their multiply-adds: a weight's elements times the ``positions`` it is
    applied at per example.
    """

    amount: float | int
    scope: str = "tensor"
    pattern: tuple[int, int] | None = None
    positions: int = 1

    def count(self, total: int) -> float:
        """What may live of ``total`` units (at least one) or multiply-adds."""
        if self.scope == "flops":
            return self.amount * total
        return self.amount if isinstance(self.amount, int) else max(1, round(self.amount * total))


@dataclass(frozen=True)
class BudgetPlan:
    """How a budget is imposed over training."""

    ramp: float = 0.45
    """Share of training at which the budget has its full size; before, units live by the cubic ramp
    ``share + (1 - share) (1 - progress / ramp)**3`` (Zhu & Gupta, 2017)."""
    commit: float = 0.6
    """Share of training at which what is outside becomes exactly zero and the support final."""
    strength_kept: float = 0.02
    """Strength of units inside the budget until the commit: this times ``ln(1 / share)``."""
    strength_pruned: float = 30.0
    """Strength of units outside."""
    plasticity: float = 4.0
    """The imbalance has decayed by ``exp(-plasticity)`` at the commit, which then ends it."""
    every: int = 20
    """Steps between two selections."""
    begin: float = 0.0
    """Share of training at which the ramp begins."""


def check_share(owner: str, field: str, value: object) -> None:
    """Raise unless ``value`` is None or a share in (0, 1]."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{owner}: {field} must be a number or None, got {type(value).__name__}")
    if not 0 < value <= 1:
        raise ValueError(f"{owner}: {field} is a share and must lie in (0, 1], got {value}")


def check_keep(owner: str, value: object) -> None:
    """Raise unless ``value`` is None, an integer >= 1 (a count) or a float in (0, 1] (a share)."""
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 1:
            raise ValueError(f"{owner}: keep as a count must be >= 1, got {value}")
        return
    check_share(owner, "keep", value)


def check_scope(owner: str, value: object, known: tuple[str, ...], amount: object, field: str) -> None:
    """Raise unless ``value`` is a known scope, and the default if there is no budget (``amount``)."""
    if value not in known:
        *most, last = map(repr, known)
        raise ValueError(f"{owner}: scope must be {', '.join(most)} or {last}, got {value!r}")
    if value != "tensor" and amount is None:
        raise ValueError(f"{owner}: scope={value!r} shares a budget among tensors; give a {field}")


def parse_pattern(owner: str, value: object) -> tuple[int, int]:
    """N and M of a pattern like ``"2:4"``."""
    if not isinstance(value, str):
        raise TypeError(f"{owner}: pattern must be a string like '2:4' or None, got {type(value).__name__}")
    found = _PATTERN.fullmatch(value)
    n, m = (int(x) for x in found.groups()) if found else (0, 0)
    if not 1 <= n < m <= _LONGEST:
        raise ValueError(f"{owner}: pattern must be 'N:M' with 1 <= N < M <= {_LONGEST}, like '2:4', got {value!r}")
    return n, m
