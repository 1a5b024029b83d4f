"""What every symopt optimizer shares: which parameters are constrained, their state, checkpoints, and the step.

A symopt optimizer *is* its torch.optim counterpart.  Parameters without a constraint go through torch's own code, so
their trajectories are torch's to the last bit; a constrained one takes ``retraction(direction(gradient))``.  A new
optimizer is one file that says what its direction is.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from symopt.backends import BACKENDS, FUSED, check_backend, choose, why_not
from symopt.constraints import Constraint
from symopt.optim import compiled, joint, registry
from symopt.optim.joint_slot import JointSlot
from symopt.optim.launch import step_native, step_triton
from symopt.optim.options import DEFAULTS, OWN_STATE, check_group
from symopt.optim.slot import Slot
from symopt.optim.state import ConstrainedState
from symopt.optim.steppers import stepper
from symopt_kernels.groups import Groups
from symopt_kernels.reference import elementwise, gauge
from symopt_kernels.reference.gauge import math_dtype
from symopt_kernels.triton import launch as triton_launch

__all__ = ["ConstrainedOptimizer"]


class ConstrainedOptimizer(ConstrainedState):
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
        backend: which kernel steps the constrained tensors: None for the best that can (:func:`symopt.explain` lists
            them), ``"native"``, ``"triton"`` or ``"reference"``; a named one is used or an error says why not, and the
            first two then step unconstrained tensors too, with float32 moments for those in half precision.

    ``weight_decay`` keeps torch's meaning and applies to unconstrained parameters only.
    """

    def __init__(
        self,
        params: Any,
        *args: Any,
        strength: float | Tensor | None = None,
        time_scale: str = "saturated",
        imbalance: float = 1.0,
        backend: str | None = None,
        **kwargs: Any,
    ) -> None:
        self._names = {}
        self._bound = {}
        self._members = {}
        self._groups = {}
        self._slots: dict[Tensor, Slot | JointSlot] = {}
        self._epoch = -1
        self._loading = None
        given = {"strength": strength, "time_scale": time_scale, "imbalance": imbalance, "backend": backend}
        given = {**DEFAULTS, **given}
        check_group(given, type(self).__name__)
        if hasattr(params, "named_parameters"):
            params = params.named_parameters()
        super().__init__(params, *args, **kwargs)
        self.defaults.update(given)
        for group in self.param_groups:
            for key, value in given.items():
                group.setdefault(key, value)
        self._bind()
        self.number = compiled.register(self)
        registry.register_owner(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_bound" in state:  # unpickled or deep-copied
            registry.register_owner(self)

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
        """Look every parameter up again; those that no module has any more keep what they had."""
        found, factors = registry.bound(), registry.factors()
        bound, members = dict[Tensor, Constraint | None](), dict[Tensor, tuple[Tensor, ...]]()
        names: dict[Tensor, str] = {}
        for group in self.param_groups:
            given = group.get("param_names", ["a parameter"] * len(group["params"]))
            for p, own in zip(group["params"], given, strict=True):
                if id(p) in factors:
                    raise ValueError(
                        f"{type(self).__name__}: the parameters hold factors of an explicit constraint, which this "
                        "optimizer would constrain twice; use torch.optim with symopt.param_groups(model), or "
                        "constrain(..., mode='optimizer')"
                    )
                row, name, constraint = found.get(id(p)), self._names.get(p, own), self._bound.get(p)
                name, constraint = (name, constraint) if row is None else (row.name(p), row.constraint)
                bound[p], names[p] = constraint, name
                if constraint is not None:
                    self._check_supported(name, group, constraint)
                if constraint is not None and constraint.binds_many:
                    together = self._members.get(p, (p,)) if row is None else row.parameters
                    joint.check(type(self).__name__, group, name, together, row)
                    if len(together) > 1:
                        members[p] = together
        self._bound, self._names, self._members = bound, names, members
        self._groups = {p: g for p, g in self._groups.items() if p in bound}
        self._slots = {}
        self.params = list(bound)
        self._epoch = registry.epoch()

    def _check_supported(self, name: str, group: dict[str, Any], constraint: Constraint) -> None:
        """Raise if this optimizer's settings cannot step a constrained parameter."""

    def _constraint(self, p: Tensor) -> Constraint | None:
        if self._epoch != registry.epoch() or p not in self._bound:
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
        if param in self._members and isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].clone()  # from now on every member counts for itself
        self._groups.pop(param, None)

    def constrained(self) -> Iterator[tuple[dict[str, Any], Tensor, str, Constraint]]:
        """Group, parameter, name and constraint of every constrained parameter."""
        for group in self.param_groups:
            for p in group["params"]:
                constraint = self._constraint(p)
                if constraint is not None:
                    yield group, p, self._names[p], constraint

    # -- the step --------------------------------------------------------------------------------------------------

    @abstractmethod
    def gain(self, group: dict[str, Any], p: Tensor, constraint: Constraint) -> Tensor | float | None:
        """What multiplies ``lr * strength`` in the step of ``p``; None if unknown before a first gradient."""

    @abstractmethod
    def preconditioner(self, group: dict[str, Any], p: Tensor) -> Tensor | None:
        """What the direction divides the gradient's mean by, inverted; None if nothing, or before the first step."""

    @abstractmethod
    def _direction(
        self, group: dict[str, Any], state: dict[str, Any], w: Tensor, grad: Tensor, groups: Groups | None
    ) -> tuple[Tensor, Tensor | float]:
        """Update the moments in ``state`` and return ``update, gain``."""

    @abstractmethod
    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        """State keys of the moments this group's direction keeps."""

    @abstractmethod
    def _settings(self, group: dict[str, Any]) -> dict[str, Any]:
        """The direction and its numbers, as :func:`symopt_kernels.native.step` takes them."""

    @abstractmethod
    def _step_plain(self, group: dict[str, Any]) -> None:
        """Step the unconstrained parameters of ``group`` with torch's own functions."""

    def _init_group(self, group: dict[str, Any], *lists: Any, **kwargs: Any) -> Any:
        plain = [p for p in group["params"] if self._constraint(p) is None]
        return super()._init_group({**group, "params": plain}, *lists, **kwargs)  # type: ignore[misc]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimization step, as ``torch.optim.Optimizer.step``; ``torch.compile`` sees it as one operator."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        differentiable = self.defaults["differentiable"]
        with torch.set_grad_enabled(differentiable):
            if torch.compiler.is_compiling() and not differentiable:
                compiled.trace(self)
            else:
                self.take_step()
        return loss

    def take_step(self) -> None:
        """The step itself, in the caller's grad mode."""
        found_inf = getattr(self, "found_inf", None)
        waits = found_inf is not None and found_inf.device.type == "cpu" and not triton_launch.INTERPRETED
        if waits and bool(found_inf):
            return  # GradScaler's gradients overflowed: nothing moves, the step count neither
        for group in self.param_groups:
            slots, rest, plain = self._plan(group)
            here = [slot for slot in slots if slot.backend == "native"]
            # The kernels on the device look at found_inf themselves; for all others the host has to wait for it.
            if (here or rest or plain) and (found_inf is None or not bool(found_inf)):
                if plain:
                    self._step_plain(group)
                for held, constraint in rest:
                    self._step_reference(group, held, constraint)
                if here:
                    step_native(self, group, here)
            if there := [slot for slot in slots if slot.backend == "triton"]:
                step_triton(self, group, there)

    def _plan(
        self, group: dict[str, Any]
    ) -> tuple[list[Slot | JointSlot], list[tuple[tuple[Tensor, ...], Constraint]], bool]:
        """What has a gradient: for fused kernels, for the reference, and whether torch has anything to step."""
        slots: list[Slot | JointSlot] = []
        rest: list[tuple[tuple[Tensor, ...], Constraint]] = []
        plain = False
        check_backend(type(self).__name__, group["backend"])
        key = (group["backend"], group["differentiable"], self._moments(group))
        if self._epoch != registry.epoch():
            self._bind()
        bound = self._bound
        for p in group["params"]:
            if (constraint := bound[p] if p in bound else self._constraint(p)) is not None and constraint.is_plane:
                members = self.members(p)
                if p is members[0] and any(member.grad is not None for member in members):
                    if (joined := self._joint_slot(group, members, constraint, key)) is None:
                        rest.append((members, constraint))
                    else:
                        slots.append(joined)
                continue
            if p.grad is None:
                continue
            slot = self._slots.get(p)
            if not isinstance(slot, Slot) or not slot.holds(self.state[p], key):
                if constraint is None and group["backend"] not in FUSED:
                    plain = True
                    self._ready_plain(p)
                    continue
                if (backend := self._backend(group, p, constraint)) == "reference":
                    assert constraint is not None
                    rest.append(((p,), constraint))
                    continue
                state = self._ready(group, p, constraint)
                groups = None if constraint is None else self.groups(p, constraint)
                try:
                    slot = self._slots[p] = Slot(p, constraint, state, groups, key, backend)
                except ValueError as error:
                    raise ValueError(f"{self._names[p]}: {error}") from None
            slots.append(slot)
        for p in [*(p for slot in slots for p in slot.members), *(p for held, _ in rest for p in held)]:
            if p.grad is not None and p.grad.layout is not torch.strided:
                way = "leave backend at None" if self._constraint(p) is None else "leave it out of symopt.constrain"
                reason = f"sparse gradients are not supported here; use sparse=False or {way}"
                raise RuntimeError(f"{self._names[p]}: {reason}")
        return slots, rest, plain

    def _joint_slot(
        self, group: dict[str, Any], members: tuple[Tensor, ...], constraint: Constraint, key: tuple[Any, ...]
    ) -> JointSlot | None:
        """What a fused kernel needs to know of a plane; None if the reference steps it."""
        p, key = members[0], (self.automatic(group, constraint), *key)
        slot = self._slots.get(p)
        if isinstance(slot, JointSlot) and slot.holds([self.state[q] for q in members], key):
            return slot
        if (backend := self._backend(group, p, constraint)) == "reference":
            return None
        states = self._ready_all(group, members, constraint)
        try:
            slot = self._slots[p] = JointSlot(members, constraint, states, self.groups(p, constraint), key, backend)
        except ValueError as error:
            raise ValueError(f"{self._names[p]}: {error}") from None
        return slot

    def _backend(self, group: dict[str, Any], p: Tensor, constraint: Constraint | None) -> str:
        return choose(group["backend"], self._names[p], self._reasons(group, p, constraint))

    def _reasons(self, group: dict[str, Any], p: Tensor, constraint: Constraint | None) -> dict[str, str | None]:
        members, differentiable = self.members(p), group["differentiable"]
        groups = None if constraint is None or len(members) > 1 else self.groups(p, constraint)
        found = {
            b: [why_not(b, q, constraint, groups, differentiable=differentiable) for q in members] for b in BACKENDS
        }
        return {b: next(filter(None, reasons), None) for b, reasons in found.items()}

    def backends(self) -> Iterator[tuple[str, str, dict[str, str | None]]]:
        """Name, backend and, per backend, why not that one, of every parameter (:func:`symopt.explain` prints it)."""
        for group in self.param_groups:
            for p in group["params"]:
                constraint = self._constraint(p)
                if constraint is None and group["backend"] not in FUSED:
                    yield self._names[p], "torch", {"no constraint": None}
                else:
                    reasons = self._reasons(group, p, constraint)
                    yield self._names[p], choose(group["backend"], self._names[p], reasons), reasons

    def zeros(self) -> dict[str, int]:
        """Exact zeros of every constrained tensor, as its last step left it.

        The fused kernels count what they write, so it is free there; tensors that changed since, or that the reference
        steps, are counted now.  Values written in place past autograd (``p.data[0] = 0``) are not noticed.
        """
        slots = {p: slot.zeros() for p, slot in self._slots.items()}
        return {
            name: count if (count := slots.get(p)) is not None else int((p == 0).sum())
            for _, p, name, _ in self.constrained()
        }

    def _step_reference(self, group: dict[str, Any], held: tuple[Tensor, ...], constraint: Constraint) -> None:
        if own := stepper(constraint):
            return own.step(self, group, held[0], constraint)  # type: ignore[no-any-return]
        p, dtype = held[0], math_dtype(held[0])
        states = self._ready_all(group, held, constraint)
        # Several members are stepped as one flat vector; what belongs to each is written back at the end.
        state = states[0] if len(held) == 1 else joint.gather(states, held)
        groups, saturated = self.groups(p, constraint), group["time_scale"] == "saturated"
        w, grad = joint.weight(states, held), joint.gradient(held, dtype)
        if (grad_scale := getattr(self, "grad_scale", None)) is not None:
            grad = grad / grad_scale
        if group["differentiable"]:
            w = w.clone()  # the step saves it for backward and then overwrites it
        budget = constraint.budget
        # The strengths of a budget come from the package, which knows one unit for them: AdamW's.
        rule = group if budget is None else {**group, "decoupled_weight_decay": True}
        update, gain = self._direction(rule, state, w, -grad if group["maximize"] else grad, groups)
        charge = constraint.strength_multiplier(w, decoupled=self.decoupled(group))
        # A tensor lr or strength is often fp32, and two 0-dim tensors would multiply in its precision.
        lr, strength = (
            x.to(w.dtype) if isinstance(x, Tensor) else x
            for x in (group["lr"], self.strength(group, constraint, state))
        )
        if self.automatic(group, constraint):  # for the steps to come
            decoupled = self.decoupled(group)
            smooth = update
            if not decoupled:
                smooth = update / gain if isinstance(gain, float) else groups.scale(1 / gain, update)  # type: ignore[union-attr]
            needed = constraint.needed(smooth, state["critical"], per_coordinate=decoupled)
            self._update(group, state, "critical", needed)
        keep: float | Tensor | None = group["imbalance_factor"]
        snaps: Tensor | bool = True
        if budget is not None:
            inside, outside, threshold, keep = state["budget"].to(w.dtype).unbind()
            outer = constraint.pruned(w, threshold, groups).reshape(w.shape if groups is None else (-1,))
            snaps = outer  # and no branch on a tensor: nothing may wait for the device
            strength = torch.where(outer, outside, inside)
        delta, decay = lr * update, lr * strength * gain * charge
        c, scale = state["imbalance"], state["metric_scale"]
        if constraint.carries_factors:
            stored = tuple(state[f"factor_{i}"] for i in range(constraint.depth))
            factors = stored
            if keep is not None:
                # Before the step: at a commit the strength is 0 from here on, and a zero must not start with a partner.
                factors = elementwise.rebalance(stored, float(keep))
            new, moved = constraint.advance(factors, delta, decay, scale, saturated=saturated)
            # A product rounds, so where no factor moved the weight is left alone: a step with lr 0 changes no bit.
            still = torch.stack([f == m for f, m in zip(factors, moved, strict=True)]).all(0)
            p.copy_(torch.where(still, p, new.to(p.dtype)))
            for i, (before, value) in enumerate(zip(stored, moved, strict=True)):
                self._update(group, state, f"factor_{i}", torch.where(still, before, value))
            return
        new = constraint.retract(w, delta, decay, c, scale, groups, saturated=saturated, snaps=snaps)
        joint.scatter(new, state, states, held, differentiable=group["differentiable"])
        if keep is None:
            c = gauge.imbalance_law(c, decay, scale, constraint.size(new, groups), saturated=saturated)
        else:
            c = c * keep
            c = torch.where(c <= gauge.SNAP * scale, 0.0, c)
        self._update(group, state, "imbalance", c)

    @staticmethod
    def _update(group: dict[str, Any], state: dict[str, Any], key: str, value: Tensor) -> None:
        """Write state in place, so that its address stays; out of place where a graph goes through the step."""
        if group["differentiable"]:
            state[key] = value
        else:
            state[key].copy_(value)
