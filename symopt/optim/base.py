"""What every symopt optimizer shares: which parameters are constrained, their state, checkpoints, and the step.

A symopt optimizer *is* its torch.optim counterpart.  Parameters without a constraint go through torch's own code, so
their trajectories are torch's to the last bit; a constrained one takes ``retraction(direction(gradient))``.  A new
optimizer is one file that says what its direction is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _use_grad_for_differentiable

from symopt import annotation
from symopt.constraints import Constraint
from symopt.optim.options import DEFAULTS, OWN_STATE, check_group, math_dtype, shared_moment
from symopt_kernels import reference
from symopt_kernels.reference import Groups

__all__ = ["ConstrainedOptimizer"]


class ConstrainedOptimizer(torch.optim.Optimizer, ABC):
    """Abstract mixin in front of a torch.optim class.

    Args:
        params: a module, or anything torch.optim takes: parameters, named parameters, or groups of them.  Constraints
            are found by the parameter itself, so every form finds them.
        strength: overrides the constraints' own; a number, a 0-dim tensor or None.  Group key ``"strength"``, so it
            may be scheduled like ``lr``.
        time_scale: ``"saturated"`` (a weight above its tensor's typical size moves as under the plain optimizer) or
            ``"none"`` (steps of the explicit factors to the letter; large weights move by a fixed factor per step).
        imbalance: initial plasticity c of each tensor, in units of its root mean square; 0 locks signs and makes zeros
            permanent from the start.  It decays by itself (see :class:`symopt.Anneal` for a schedule).

    ``weight_decay`` keeps torch's meaning and applies to unconstrained parameters only.
    """

    param_groups: list[dict[str, Any]]

    def __init__(
        self,
        params: Any,
        *args: Any,
        strength: float | Tensor | None = None,
        time_scale: str = "saturated",
        imbalance: float = 1.0,
        **kwargs: Any,
    ) -> None:
        self._names: dict[Tensor, str] = {}
        self._bound: dict[Tensor, Constraint | None] = {}
        self._groups: dict[Tensor, Groups] = {}
        self._epoch = -1
        self._loading: dict[str, Any] | None = None
        given = {**DEFAULTS, "strength": strength, "time_scale": time_scale, "imbalance": imbalance}
        check_group(given, type(self).__name__)
        if hasattr(params, "named_parameters"):
            params = params.named_parameters()
        super().__init__(params, *args, **kwargs)
        self.defaults.update(given)
        for group in self.param_groups:
            for key, value in given.items():
                group.setdefault(key, value)
        # GradScaler then unscales and skips itself; torch's fused path would hide found_inf from the constrained step.
        self._step_supports_amp_scaling = False
        self._bind()
        annotation.register_owner(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict):  # torch says what is wrong with anything else
            check_group(param_group, type(self).__name__)
        super().add_param_group(param_group)
        if self._epoch >= 0:  # not while torch's constructor adds the first groups
            try:
                self._bind()
            except ValueError:
                self.param_groups.pop()
                raise

    # -- whose constraint is it ----------------------------------------------------------------------------------

    def _bind(self) -> None:
        """Look every parameter up again; those a module no longer vouches for keep what they had."""
        found, factors = annotation.constraints_by_parameter(), annotation.factors()
        bound: dict[Tensor, Constraint | None] = {}
        names: dict[Tensor, str] = {}
        for group in self.param_groups:
            for p in group["params"]:
                if id(p) in factors:
                    raise ValueError(
                        f"{type(self).__name__}: the parameters hold factors of an explicit constraint, which this "
                        "optimizer would constrain twice; use torch.optim with symopt.param_groups(model), or "
                        "constrain(..., mode='optimizer')"
                    )
                name, constraint = found.get(id(p), (self._names.get(p, "a parameter"), self._bound.get(p)))
                bound[p], names[p] = constraint, name
                if constraint is not None:
                    self._check_supported(name, group, constraint)
        self._bound, self._names = bound, names
        self._groups = {p: g for p, g in self._groups.items() if p in bound}
        self._epoch = annotation.epoch()

    def _check_supported(self, name: str, group: dict[str, Any], constraint: Constraint) -> None:
        """Raise if this optimizer's settings cannot step a constrained parameter."""

    def _constraint(self, p: Tensor) -> Constraint | None:
        if self._epoch != annotation.epoch() or p not in self._bound:
            self._bind()
        return self._bound[p]

    def owns(self, param: Tensor) -> bool:
        """Whether ``param`` is in one of the groups."""
        return any(param is p for group in self.param_groups for p in group["params"])

    def forget(self, param: Tensor) -> None:
        """Treat ``param`` as unconstrained from now on (:func:`symopt.release` calls this); moments stay."""
        constraint = self._bound.pop(param, None)
        if constraint is None or param not in self.state:
            return
        state = self.state[param]
        per_weight = self._per_weight(param, constraint)
        for key in [key for key in state if key in OWN_STATE or key.startswith("factor_")]:
            del state[key]
        state.update(per_weight)
        for key, value in state.items():
            if key != "step" and isinstance(value, Tensor):
                state[key] = value.to(param.dtype)
        self._groups.pop(param, None)

    def constrained(self) -> Iterator[tuple[dict[str, Any], Tensor, str, Constraint]]:
        """Group, parameter, name and constraint of every constrained parameter."""
        for group in self.param_groups:
            for p in group["params"]:
                constraint = self._constraint(p)
                if constraint is not None:
                    yield group, p, self._names[p], constraint

    def strength(self, group: dict[str, Any], constraint: Constraint) -> float | Tensor:
        """The strength in force: the group's, else the constraint's own, else its default for this optimizer."""
        if group["committed"]:
            return 0.0
        if group["strength"] is not None:
            return group["strength"]  # type: ignore[no-any-return]
        if constraint.strength is not None:
            return constraint.strength
        return constraint.default_strength(decoupled=self.decoupled(group))

    def groups(self, p: Tensor, constraint: Constraint) -> Groups | None:
        """The partition of ``p`` into units, cached; an index map is the state tensor ``group_index``."""
        cached = self._groups.get(p)
        index = self.state[p].get("group_index") if p in self.state else None
        if cached is None or cached.index is not index:
            cached = constraint.partition(p.detach(), index)
            if cached is not None and (cached.index is index):
                self._groups[p] = cached
        return cached

    # -- the step --------------------------------------------------------------------------------------------------

    @abstractmethod
    def decoupled(self, group: dict[str, Any]) -> bool:
        """Whether the strength bypasses the preconditioner (AdamW)."""

    @abstractmethod
    def gain(self, group: dict[str, Any], p: Tensor, constraint: Constraint) -> Tensor | float | None:
        """What multiplies ``lr * strength`` in the step of ``p``; None if unknown before a first gradient."""

    @abstractmethod
    def _direction(
        self, group: dict[str, Any], state: dict[str, Any], w: Tensor, grad: Tensor, groups: Groups | None
    ) -> tuple[Tensor, Tensor | float]:
        """Update the moments in ``state`` and return ``update, gain``."""

    @abstractmethod
    def _step_plain(self, group: dict[str, Any]) -> None:
        """Step the unconstrained parameters of ``group`` with torch's own functions."""

    def _init_group(self, group: dict[str, Any], *lists: Any, **kwargs: Any) -> Any:
        plain = [p for p in group["params"] if self._constraint(p) is None]
        return super()._init_group({**group, "params": plain}, *lists, **kwargs)  # type: ignore[misc]

    def _per_weight(self, p: Tensor, constraint: Constraint) -> dict[str, Tensor]:
        """Second moments that a group shares, written out for every weight."""
        groups = self.groups(p, constraint)
        shared = [k for k in ("exp_avg_sq", "max_exp_avg_sq") if groups is not None and k in self.state[p]]
        return {k: groups.expand(self.state[p][k]).reshape(p.shape).contiguous() for k in shared if groups}

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimization step, as ``torch.optim.Optimizer.step``."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_plain(group)
            for p in group["params"]:
                constraint = self._constraint(p)
                if constraint is not None and p.grad is not None:
                    self._step_constrained(group, p, constraint)
        return loss

    def _step_constrained(self, group: dict[str, Any], p: Tensor, constraint: Constraint) -> None:
        grad = p.grad
        assert grad is not None
        if grad.is_sparse:
            raise RuntimeError(
                f"{self._names[p]}: sparse gradients are not supported for constrained parameters; use sparse=False, "
                "or leave this parameter out of symopt.constrain"
            )
        state = self._ready(group, p, constraint)
        groups, saturated = self.groups(p, constraint), group["time_scale"] == "saturated"
        w, grad = state.get("master", p), grad.to(math_dtype(p))
        if group["differentiable"]:
            w = w.clone()  # the step saves it for backward and then overwrites it
        update, gain = self._direction(group, state, w, -grad if group["maximize"] else grad, groups)
        charge = constraint.charge(w, decoupled=self.decoupled(group))
        delta, decay = group["lr"] * update, group["lr"] * self.strength(group, constraint) * gain * charge
        c, scale = state["imbalance"], state["metric_scale"]
        if constraint.carries_factors:
            stored = tuple(state[f"factor_{i}"] for i in range(constraint.depth))
            factors = stored
            if group["imbalance_decay"] is not None:
                # Before the step: at a commit the strength is 0 from here on, and a zero must not start with a partner.
                factors = reference.rebalance(stored, group["imbalance_decay"])
            new, moved = constraint.advance(factors, delta, decay, scale, saturated=saturated)
            # A product rounds, so where no factor moved the weight is left alone: a step with lr 0 changes no bit.
            still = torch.stack([f == m for f, m in zip(factors, moved, strict=True)]).all(0)
            p.copy_(torch.where(still, p, new.to(p.dtype)))
            for i, (before, value) in enumerate(zip(stored, moved, strict=True)):
                self._update(group, state, f"factor_{i}", torch.where(still, before, value))
            return
        new = constraint.retract(w, delta, decay, c, scale, groups, saturated=saturated)
        p.copy_(new)
        if "master" in state:
            self._update(group, state, "master", new)
        if group["imbalance_decay"] is None:
            c = reference.imbalance_law(c, decay, scale, constraint.size(new, groups), saturated=saturated)
        else:
            c = c * group["imbalance_decay"]
            c = torch.where(c <= reference.SNAP * scale, 0.0, c)
        self._update(group, state, "imbalance", c)

    @staticmethod
    def _update(group: dict[str, Any], state: dict[str, Any], key: str, value: Tensor) -> None:
        """Write state in place, so that its address stays; out of place where a graph goes through the step."""
        if group["differentiable"]:
            state[key] = value
        else:
            state[key].copy_(value)

    # -- state -----------------------------------------------------------------------------------------------------

    def _ready(self, group: dict[str, Any], p: Tensor, constraint: Constraint) -> dict[str, Any]:
        """The state of ``p``: what is missing is made (a checkpoint may bring a part), what does not fit is fitted."""
        state: dict[str, Any] = self.state[p]
        dtype = math_dtype(p)
        if "group_index" not in state and (index := constraint.index(p)) is not None:
            state["group_index"] = index
        groups = self.groups(p, constraint)
        for key, value in state.items():
            if isinstance(value, Tensor) and value.is_floating_point() and key != "step" and value.dtype != dtype:
                state[key] = value.to(dtype)
        if p.dtype != dtype and not constraint.carries_factors:
            # Half precision cannot hold the small shrink of a step: without an fp32 copy weights would stop short of
            # zero.  Wherever the weight was changed from outside, it and not the copy is right.
            master = state.get("master")
            state["master"] = p.to(dtype) if master is None else torch.where(master.to(p.dtype) == p, master, p)
        else:
            state.pop("master", None)
        for key in ("exp_avg_sq", "max_exp_avg_sq"):
            if groups is not None and key in state and state[key].shape == p.shape != (groups.count,):
                state[key] = shared_moment(state[key], groups)
        if "imbalance" not in state or "metric_scale" not in state:
            w = p.detach().to(dtype)
            c, scale = constraint.start(w, group["imbalance"], groups)
            if not bool(scale > 0):
                raise ValueError(
                    f"{self._names[p]} is zero everywhere, and without imbalance zeros are permanent, so it could "
                    "never train; give the optimizer imbalance > 0 or initialise the weight (at depth > 2 only "
                    "gauge='free' has an imbalance)"
                )
            state["imbalance"], state["metric_scale"] = c, scale
        if constraint.carries_factors:
            self._ready_factors(state, p, constraint)
        self._init_moments(group, state, p, groups)
        return state

    def _ready_factors(self, state: dict[str, Any], p: Tensor, constraint: Constraint) -> None:
        """Factors that compose to the weight; entries of it that were changed from outside are split anew."""
        w, keys = p.detach().to(math_dtype(p)), [f"factor_{i}" for i in range(constraint.depth)]
        if any(key not in state for key in keys):
            state.update(zip(keys, (f.clone() for f in constraint.split(w, state["imbalance"])), strict=True))
            return
        factors = tuple(state[key] for key in keys)
        stale = constraint.compose(factors).to(p.dtype) != p
        if bool(stale.any()):
            fresh = constraint.split(w, state["imbalance"])
            for factor, value in zip(factors, fresh, strict=True):
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
        """
        # torch casts float state to the parameter's dtype, which costs an fp32 state of bf16 weights its last bits
        # (pytorch #43706).  What the last pre-hook leaves is what gets loaded, so that is what __setstate__ keeps.
        final: dict[str, Any] = {}
        own = [{key: group[key] for key in DEFAULTS} for group in self.param_groups]
        handle = self.register_load_state_dict_pre_hook(lambda _, loaded: final.update(loaded))
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
        return dict(super().__getstate__(), _bound=self._bound, _names=self._names)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.setdefault("_loading", None)
        super().__setstate__(state)
        if self._loading is not None:
            self._restore(**self._loading)
        for group in self.param_groups:
            for key, value in DEFAULTS.items():
                group.setdefault(key, self.defaults.get(key, value))
        if "_bound" in state:  # unpickled or deep-copied
            self._groups, self._epoch = {}, -1
            self._step_supports_amp_scaling = False
            self._bound, self._names = dict(state["_bound"]), dict(state["_names"])
            annotation.register_owner(self)
