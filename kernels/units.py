"""Units that span several parameters: which slices of which parameter share one gate, one second moment, one count."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["Part", "Units"]


@dataclass(frozen=True, eq=False)
class Part:
    """What one parameter has of the units: slice i along ``dim`` belongs to unit ``index[i]``, or to none (-1).

    ``index`` is int64 of shape ``(shape[dim],)``.  ``factor`` is the a_t of ``w_t = a_t * gate * direction_t``: the
    unit sees ``w_t / a_t``, whose gradient is ``a_t`` times that of ``w_t``.
    """

    shape: tuple[int, ...]
    dim: int
    index: Tensor
    factor: float = 1.0

    @property
    def numel(self) -> int:
        """Weights of the parameter."""
        return math.prod(self.shape)

    @property
    def inner(self) -> int:
        """Weights of one slice."""
        return math.prod(self.shape[: self.dim] + self.shape[self.dim + 1 :])

    @cached_property
    def slices(self) -> Tensor:
        """The slices that belong to a unit; looked up once, as the answer would have to come from a device."""
        return (self.index >= 0).nonzero().flatten()

    @cached_property
    def units_of_slices(self) -> Tensor:
        """The units of :attr:`slices`."""
        return self.index[self.slices]

    @cached_property
    def unbound_places(self) -> Tensor:
        """Places of the weights that belong to no unit, in row-major order."""
        return (~self.bound.expand(self.shape)).flatten().nonzero().flatten()

    @cached_property
    def bound(self) -> Tensor:
        """Whether a slice belongs to a unit, :meth:`along` the parameter."""
        return self.along(self.index >= 0)

    @property
    def unbound(self) -> int:
        """Number of weights that belong to no unit."""
        return len(self.unbound_places)

    def along(self, v: Tensor) -> Tensor:
        """A value per slice, in a shape that broadcasts against the parameter."""
        return v.reshape([-1 if d == self.dim else 1 for d in range(len(self.shape))])

    def slice_sums(self, x: Tensor) -> Tensor:
        """The sum of ``x`` over each slice, ``(shape[dim],)``."""
        others = [d for d in range(len(self.shape)) if d != self.dim]
        return x.sum(others) if others else x

    def unbound_weights(self, x: Tensor) -> Tensor:
        """Those of ``x``, shaped as the parameter, that belong to no unit."""
        return x.flatten().index_select(0, self.unbound_places)

    def with_unbound(self, x: Tensor, values: Tensor) -> Tensor:
        """``x`` with other :meth:`unbound_weights`."""
        return x.flatten().index_copy(0, self.unbound_places, values).reshape(self.shape)


@dataclass(frozen=True, eq=False)
class Units:
    """A partition of slices of several parameters into ``count`` units, in a fixed order of ``parts``.

    Second moments are one flat vector of length ``count + unbound``: one per unit, then one for every weight that
    belongs to no unit, part by part, in row-major order of the parameter.  Such weights take the plain step.
    """

    count: int
    parts: tuple[Part, ...]
    all_sizes: Tensor | None = None
    """Number of weights of each unit, where other processes hold some of them; None: the parts are all there is."""

    @property
    def unbound(self) -> int:
        """Weights that belong to no unit, over all parts."""
        return sum(part.unbound for part in self.parts)

    def to(self, device: torch.device) -> Units:
        """The same with indices on another device."""
        if all(part.index.device == device for part in self.parts):
            return self
        return replace(self, parts=tuple(replace(part, index=part.index.to(device)) for part in self.parts))

    def sizes(self, like: Tensor) -> Tensor:
        """Number of weights of each unit, ``(count,)``."""
        return self._sizes.to(like)

    @cached_property
    def _sizes(self) -> Tensor:
        if self.all_sizes is not None:
            return self.all_sizes
        ones = [torch.full_like(part.index, part.inner, dtype=torch.float64) for part in self.parts]
        return self._gather(ones)

    def sum(self, xs: Sequence[Tensor]) -> Tensor:
        """Sum over each unit of one tensor per part, shaped as the parameters: ``(count,)``.

        Parts are added in their order, slices of one part in the order of their indices, so equal inputs give equal
        bits.
        """
        return self._gather([part.slice_sums(x) for part, x in zip(self.parts, xs, strict=True)])

    def expand(self, v: Tensor, part: Part, unbound: float = 0.0) -> Tensor:
        """Give every slice of ``part`` the value of its unit, :meth:`Part.along` it; ``unbound`` where it has none."""
        return part.along(torch.where(part.index >= 0, v[part.index.clamp(min=0)], unbound))

    def flat(self, v: Tensor, unbound: float = 0.0) -> Tensor:
        """Give every weight of all parts, one after the other, the value of its unit."""
        return torch.cat([self.expand(v, part, unbound).expand(part.shape).flatten() for part in self.parts])

    def _first(self, xs: Sequence[Tensor], order: Sequence[int]) -> Tensor:
        """One weight of each unit, ``(count,)``, from the first part in ``order`` that has one."""
        found = xs[0].new_zeros(self.count)
        for i in reversed(order):
            part = self.parts[i]
            one = xs[i].movedim(part.dim, 0).reshape(part.shape[part.dim], -1)[:, 0]
            found = found.index_put((part.units_of_slices,), one[part.slices])
        return found

    def pack(self, per_unit: Tensor, xs: Sequence[Tensor]) -> Tensor:
        """The flat vector of a second moment: ``per_unit``, then the unbound weights of one tensor per part."""
        return torch.cat([per_unit, *(part.unbound_weights(x) for part, x in zip(self.parts, xs, strict=True))])

    def unpack(self, moment: Tensor, place: int) -> Tensor:
        """Of such a vector, what belongs to the unbound weights of one part."""
        begin = self.count + sum(part.unbound for part in self.parts[:place])
        return moment[begin : begin + self.parts[place].unbound]

    def write_out(self, moment: Tensor, place: int) -> Tensor:
        """Such a vector for every weight of one part, shaped as its parameter and in units of its own gradient."""
        part = self.parts[place]
        full = self.expand(moment[: self.count] / part.factor**2, part).expand(part.shape)
        return part.with_unbound(full, self.unpack(moment, place))

    def read_in(self, xs: Sequence[Tensor]) -> Tensor:
        """The inverse of :meth:`write_out` for all parts, and of other tensors the mean over every unit.

        To the last bit where the unit has a slice whose factor is a power of two.
        """
        scaled = [x * part.factor**2 for part, x in zip(self.parts, xs, strict=True)]
        exact = sorted(range(len(xs)), key=lambda i: math.frexp(self.parts[i].factor)[0] != 0.5)
        first = self._first(scaled, exact)
        rest = [x - self.expand(first, part) for x, part in zip(scaled, self.parts, strict=True)]
        changed = [x != self.expand(first / part.factor**2, part) for part, x in zip(self.parts, xs, strict=True)]
        written = self.sum([x.to(first) for x in changed]) == 0
        return self.pack(torch.where(written, first, first + self.sum(rest) / self.sizes(first)), xs)

    def _gather(self, sums: Sequence[Tensor]) -> Tensor:
        total = sums[0].new_zeros(self.count)
        for part, own in zip(self.parts, sums, strict=True):
            # Accumulating by index_put sorts on a GPU, where index_add would add in any order.
            total = total.index_put((part.units_of_slices,), own[part.slices], accumulate=True)
        return total
