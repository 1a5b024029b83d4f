"""Anneal: tells the optimizer how long training is, so that structure has settled when it ends."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from symopt.budgets.pools import BudgetedWeight
from symopt.budgets.schedule import Decision, Scheduled, commit_step, decide, is_due, largest_strength
from symopt.budgets.state import BUDGET, is_committed
from symopt.constraints import Composed
from symopt.constraints.budget import BudgetPlan
from symopt.constraints.planes.plane import parts
from symopt.optim import ConstrainedOptimizer
from symopt.optim.binding import Binding
from symopt.optim.collapse import collapse_steps, metric_scale
from symopt.optim.direction import Options, State
from symopt.optim.own_step import own_step

__all__ = ["Anneal"]


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
        self._warned: set[Tensor] = set()
        self._dead: set[int] = set()
        self._seen: dict[Tensor, tuple[Tensor, int, bool]] = {}
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

    @torch.no_grad()
    def _impose(self) -> None:
        """Give every weight with a budget its strengths and threshold; from the commit on, prune it."""
        due: dict[Scheduled, Binding] = {}
        for group, binding in self.optimizer.bindings():
            constraint = binding.constraint
            if constraint is None or constraint.budget is None:
                continue
            plan = self.plan or constraint.plan
            state = self.optimizer.state.get(binding.parameters[0], {})
            last = commit_step(plan, self.total_steps, self.commit)
            if is_due(plan, self.last_step, last) and not self._is_committed(binding, state):
                if (own := own_step(constraint)) is not None:
                    own.align(group, state, binding.parameters[0])
                due[self._scheduled(group, binding, state)] = binding
        for decision in decide(due, self.last_step, self.total_steps, self.commit, self.plan):
            self._write(due[decision.scheduled], decision)

    def _scheduled(self, group: Options, binding: Binding, state: State) -> Scheduled:
        constraint, p, direction = binding.constraint, binding.parameters[0], self.optimizer.direction
        assert constraint is not None
        groups = binding.groups(state)
        if (own := own_step(constraint)) is not None:
            weight = BudgetedWeight(binding.label, own.sizes(constraint, state, p), constraint, None)
        else:
            states = [self.optimizer.state.get(q, {}) for q in binding.parameters]
            weight = BudgetedWeight(binding.label, binding.stepped_weight(states).detach(), constraint, groups)
        count, most = sum(q.numel() for q in binding.parameters), None
        if direction.scaled_by is not None:
            scale = torch.ones((), device=p.device)
            if group["time_scale"] == "saturated":
                scale = metric_scale(binding, group, state)
            most = largest_strength(constraint, group["lr"], scale, count, weight.units)
        given = group["strength"] if group["strength"] is not None else constraint.strength
        return Scheduled(weight, self._unit(binding, weight.units), given, most)

    def _unit(self, binding: Binding, units: int) -> float | Tensor:
        found = [
            self.optimizer.direction.strength_unit(p, self.optimizer.state.get(p, {}), units)
            for p in binding.parameters
        ]
        if len(found) == 1:
            return found[0]
        squares = [torch.as_tensor(x) ** 2 for x in found]
        return torch.stack(squares).sum().sqrt() if any(isinstance(x, Tensor) for x in found) else found[0]

    def _is_committed(self, binding: Binding, state: State) -> bool:
        """:func:`is_committed`, read once: to look at the tensor is to wait for the device."""
        stored = state.get(BUDGET)
        if stored is None:
            return False
        known = self._seen.get(binding.parameters[0])
        if known is None or known[0] is not stored or known[1] != stored._version:
            known = self._seen[binding.parameters[0]] = stored, stored._version, is_committed(state)
        return known[2]

    def _write(self, binding: Binding, decision: Decision) -> None:
        """State in place, so that its address stays."""
        p, constraint = binding.parameters[0], binding.constraint
        assert constraint is not None
        states = [self.optimizer.state[q] for q in binding.parameters]
        if decision.pruned is not None:
            if (own := own_step(constraint)) is not None:
                own.prune(states[0], p, decision.pruned)
            else:
                weight = decision.scheduled.weight
                pruned = constraint.units(decision.pruned, weight.w, weight.groups)
                for q, state, mask in zip(binding.parameters, states, parts(pruned, binding.parameters), strict=True):
                    for w in (q, state.get("master")):
                        if w is not None:
                            w.masked_fill_(mask, 0.0)
            if "imbalance" in states[0]:
                states[0]["imbalance"].zero_()
        numbers = decision.state.tensor(p.device)
        if BUDGET in states[0]:
            states[0][BUDGET].copy_(numbers)
        else:
            for state in states:
                state[BUDGET] = numbers
        stored = states[0][BUDGET]
        self._seen[p] = stored, stored._version, decision.pruned is not None

    def step(self) -> None:
        """Call once after every ``optimizer.step()``."""
        self.last_step += 1
        if self.last_step == 1:
            self._check()  # Adam's preconditioner is known only now
        self._set()
        self._impose()
        if self.last_step % max(1, self.total_steps // 20) == 0:
            self._warn_dead_tensors()

    def _warn_dead_tensors(self) -> None:
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
        for group, binding in self.optimizer.bindings():
            p, name, constraint = binding.parameters[0], binding.names[0], binding.constraint
            assert constraint is not None
            if p in self._warned:
                continue
            direction, state = self.optimizer.direction, self.optimizer.state.get(p, {})
            lr = max(float(group[key]) for key in ("lr", "initial_lr", "max_lr") if key in group)
            rule = {**group, "lr": lr}
            active = self.total_steps if self.commit is None else self.commit * self.total_steps
            budget, own, decoupled = constraint.budget is not None, None, None
            if budget:  # what leaves the budget last has from the end of the ramp to the commit
                plan = self.plan or constraint.plan
                last = commit_step(plan, self.total_steps, self.commit)
                active = max(1, round(last * (1 - plan.ramp / plan.commit)))
                unit = float(self._scheduled(group, binding, state).unit)
                if unit == 0:
                    continue  # SGD before its first gradient
                own, decoupled = plan.strength_pruned * unit, True
            needed = collapse_steps(binding, direction, rule, state, strength=own, decoupled=decoupled)
            if needed is None or needed <= active:
                continue
            self._warned.add(p)
            factor, strength = needed / active, float(binding.strength(direction, group, state))
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
