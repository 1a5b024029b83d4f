"""From a weight to its factors: the starting points of explicit mode (the argument ``init`` of symopt.constrain)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from symopt.constraints import Constraint
from symopt.constraints.base import check_number

__all__ = ["INITS", "check_init", "factors_of", "keeps_weight"]

INITS = ("imbalanced", "balanced", "gates", "independent", "matched")
_DRAWN = ("independent", "matched")


def check_init(init: object) -> None:
    """Raise unless ``init`` is one of :data:`INITS` or an imbalance >= 0."""
    if isinstance(init, (int, float)) and not isinstance(init, bool):
        check_number("constrain", "init", init)
    elif init not in INITS:
        raise ValueError(f"constrain: init must be a number >= 0 or one of {', '.join(map(repr, INITS))}, got {init!r}")


def keeps_weight(init: str | float) -> bool:
    """Whether factors by this init compose to the weight; otherwise they are drawn and replace it."""
    return init not in _DRAWN


def factors_of(constraint: Constraint, weight: Tensor, init: str | float) -> tuple[Tensor, ...]:
    """Factors of ``weight`` by one of :data:`INITS`, or with the imbalance given as a number."""
    if not isinstance(init, str):
        return constraint.split(weight, float(init))
    if init == "balanced":
        return constraint.split(weight)
    if init == "imbalanced":
        return constraint.split(weight, constraint.imbalance(weight, 1.0))
    if constraint.is_matrix:
        raise ValueError(
            f"constrain: init={init!r} draws factors of the weight's own shape, which those of {constraint} are not; "
            "use 'imbalanced', 'balanced' or a number"
        )
    balanced = constraint.split(weight)
    base, gates = balanced[: constraint.free_factors], balanced[constraint.free_factors : -1]
    if init == "gates":
        ones = tuple(torch.ones_like(g) for g in gates)
        # A constraint may fix a coefficient per weight: what its factors compose to where all of them are 1.
        coefficient = constraint.compose((*(torch.zeros_like(b) for b in base), *ones, torch.ones_like(weight)))
        return (*base, *ones, torch.where(coefficient == 0, 0.0, weight / coefficient))
    size = weight.square().mean().sqrt()
    if not bool(size > 0):
        raise ValueError(f"constrain: init={init!r} draws factors of the weight's size, which is 0; use 'gates'")
    if init == "independent":
        # Every factor has the law of the weight itself, as if each were a freshly initialised layer.
        return (*base, *(torch.randn_like(g) * size for g in gates), weight.clone())
    # "matched": the product has the weight's variance; truncation keeps both tails of the product in check.
    depth = len(gates) + 1
    root = size ** (1 / depth)
    return (*base, *(_truncated(f, root) for f in (*gates, balanced[-1])))


def _truncated(like: Tensor, std: Tensor) -> Tensor:
    """Normal, magnitude between .1 and 2 standard deviations, then rescaled to the standard deviation asked for."""
    lo, hi = (0.5 * (1 + math.erf(z / math.sqrt(2))) for z in (0.1, 2.0))
    magnitude = torch.special.ndtri(lo + (hi - lo) * torch.rand_like(like))
    signed = torch.where(torch.rand_like(like) < 0.5, -magnitude, magnitude)
    return signed * (std / _TRUNCATED_STD)


def _second_moment(a: float, b: float) -> float:
    """Of a standard normal whose magnitude is kept between ``a`` and ``b``."""
    low, high = (z * math.exp(-z * z / 2) / math.sqrt(2 * math.pi) for z in (a, b))
    mass = 0.5 * (math.erf(b / math.sqrt(2)) - math.erf(a / math.sqrt(2)))
    return 1 - (high - low) / mass


_TRUNCATED_STD = math.sqrt(_second_moment(0.1, 2.0))
