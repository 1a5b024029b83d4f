"""The step of LowRank: the gradient is pulled back to U and V, and each has the optimizer's direction with row moments.

State, beside torch's ``step`` and what every constrained weight has, all of it in flat tensors: ``factor_u`` (m x r),
``factor_v`` (n x r), their moments ``factor_u_exp_avg`` (m x r), ``factor_u_exp_avg_sq`` (m, one number per row), ...,
and ``factor_age``, the steps since columns were last aligned.  A second moment per *row* is the finest that commutes
with the rotation, which acts from the right.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from symopt.constraints import LowRank
from symopt.optim.options import is_cut
from symopt_kernels import lowrank as kernel
from symopt_kernels.groups import Groups
from symopt_kernels.reference import SNAP, math_dtype

__all__ = ["align", "cut", "gain", "per_weight", "ready", "sizes", "step"]

EVERY, COLUMNS = 20, 16
"""Steps between two alignments: 20, and one per 16 columns where there are many, as an alignment costs r**3."""

_SIDES = ("u", "v")
_probes = WeakTensorKeyDictionary()
"""factor_u -> the weight it last composed, seen through one vector: cheap to compare with the weight of now."""


def _factors(state: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return state["factor_u"], state["factor_v"]


def _moments(state: dict[str, Any], side: str) -> dict[str, Tensor]:
    """The state of one factor under torch's keys."""
    prefix = f"factor_{side}_"
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _rows(factor: Tensor) -> Groups:
    return Groups(factor.shape[0], tuple(factor.shape), (1,))


def _probe(p: Tensor) -> Tensor:
    matrix = p.detach().flatten(1)
    matrix = matrix if matrix.dtype == math_dtype(p) else matrix.float()
    x = torch.linspace(1, 2, matrix.shape[1], dtype=matrix.dtype, device=matrix.device).cos()
    return matrix @ x


# ------------------------------------------------------------------------------------------------------------- state


def ready(opt: Any, group: dict[str, Any], state: dict[str, Any], p: Tensor, c: LowRank) -> None:
    """Factors that compose to the weight and moments for them; where the weight was changed from outside, anew."""
    matrix = p.detach().flatten(1).to(math_dtype(p))
    if "factor_u" not in state or "factor_v" not in state:
        state["factor_u"], state["factor_v"] = kernel.factorize(matrix, 0.0, c.most if is_cut(state) else c.max_rank)
    elif not _holds(state, p, matrix):
        old = _factors(state)
        new = kernel.factorize(matrix, 0.0, c.most if is_cut(state) else c.max_rank)
        _move(
            state, new, *(torch.linalg.pinv(before) @ after for before, after in zip(old[::-1], new[::-1], strict=True))
        )
    if "factor_age" not in state:
        state["factor_age"] = torch.zeros(())
    u, v = _factors(state)
    frames = {"u": v / kernel.scale_of(v), "v": u / kernel.scale_of(u)}
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"):
        plain = state.pop(key, None)  # as torch.optim and other constraints keep it
        for side in _SIDES:
            if plain is not None and f"factor_{side}_{key}" not in state and plain.shape == p.shape:
                full = plain.flatten(1) if side == "u" else plain.flatten(1).mT
                state[f"factor_{side}_{key}"] = full.mean(1) if key.endswith("_sq") else full @ frames[side]
    for side, factor in zip(_SIDES, (u, v), strict=True):
        sub = _moments(state, side) | ({"step": state["step"]} if "step" in state else {})
        opt._init_moments(group, sub, factor, _rows(factor))
        if "step" in sub:
            state["step"] = sub.pop("step")
        state.update({f"factor_{side}_{key}": value for key, value in sub.items()})


def _holds(state: dict[str, Any], p: Tensor, matrix: Tensor) -> bool:
    """Whether the factors still compose to the weight, up to rounding."""
    u, v = _factors(state)
    if u.shape[0] != matrix.shape[0] or v.shape[0] != matrix.shape[1] or u.shape[1] != v.shape[1]:
        return False
    known = _probes.get(u)
    if known is not None and torch.equal(known, _probe(p)):
        return True
    made = u @ v.mT
    # Entry (i, j) of a product rounds by eps |u_i| |v_j|, on another machine differently.
    slack = 4 * torch.finfo(u.dtype).eps * u.norm(dim=1, keepdim=True) * v.norm(dim=1)
    slack += torch.finfo(p.dtype).eps * made.abs()
    return bool(((matrix - made).abs() <= slack).all())


def per_weight(state: dict[str, Any], p: Tensor) -> dict[str, Tensor]:
    """The moments as a plain optimizer of W would have them, from what the two factors know of them."""
    if "factor_u" not in state:
        return {}
    u, v = _factors(state)
    left, right = torch.linalg.pinv(u), torch.linalg.pinv(v)
    mine, theirs = (_moments(state, side) for side in _SIDES)
    full: dict[str, Tensor] = {}
    for key in mine:
        if key.endswith("_sq"):  # rows times columns over the mean (Shazeer & Stern, ICML 2018)
            a, b = mine[key], theirs[key]
            full[key] = torch.outer(a, b) / (a.mean() * b.mean()).sqrt().clamp(min=torch.finfo(a.dtype).tiny)
        elif key != "age":
            # G on the tangent space, G Q Q^T + P P^T G - P P^T G Q Q^T.
            from_u, from_v = mine[key] * kernel.scale_of(v), theirs[key] * kernel.scale_of(u)
            full[key] = from_u @ right + (from_v @ left - right.mT @ (v.mT @ (from_v @ left))).mT
    return {key: value.reshape(p.shape) for key, value in full.items()}


def sizes(state: dict[str, Any], p: Tensor, c: LowRank) -> Tensor:
    """Size of every singular direction, zeros for those that are gone, as many as the smaller side of W has."""
    side = min(p.shape[0], p[0].numel())
    found = kernel.column_sizes(*_factors(state)) if "factor_u" in state else c.size(p.detach())[: c.max_rank]
    return torch.cat([found, found.new_zeros(side - len(found))])


def gain(opt: Any, group: dict[str, Any], p: Tensor, c: LowRank) -> Tensor | float | None:
    """What multiplies ``lr * strength``: one number, the mean over the rows where each has its own."""
    if opt.decoupled(group) or c.budget is not None:
        return c.loudness(p)
    peak = opt.state.get(p, {}).get("factor_u_max_exp_avg_sq" if group["amsgrad"] else "factor_u_exp_avg_sq")
    if peak is None:
        return None
    preconditioner: Tensor = 1 / ((peak.mean() / (1 - group["betas"][1] ** opt.state[p]["step"])).sqrt() + group["eps"])
    return preconditioner


# -------------------------------------------------------------------------------------------------------------- step


def step(opt: Any, group: dict[str, Any], p: Tensor, c: LowRank) -> None:
    """One step of both factors, and of the weight as their product."""
    state = opt._ready(group, p, c)
    factors, saturated = _factors(state), group["time_scale"] == "saturated"
    if factors[0].shape[1] == 0:
        return  # nothing is left that could move
    assert p.grad is not None
    grad = p.grad.flatten(1).to(factors[0].dtype)
    if (grad_scale := getattr(opt, "grad_scale", None)) is not None:
        grad = grad / grad_scale
    grad = -grad if group["maximize"] else grad
    pulled = kernel.pull_back(grad, *factors)
    decoupled = opt.decoupled(group) or c.budget is not None
    deltas, gains = [], []
    lr, strength = (x.to(grad) if isinstance(x, Tensor) else x for x in (group["lr"], opt.strength(group, c)))
    for side, factor, other, g in zip(_SIDES, factors, factors[::-1], pulled, strict=True):
        sub = _moments(state, side)
        if "step" in state:
            sub["step"] = state["step"] if side == "v" else state["step"].clone()  # one step, not two
        update, row_gain = opt._direction({**group, "decoupled_weight_decay": decoupled}, sub, factor, g, _rows(factor))
        sub.pop("step", None)
        state.update({f"factor_{side}_{key}": value for key, value in sub.items()})
        deltas.append((lr * kernel.scale_of(other)) * update)
        gains.append(row_gain)
    if decoupled and "step" in state:
        gains = [1.0, 1.0]
        strength = strength * c.loudness(p)
    if c.budget is not None:
        inside, outside, threshold, _ = state["trim"].to(grad).unbind()
        strength = torch.where(kernel.column_sizes(*factors) <= threshold, outside, inside)
        strength = strength * (c.loudness(p) if "step" in state else 1.0)
    decay = lr * strength
    (u, v), scale = factors, state["metric_scale"]
    both = (gains[0], gains[1])
    new = kernel.lowrank(u, v, deltas[0], deltas[1], decay, scale, gains=both, saturated=saturated)
    if group["differentiable"]:
        state["factor_u"], state["factor_v"] = new
        p.copy_((new[0] @ new[1].mT).reshape(p.shape))
        return
    if float(lr) == 0:
        return  # such a step changes no bit, and a product rounds
    due = max(EVERY, factors[0].shape[1] // COLUMNS)
    state["factor_u"], state["factor_v"] = new
    state["factor_age"] += 1
    if state["factor_age"] >= due:
        snaps = saturated and bool(torch.as_tensor(decay).max() > 0)
        _align(state, saturated, factors if snaps else None)
    _write(state, p)


def _write(state: dict[str, Any], p: Tensor) -> None:
    u, v = _factors(state)
    p.copy_((u @ v.mT).reshape(p.shape))
    _probes[u] = _probe(p)


def _align(state: dict[str, Any], balance: bool, before: tuple[Tensor, Tensor] | None) -> None:
    """Turn columns into singular directions; seen from where the last step began, drop those that still shrink to 0."""
    u, v, turn_u, turn_v = kernel.align(*_factors(state), balance=balance)
    size = kernel.column_sizes(u, v)
    dead = size == 0
    if before is not None:
        shrinks = size < kernel.column_sizes(before[0] @ turn_u, before[1] @ turn_v)
        dead |= (size <= SNAP * state["metric_scale"]) & shrinks
    _move(state, (u, v), turn_v, turn_u)
    state["factor_age"].zero_()
    if bool(dead.any()):
        _keep(state, ~dead)


def _move(state: dict[str, Any], new: tuple[Tensor, Tensor], for_u: Tensor, for_v: Tensor) -> None:
    """Take other factors, and moments along: what V pulled back times ``for_u`` is what the new V would have."""
    for side, turn, old, now in (("u", for_u, "factor_v", new[1]), ("v", for_v, "factor_u", new[0])):
        ratio = kernel.scale_of(state[old]) / kernel.scale_of(now)
        for key, value in _moments(state, side).items():
            if value.dim() == 2:
                state[f"factor_{side}_{key}"] = value @ (turn * ratio)
    state["factor_u"], state["factor_v"] = new


def _keep(state: dict[str, Any], live: Tensor) -> None:
    """Drop all other columns."""
    eye = torch.eye(len(live), dtype=state["factor_u"].dtype, device=live.device)[:, live]
    u, v = _factors(state)
    _move(state, (u[:, live].contiguous(), v[:, live].contiguous()), eye, eye)


def align(group: dict[str, Any], state: dict[str, Any], p: Tensor) -> None:
    """Singular directions as of now, for a budget that is about to choose among them."""
    if "factor_u" in state and float(state["factor_age"]) > 0 and not group["differentiable"]:
        _align(state, group["time_scale"] == "saturated", None)
        _write(state, p)


def cut(state: dict[str, Any], p: Tensor, gone: Tensor) -> None:
    """Drop the directions that are outside the budget."""
    if "factor_u" in state:
        _keep(state, ~gone[: state["factor_u"].shape[1]])
        _write(state, p)
