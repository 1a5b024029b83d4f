"""The state of constrained parameters: made lazily, fitted to what a checkpoint brings, saved as torch.optim does."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from symopt.constraints import Constraint
from symopt.constraints.planes.plane import flat, parts
from symopt.optim import compiled, joint
from symopt.optim.checkpoint import check
from symopt.optim.joint_slot import JointSlot
from symopt.optim.options import DEFAULTS, shared_moment
from symopt.optim.slot import Slot
from symopt.optim.steppers import stepper
from symopt_kernels.groups import Groups
from symopt_kernels.reference.gauge import math_dtype
from symopt_kernels.reference.plane import AUTO_STRENGTH_MARGIN

__all__ = ["ConstrainedState"]


class ConstrainedState(torch.optim.Optimizer, ABC):
    """Abstract: what :class:`symopt.optim.ConstrainedOptimizer` keeps beside a parameter."""

    param_groups: list[dict[str, Any]]
    _names: dict[Tensor, str]
    _bound: dict[Tensor, Constraint | None]
    _members: dict[Tensor, tuple[Tensor, ...]]
    """Every parameter of a joint constraint -> all of them, in its order."""
    _groups: dict[Tensor, tuple[torch.Size, Groups]]
    _slots: dict[Tensor, Slot | JointSlot]
    _epoch: int
    number: int
    params: list[Tensor]
    _loading: dict[str, Any] | None

    @abstractmethod
    def _bind(self) -> None:
        """Look every parameter's constraint up again."""

    @abstractmethod
    def _constraint(self, p: Tensor) -> Constraint | None:
        """The constraint ``p`` obeys."""

    def groups(self, p: Tensor, constraint: Constraint) -> Groups | None:
        """The orbits of ``p`` that share one second moment, cached; an index map is the state tensor ``group_index``.

        Under a joint constraint they are those of the flat vector of its members.
        """
        if p in self._members:
            return constraint.partition(joint.template(self._members[p]))
        shape, cached = self._groups.get(p, (None, None))
        index = self.state[p].get("group_index") if p in self.state else None
        if cached is None or shape != p.shape or cached.index is not index:
            cached = constraint.partition(p.detach(), index)
            if cached is not None and (cached.index is index):
                self._groups[p] = (p.shape, cached)
        return cached

    def _per_weight(self, p: Tensor, constraint: Constraint) -> dict[str, Tensor]:
        """Second moments that a group shares, written out for every weight."""
        if own := stepper(constraint):
            return own.per_weight(self.state[p], p)  # type: ignore[no-any-return]
        groups, state = self.groups(p, constraint), self.state[p]
        if groups is None:
            return {}
        # Loaded ones are per weight until the first step.
        shared = [k for k in ("exp_avg_sq", "max_exp_avg_sq") if k in state and state[k].shape == (groups.count,)]
        members = self.members(p)
        place = next(i for i, member in enumerate(members) if member is p)
        values = {k: groups.expand(state[k]).flatten() for k in shared}
        return {k: parts(value, members)[place].contiguous() for k, value in values.items()}

    def members(self, p: Tensor) -> tuple[Tensor, ...]:
        """All parameters under the constraint of ``p``, in its order."""
        return self._members.get(p, (p,))

    def weight(self, p: Tensor) -> Tensor:
        """The weight that the constraint of ``p`` sees: its own, or under a joint one that of all members, flat."""
        return flat(self.members(p)).detach()

    @abstractmethod
    def decoupled(self, group: dict[str, Any]) -> bool:
        """Whether the strength bypasses the preconditioner (AdamW)."""

    def strength(self, group: dict[str, Any], constraint: Constraint, state: dict[str, Any]) -> float | Tensor:
        """The strength in force: the group's, else the constraint's own, else its default for this optimizer.

        That of a plane is automatic: ``AUTO_STRENGTH_MARGIN`` times the running estimate in the parameter's ``state``
        of what it needs, which a step updates for the next; NaN before the first step.
        """
        if group["committed"] and not constraint.is_plane:
            return 0.0
        if group["strength"] is not None:
            return group["strength"]  # type: ignore[no-any-return]
        if constraint.strength is not None:
            return constraint.strength
        if constraint.budget is not None:
            return 0.0  # symopt.Anneal chooses
        if constraint.is_plane:
            return AUTO_STRENGTH_MARGIN * state["critical"] if "critical" in state else math.nan
        return constraint.default_strength(decoupled=self.decoupled(group))

    def automatic(self, group: dict[str, Any], constraint: Constraint) -> bool:
        """Whether the strength is the running estimate of what a fixed structure needs."""
        return constraint.is_plane and group["strength"] is None and constraint.strength is None

    def _ready(self, group: dict[str, Any], p: Tensor, constraint: Constraint | None) -> dict[str, Any]:
        """The state of ``p``: what is missing is made (a checkpoint may bring a part), what does not fit is fitted."""
        state: dict[str, Any] = self.state[p]
        if constraint is not None and "group_index" not in state and (index := constraint.index(p)) is not None:
            state["group_index"] = index
        groups = None if constraint is None else self.groups(p, constraint)
        self._fit(state, p, constraint)
        if constraint is None:
            self._init_moments(group, state, p, None)
            return state
        for key in ("exp_avg_sq", "max_exp_avg_sq"):
            if groups is not None and key in state and state[key].shape == p.shape != (groups.count,):
                state[key] = shared_moment(state[key], groups)
        self._begin(group, [state], (p,), constraint, groups)
        if own := stepper(constraint):
            own.ready(self, group, state, p, constraint)
            return state
        if constraint.carries_factors:
            self._ready_factors(state, p, constraint)
        self._init_moments(group, state, p, groups)
        return state

    def _ready_all(
        self, group: dict[str, Any], members: tuple[Tensor, ...], constraint: Constraint
    ) -> list[dict[str, Any]]:
        """:meth:`_ready` of all members of a constraint."""
        if len(members) == 1:
            return [self._ready(group, members[0], constraint)]
        states, groups = [self.state[p] for p in members], self.groups(members[0], constraint)
        assert groups is not None
        for state, p in zip(states, members, strict=True):
            self._fit(state, p, constraint)
        joint.share(states, members, groups)
        self._begin(group, states, members, constraint, groups)
        for state, p in zip(states, members, strict=True):
            state.update({key: states[0][key] for key in joint.SHARED if key in states[0]})
            self._init_moments(group, state, p, groups)
        return states

    def _fit(self, state: dict[str, Any], p: Tensor, constraint: Constraint | None) -> None:
        """Give what a checkpoint brought the precision it is stepped in."""
        dtype = math_dtype(p)
        for key, value in state.items():
            if key == "step":
                if not isinstance(value, Tensor) or value.dtype not in (torch.float32, torch.float64):
                    state[key] = torch.tensor(float(value), dtype=torch.float32)  # as old checkpoints have it
            elif key == "budget":
                state[key] = value.to(device=p.device, dtype=torch.float64)
            elif isinstance(value, Tensor) and value.is_floating_point() and value.dtype != dtype:
                state[key] = value.to(dtype)
        if constraint is None:
            return
        if p.dtype != dtype and not constraint.carries_factors:
            # Half precision cannot hold the small shrink of a step: without an fp32 copy weights would stop short of
            # zero.  Wherever the weight was changed from outside, it and not the copy is right.
            master = state.get("master")
            state["master"] = p.to(dtype) if master is None else torch.where(master.to(p.dtype) == p, master, p)
        else:
            state.pop("master", None)

    def _begin(
        self,
        group: dict[str, Any],
        states: list[dict[str, Any]],
        members: tuple[Tensor, ...],
        constraint: Constraint,
        groups: Groups | None,
    ) -> None:
        """Create what the constraint itself keeps, in the first of ``states``."""
        state, name = states[0], ", ".join(self._names[p] for p in members)
        automatic = self.automatic(group, constraint)
        if "imbalance" not in state or "metric_scale" not in state:
            w = joint.weight(states, members).detach().to(math_dtype(members[0]))
            # What is known to lie above the critical strength never has to come back.
            c, scale = constraint.start(w, 0.0 if automatic else group["imbalance"], groups)
            if not bool(scale > 0):
                raise ValueError(
                    f"{name} is zero everywhere, and without imbalance zeros are permanent, so it could "
                    "never train; give the optimizer imbalance > 0 or initialise the weight (at depth > 2 only "
                    "gauge='free' has an imbalance, LowRank has none)"
                )
            state["imbalance"], state["metric_scale"] = c, scale
        if constraint.budget is None:
            state.pop("budget", None)
        elif "budget" not in state:
            if group["imbalance_factor"] is None:
                raise RuntimeError(
                    f"{name}: {constraint} is a budget, which has to be ramped in; create "
                    "symopt.Anneal(optimizer, total_steps) before the first step and call its step() after each"
                )
            state["budget"] = torch.tensor([0.0, 0.0, -1.0, group["imbalance_factor"]], dtype=torch.float64)
        if not automatic:
            state.pop("critical", None)
        elif "critical" not in state:
            state["critical"] = torch.zeros_like(state["imbalance"])

    def _ready_plain(self, p: Tensor) -> None:
        """Undo what the native step makes of the state of an unconstrained tensor in half precision."""
        if p.dtype != math_dtype(p):
            for key, value in self.state.get(p, {}).items():
                if key != "step" and isinstance(value, Tensor) and value.dtype == torch.float32:
                    self.state[p][key] = value.to(p.dtype)

    def _ready_factors(self, state: dict[str, Any], p: Tensor, constraint: Constraint) -> None:
        """Factors that compose to the weight; entries of it that were changed from outside are split anew."""
        w, keys = p.detach().to(math_dtype(p)), [f"factor_{i}" for i in range(constraint.depth)]
        if any(key not in state for key in keys):
            state.update(zip(keys, (f.clone() for f in constraint.split(w, state["imbalance"])), strict=True))
            return
        factors = tuple(state[key] for key in keys)
        stale = constraint.compose(factors).to(p.dtype) != p
        # No look whether there are any: nothing may wait for the device.
        for factor, value in zip(factors, constraint.split(w, state["imbalance"]), strict=True):
            factor.copy_(torch.where(stale, value, factor))

    @abstractmethod
    def _init_moments(self, group: dict[str, Any], state: dict[str, Any], p: Tensor, groups: Groups | None) -> None:
        """Create whatever moments are missing from ``state``."""

    def state_dict(self) -> dict[str, Any]:
        """As torch's; second moments shared by a group are written out per weight, so torch.optim can load them."""

        def write_out(_: torch.optim.Optimizer, packed: dict[str, Any]) -> None:
            params = [p for group in self.param_groups for p in group["params"]]
            for index, p in enumerate(params):
                constraint = self._constraint(p)
                if constraint is not None and index in packed["state"]:
                    packed["state"][index] = {**packed["state"][index], **self._per_weight(p, constraint)}

        # First of the hooks, so that a user's hook sees what is saved and has the last word.
        handle = self.register_state_dict_post_hook(write_out, prepend=True)
        try:
            packed: dict[str, Any] = super().state_dict()
        finally:
            handle.remove()
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, and loads torch.optim checkpoints; float state keeps the precision it was saved in.

        Second moments saved per weight are averaged over each group that shares one; group options that torch knows
        nothing of stay as they are if the checkpoint has none.

        Raises:
            ValueError, TypeError: if it is no such optimizer's state, or another's, or does not fit the weights;
                nothing has been touched then.
        """
        # torch casts float state to the parameter's dtype, which costs an fp32 state of bf16 weights its last bits
        # (pytorch #43706).  What the last pre-hook leaves is what gets loaded, so that is what __setstate__ keeps.
        final: dict[str, Any] = {}
        own = [{key: group[key] for key in DEFAULTS} for group in self.param_groups]
        given: Any = state_dict
        if not isinstance(given, dict):
            check(self, given)

        def keep(_: torch.optim.Optimizer, loaded: dict[str, Any]) -> None:
            check(self, loaded)
            final.update(loaded)

        handle = self.register_load_state_dict_pre_hook(keep)
        self._loading = {"final": final, "own": own}
        try:
            super().load_state_dict(state_dict)
        finally:
            self._loading = None
            handle.remove()

    def _restore(self, final: dict[str, Any], own: list[dict[str, Any]]) -> None:
        for group, saved, before in zip(self.param_groups, final["param_groups"], own, strict=True):
            group.update({key: value for key, value in before.items() if key not in saved})
            for i, p in zip(saved["params"], group["params"], strict=True):
                constrained = self._constraint(p) is not None
                for key, value in final["state"].get(i, {}).items():
                    if key == "step" and isinstance(value, Tensor):
                        self.state[p][key] = self.state[p][key].clone()  # torch keeps the checkpoint's own tensor
                    elif constrained and key == "group_index" and value.is_floating_point():
                        del self.state[p][key]  # torch.optim saved it as floats; it is made anew
                    elif constrained and isinstance(value, Tensor):
                        self.state[p][key] = value.detach().to(device=p.device, copy=True)
                    elif constrained and value is None:
                        self.state[p].pop(key)
        self._groups.clear()

    def __getstate__(self) -> dict[str, Any]:
        self._bind()
        return dict(super().__getstate__(), _bound=self._bound, _names=self._names, _members=self._members)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.setdefault("_loading", None)
        # torch takes state that is not empty for that of a parameter that has stepped; a budget's is there before.
        stepped = {p: s for p, s in state["state"].items() if not isinstance(s, dict) or "step" in s}
        super().__setstate__({**state, "state": stepped})
        self.state = state["state"]
        if self._loading is not None:
            self._restore(**self._loading)
        for group in self.param_groups:
            for key, value in DEFAULTS.items():
                group.setdefault(key, self.defaults.get(key, value))
        if "_bound" in state:  # unpickled or deep-copied
            self._groups, self._slots, self._epoch = {}, {}, -1
            self.number = compiled.register(self)
            self.params = [p for group in self.param_groups for p in group["params"]]
            self._bound, self._names = dict(state["_bound"]), dict(state["_names"])
            self._members = dict(state.get("_members", {}))
