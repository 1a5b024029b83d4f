"""GroupBridge: zeros of whole groups and, inside the groups that live, of single weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, final

import torch
from torch import Tensor

from symopt.constraints.base import Constraint, Factors, Outs
from symopt.constraints.group import GroupSparse
from symopt_kernels.groups import Groups
from symopt_kernels.reference.gauge import SNAP, time_scale, weight_scale

__all__ = ["GroupBridge"]


@final
@dataclass(frozen=True, kw_only=True, repr=False)
class GroupBridge(Constraint):
    """Exact zeros of groups and of weights inside them, by the symmetries of ``w_i = s_g u_i v_i``.

    Weight decay kappa on gates and both factors charges the group bridge with exponent 2/3,
    ``kappa * 3/2 * sum_g (sum_i |w_i|)**(2/3)``, i in g: between groups it selects, as a non-convex penalty that
    shrinks large groups less, and inside a group it is an l1 norm.  In the balanced gauge,
    ``s_g**2 = sum_i u_i**2 = sum_i v_i**2`` and ``|u_i| = |v_i|``, one gradient step on all factors is

        w_i' = max(rho - <delta, w_g> / s**2, 0) max(rho - sgn(w_i) s delta_i, 0)**2 w_i,      s**3 = sum_i |w_i|,

    so signs are locked and every zero is permanent.

    Args:
        groups: ``"out"``, ``"in"``, ``"head:<n>"`` or ``"block:<r>x<c>"``, as of :class:`symopt.GroupSparse`.
        strength: kappa, as of :class:`symopt.GroupSparse`.

    Raises:
        TypeError, ValueError: for other ``groups``, one that does not fit the weight, or a bad ``strength``.

    Source: J. Huang, S. Ma, H. Xie & C.-H. Zhang, *A group bridge approach for variable selection*, Biometrika 2009;
    the symmetries: L. Ziyin, ICML 2024 (arXiv 2309.16932), Section 4.

    Example:
        >>> import torch
        >>> from symopt import GroupBridge
        >>> w = torch.tensor([[3.0, -5.0], [0.0, 0.0]])
        >>> GroupBridge("out").size(w)
        tensor([8., 0.])
        >>> GroupBridge("out").penalty(w)
        tensor(6.)
    """

    retraction = "group_bridge"
    depth: ClassVar[int] = 3  # type: ignore[misc]

    groups: str = field(kw_only=False)
    strength: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.groups, str):
            raise TypeError(f"GroupBridge: groups must be a string, got {type(self.groups).__name__}")
        GroupSparse(self.groups)

    def bind(self, name: str, w: Tensor) -> Constraint:
        GroupSparse(self.groups).bind(name, w)
        return self

    def partition(self, w: Tensor, index: Tensor | None = None) -> Groups:
        return GroupSparse(self.groups).partition(w)

    def compose(self, factors: Factors, out: Tensor | None = None) -> Tensor:
        gate, u, v = factors
        return self.partition(u).scale(gate, u * v, out)

    def split(self, w: Tensor, imbalance: Tensor | float = 0.0) -> Factors:
        """Balanced, whatever the ``imbalance``, as of every constraint with more than two factors."""
        groups, gate = self.partition(w), self.size(w) ** (1 / 3)
        inverse = torch.where(gate > 0, 1 / gate.clamp(min=torch.finfo(w.dtype).tiny), 0.0)
        root = groups.scale(inverse, w.abs()).sqrt()
        return gate, root, w.sign() * root

    def pullback(self, factors: Factors, grad: Tensor, out: Outs | None = None) -> Factors:
        gate, u, v = factors
        groups = self.partition(u)
        return groups.sum(grad * u * v), groups.scale(gate, grad * v), groups.scale(gate, grad * u)

    def mirror(self, factors: Factors) -> Factors:
        gate, u, v = factors
        return -gate, -u, v

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
        tiny = torch.finfo(w.dtype).tiny
        gate = self.size(w, groups) ** (1 / 3)

        def per_weight(v: Tensor) -> Tensor:
            return groups.expand(v).reshape(w.shape)

        # How fast the two kinds of factors move, relative to themselves; both bound the time scale.
        radial = groups.sum(delta * w) / (gate * gate).clamp(min=tiny)
        pull = gate * groups.sum(delta * delta).sqrt()
        t = time_scale(3 * gate**4, pull, decay, metric_scale if saturated else None)
        rho = 1 - t * decay
        change = per_weight(rho) - w.sign() * groups.scale(t * gate, delta)
        new = groups.scale((rho - t * radial).clamp(min=0), w) * change.clamp(min=0) ** 2
        new = new + 0 * delta  # the clamp would turn an infinite gradient into a quiet zero
        # A zero attracts a group while its gate decays faster than it is pulled, and so it does a weight.
        least = SNAP * weight_scale(metric_scale, 3)
        snapped = per_weight((self.size(new, groups) <= least) & (pull < decay) & snaps)
        alone = new.abs() <= least / per_weight(groups.size(w))
        alone &= groups.scale(gate, delta).abs() < per_weight(0 * gate + decay)
        alone &= per_weight(snaps) if isinstance(snaps, Tensor) else snaps
        return torch.where(snapped | alone, 0.0, new)

    def penalty(self, w: Tensor) -> Tensor:
        return 1.5 * (self.size(w) ** (2 / 3)).sum()

    def size(self, w: Tensor, groups: Groups | None = None) -> Tensor:
        """``sum_i |w_i|`` of every group."""
        return (groups or self.partition(w)).sum(w.abs())

    def default_strength(self, *, decoupled: bool) -> float:
        return 0.06 if decoupled else 1e-4
