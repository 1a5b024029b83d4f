"""Explicit mode of a constraint over several parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from symopt.constraints import Constraint
from symopt.constraints.planes.plane import flat
from symopt.module.factors import factors_of

__all__ = ["SharedFactors"]


@final
class SharedFactors:
    """The factors of a constraint over several parameters, which are those of their flat vector.

    A factor with one entry per weight is stored in parts, each with the parameter it belongs to; any other (the gates
    of units that span several parameters) is stored with the first parameter.  So every parameter needs the factors of
    all, and this knows where they are.
    """

    def __init__(self, constraint: Constraint, weights: Sequence[Tensor], init: str | float) -> None:
        self.constraint = constraint
        self.shapes = [w.shape for w in weights]
        self.holders: list[nn.Module] = []
        """In the constraint's order, what holds the factors stored with each parameter."""
        factors = factors_of(constraint, flat(weights), init)
        self.in_parts = [factor.shape == (sum(w.numel() for w in weights),) for factor in factors]
        self.initial: list[tuple[Tensor, ...]] = self.stored(factors)
        """Of each parameter that has no holder yet, its factors."""

    def indices(self, i: int) -> list[int]:
        """Which factors are stored with parameter i, whole or in part."""
        return [k for k, in_parts in enumerate(self.in_parts) if in_parts or i == 0]

    def stored(self, factors: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """What is stored with each parameter, of the factors of all."""
        split = [self.split(f) if in_parts else () for f, in_parts in zip(factors, self.in_parts, strict=True)]
        return [
            tuple(split[k][i] if self.in_parts[k] else factors[k] for k in self.indices(i))
            for i in range(len(self.shapes))
        ]

    def split(self, whole: Tensor) -> tuple[Tensor, ...]:
        """The flat vector of all, as one tensor per parameter."""
        pieces = whole.flatten().split([shape.numel() for shape in self.shapes])
        return tuple(piece.reshape(shape) for piece, shape in zip(pieces, self.shapes, strict=True))

    def factors(self) -> tuple[Tensor, ...]:
        """Those of the flat vector of all weights."""
        stored = [
            dict(zip(self.indices(i), h.parameters(recurse=False), strict=True)) for i, h in enumerate(self.holders)
        ]
        return tuple(
            flat([mine[k] for mine in stored]) if in_parts else stored[0][k] for k, in_parts in enumerate(self.in_parts)
        )

    @torch.no_grad()
    def assign(self, i: int, weight: Tensor, init: str | float) -> tuple[Tensor, ...]:
        """Give parameter i this weight while the others keep theirs, by new factors; returns those stored with i."""
        weights = list(self.split(self.constraint.compose(self.factors())))
        weights[i] = weight
        stored = self.stored(factors_of(self.constraint, flat(weights), init))
        for holder, values in zip(self.holders, stored, strict=True):
            for factor, value in zip(holder.parameters(recurse=False), values, strict=True):
                factor.copy_(value)
        return stored[i]
