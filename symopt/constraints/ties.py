"""Ready-made planes: Tied, Symmetric, Circulant, Equivariant (weights of one orbit are equal) and ZeroMean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from symopt.constraints.base import Constraint
from symopt.constraints.plane import OrbitPlane, Plane
from symopt_kernels.groups import Groups

__all__ = ["Circulant", "Equivariant", "Symmetric", "Tied", "ZeroMean"]


def _groups(labels: Tensor) -> Groups:
    """Orbits from any labels, of the shape of the weight."""
    index = torch.unique(labels, return_inverse=True)[1]
    return Groups(int(index.max()) + 1, tuple(labels.shape), (), index)


@final
@dataclass(frozen=True, eq=False, repr=False)
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

    joint: ClassVar[bool] = True

    strength: float | None = None
    mode: str = "joint"
    views: Sequence[Any] | None = None
    shapes: tuple[tuple[int, ...], ...] = field(default=(), kw_only=True, repr=False)

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
            if not isinstance(place, Tensor) or not bool(torch.isin(place, template).all()):
                raise TypeError(f"{owner}: the view {view!r} must return a view of the tensor it is given")
            places.append(place)
            start += math.prod(shape) if len(self.shapes) > 1 else 0
        if len({place.shape for place in places}) > 1:
            got = " and ".join(str(tuple(place.shape)) for place in places)
            swapped = len(places) == 2 and places[0].shape == places[1].T.shape
            fix = "give views=[None, 'T']" if swapped else "give views of equal shapes"
            raise ValueError(f"{owner}: what is tied must have one shape, got {got}; {fix}")
        if torch.cat([place.flatten() for place in places]).unique().numel() < len(places) * places[0].numel():
            raise ValueError(f"{owner}: a weight is tied to more than one place; views must not overlap")
        return places

    @property
    def shared(self) -> bool:  # type: ignore[override]
        """Whether the tied parameters are the same in shape and order, so that one can serve as all."""
        return len(self.shapes) > 1 and (self.views is None or all(view is None for view in self.views))

    def orbits(self, shape: tuple[int, ...]) -> Groups:
        if not self.shapes:
            return replace(self, shapes=(shape,)).orbits(shape)
        places = self._places("Tied")
        if self.shared:
            return Groups(places[0].numel(), (len(places), places[0].numel()), (0,))
        labels = torch.arange(math.prod(shape))
        for place in places[1:]:
            labels[place.flatten()] = places[0].flatten()
        return _groups(labels.reshape(shape))

    def gates(self, w: Tensor) -> Groups:
        return super().gates(w) if self.mode == "joint" else self.partition(w)

    def spread(self, w: Tensor) -> Tensor | float:
        return super().spread(w) if self.mode == "joint" else (self._known(w)[1] - 1).clamp(min=1).sqrt()

    def size(self, w: Tensor, groups: Groups | None = None) -> Tensor:
        size = super().size(w)
        return size if self.mode == "joint" else size[self._known(w)[1] > 1]

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        inner = super().inner(x, y)
        return inner if self.mode == "joint" else inner[self._known(x)[1] > 1]

    def per_unit(self, rate: Tensor, w: Tensor) -> Tensor:
        return super().per_unit(rate, w) if self.mode == "joint" or rate.numel() == 1 else rate[self._known(w)[1] > 1]


@final
@dataclass(frozen=True, repr=False)
class Symmetric(OrbitPlane):
    """A square matrix becomes symmetric, ``w = w.T``: undirected interactions, energies, metrics.

    Args:
        strength: kappa, as in :class:`symopt.Mirror`; None: automatic.  The critical one is
            ``||g - g.T||_F / 2``.

    Raises:
        TypeError, ValueError: for a bad ``strength`` or a weight that is no square matrix.

    Source: L. Ziyin, ICML 2024 (arXiv 2309.16932), Section 4.

    Example:
        >>> import torch, symopt
        >>> w = torch.tensor([[1.0, 2.0], [4.0, 3.0]])
        >>> symopt.Symmetric().onto(w)
        tensor([[1., 3.],
                [3., 3.]])
        >>> symopt.Symmetric().penalty(w)  # the distance from the symmetric matrices
        tensor(1.4142)
    """

    strength: float | None = None

    def bind(self, name: str, w: Tensor) -> Constraint:
        _square(f"Symmetric on {name}", w)
        return self

    def orbits(self, shape: tuple[int, ...]) -> Groups:
        labels = torch.arange(math.prod(shape)).reshape(shape)
        return _groups(torch.minimum(labels, labels.T))


@final
@dataclass(frozen=True, repr=False)
class Circulant(OrbitPlane):
    """A square matrix becomes circulant: ``w[i, j]`` depends on ``(j - i) mod n`` alone, a circular convolution.

    Args:
        strength: kappa, as in :class:`symopt.Mirror`; None: automatic.

    Raises:
        TypeError, ValueError: for a bad ``strength`` or a weight that is no square matrix.

    Source: L. Ziyin, ICML 2024 (arXiv 2309.16932), Section 4.

    Example:
        >>> import torch, symopt
        >>> symopt.Circulant().onto(torch.tensor([[1.0, 2.0], [4.0, 3.0]]))
        tensor([[2., 3.],
                [3., 2.]])
    """

    strength: float | None = None

    def bind(self, name: str, w: Tensor) -> Constraint:
        _square(f"Circulant on {name}", w)
        return self

    def orbits(self, shape: tuple[int, ...]) -> Groups:
        i = torch.arange(shape[0])
        return _groups((i[None, :] - i[:, None]) % shape[0])


@final
@dataclass(frozen=True, eq=False, repr=False)
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

    permutations: Sequence[Any]
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
                return _groups(labels.reshape(shape))


@final
@dataclass(frozen=True, repr=False)
class ZeroMean(Plane):
    """Means over ``dim`` become zero: every neuron's incoming weights sum to 0, so it cannot see a constant input.

    Args:
        strength: kappa, as in :class:`symopt.Mirror`; None: automatic.
        dim: dimension or dimensions of the mean; default: all but the first (of a vector, its only one).

    Zero means here up to the rounding of the sum.

    Raises:
        TypeError, ValueError: for a bad ``strength`` or a ``dim`` that the weight does not have.

    Source: L. Ziyin, ICML 2024 (arXiv 2309.16932), Section 4; centred weights: Qiao et al., 2019 (arXiv 1903.10520).

    Example:
        >>> import torch, symopt
        >>> symopt.ZeroMean().onto(torch.tensor([[1.0, 3.0], [2.0, 2.0]]))
        tensor([[-1.,  1.],
                [ 0.,  0.]])
    """

    strength: float | None = None
    dim: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        dims: Any = self.dim if isinstance(self.dim, tuple) else () if self.dim is None else (self.dim,)
        if not all(isinstance(d, int) and not isinstance(d, bool) for d in dims):
            raise TypeError(f"ZeroMean: dim must be an integer, a tuple of them or None, got {self.dim!r}")

    def bind(self, name: str, w: Tensor) -> Constraint:
        dims = self.dim if isinstance(self.dim, tuple) else () if self.dim is None else (self.dim,)
        if not all(-w.dim() <= d < w.dim() for d in dims):
            raise ValueError(f"ZeroMean on {name}: shape {tuple(w.shape)} has no dimension {self.dim}")
        return self

    def partition(self, w: Tensor, index: Tensor | None = None) -> Groups:
        if self.dim is None:
            dims = tuple(range(min(1, w.dim() - 1), w.dim()))
        else:
            dims = tuple(d % w.dim() for d in (self.dim if isinstance(self.dim, tuple) else (self.dim,)))
        shape = tuple(w.shape)
        return Groups(math.prod([n for d, n in enumerate(shape) if d not in dims]), shape, dims)

    def off(self, x: Tensor) -> Tensor:
        groups = self.partition(x)
        return groups.expand(groups.sum(x) / groups.size(x)).reshape(x.shape)

    def codimension(self, w: Tensor) -> float:
        return float(self.partition(w).count)


def _square(owner: str, w: Tensor) -> None:
    if w.dim() != 2 or w.shape[0] != w.shape[1]:
        raise ValueError(f"{owner}: needs a square matrix, got shape {tuple(w.shape)}")


def _permutation(p: Any) -> Tensor | None:
    if p is None:
        return None
    found: Any = torch.as_tensor(p)
    if found.dim() != 1 or found.is_floating_point() or found.dtype == torch.bool:
        raise TypeError(f"Equivariant: a permutation must be a list or 1-d tensor of integers, got {p!r}")
    order: Tensor = found.long().cpu()
    if not torch.equal(order.sort().values, torch.arange(len(order))):
        raise ValueError(f"Equivariant: {order.tolist()} is no permutation of 0 ... {len(order) - 1}")
    return order
