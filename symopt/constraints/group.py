"""GroupSparse: whole neurons, inputs, heads, blocks or any groups of weights may become exactly zero."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor

from symopt.constraints.base import Constraint, Factors, Outs, check_depth
from symopt.constraints.budget import Budget, check_keep, check_scope
from symopt.constraints.gauge import heavy_factor
from symopt.constraints.mapping import Index, check_mapping, first_pattern, spanning_units
from symopt.constraints.spanning import SpanningGroups
from symopt_kernels.groups import Groups
from symopt_kernels.reference import gauge
from symopt_kernels.reference import group as group_kernel

__all__ = ["GroupSparse"]

_HEAD = re.compile(r"head:([1-9]\d*)")
_BLOCK = re.compile(r"block:([1-9]\d*)x([1-9]\d*)")


@final
@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class GroupSparse(Constraint):
    """Exact zeros of whole groups, by the rescaling symmetry of a gate, ``w_g = s_g d_g`` (``s -> a s, d -> d / a``).

    Weight decay kappa on gate and direction charges ``kappa * sum_g ||w_g||_2``; with D - 1 gates (depth D),
    ``w_g = s_1 ... s_{D-1} d_g``, it charges ``kappa * D/2 * sum_g ||w_g||_2**(2/D)``.

    Args:
        groups: which weights belong together; every weight is in exactly one group.

            - ``"out"``: slices along dimension 0: neurons of a Linear, filters of a Conv, rows of an Embedding.
            - ``"in"``: slices along dimension 1: inputs of a Linear, input channels of a Conv.
            - ``"head:<n>"``: ``n`` equal runs of dimension 0.  A packed query-key-value weight (out = 3 * in) is read
              as ``(3, n, out / 3n, in)``, so that a head takes its rows of all three.
            - ``"block:<r>x<c>"``: blocks of r outputs by c inputs, kernel positions included.
            - an integer tensor: a group number per weight (the weight's shape) or per slice of dimension 0 (1-d).
            - a callable ``weight -> integer tensor``, called once by :func:`symopt.constrain`.
            - a mapping ``{pattern: (dim, index)}`` for units that span several parameters, biases and scales included:
              slice i along ``dim`` of every parameter that the :mod:`fnmatch` pattern matches belongs to unit
              ``index[i]``, or to none (-1); ``index`` None numbers the slices from 0.  All parameters that the key of
              :func:`symopt.constrain` and the mapping match are bound as one: one gate, one second moment and one count
              per unit.  Weights in no unit take the plain step, without ``weight_decay``.

            Strings count dimensions as a Linear or Conv stores them, (out, in, ...); a transposed convolution is
            refused, and Hugging Face's Conv1D, which is (in, out), must be named in full.  A wildcard of
            :func:`symopt.constrain` makes no units of what is the model's output or a vocabulary: that, too, has to be
            named in full.
        strength: kappa, as in :class:`symopt.Sparse`.  With ``AdamW`` it counts per coordinate, whatever the group's
            size: a group dies while ``||E m / rms|| < strength * sqrt(size)``.  Defaults: 0.06 with AdamW, 1e-4 with
            SGD and Adam.
        keep: a budget instead of a strength: how many groups of each tensor live in the end, exactly; an integer is a
            count, a float in (0, 1] a share.  The optimizer ramps it in, as for :class:`symopt.Sparse`.
        scope: whose budget it is: of each ``"tensor"``; ``"global"``, of all tensors with an equal constraint together,
            by the layer-adaptive score of :class:`symopt.Sparse`, of groups; or ``"flops"``, by that score per
            multiply-add, and ``keep`` is a share of the multiply-adds of these weights (as many groups live as fit).
            Of every tensor one group lives at least.
        positions: for scope ``"flops"``, how often the weight is applied per example: 1 for a Linear of vectors (the
            default for matrices), the output's height times width for a convolution.
        factors: with a mapping, ``{pattern: a}``: the unit sees these parameters divided by a > 0 (default 1), so that
            members of different scales move alike: ``w_t = a_t * gate * direction_t``, charged
            ``kappa * sum_g (sum_t ||w_t||**2 / a_t**2)**(1/2)``.
        depth: number D >= 2 of factors (a budget and a mapping need 2); above 2 balanced, which makes every zero
            permanent.

    Raises:
        TypeError, ValueError: for an unknown ``groups``, one that does not fit the weight, or a bad ``strength``.

    Source: D-Gating (Kolb et al., NeurIPS 2025), the symmetry: Ziyin, ICML 2024 (arXiv 2309.16932),
    Section 4.

    Example:
        >>> import torch
        >>> import symopt
        >>> from symopt import GroupSparse
        >>> w = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
        >>> GroupSparse("out").size(w)
        tensor([5., 0.])
        >>> GroupSparse("out").penalty(w)
        tensor(5.)
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> channel = GroupSparse({"0.*": (0, None), "1.*": (0, None)}, keep=4)
        >>> symopt.constraints(symopt.constrain(net, {"*": channel}))["1.bias"]
        GroupSparse({'0.*': 0, '1.*': 0}, keep=4)
    """

    @property
    def retraction(self) -> str:
        """By depth."""
        return "group" if self.depth == 2 else "group_deep"

    groups: str | Tensor | Callable[[Tensor], Tensor] | Mapping[str, tuple[int, Index]] = field(kw_only=False)
    strength: float | None = None
    keep: float | int | None = None
    scope: str = "tensor"
    positions: int | None = None
    factors: Mapping[str, float] | None = None
    depth: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_depth("GroupSparse", self.depth)
        check_keep("GroupSparse", self.keep)
        if self.keep is not None and self.depth != 2:
            raise ValueError(f"GroupSparse: a budget (keep) needs depth=2, got depth={self.depth}")
        check_scope("GroupSparse", self.scope, ("tensor", "global", "flops"), self.keep, "keep")
        if isinstance(self.groups, Mapping):
            check_mapping(self.groups, self.factors, self.depth)
        elif self.factors is not None:
            raise ValueError("GroupSparse: factors belong to groups given as a mapping {pattern: (dim, index)}")
        if self.scope != "tensor" and not isinstance(self.groups, str):
            raise ValueError(f"GroupSparse: scope={self.scope!r} compares groups of equal size; name them by a string")
        if self.scope == "flops" and isinstance(self.keep, int):
            raise ValueError(f"GroupSparse: keep with scope='flops' is a share in (0, 1], got the count {self.keep}")
        if self.positions is not None and (self.scope != "flops" or not _whole(self.positions)):
            raise ValueError(f"GroupSparse: positions is an integer >= 1, for scope='flops'; got {self.positions!r}")
        groups = self.groups
        if isinstance(groups, str):
            if groups not in ("out", "in") and not _HEAD.fullmatch(groups) and not _BLOCK.fullmatch(groups):
                raise ValueError(
                    "GroupSparse: groups must be 'out', 'in', 'head:<n>', 'block:<r>x<c>', an integer tensor or a "
                    f"callable, got {groups!r}"
                )
        elif isinstance(groups, Tensor):
            if not _integers(groups):
                raise TypeError(f"GroupSparse: an index tensor must hold integers, got {groups.dtype}")
        elif not callable(groups) and not isinstance(groups, Mapping):
            raise TypeError(
                "GroupSparse: groups must be a string, integer tensor, callable or mapping, got "
                f"{type(groups).__name__}"
            )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, GroupSparse) or self._numbers() != other._numbers():
            return False
        if isinstance(self.groups, Tensor) and isinstance(other.groups, Tensor):
            return torch.equal(self.groups, other.groups)
        return type(self.groups) is type(other.groups) and self.groups == other.groups

    def one_sided(self, w: Tensor) -> bool:
        rows = self.groups in ("out", "in") or (isinstance(self.groups, str) and self.groups.startswith("head:"))
        return w.dim() == 2 and rows

    def __hash__(self) -> int:
        return hash((self._numbers(), self.groups if isinstance(self.groups, str) else None))

    def _numbers(self) -> tuple[object, ...]:
        return (self.strength, type(self.keep), self.keep, self.scope, self.positions, self.depth)

    def __repr__(self) -> str:
        """The call that makes it; of a mapping the dimensions, without the indices."""
        if not isinstance(self.groups, Mapping):
            return super().__repr__()
        given = [("strength", self.strength), ("keep", self.keep), ("factors", self.factors)]
        shown = "".join(f", {name}={value!r}" for name, value in given if value is not None)
        return f"GroupSparse({ {pattern: dim for pattern, (dim, _) in self.groups.items()} }{shown})"

    @property
    def binds_many(self) -> bool:
        """Whether units span parameters."""
        return isinstance(self.groups, Mapping)

    def selects(self, name: str) -> bool | None:
        return first_pattern(self.groups, name) is not None if isinstance(self.groups, Mapping) else None

    def bind_all(self, names: tuple[str, ...], weights: tuple[Tensor, ...]) -> Constraint:
        if not isinstance(self.groups, Mapping):
            return super().bind_all(names, weights)
        units = spanning_units(self.groups, self.factors, names, weights)
        if isinstance(self.keep, int) and self.keep > units.count:
            raise ValueError(f"GroupSparse: keep={self.keep} of {units.count} units; give at most {units.count}")
        return SpanningGroups(repr(self), units_=units, strength=self.strength, keep=self.keep)

    @property
    def budget(self) -> Budget | None:
        return None if self.keep is None else Budget(self.keep, self.scope, positions=self.positions or 1)

    def shared_budget(self) -> Constraint:
        """Without ``positions``: how often a weight is applied is its own affair, not the budget's."""
        return replace(self, positions=None)

    def bind(self, name: str, w: Tensor) -> Constraint:
        index = self.index(w, name)
        if index is None:
            self._view(name, w)
        units = self.partition(w, index).count
        if self.scope == "flops" and self.positions is None and w.dim() > 2:
            raise ValueError(
                f"GroupSparse(scope='flops') on {name}: a kernel of shape {tuple(w.shape)} is applied at many places; "
                "give positions, the height times width of its output"
            )
        if self.scope == "tensor" and isinstance(self.keep, int) and self.keep > units:
            raise ValueError(f"GroupSparse on {name}: keep={self.keep} of {units} groups; give at most {units}")
        return self if index is None else replace(self, groups=index.cpu())

    def index(self, w: Tensor, name: str = "weight") -> Tensor | None:
        if isinstance(self.groups, str):
            return None
        if isinstance(self.groups, Mapping):
            raise TypeError(f"{self} has units only once symopt.constrain has bound it to parameters")
        index: object = self.groups if isinstance(self.groups, Tensor) else self.groups(w.detach())
        if not isinstance(index, Tensor) or not _integers(index):
            kind = index.dtype if isinstance(index, Tensor) else type(index).__name__
            raise TypeError(f"GroupSparse on {name}: the callable must return an integer tensor, got {kind}")
        if index.dim() == 1 and w.dim() > 1 and index.shape[0] == w.shape[0]:
            index = index.reshape(-1, *[1] * (w.dim() - 1)).expand(w.shape)
        if index.shape != w.shape:
            raise ValueError(
                f"GroupSparse on {name}: the index tensor has shape {tuple(index.shape)}; give one group per weight "
                f"{tuple(w.shape)} or one per slice of dimension 0 ({w.shape[0]},)"
            )
        inverse: Tensor = torch.unique(index.to(w.device), return_inverse=True)[1]
        return inverse

    def partition(self, w: Tensor, index: Tensor | None = None) -> Groups:
        if not isinstance(self.groups, str):
            index = self.index(w) if index is None else index
            assert index is not None
            return Groups(int(index.max()) + 1, tuple(w.shape), (), index)
        view, dims = self._view("weight", w)
        return Groups(math.prod([n for d, n in enumerate(view) if d not in dims]), view, dims)  # a list: compilable

    def _view(self, name: str, w: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        shape, kind = tuple(w.shape), self.groups
        rows = shape[0]
        assert isinstance(kind, str)
        if kind == "out":
            return shape, tuple(range(1, w.dim()))
        if kind == "in":
            if w.dim() < 2:
                raise ValueError(f"GroupSparse('in') on {name}: shape {shape} has no dimension 1; use 'out'")
            return shape, (0, *range(2, w.dim()))
        if head := _HEAD.fullmatch(kind):
            heads = int(head[1])
            packed = 3 if w.dim() == 2 and rows == 3 * shape[1] else 1
            if rows % (packed * heads):
                what = "outputs of each of query, key and value" if packed == 3 else "outputs"
                raise ValueError(
                    f"GroupSparse({kind!r}) on {name}: {rows // packed} {what} do not split into {heads} equal heads"
                )
            return (packed, heads, rows // (packed * heads), *shape[1:]), (0, *range(2, w.dim() + 2))
        block = _BLOCK.fullmatch(kind)
        assert block is not None
        r, c = int(block[1]), int(block[2])
        if w.dim() < 2 or rows % r or shape[1] % c:
            raise ValueError(
                f"GroupSparse({kind!r}) on {name}: shape {shape} does not split into {r} x {c} blocks; choose divisors "
                "of its first two dimensions or give an index tensor"
            )
        return (rows // r, r, shape[1] // c, c, *shape[2:]), (1, *range(3, w.dim() + 2))

    def compose(self, factors: Factors, out: Tensor | None = None) -> Tensor:
        *gates, direction = factors
        return self.partition(direction).scale(gauge.product(tuple(gates)), direction, out)

    def split(self, w: Tensor, imbalance: Tensor | float = 0.0) -> Factors:
        groups = self.partition(w)
        gate = heavy_factor(groups.sum(w * w).sqrt(), imbalance, self.depth)
        power = gate ** (self.depth - 1)
        inverse = torch.where(power > 0, 1 / power.clamp(min=torch.finfo(w.dtype).tiny), 0.0)
        return (gate,) * (self.depth - 1) + (groups.scale(inverse, w),)

    def pullback(self, factors: Factors, grad: Tensor, out: Outs | None = None) -> Factors:
        *gates, direction = factors
        groups = self.partition(direction)
        inner = groups.sum(grad * direction)
        rest = (inner * r for r in gauge.partial_products(tuple(gates))) if len(gates) > 1 else (inner,)
        return (*rest, groups.scale(gauge.product(tuple(gates)), grad, out[-1] if out else None))

    def mirror(self, factors: Factors) -> Factors:
        gate, *others, direction = factors
        return (-gate, *others, -direction)

    def retract(
        self,
        w: Tensor,
        delta: Tensor,
        decay: Tensor | float,
        imbalance: Tensor,
        metric_scale: Tensor,
        groups: Groups | None,
        *,
        saturated: bool = True,
        snaps: Tensor | bool = True,
    ) -> Tensor:
        groups = groups or self.partition(w)
        if self.depth > 2:
            return group_kernel.group_deep(
                w, delta, decay, metric_scale, groups, self.depth, saturated=saturated, snaps=snaps
            )
        return group_kernel.group(w, delta, decay, imbalance, metric_scale, groups, saturated=saturated, snaps=snaps)

    def penalty(self, w: Tensor) -> Tensor:
        return self.depth / 2 * (self.size(w) ** (2 / self.depth)).sum()

    def size(self, w: Tensor, groups: Groups | None = None) -> Tensor:
        return (groups or self.partition(w)).sum(w * w).sqrt()

    def default_strength(self, *, decoupled: bool) -> float:
        return 0.06 if decoupled else 1e-4


def _whole(x: object) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= 1


def _integers(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)
