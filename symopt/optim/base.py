"""What every symopt optimizer shares: which parameters are constrained, their state, checkpoints, and the step.

A symopt optimizer *is* its torch.optim counterpart.  Parameters without a constraint go through torch's own code, so
their trajectories are torch's to the last bit; a constrained one takes ``retraction(direction(gradient))``.  A new
optimizer is one file that says what its direction is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from symopt.optim import checkpoint, compiled, dispatch, registry
from symopt.optim.binding import Binding
from symopt.optim.direction import Direction, Options, ParamGroup, State
from symopt.optim.membership import Membership
from symopt.optim.options import DEFAULTS, Params, check_group, check_length, parameters_of
from symopt.optim.schedule import Schedule

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
            permanent from the start.  It decays by itself, or with ``total_steps`` by a schedule.
        backend: which kernel steps the constrained tensors: None for the best that can (:func:`symopt.explain` lists
            them), ``"native"``, ``"triton"`` or ``"reference"``; a named one is used or an error says why not, and the
            first two then step unconstrained tensors too, with float32 moments for those in half precision.
        total_steps: length of the whole training in optimizer steps; every call of :meth:`step` counts but one that
            GradScaler skips.  The imbalance is multiplied by ``exp(-25 / total_steps)`` per step, and budgets, which
            need it, are ramped in and committed (docs/budgets.md).
        commit: share of training, in (0, 1), after which structure is final: strengths are 0 from then on, so zeros
            stay and the rest trains without shrinkage.  None: a strength never ends, a budget is committed at 60 %
            (``LowRank`` at 14 %).

    ``weight_decay`` keeps torch's meaning and applies to unconstrained parameters only.
    """

    direction: ClassVar[Direction]
    """What it makes of a gradient."""

    def __init__(self, params: Params, *args: Any, **kwargs: Any) -> None:
        self.membership = Membership(type(self).__name__, self.direction)
        self.schedule = Schedule(self.direction)
        self._slots: dispatch.Slots = {}
        self._loading: checkpoint.Loading | None = None
        given = self._given = {key: kwargs.pop(key, value) for key, value in DEFAULTS.items()}
        check_group(given, type(self).__name__)
        super().__init__(parameters_of(params), *args, **kwargs)
        self.defaults.update(given)
        for group in self.param_groups:
            for key, value in given.items():
                group.setdefault(key, value)
        self.membership.look_up(self.param_groups)
        self.number = compiled.register(self)
        registry.register_owner(self)

    def add_param_group(self, param_group: ParamGroup) -> None:
        if isinstance(param_group, dict):  # torch says what is wrong with anything else
            check_group({**getattr(self, "_given", self.defaults), **param_group}, type(self).__name__)
        super().add_param_group(param_group)
        if self.membership.complete:  # not while torch's constructor adds the first groups
            try:
                self.membership.look_up(self.param_groups)
            except ValueError:
                self.param_groups.pop()
                raise

    def bindings(self) -> Iterator[tuple[ParamGroup, Binding]]:
        """Param group and binding of everything that is constrained."""
        for group in self.param_groups:
            for binding in self.membership.of(group, self.param_groups).bindings:
                yield group, binding

    def binding(self, p: Tensor) -> Binding:
        """What binds ``p``; without a constraint if nothing does."""
        return self.membership.binding(p, self.param_groups)

    def owns(self, param: Tensor) -> bool:
        """Whether ``param`` is in one of the groups."""
        return param in self.membership.bindings

    def forget(self, param: Tensor) -> None:
        """Treat ``param`` as unconstrained from now on (:func:`symopt.release` calls this); moments stay."""
        binding = self.membership.bindings.get(param)
        if binding is not None and binding.constraint is not None:
            if param in self.state:
                checkpoint.release(binding, self.direction, self.state[param], param)
            self.membership.forget(param)

    @abstractmethod
    def _step_plain(self, group: ParamGroup) -> None:
        """Step the unconstrained parameters of ``group`` with torch's own functions."""

    def unconstrained(self, group: Options) -> list[Tensor]:
        """The parameters of a param group that torch's own functions step."""
        return [p for binding in self.membership.of(group, self.param_groups).unconstrained for p in binding.parameters]

    def _init_group(self, group: State, *lists: Any, **kwargs: Any) -> Any:
        return super()._init_group({**group, "params": self.unconstrained(group)}, *lists, **kwargs)  # type: ignore[misc]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimization step, as ``torch.optim.Optimizer.step``; ``torch.compile`` sees it as one operator."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        differentiable = self.defaults.get("differentiable", False)
        with torch.set_grad_enabled(differentiable):
            if torch.compiler.is_compiling() and not differentiable:
                compiled.trace(self)
            else:
                self.take_step()
        return loss

    def take_step(self) -> None:
        """The step itself, in the caller's grad mode."""
        own = (self.param_groups, self.membership, self.schedule, self.state, self._slots, self._step_plain)
        dispatch.step_groups(*own, getattr(self, "grad_scale", None), getattr(self, "found_inf", None))

    def reschedule(self, total_steps: int, commit: float | None = None) -> None:
        """Change ``total_steps``, those taken included, and ``commit`` unless None; what is committed stays so."""
        for group in self.param_groups:
            share = group["commit"] if commit is None else commit
            check_length(f"{type(self).__name__}.reschedule", total_steps, share, optional=False)
            group.update(total_steps=total_steps, commit=share)

    def update_schedule(self) -> None:
        """Select and commit outside of a captured CUDA graph, after every replay; elsewhere :meth:`step` does that."""
        self.schedule.replayed()

    def backends(self) -> Iterator[tuple[str, str, dict[str, str | None]]]:
        """Name, backend and, per backend, why not that one, of every parameter (:func:`symopt.explain` prints it)."""
        for group in self.param_groups:
            for p in group["params"]:
                yield dispatch.explained(self.binding(p), p, self.direction, group, self.state.get(p, {}))

    def zeros(self) -> dict[str, int]:
        """Exact zeros of every constrained tensor, as its last step left it.

        The fused kernels count what they write, so it is free there; tensors that changed since, or that the reference
        steps, are counted now.  Values written in place past autograd (``p.data[0] = 0``) are not noticed.
        """
        return dispatch.zeros((binding for _, binding in self.bindings()), self._slots)

    def state_dict(self) -> ParamGroup:
        """As torch's; second moments shared by a unit are written out per weight, so torch.optim can load them."""
        with checkpoint.writing_out(self, self.binding, self.direction):
            return super().state_dict()

    def load_state_dict(self, state_dict: ParamGroup) -> None:
        """As torch's, and loads torch.optim checkpoints; float state keeps the precision it was saved in.

        Second moments saved per weight are averaged over each unit that shares one; group options that torch knows
        nothing of stay as they are if the checkpoint has none.

        Raises:
            ValueError, TypeError: if it is no such optimizer's state, or another's, or does not fit the weights;
                nothing has been touched then.
        """
        with checkpoint.loading(self, self.binding, self.direction, state_dict) as self._loading:
            super().load_state_dict(state_dict)
        self._loading = None
        self.schedule.forget()

    def __getstate__(self) -> ParamGroup:
        self.membership.look_up(self.param_groups)
        return dict(super().__getstate__(), _bindings=dict(self.membership.bindings))

    def __setstate__(self, state: ParamGroup) -> None:
        bindings = state.pop("_bindings", None)
        # torch takes state that is not empty for that of a parameter that has stepped; a budget's is there before.
        stepped = {p: s for p, s in state["state"].items() if not isinstance(s, dict) or "step" in s}
        super().__setstate__({**state, "state": stepped})
        self.state = state["state"]
        if bindings is not None:  # unpickled or deep-copied
            self._loading, self._slots = None, {}
            self.membership = Membership(type(self).__name__, self.direction, bindings)
            self.schedule = Schedule(self.direction)
            self.number = compiled.register(self)
            registry.register_owner(self)
        if self._loading is not None:
            self._loading.restore(self.param_groups, self.state, self.binding, self.direction)
        for group in self.param_groups:
            for key, value in DEFAULTS.items():
                group.setdefault(key, self.defaults.get(key, value))
