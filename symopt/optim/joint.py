"""Several parameters under one joint constraint: stepped as one flat vector, kept in the state of each as torch does.

``exp_avg`` and ``momentum_buffer`` lie with their own parameter, in its shape; what the constraint has one of
(:data:`SHARED`) is one tensor that the states of all members refer to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from symopt.constraints.planes.plane import flat, parts
from symopt.optim.options import shared_moment
from symopt.optim.registry import Bound
from symopt_kernels.groups import Groups
from symopt_kernels.reference.gauge import math_dtype

__all__ = ["SHARED", "check", "gather", "gradient", "scatter", "share", "template", "weight"]

Members = tuple[Tensor, ...]

SHARED = ("step", "exp_avg_sq", "max_exp_avg_sq", "imbalance", "metric_scale", "critical")

_OWN = ("exp_avg", "momentum_buffer")


def weight(states: list[dict[str, Any]], members: Members) -> Tensor:
    """The flat weight, in the precision it is stepped in."""
    return flat(tuple(state.get("master", p) for state, p in zip(states, members, strict=True)))


def gradient(members: Members, dtype: torch.dtype) -> Tensor:
    """The flat gradient; a member without one counts as zero, because the others move it all the same."""
    return flat(tuple(torch.zeros_like(p) if p.grad is None else p.grad for p in members)).to(dtype)


def share(states: list[dict[str, Any]], members: Members, groups: Groups) -> None:
    """Make everything shared one tensor again: a checkpoint brings each member its own, second moments per weight."""
    for key in SHARED:
        found = [state[key] for state in states if key in state]
        if not found or (len(found) == len(states) and all(value is found[0] for value in found)):
            continue
        value = max(found, key=float) if key == "step" else found[0]
        if key in ("exp_avg_sq", "max_exp_avg_sq"):
            mean = torch.cat([part.flatten() for part in found]).mean()
            per_weight = [state.get(key, mean.expand(p.shape)) for state, p in zip(states, members, strict=True)]
            value = shared_moment(flat(tuple(per_weight)), groups)
        for state in states:
            state[key] = value


def gather(states: list[dict[str, Any]], members: Members) -> dict[str, Any]:
    """The state of the flat vector: what is shared, and each member's own moments one after the other."""
    joined = {key: states[0][key] for key in SHARED if key in states[0]}
    for key in _OWN:
        found = [state.get(key) for state in states]
        if any(value is not None for value in found):
            own = zip(found, members, strict=True)
            joined[key] = flat(tuple(torch.zeros_like(p, dtype=math_dtype(p)) if v is None else v for v, p in own))
    return joined


def scatter(
    new: Tensor, joined: dict[str, Any], states: list[dict[str, Any]], members: Members, *, differentiable: bool
) -> None:
    """Write the step of the flat vector back to its members."""
    for p, value, state in zip(members, parts(new, members), states, strict=True):
        p.copy_(value)
        if "master" in state:
            state["master"].copy_(value)
    if joined is states[0]:
        return
    if differentiable:  # state was replaced, not written to
        for state in states:
            state.update({key: joined[key] for key in SHARED if key in joined})
    for key in _OWN:
        if joined.get(key) is None:
            continue
        for state, value in zip(states, parts(joined[key], members), strict=True):
            if state.get(key) is None or differentiable:
                state[key] = value if differentiable else value.clone()
            else:
                state[key].copy_(value)


def template(members: Members) -> Tensor:
    """A tensor of the flat vector's shape, without its values."""
    shape = members[0].shape if len(members) == 1 else (sum(p.numel() for p in members),)
    return members[0].detach().new_empty(shape, dtype=math_dtype(members[0]))


def check(owner: str, group: dict[str, Any], name: str, together: Members, row: Bound | None) -> None:
    """Raise unless all parameters of a joint constraint are in ``group``."""
    own = set(map(id, group["params"]))
    names = row.names if row is not None else ("another parameter",) * len(together)
    lacking = [other for other, q in zip(names, together, strict=True) if id(q) not in own]
    if lacking := [*(row.missing if row is not None else ()), *lacking]:
        raise ValueError(
            f"{owner}: {name} shares a constraint with {lacking[0]}, which is not in its param group; give both to "
            "one group, as symopt.param_groups(model) does"
        )
