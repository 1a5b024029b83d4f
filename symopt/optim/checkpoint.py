"""Checkpoints: what is written out, what a loaded state must look like, and what is restored from it.

Everything is checked before anything of the optimizer is touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, final

import torch
from torch import Tensor

from symopt.budgets.state import BUDGET, BudgetState
from symopt.optim.binding import Binding
from symopt.optim.direction import Direction, Options, ParamGroup, State
from symopt.optim.options import DEFAULTS, PROGRESS, ROWS, check_group
from symopt.optim.own_step import own_step
from symopt.optim.state import OWN_STATE, pack_moments

__all__ = ["Loading", "loading", "release", "writing_out"]

_LEAST = {
    "step": 0.0,
    PROGRESS: 0.0,
    "imbalance": 0.0,
    "critical": 0.0,
    "metric_scale": torch.finfo(torch.float32).tiny,
}

_SWITCHES = ("maximize", "foreach", "capturable", "differentiable", "fused")
"""Options of torch.optim that old checkpoints may lack."""

_MAY_BE_INFINITE = ("threshold", "largest_decay")
"""Numbers of a budget that are no bound if they are."""

BindingOf = Callable[[Tensor], Binding]


# -- writing -----------------------------------------------------------------------------------------------------------


def per_weight(binding: Binding, direction: Direction, state: State, p: Tensor) -> dict[str, Tensor]:
    """Moments of ``p`` that are not kept per weight, as torch.optim would have them."""
    if binding.constraint is None:
        return {}
    own = own_step(binding.constraint)
    return binding.per_weight(direction, state, p) if own is None else own.per_weight(direction, state, p)


def written(binding: Binding, direction: Direction, state: State, p: Tensor) -> dict[str, Tensor]:
    """What a checkpoint has beside or in place of the state."""
    own = None if binding.constraint is None else own_step(binding.constraint)
    found = per_weight(binding, direction, state, p)
    return found if own is None or binding.constraint is None else found | own.saved(binding.constraint, state, p)


@contextmanager
def writing_out(optimizer: torch.optim.Optimizer, binding: BindingOf, direction: Direction) -> Iterator[None]:
    """While this lasts, ``state_dict`` has every moment per weight."""

    def write_out(_: torch.optim.Optimizer, packed: ParamGroup) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for index, p in enumerate(params):
            if index in packed["state"]:
                found = written(binding(p), direction, optimizer.state[p], p)
                packed["state"][index] = {**packed["state"][index], **found}

    # First of the hooks, so that a user's hook sees what is saved and has the last word.
    handle = optimizer.register_state_dict_post_hook(write_out, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def release(binding: Binding, direction: Direction, state: State, p: Tensor) -> None:
    """Make of the state of a constrained parameter that of an unconstrained one."""
    assert binding.constraint is not None
    own, plain = own_step(binding.constraint), per_weight(binding, direction, state, p)
    for key in list(state):
        if key in OWN_STATE or key.startswith("factor_") or (own is not None and own.owns(key)):
            del state[key]
    state.update(plain)
    for key, value in state.items():
        if key != "step" and isinstance(value, Tensor):
            state[key] = value.to(p.dtype)
    if binding.several and isinstance(state.get("step"), Tensor):
        state["step"] = state["step"].clone()  # from now on every parameter counts for itself


# -- loading -----------------------------------------------------------------------------------------------------------


@final
class Loading:
    """A ``load_state_dict`` under way."""

    def __init__(self, param_groups: list[ParamGroup]) -> None:
        self._options = [{key: group[key] for key in DEFAULTS} for group in param_groups]
        self.final: ParamGroup = {}
        """What the last pre-hook leaves, which is what gets loaded."""

    def restore(
        self, param_groups: list[ParamGroup], states: dict[Tensor, State], binding: BindingOf, direction: Direction
    ) -> None:
        """Bring back what torch has lost, and make moments per unit of those that were written out.

        torch casts float state to the parameter's dtype, which costs an fp32 state of bf16 weights its last bits
        (pytorch #43706).
        """
        for group, saved, before in zip(param_groups, self.final["param_groups"], self._options, strict=True):
            # The length of this run is its own; all else that a checkpoint has counts, as with torch.
            length = ("total_steps", "commit") if before["total_steps"] is not None else ()
            group.update({key: value for key, value in before.items() if key not in saved or key in length})
            for i, p in zip(saved["params"], group["params"], strict=True):
                loaded = self.final["state"].get(i, {})
                # It may be constrained only after this.
                constrained = binding(p).constraint is not None or PROGRESS in loaded
                for key, value in loaded.items():
                    if key == "step" and isinstance(value, Tensor):
                        states[p][key] = states[p][key].clone()  # torch keeps the checkpoint's own tensor
                    elif constrained and key == "group_index" and value.is_floating_point():
                        del states[p][key]  # torch.optim saved it as floats; it is made anew
                    elif constrained and isinstance(value, Tensor):
                        states[p][key] = value.detach().to(device=p.device, copy=True)
                    elif constrained and value is None:
                        states[p].pop(key)
        for one in dict.fromkeys(binding(p) for group in param_groups for p in group["params"]):
            own = [states.get(p, {}) for p in one.parameters]
            if one.constraint is not None and (steps := own_step(one.constraint)) is not None:
                steps.loaded(own[0])
            if one.constraint is not None and own_step(one.constraint) is None and all("imbalance" in s for s in own):
                pack_moments(one, direction, own, per_weight=True)


@contextmanager
def loading(
    optimizer: torch.optim.Optimizer, binding: BindingOf, direction: Direction, state_dict: object
) -> Iterator[Loading]:
    """While this lasts, what torch is about to load is checked first, and noted."""
    if not isinstance(state_dict, dict):
        check(optimizer, binding, direction, state_dict)
    found = Loading(optimizer.param_groups)

    def keep(_: torch.optim.Optimizer, loaded: ParamGroup) -> None:
        check(optimizer, binding, direction, loaded)
        found.final.update(loaded)

    handle = optimizer.register_load_state_dict_pre_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


def check(optimizer: torch.optim.Optimizer, binding: BindingOf, direction: Direction, loaded: object) -> None:
    """Raise unless ``loaded`` is the state of such an optimizer over such parameters.

    What torch checks (numbers of groups and of their parameters) is left to torch, which touches nothing before.
    """
    owner = f"{type(optimizer).__name__}.load_state_dict"
    if not isinstance(loaded, Mapping):
        raise TypeError(f"{owner}: expected the dict that state_dict() returns, got {type(loaded).__name__}")
    for key, kind in (("state", Mapping), ("param_groups", list)):
        if not isinstance(loaded.get(key), kind):
            keys = ", ".join(map(repr, list(loaded)[:3]))
            raise ValueError(f"{owner}: no {kind.__name__.lower()} {key!r}; is it an optimizer's state? It has {keys}")
    for number, (group, saved) in enumerate(zip(optimizer.param_groups, loaded["param_groups"], strict=False)):
        where = f"{owner}: param_groups[{number}]"
        if not isinstance(saved, Mapping) or not isinstance(saved.get("params"), list):
            raise ValueError(f"{where} has no list 'params'; is it an optimizer's state?")
        _check_options(where, optimizer.defaults, dict(saved))
        for i, p in zip(saved["params"], group["params"], strict=False):
            state, where = loaded["state"].get(i, {}), f"{owner}: state of parameter {i}"
            if not isinstance(state, Mapping):
                raise ValueError(f"{where} is a {type(state).__name__}, must be a dict")
            current = optimizer.state.get(p, {})
            _check_state(where, binding(p), direction, current, p, state)
            if not _is_alike(optimizer.defaults, saved):
                _check_kind(f"{where} holds", type(optimizer).__name__, direction, {**group, **saved}, p, state)


def _check_options(where: str, defaults: ParamGroup, saved: ParamGroup) -> None:
    check_group(saved, where)
    for key, default in defaults.items():
        value = saved.get(key, default)
        if isinstance(default, tuple):
            fits = isinstance(value, (tuple, list)) and len(value) == len(default) and all(map(_is_number, value))
        elif _is_number(default):
            fits = _is_number(value)
        else:
            text = (str,) if default is None else ()  # as of a backend
            fits = value is None or isinstance(value, (bool, int, float, Tensor, type(default), *text))
        if not fits:
            raise ValueError(f"{where}: {key} is {value!r}, which cannot stand for {default!r}")
    if saved.get("decoupled_weight_decay", False) and not defaults.get("decoupled_weight_decay", True):
        raise ValueError(
            f"{where} is AdamW's, whose strength and decay mean something else to Adam; load it into AdamW, or set "
            "its decoupled_weight_decay to False to go on as Adam"
        )


def _is_number(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_state(
    where: str, binding: Binding, direction: Direction, current: State, p: Tensor, state: Mapping[str, Any]
) -> None:
    moments = {moment.key: moment for moment in direction.table}
    constraint = binding.constraint
    count = binding.moment_count(current) if constraint is not None else None
    # A run whose weights are spoilt may be saved and loaded like any other, and its state is what it is.
    spoilt = not all(w.is_meta or bool(w.isfinite().all()) for w in binding.parameters or (p,))
    for key, value in state.items():
        factor = constraint is not None and constraint.carries_factors and key.startswith("factor_")
        if value is None or not (factor or key in (*_LEAST, *moments, *OWN_STATE)):
            continue  # torch's "none yet", and what users keep there themselves
        if key in _LEAST and _is_number(value):
            _check_numbers(
                where, key, torch.as_tensor(value), _LEAST[key], spoilt=spoilt and key not in ("step", PROGRESS)
            )
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"{where}: {key} is a {type(value).__name__}, must be a tensor")
        if key == BUDGET:
            fits = BudgetState.fits(value)
        elif key == ROWS:
            fits = value.shape == p.shape[:1]
        elif factor:  # a matrix's factors have a rank, which is theirs to know
            fits = not value.is_complex() and (value.shape == p.shape or not key[len("factor_") :].isdigit())
        elif constraint is not None and key in moments and moments[key].per_unit:
            fits = value.shape == p.shape or value.numel() == (1 if count is None else count)
        else:
            fits = key not in _LEAST and value.shape == p.shape and (p.is_complex() or not value.is_complex())
        if not fits or value.layout is not torch.strided:
            kind = f"{value.dtype} of shape {tuple(value.shape)}"
            raise ValueError(f"{where}: {key} is {kind}, which does not fit a weight of shape {tuple(p.shape)}")
        if value.is_meta:
            continue
        if key == BUDGET:
            _check_budget(where, value, spoilt=spoilt)
        elif key == "group_index":
            _check_index(where, value, p)
        else:
            squares = tuple(moment.key for moment in direction.table if moment.role != "first")
            least = 0.0 if key == "factor_age" or key.endswith(squares) else None
            _check_numbers(where, key, value, least, spoilt=spoilt, overflows=count is None and key in squares)


_ANEW = "load an earlier checkpoint, or drop this parameter's entry in 'state', so that its state begins anew"


def _check_numbers(
    where: str, key: str, value: Tensor, least: float | None, *, spoilt: bool = False, overflows: bool = False
) -> None:
    """Raise unless all are at least ``least``, and finite; in a ``spoilt`` run they need not be.

    A weight's own square that ``overflows`` is infinite: the weight stands still, as torch's; a group would become NaN.
    """
    numbers = torch.view_as_real(value) if value.is_complex() else value
    bad = torch.zeros_like(numbers, dtype=torch.bool) if least is None else numbers < least
    if not spoilt:
        bad |= numbers.isnan() if overflows else ~numbers.isfinite()
    if not bool(bad.any()):
        return
    first = float(numbers[bad][0])
    bound = "" if least is None else "> 0" if least else ">= 0"
    must = bound if math.isfinite(first) else " and ".join(filter(None, ("finite", bound)))
    verb = "is" if numbers.numel() == 1 else "holds"
    raise ValueError(f"{where}: {key} {verb} {first:g}, must be {must}; {_ANEW}")


def _check_budget(where: str, value: Tensor, *, spoilt: bool) -> None:
    for field, number in zip(fields(BudgetState), value, strict=True):
        if spoilt or (field.name in _MAY_BE_INFINITE and bool(number == math.inf)):
            continue
        # A negative threshold prunes nothing.
        _check_numbers(where, f"{BUDGET} ({field.name})", number, None if field.name == "threshold" else 0.0)


def _check_index(where: str, value: Tensor, p: Tensor) -> None:
    if value.dtype == torch.bool:
        raise ValueError(f"{where}: group_index is torch.bool, must hold integers; {_ANEW}")
    if value.is_floating_point():  # torch.optim saved it so: it is made anew, once it is known to be one
        _check_numbers(where, "group_index", value, 0.0)
        if not torch.equal(value, value.round()):
            first = float(value[value != value.round()][0])
            raise ValueError(f"{where}: group_index holds {first:g}, must hold integers; {_ANEW}")
    elif value.numel() and not 0 <= int(value.min()) <= int(value.max()) < p.numel():
        raise ValueError(f"{where}: group_index must number the groups of {p.numel()} weights from 0; {_ANEW}")


def _is_alike(defaults: ParamGroup, saved: Mapping[str, object]) -> bool:
    """Whether a group was saved by an optimizer with all hyperparameters of this one: such a one, or torch's twin."""
    return all(key in saved for key in defaults if key not in DEFAULTS and key not in _SWITCHES)


def _check_kind(
    where: str, owner: str, direction: Direction, options: Options, p: Tensor, state: Mapping[str, Any]
) -> None:
    """Raise for what another optimizer remembers: torch would use none of it, and save it for ever."""
    foreign = [k for k, v in state.items() if isinstance(v, Tensor) and v.shape == p.shape and k not in OWN_STATE]
    own = (*(moment.key for moment in direction.moments(options)), "factor_0", "imbalance")
    if p.dim() and foreign and not any(key in state for key in own):
        raise ValueError(
            f"{where} {', '.join(foreign)} and nothing that {owner} remembers: another "
            "optimizer's checkpoint? Go on without it; the weights are in the module's state"
        )
