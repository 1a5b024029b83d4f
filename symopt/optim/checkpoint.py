"""What a loaded state must look like: said before anything of the optimizer is touched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from symopt.optim.options import OWN_STATE, TRIM, check_group

__all__ = ["check"]

_SHARED = ("exp_avg_sq", "max_exp_avg_sq")
_MOMENTS = ("exp_avg", *_SHARED, "momentum_buffer")
_LEAST = {"step": 0.0, "imbalance": 0.0, "critical": 0.0, "metric_scale": torch.finfo(torch.float32).tiny}


def check(optimizer: Any, loaded: Any) -> None:
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
            _check_state(where, optimizer, p, dict(state))
            _check_kind(where, optimizer, {**group, **saved}, p, dict(state))


def _check_options(where: str, defaults: dict[str, Any], saved: dict[str, Any]) -> None:
    check_group(saved, where)
    for key, default in defaults.items():
        value = saved.get(key, default)
        if isinstance(default, tuple):
            fits = isinstance(value, (tuple, list)) and len(value) == len(default) and all(map(_is_number, value))
        elif _is_number(default):
            fits = _is_number(value)
        else:
            fits = value is None or isinstance(value, (bool, int, float, Tensor, type(default)))
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


def _check_state(where: str, optimizer: Any, p: Tensor, state: dict[str, Any]) -> None:
    constraint = optimizer._constraint(p)
    groups = None if constraint is None else optimizer.groups(p, constraint)
    for key, value in state.items():
        if value is None or key not in (*_LEAST, *_MOMENTS, *OWN_STATE):
            continue  # torch's "none yet", and what users keep there themselves
        if key in _LEAST and _is_number(value):
            if float(value) < _LEAST[key]:
                raise ValueError(f"{where}: {key} is {float(value):g}, must be {'>' if _LEAST[key] else '>='} 0")
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"{where}: {key} is a {type(value).__name__}, must be a tensor")
        if key == "budget":
            fits = value.shape == (len(TRIM),) and value.is_floating_point()
        elif constraint is not None and key in _SHARED:
            fits = value.shape == p.shape or value.numel() == (1 if groups is None else groups.count)
        else:
            fits = key not in _LEAST and value.shape == p.shape and (p.is_complex() or not value.is_complex())
        if not fits or value.layout is not torch.strided:
            kind = f"{value.dtype} of shape {tuple(value.shape)}"
            raise ValueError(f"{where}: {key} is {kind}, which does not fit a weight of shape {tuple(p.shape)}")
        if key == "group_index" and value.numel() and not 0 <= int(value.min()) <= int(value.max()) < p.numel():
            raise ValueError(f"{where}: group_index must number the groups of {p.numel()} weights from 0")


def _check_kind(where: str, optimizer: Any, group: dict[str, Any], p: Tensor, state: dict[str, Any]) -> None:
    """Raise for what another optimizer remembers: torch would use none of it, and save it for ever."""
    foreign = [k for k, v in state.items() if isinstance(v, Tensor) and v.shape == p.shape and k not in OWN_STATE]
    if p.dim() and foreign and not any(key in state for key in (*optimizer._moments(group), "factor_0", "imbalance")):
        raise ValueError(
            f"{where} holds {', '.join(foreign)} and nothing that {type(optimizer).__name__} remembers: another "
            "optimizer's checkpoint? Go on without it; the weights are in the module's state"
        )
