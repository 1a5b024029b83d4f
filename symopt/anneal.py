"""Anneal: tells the optimizer how long training is, so that structure has settled when it ends."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from symopt.budgets.pools import Member, pools
from symopt.budgets.selection import Threshold
from symopt.constraints import Composed, Constraint
from symopt.constraints.budget import BudgetPlan
from symopt.optim import ConstrainedOptimizer
from symopt.optim.options import is_cut
from symopt.optim.steppers import stepper
from symopt_kernels.reference.gauge import math_dtype

__all__ = ["Anneal"]


GENTLE, SMALL = 0.1, 0.05
"""The largest decay of a unit outside a budget per step, relative to the metric, where the budget is more than SMALL:
(1 - .1)**(2 * 20) is 1.5 %.  Smaller ones are met as they are, and half a percent of a ResNet lost 20 points by it."""
_RATE = 25.0  # exp(-25 k / N) passes SNAP after 55 % of training: the rest settles what is left with zeros permanent


class Anneal:
    """Schedule of the imbalance (the plasticity of zeros) over a known number of steps; used like an LR scheduler.

    Each step multiplies every tensor's imbalance by ``exp(-25 / total_steps)``: it reaches 0 after about 55 % of
    training, whatever the learning rate, strength or preconditioner.  Without Anneal it decays at the rate of the
    slowest weights, which is safe but can take long.  In the free gauge, where every weight has its own, all of them
    are multiplied alike.

    With ``commit``, structure found by then is final: from that share of training on the strength is 0, so what is zero
    stays zero and what lives trains without shrinkage (no bias, but no longer the optimum of loss + penalty).

    Weights with a budget (``Sparse(density=)``, ``Sparse(pattern=)``, ``GroupSparse(keep=)``, ``LowRank(rank=)``) need
    an Anneal.  Of their units those outside the budget, the smallest, decay quickly, those inside hardly.  The budget
    tightens by a cubic ramp until 45 % of training; at the ``commit``, for them 60 % if None, what is outside becomes
    exactly zero, and the rest trains on at the fixed support without any decay.  Until then a zero may come back.
    Units are selected anew every 20 steps, exactly.  For ``LowRank`` the ramp runs from 10 to 12 % of training, the
    commit is at 14 %, and no direction comes back.  Under :class:`symopt.SGD`, which has no second moments, strengths
    are in units of the gradient's root mean square.

    Before the first step it warns if ``lr * steps * strength`` is too small to bring even the median weight of some
    tensor to zero, and says what would do.  It knows the steps with strength (up to ``commit``) and the largest lr the
    group names (``lr``, and ``initial_lr`` and ``max_lr``, which torch's schedulers leave there), not the schedule.
    For a budget it warns if what leaves it last has too few steps to decay before it is cut.  During training it warns
    of every tensor that has died as a whole.

    Args:
        optimizer: a symopt optimizer.
        total_steps: number of optimizer steps in the whole training, >= 1.
        commit: share of training in (0, 1) after which the support is fixed; None keeps the strength to the end.

    Raises:
        TypeError: for another kind of optimizer or a non-integer ``total_steps``.
        ValueError: for ``total_steps < 1`` or a ``commit`` outside (0, 1).

    Example:
        >>> import torch, symopt
        >>> net = symopt.constrain(torch.nn.Linear(8, 4), {"weight": symopt.Sparse(strength=0.15)})
        >>> opt = symopt.AdamW(net, lr=5e-2)
        >>> anneal = symopt.Anneal(opt, total_steps=500)
        >>> for _ in range(500):
        ...     opt.zero_grad()
        ...     x = torch.randn(16, 8)
        ...     (net(x) - 3 * x[:, :4]).square().mean().backward()
        ...     opt.step()
        ...     anneal.step()
        >>> opt.state[net.weight]["imbalance"]
        tensor(0.)
    """

    def __init__(
        self,
        optimizer: ConstrainedOptimizer,
        total_steps: int,
        commit: float | None = None,
        *,
        _plan: BudgetPlan | None = None,
    ) -> None:
        if not isinstance(optimizer, ConstrainedOptimizer):
            raise TypeError(
                f"Anneal: optimizer must be a symopt optimizer (SGD, Adam, AdamW), got {type(optimizer).__name__}"
            )
        if isinstance(total_steps, bool) or not isinstance(total_steps, int):
            raise TypeError(f"Anneal: total_steps must be an integer, got {type(total_steps).__name__}")
        if total_steps < 1:
            raise ValueError(f"Anneal: total_steps must be >= 1, got {total_steps}")
        if commit is not None and (isinstance(commit, bool) or not isinstance(commit, (int, float))):
            raise TypeError(f"Anneal: commit must be a number or None, got {commit!r}")
        if commit is not None and not 0 < commit < 1:
            raise ValueError(f"Anneal: commit must be None or a share of training in (0, 1), got {commit}")
        self.optimizer = optimizer
        self.total_steps = total_steps
        self.commit = commit
        self.last_step = 0
        self.plan = _plan
        self._warned: set[int] = set()
        self._dead: set[int] = set()
        self._seen: dict[int, tuple[Tensor, int, bool]] = {}
        self._set()
        self._impose()
        self._check()

    def _set(self) -> None:
        committed = self.commit is not None and self.last_step >= self.commit * self.total_steps
        rate = _RATE if self.commit is None else max(_RATE, math.log(1e7) / self.commit)
        for group in self.optimizer.param_groups:
            group["imbalance_factor"] = 0.0 if committed else math.exp(-rate / self.total_steps)
            group["committed"] = committed

    # -- budgets -----------------------------------------------------------------------------------------------------

    def _plan_of(self, constraint: Constraint) -> tuple[BudgetPlan, int]:
        """The plan of a budget, and the step after which what is outside is cut."""
        plan = self.plan or constraint.plan
        return plan, max(1, round((plan.commit if self.commit is None else self.commit) * self.total_steps))

    def _member(self, p: Tensor, name: str, constraint: Constraint) -> Member:
        state = self.optimizer.state.get(p, {})
        if own := stepper(constraint):
            return Member(name, own.sizes(state, p, constraint), constraint, None)
        return Member(name, state.get("master", p.detach()), constraint, self.optimizer.groups(p, constraint))

    @torch.no_grad()
    def _impose(self) -> None:
        """Give every weight with a budget its strengths and threshold; from the commit on, cut what is outside."""
        held: dict[Member, tuple[dict[str, Any], Tensor]] = {}
        for group, p, name, constraint in self.optimizer.constrained():
            if constraint.budget is None:
                continue
            plan, last = self._plan_of(constraint)
            due = self.last_step % plan.every == 0 or self.last_step in (1, last)
            state = self.optimizer.state.get(p, {})
            if not due or self._is_cut(p, state):
                continue
            if own := stepper(constraint):
                own.align(group, state, p)
            held[self._member(p, name, constraint)] = group, p
        for pool in pools(held):
            plan, last = self._plan_of(pool.members[0].constraint)
            if self.last_step >= last:
                for m, outside in zip(pool.members, pool.pruned(), strict=True):
                    self._cut(held[m][1], m.constraint, m.constraint.units(outside, m.w, m.groups))
                continue
            first, full = (last * share / plan.commit for share in (plan.begin, plan.ramp))
            left = min(1.0, max(0.0, 1 - (self.last_step - first) / (full - first))) ** 3
            for m, limit in zip(pool.members, pool.thresholds(pool.at(left)), strict=True):
                self._trim(*held[m], m, pool.share, limit, left)

    def _is_cut(self, p: Tensor, state: dict[str, Any]) -> bool:
        """:func:`is_cut`, read once: to look at the tensor is to wait for the device."""
        trim = state.get("budget")
        if trim is None:
            return False
        known = self._seen.get(id(p))
        if known is None or known[0] is not trim or known[1] != trim._version:
            known = self._seen[id(p)] = trim, trim._version, is_cut(state)
        return known[2]

    def _trim(self, group: dict[str, Any], p: Tensor, m: Member, share: float, limit: Threshold, left: float) -> None:
        unit = self._unit(group, p, m)
        own = group["strength"] if group["strength"] is not None else m.constraint.strength
        plan, last = self._plan_of(m.constraint)
        inside = plan.strength_kept * math.log(1 / share) if own is None else own
        outside = self._outside(group, p, m, plan, unit, share)
        # A pattern has no threshold that could prune one weight after the other: the strength grows instead.
        outside = outside * (1 - left) if m.budget.pattern else outside
        keep = math.exp(-plan.plasticity / last)
        trim = torch.tensor([0.0, 0.0, 0.0, keep], dtype=torch.float64, device=p.device)
        trim[0], trim[1], trim[2] = inside * unit, outside, limit
        self._write(p, trim, cut=False)

    def _write(self, p: Tensor, trim: Tensor, *, cut: bool) -> None:
        """In place, so that its address stays."""
        state = self.optimizer.state[p]
        if "budget" in state:
            state["budget"].copy_(trim)
        else:
            state["budget"] = trim
        self._seen[id(p)] = state["budget"], state["budget"]._version, cut

    def _unit(self, group: dict[str, Any], p: Tensor, m: Member) -> float | Tensor:
        """What a strength of 1 means: 1 with Adam's preconditioner, without it the rms of the gradient."""
        if "betas" in group:
            return 1.0
        grad = p.grad if p.grad is not None else self.optimizer.state[p].get("momentum_buffer")
        if grad is None:
            return 0.0
        rms = grad.detach().to(math_dtype(p)).square().mean().sqrt()
        return rms * math.sqrt(p.numel() / m.units)

    def _outside(
        self, group: dict[str, Any], p: Tensor, m: Member, plan: BudgetPlan, unit: float | Tensor, share: float
    ) -> float | Tensor:
        """The strength outside a budget."""
        outside = plan.strength_pruned * unit
        if m.budget.pattern or m.constraint.is_matrix or share <= SMALL or "betas" not in group:
            return outside
        # Units without a gradient fill a large budget, and do not come back: what drifts over the threshold must be
        # alive when the next selection looks.
        scale = torch.ones(())
        if group["time_scale"] == "saturated":
            scale = _metric_scale(self.optimizer, group, p, m.constraint)
        rate = torch.as_tensor(group["lr"]) * math.sqrt(p.numel() / m.units)
        return torch.as_tensor(outside, device=p.device).minimum((GENTLE * scale / rate).to(p.device))

    def _cut(self, p: Tensor, constraint: Constraint, gone: Tensor) -> None:
        state = self.optimizer.state[p]
        if own := stepper(constraint):
            own.cut(state, p, gone)
        else:
            for w in (p, state.get("master")):
                if w is not None:
                    w.masked_fill_(gone, 0.0)
        self._write(p, torch.tensor([0.0, 0.0, -1.0, 0.0], dtype=torch.float64, device=p.device), cut=True)
        if "imbalance" in state:
            state["imbalance"].zero_()

    def step(self) -> None:
        """Call once after every ``optimizer.step()``."""
        self.last_step += 1
        if self.last_step == 1:
            self._check()  # Adam's preconditioner is known only now
        self._set()
        self._impose()
        if self.last_step % max(1, self.total_steps // 20) == 0:
            self._mourn()

    def _mourn(self) -> None:
        """Warn once of every weight that has become zero for good, all of it."""
        for _, p, name, _ in self.optimizer.constrained():
            imbalance = self.optimizer.state.get(p, {}).get("imbalance")
            final = imbalance is not None and not bool(imbalance.any())
            if final and id(p) not in self._dead and not bool(p.any()):
                self._dead.add(id(p))
                warnings.warn(
                    f"{name}: all of its weights have become zero and stay zero; give it a smaller strength, or a "
                    "budget, which every tensor survives",
                    stacklevel=3,
                )

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers; save it beside the optimizer's."""
        return {"total_steps": self.total_steps, "commit": self.commit, "last_step": self.last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken."""
        self.total_steps, self.commit = state_dict["total_steps"], state_dict["commit"]
        self.last_step = state_dict["last_step"]
        self._set()

    def _check(self) -> None:
        for group, p, name, constraint in self.optimizer.constrained():
            if id(p) in self._warned or self.optimizer.members(p)[0] is not p:
                continue  # one warning for all members of a joint constraint
            lr = max(float(group[key]) for key in ("lr", "initial_lr", "max_lr") if key in group)
            rule = {**group, "lr": lr}
            active = self.total_steps if self.commit is None else self.commit * self.total_steps
            budget = constraint.budget is not None
            if budget:  # what leaves the budget last has from the end of the ramp to the commit
                plan, last = self._plan_of(constraint)
                active = max(1, round(last * (1 - plan.ramp / plan.commit)))
                unit = float(self._unit(group, p, self._member(p, name, constraint)))
                if unit == 0:
                    continue  # SGD before its first gradient
                rule |= {"decoupled_weight_decay": True, "strength": plan.strength_pruned * unit}
            needed = collapse_steps(self.optimizer, rule, p, constraint)
            if needed is None or needed <= active:
                continue
            self._warned.add(id(p))
            state = self.optimizer.state.get(p, {})
            factor, strength = needed / active, float(self.optimizer.strength(group, constraint, state))
            listed = isinstance(constraint, Composed)  # its strength multiplies those in the list
            if budget and not math.isinf(factor):
                fix = f"use lr >= {lr * factor:.2g} or {math.ceil(self.total_steps * factor)} steps"
                warnings.warn(
                    f"{name}: {self.total_steps} steps at lr {lr:.2g} are too few to ramp its budget in; what is cut "
                    f"will not have decayed; {fix}",
                    stacklevel=3,
                )
                continue
            if math.isinf(factor):
                fix = "give an lr > 0" if lr == 0 else "give a strength > 0"
            else:
                more = f"strengths {factor:.2g} times as large" if listed else f"strength >= {strength * factor:.2g}"
                fix = f"use lr >= {lr * factor:.2g}, {more}, or {math.ceil(self.total_steps * factor)} steps"
            at = f"lr {lr:.2g}" if listed else f"lr {lr:.2g} and strength {strength:.2g}"
            before = "" if self.commit is None else " before the commit"
            warnings.warn(
                f"{name}: {math.floor(active)} steps{before} at {at} are too few to bring even its median weight to "
                f"zero without a gradient; {fix}",
                stacklevel=3,
            )


def _metric_scale(optimizer: ConstrainedOptimizer, group: dict[str, Any], p: Tensor, constraint: Constraint) -> Tensor:
    """The state's, or before the first step what it will be."""
    state = optimizer.state.get(p, {})
    if "metric_scale" in state:
        return state["metric_scale"]  # type: ignore[no-any-return]
    groups, w = optimizer.groups(p, constraint), optimizer.weight(p).float()
    return constraint.start(w, group["imbalance"], groups)[1]


@torch.no_grad()
def collapse_steps(
    optimizer: ConstrainedOptimizer, group: dict[str, Any], p: torch.Tensor, constraint: Any
) -> float | None:
    """Steps at the current rate until the median live unit of ``p`` is zero if no gradient holds it.

    None while the preconditioner or an automatic strength is unknown (before the first step), 0 if nothing lives.
    """
    gain = optimizer.gain(group, p, constraint)
    if gain is None:
        return None
    state = optimizer.state.get(p, {})
    strength = optimizer.strength(group, constraint, state)
    if math.isnan(strength):
        return None
    groups, w = optimizer.groups(p, constraint), optimizer.weight(p).float()
    scale = _metric_scale(optimizer, group, p, constraint)
    size = constraint.size(w, groups)
    live = size > 0
    if not bool(live.any()):
        return 0.0
    charge = torch.as_tensor(constraint.strength_multiplier(w, decoupled=optimizer.decoupled(group))).flatten()
    rate = constraint.per_unit(group["lr"] * strength * torch.as_tensor(gain).flatten() * charge, w)
    need = constraint.collapse(size, scale, saturated=group["time_scale"] == "saturated") / rate
    return float(need[live].median())
