"""Tied: weights of several parameters, or of several parts of one, become equal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch import Tensor

from symopt.constraints.base import Constraint
from symopt.constraints.planes.derived import derived
from symopt.constraints.planes.orbits import OrbitPlane, labelled
from symopt_kernels.groups import Groups

__all__ = ["Tied"]


@final
@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Tied(OrbitPlane):
    """Weights become equal: ``{("enc.weight", "dec.weight"): Tied()}`` ties everything its key matches, as one.

    The plane is the mean over the tied copies.  Until they are equal every copy gets its own gradient, so a tie is
    found by training instead of being built in; then they stay equal bit for bit, train as one weight, and
    :func:`symopt.fold` makes them one shared Parameter where nothing but None is in ``views``.

    Args:
        strength: kappa, as in :class:`symopt.Mirror`; None: automatic.  The critical one is ``||(I - P) g||_2`` over
            all tied weights in joint mode, and the largest ``||(I - P) g_i||_2`` of an index i element-wise.
        mode: ``"joint"``: all are tied at once, by one gate; ``"elementwise"``: every index by its own, so where the
            gradients of the copies agree they are tied sooner.
        views: which part of each parameter is tied, in the order of the key; each one of None (all of it), ``"T"``
            (transposed), a slice or tuple of slices and integers, or a function that returns a view.  For a single
            parameter, the parts of it that are tied to each other: ``{"qkv.weight": Tied(views=[slice(64),
            slice(64, 128)])}``.  What no view covers is free.

    Second moments are shared by every tied index.  Parameters that are tied belong in one param group.

    Raises:
        TypeError, ValueError: for a bad ``strength``, ``mode`` or ``views``, views of different shapes or that overlap,
            or less than two of them.

    Source: L. Ziyin, ICML 2024 (arXiv 2309.16932), Section 4: a permutation symmetry is the reflection through the tie.

    Example:
        >>> import torch, symopt
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 2, bias=False), torch.nn.Linear(2, 4, bias=False))
        >>> net = symopt.constrain(net, {("0.weight", "1.weight"): symopt.Tied(views=[None, "T"])})
        >>> opt = symopt.AdamW(net, lr=1e-2)
        >>> for _ in range(1000):
        ...     opt.zero_grad()
        ...     (net(torch.eye(4)) - torch.eye(4)).square().sum().backward()
        ...     opt.step()
        >>> torch.equal(net[0].weight, net[1].weight.T)
        True
    """

    binds_many = True

    strength: float | None = None
    mode: str = "joint"
    views: Sequence[Any] | None = None
    shapes: tuple[tuple[int, ...], ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in ("joint", "elementwise"):
            raise ValueError(f"Tied: mode must be 'joint' or 'elementwise', got {self.mode!r}")
        if self.views is None:
            return
        if isinstance(self.views, (str, slice)) or not isinstance(self.views, Sequence):
            raise TypeError(f"Tied: views must be a list, one per tied part, got {self.views!r}")
        for view in self.views:
            parts = view if isinstance(view, tuple) else (view,)
            known = all(isinstance(p, (slice, int)) for p in parts) or view is None or view == "T" or callable(view)
            if not known:
                raise TypeError(f"Tied: a view must be None, 'T', a slice, a tuple of them or a function, got {view!r}")

    def bind_all(self, names: tuple[str, ...], weights: tuple[Tensor, ...]) -> Constraint:
        bound = replace(self, shapes=tuple(tuple(w.shape) for w in weights))
        bound._places(f"Tied on {', '.join(names)}")
        return bound

    def _places(self, owner: str) -> list[Tensor]:
        """For each tied part, where its weights lie in the flat vector of all."""
        views = list(self.views) if self.views is not None else [None] * len(self.shapes)
        if len(views) < 2:
            raise ValueError(f"{owner}: a tie needs two or more parameters, or views of two or more parts of one")
        shapes = self.shapes if len(self.shapes) > 1 else self.shapes * len(views)
        if len(views) != len(shapes):
            raise ValueError(f"{owner}: {len(views)} views for {len(shapes)} parameters; give one for each")
        places, start = [], 0
        for view, shape in zip(views, shapes, strict=True):
            template = start + torch.arange(math.prod(shape)).reshape(shape)
            place = (
                template
                if view is None
                else template.T
                if view == "T"
                else view(template)
                if callable(view)
                else (template[view])
            )
            if not isinstance(place, Tensor) or not _within(place, template):
                raise TypeError(f"{owner}: the view {view!r} must return a view of the tensor it is given")
            places.append(place)
            start += math.prod(shape) if len(self.shapes) > 1 else 0
        if len({place.shape for place in places}) > 1:
            got = " and ".join(str(tuple(place.shape)) for place in places)
            swapped = len(places) == 2 and places[0].shape == places[1].T.shape
            fix = "give views=[None, 'T']" if swapped else "give views of equal shapes"
            raise ValueError(f"{owner}: what is tied must have one shape, got {got}; {fix}")
        if places[0].numel() == 0:
            raise ValueError(f"{owner}: the views are empty, so there is nothing to tie")
        if int(torch.bincount(torch.cat([place.flatten() for place in places])).max()) > 1:
            raise ValueError(f"{owner}: a weight is tied to more than one place; views must not overlap")
        return places

    @property
    def parameters_identical(self) -> bool:
        """Whether the tied parameters are the same in shape and order, so that one can serve as all."""
        return len(self.shapes) > 1 and (self.views is None or all(view is None for view in self.views))

    def members(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        return self.shapes or (shape,)

    def orbits(self, shape: tuple[int, ...]) -> Groups:
        if not self.shapes:
            return replace(self, shapes=(shape,)).orbits(shape)
        places = self._places("Tied")
        if self.parameters_identical:
            return Groups(places[0].numel(), (len(places), places[0].numel()), (0,))
        labels = torch.arange(math.prod(shape))
        for place in places[1:]:
            labels[place.flatten()] = places[0].flatten()
        return labelled(labels.reshape(shape))

    @property
    def gate_per_orbit(self) -> bool:
        return self.mode == "elementwise"

    def gates(self, w: Tensor) -> Groups:
        """As orbits are named: explicit mode keeps gates in checkpoints, which no tuning of kernels may reorder."""
        return self._known(w, named=True)[0] if self.gate_per_orbit else super().gates(w)

    def sqrt_dim_per_gate(self, w: Tensor) -> Tensor | float:
        return (self._known(w)[1] - 1).clamp(min=1).sqrt() if self.gate_per_orbit else super().sqrt_dim_per_gate(w)

    def size(self, w: Tensor, groups: Groups | None = None) -> Tensor:
        size = super().size(w)
        return self._several(size, w) if self.gate_per_orbit else size

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        inner = super().inner(x, y)
        return self._several(inner, x) if self.gate_per_orbit else inner

    def per_unit(self, rate: Tensor, w: Tensor) -> Tensor:
        if not self.gate_per_orbit or rate.numel() == 1:
            return super().per_unit(rate, w)
        return self._several(self.gates(w).first(self.partition(w).expand(rate).reshape(w.shape)), w)

    def _several(self, values: Tensor, w: Tensor) -> Tensor:
        """Those of one value per gate that belong to orbits of two or more weights."""
        # Asked for once, as the answer has to come from the device.
        several = derived(
            self,
            ("several", tuple(w.shape), w.device),
            lambda: (self._known(w, named=True)[1] > 1).nonzero().flatten(),
        )
        return values[several]


def _within(place: Tensor, template: Tensor) -> bool:
    """Whether a view of ``template``, whose elements count up, has elements of it alone."""
    if place.dtype != template.dtype:
        return False
    return place.numel() == 0 or bool(place.min() >= template.min() and place.max() <= template.max())
