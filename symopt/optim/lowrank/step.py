"""The step of LowRank: the gradient is pulled back to U and V, and each has the optimizer's direction with row moments.

A second moment per *row* is the finest that commutes with the rotation, which acts from the right.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from symopt.constraints import LowRank
from symopt.optim.lowrank.factors import SIDES, align, cut, holds, moments, move, pair, rows, sizes, turn, write
from symopt.optim.options import is_cut
from symopt_kernels.reference import lowrank as kernel
from symopt_kernels.reference.gauge import math_dtype

__all__ = ["align", "cut", "gain", "per_weight", "period", "ready", "sizes", "step"]

EVERY = 20
"""Steps between two alignments of few columns."""


def period(columns: int) -> int:
    """Steps between two alignments: one per 16 columns where there are many, as an alignment costs r**3."""
    return max(EVERY, columns // 16)


def ready(opt: Any, group: dict[str, Any], state: dict[str, Any], p: Tensor, c: LowRank) -> None:
    """Factors that compose to the weight and moments for them; where the weight was changed from outside, anew."""
    matrix = p.detach().flatten(1).to(math_dtype(p))
    if "factor_u" not in state or "factor_v" not in state:
        state["factor_u"], state["factor_v"] = kernel.factorize(matrix, 0.0, c.most if is_cut(state) else c.max_rank)
    elif not holds(state, p, matrix):
        old = pair(state)
        new = kernel.factorize(matrix, 0.0, c.most if is_cut(state) else c.max_rank)
        move(state, new, *(kernel.inverse(before) @ after for before, after in zip(old[::-1], new[::-1], strict=True)))
    if "factor_age" not in state:
        state["factor_age"] = torch.zeros(())
    u, v = pair(state)
    frames = {"u": v / kernel.scale_of(v), "v": u / kernel.scale_of(u)}
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"):
        plain = state.pop(key, None)  # as torch.optim and other constraints keep it
        for side in SIDES:
            if plain is not None and f"factor_{side}_{key}" not in state and plain.shape == p.shape:
                full = plain.flatten(1) if side == "u" else plain.flatten(1).mT
                state[f"factor_{side}_{key}"] = full.mean(1) if key.endswith("_sq") else full @ frames[side]
    for side, factor in zip(SIDES, (u, v), strict=True):
        sub = moments(state, side) | ({"step": state["step"]} if "step" in state else {})
        opt._init_moments(group, sub, factor, rows(factor))
        if "step" in sub:
            state["step"] = sub.pop("step")
        state.update({f"factor_{side}_{key}": value for key, value in sub.items()})


def per_weight(state: dict[str, Any], p: Tensor) -> dict[str, Tensor]:
    """The moments as a plain optimizer of W would have them, from what the two factors know of them."""
    if "factor_u" not in state:
        return {}
    u, v = pair(state)
    left, right = kernel.inverse(u), kernel.inverse(v)
    mine, theirs = (moments(state, side) for side in SIDES)
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


def gain(opt: Any, group: dict[str, Any], p: Tensor, c: LowRank) -> Tensor | float | None:
    """What multiplies ``lr * strength``: one number, the mean over the rows where each has its own."""
    if opt.decoupled(group) or c.budget is not None:
        return c.per_coordinate_factor(p)
    peak = opt.state.get(p, {}).get("factor_u_max_exp_avg_sq" if group["amsgrad"] else "factor_u_exp_avg_sq")
    if peak is None:
        return None
    preconditioner: Tensor = 1 / ((peak.mean() / (1 - group["betas"][1] ** opt.state[p]["step"])).sqrt() + group["eps"])
    return preconditioner


def step(opt: Any, group: dict[str, Any], p: Tensor, c: LowRank) -> None:
    """One step of both factors, and of the weight as their product."""
    state = opt._ready(group, p, c)
    factors, saturated = pair(state), group["time_scale"] == "saturated"
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
    lr, strength = (x.to(grad) if isinstance(x, Tensor) else x for x in (group["lr"], opt.strength(group, c, state)))
    for side, factor, other, g in zip(SIDES, factors, factors[::-1], pulled, strict=True):
        sub = moments(state, side)
        if "step" in state:
            sub["step"] = state["step"] if side == "v" else state["step"].clone()  # one step, not two
        update, row_gain = opt._direction({**group, "decoupled_weight_decay": decoupled}, sub, factor, g, rows(factor))
        sub.pop("step", None)
        state.update({f"factor_{side}_{key}": value for key, value in sub.items()})
        deltas.append((lr * kernel.scale_of(other)) * update)
        gains.append(row_gain)
    if decoupled and "step" in state:
        gains = [1.0, 1.0]
        strength = strength * c.per_coordinate_factor(p)
    if c.budget is not None:
        inside, outside, threshold, _ = state["budget"].to(grad).unbind()
        strength = torch.where(kernel.column_sizes(*factors) <= threshold, outside, inside)
        strength = strength * (c.per_coordinate_factor(p) if "step" in state else 1.0)
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
    state["factor_u"], state["factor_v"] = new
    state["factor_age"] += 1
    if state["factor_age"] >= period(factors[0].shape[1]):
        snaps = saturated and bool(torch.as_tensor(decay).max() > 0)
        turn(state, saturated, factors if snaps else None)
    write(state, p)
