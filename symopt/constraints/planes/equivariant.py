"""Equivariant: layers that commute with permutations of their inputs and outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from symopt.constraints.base import Constraint
from symopt.constraints.planes.orbits import OrbitPlane, labelled
from symopt_kernels.groups import Groups

__all__ = ["Equivariant"]


@final
@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Equivariant(OrbitPlane):
    """A layer becomes equivariant under permutations: permuting its inputs permutes its outputs.

    With a generator ``(out, in)`` of the group, ``w[out][:, in] = w`` (and ``b[out] = b`` for a bias, named in full):
    ``layer(x[..., in]) = layer(x)[..., out]``.  Weights of one orbit of the generated group become equal.

    Args:
        permutations: the generators; each a pair ``(out, in)`` of integer tensors or lists, of the lengths of
            dimensions 0 and 1 of the weight, None for one that stays in order; or one permutation for both.
        strength: kappa, as in :class:`symopt.Mirror`; None: automatic.

    Raises:
        TypeError, ValueError: if something is no permutation, or not of the weight's size.

    Source: L. Ziyin, ICML 2024 (arXiv 2309.16932), Section 4; equivariant layers as tied weights: Ravanbakhsh et al.,
    ICML 2017 (arXiv 1702.08389).

    Example:
        >>> import torch, symopt
        >>> flip = symopt.Equivariant([[2, 1, 0]])
        >>> w = flip.onto(torch.arange(9.0).reshape(3, 3))
        >>> torch.equal(w.flip(0).flip(1), w)
        True
    """

    permutations: Sequence[Any] = field(kw_only=False)
    strength: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.permutations, (str, Tensor)) or not isinstance(self.permutations, Sequence):
            raise TypeError("Equivariant: permutations must be a list of generators, each a permutation or a pair")
        if not self.permutations:
            raise ValueError("Equivariant: permutations is empty; give at least one generator")
        pairs = [g if isinstance(g, tuple) else (g, g) for g in self.permutations]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError("Equivariant: a tuple in permutations must be a pair (out, in)")
        vars(self)["permutations"] = [tuple(_permutation(p) for p in pair) for pair in pairs]

    def __repr__(self) -> str:
        """The call, with the number of generators instead of the permutations."""
        own = "" if self.strength is None else f", strength={self.strength}"
        return f"Equivariant({len(self.permutations)} permutations{own})"

    def bind(self, name: str, w: Tensor) -> Constraint:
        self._check(f"Equivariant on {name}", tuple(w.shape))
        return self

    def _check(self, owner: str, shape: tuple[int, ...]) -> None:
        for pair in self.permutations:
            for dim, p in enumerate(pair[: len(shape)]):
                if p is not None and len(p) != shape[dim]:
                    raise ValueError(
                        f"{owner}: a permutation of {len(p)} does not fit dimension {dim} of shape {shape}"
                    )
        if len(shape) < 2 and all(pair[0] is None for pair in self.permutations):
            raise ValueError(f"{owner}: no generator permutes outputs, so a bias is free; leave it out")

    def orbits(self, shape: tuple[int, ...]) -> Groups:
        self._check("Equivariant", shape)
        moves = []
        for pair in self.permutations:
            move = torch.arange(math.prod(shape)).reshape(shape)
            for dim, p in enumerate(pair[: len(shape)]):
                move = move if p is None else move.index_select(dim, p)
            moves.append(move.flatten())
        labels = torch.arange(math.prod(shape))
        while True:  # each weight takes the least label in reach; a cycle of length L is covered in log2(L) doublings
            before = labels.clone()
            for move in moves:
                jump = move
                for _ in range(max(1, math.ceil(math.log2(max(2, math.prod(shape)))))):
                    labels = torch.minimum(labels, labels[jump])
                    jump = jump[jump]
            if torch.equal(labels, before):
                return labelled(labels.reshape(shape))


def _permutation(p: Any) -> Tensor | None:
    if p is None:
        return None
    found = torch.as_tensor(p)
    if found.dim() != 1 or found.is_floating_point() or found.dtype == torch.bool:
        raise TypeError(f"Equivariant: a permutation must be a list or 1-d tensor of integers, got {p!r}")
    order = found.long().cpu()
    if not torch.equal(order.sort().values, torch.arange(len(order))):
        raise ValueError(f"Equivariant: {order.tolist()} is no permutation of 0 ... {len(order) - 1}")
    return order
