"""The step of LowRank: the gradient is pulled back to U and V, and each has the optimizer's direction with row moments.

A second moment per *row* is the finest that commutes with the rotation, which acts from the right.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from symopt.budgets.state import BudgetState, is_committed
from symopt.constraints import Constraint, LowRank
from symopt.optim import advice
from symopt.optim.binding import Binding
from symopt.optim.direction import Direction, Options, State
from symopt.optim.lowrank.factors import (
    RANK,
    SIDES,
    align,
    cut,
    holds,
    moments,
    move,
    padded,
    pair,
    rows,
    sizes,
    strip,
    turn,
    write,
)
from symopt.optim.own_step import OwnStep
from symopt_kernels.reference import lowrank as kernel
from symopt_kernels.reference.gauge import math_dtype

__all__ = ["LowRankStep", "period"]

EVERY = 20
"""Steps between two alignments of few columns."""


def period(columns: int) -> int:
    """Steps between two alignments: one per 16 columns where there are many, as an alignment costs r**3."""
    return max(EVERY, columns // 16)


@final
class LowRankStep(OwnStep):
    """U and V as state; the weight is written as their product."""

    def ready(self, binding: Binding, direction: Direction, options: Options, state: State) -> None:
        """Factors that compose to the weight and moments for them; where the weight was changed from outside, anew."""
        p, c = binding.parameters[0], _constraint(binding)
        matrix = p.detach().flatten(1).to(math_dtype(p))
        strip(state)  # loaded before the constraint was known
        if RANK not in state:
            state[RANK] = torch.zeros((), dtype=torch.float32)
        if "factor_u" not in state or "factor_v" not in state:
            most = c.most if is_committed(state) else c.max_rank
            state["factor_u"], state["factor_v"] = kernel.factorize(matrix, 0.0, most)
        elif not holds(state, p, matrix):
            if c.most is not None and is_committed(state) and (live := int((c.size(p.detach()) > 0).sum())) > c.most:
                advice.truncated(binding, live, c.most)
            old = pair(state)
            new = kernel.factorize(matrix, 0.0, c.most if is_committed(state) else c.max_rank)
            turns = [kernel.inverse(before) @ after for before, after in zip(old[::-1], new[::-1], strict=True)]
            move(state, new, turns[0], turns[1])
        if "factor_age" not in state:
            state["factor_age"] = torch.zeros((), dtype=torch.float32)
        state[RANK].fill_(state["factor_u"].shape[1])
        u, v = pair(state)
        frames = {"u": v / kernel.scale_of(v), "v": u / kernel.scale_of(u)}
        for moment in direction.table:
            plain = state.pop(moment.key, None)  # as torch.optim and other constraints keep it
            for side in SIDES:
                if plain is not None and f"factor_{side}_{moment.key}" not in state and plain.shape == p.shape:
                    full = plain.flatten(1) if side == "u" else plain.flatten(1).mT
                    state[f"factor_{side}_{moment.key}"] = full.mean(1) if moment.per_unit else full @ frames[side]
        for side, factor in zip(SIDES, (u, v), strict=True):
            sub: State = moments(state, side) | ({"step": state["step"]} if "step" in state else {})
            direction.init(options, sub, factor, rows(factor).count)
            if "step" in sub:
                state["step"] = sub.pop("step")
            state.update({f"factor_{side}_{key}": value for key, value in sub.items()})

    def per_weight(self, direction: Direction, state: State, p: Tensor) -> dict[str, Tensor]:
        """The moments as a plain optimizer of W would have them, from what the two factors know of them."""
        if "factor_u" not in state:
            return {}
        u, v = pair(state)
        left, right = kernel.inverse(u), kernel.inverse(v)
        mine, theirs = (moments(state, side) for side in SIDES)
        full: dict[str, Tensor] = {}
        for moment in direction.table:
            if (key := moment.key) not in mine:
                continue
            if moment.per_unit:  # rows times columns over the mean (Shazeer & Stern, ICML 2018)
                a, b = mine[key], theirs[key]
                full[key] = torch.outer(a, b) / (a.mean() * b.mean()).sqrt().clamp(min=torch.finfo(a.dtype).tiny)
            else:
                # G on the tangent space, G Q Q^T + P P^T G - P P^T G Q Q^T.
                from_u, from_v = mine[key] * kernel.scale_of(v), theirs[key] * kernel.scale_of(u)
                full[key] = from_u @ right + (from_v @ left - right.mT @ (v.mT @ (from_v @ left))).mT
        return {key: value.reshape(p.shape) for key, value in full.items()}

    def saved(self, constraint: Constraint, state: State, p: Tensor) -> dict[str, Tensor]:
        return padded(constraint, state, p)

    def loaded(self, state: State) -> None:
        strip(state)

    def known_gain(
        self, binding: Binding, direction: Direction, options: Options, state: State
    ) -> Tensor | float | None:
        """One number, the mean over the rows where each has its own."""
        if binding.decoupled(direction, options):
            return _constraint(binding).per_coordinate_factor(binding.parameters[0])
        sub: State = dict(moments(state, "u"))
        if "step" in state:
            sub["step"] = state["step"]
        scale = direction.preconditioner(options, sub, torch.mean)
        return direction.known_gain(options, scale, None, binding.parameters[0].shape, decoupled=False)

    def step(
        self, binding: Binding, direction: Direction, options: Options, state: State, grad_scale: Tensor | None
    ) -> None:
        """One step of both factors, and of the weight as their product."""
        p, c = binding.parameters[0], _constraint(binding)
        factors, saturated = pair(state), options["time_scale"] == "saturated"
        if factors[0].shape[1] == 0:  # nothing is left that could move, but all such states look alike
            for moment in direction.moments(options):
                for side, factor in zip(SIDES, factors, strict=True):
                    if not moment.per_unit:
                        state.setdefault(f"factor_{side}_{moment.key}", torch.zeros_like(factor))
            return
        assert p.grad is not None
        grad = p.grad.flatten(1).to(factors[0].dtype)
        grad = grad if grad_scale is None else grad / grad_scale
        grad = -grad if options.get("maximize", False) else grad
        pulled = kernel.pull_back(grad, *factors)
        decoupled = binding.decoupled(direction, options)
        deltas, gains = [], list[Tensor | float]()
        lr, strength = (
            x.to(grad) if isinstance(x, Tensor) else x
            for x in (options["lr"], binding.strength(direction, options, state))
        )
        for side, factor, other, g in zip(SIDES, factors, factors[::-1], pulled, strict=True):
            sub: State = moments(state, side)
            if "step" in state:
                sub["step"] = state["step"] if side == "v" else state["step"].clone()  # one step, not two
            update, row_gain = direction.update(options, sub, g, rows(factor), decoupled=decoupled)
            sub.pop("step", None)
            state.update({f"factor_{side}_{key}": value for key, value in sub.items()})
            deltas.append((lr * kernel.scale_of(other)) * update)
            gains.append(row_gain)
        normalised = direction.scaled_by is not None
        if decoupled and normalised:
            gains = [1.0, 1.0]
            strength = strength * c.per_coordinate_factor(p)
        if c.budget is not None:
            budget = BudgetState.read(state, grad)
            pruned = kernel.column_sizes(*factors) <= budget.threshold
            strength = torch.where(pruned, budget.strength_pruned, budget.strength_kept)
            strength = strength * (c.per_coordinate_factor(p) if normalised else 1.0)
        decay = lr * strength
        new = kernel.lowrank(
            *factors,
            deltas[0],
            deltas[1],
            decay,
            state["metric_scale"],
            gains=(gains[0], gains[1]),
            saturated=saturated,
        )
        if options.get("differentiable", False):
            state["factor_u"], state["factor_v"] = new
            p.copy_((new[0] @ new[1].mT).reshape(p.shape))
            return
        if float(lr) == 0:
            return  # such a step changes no bit, and a product rounds
        state["factor_u"], state["factor_v"] = new
        state["factor_age"] += 1
        if state["factor_age"] >= period(factors[0].shape[1]):
            snaps = saturated and bool(torch.as_tensor(decay).max() > 0)
            turn(state, saturated, factors if snaps else None, 0 if c.rank is None else c.rank)
        write(state, p)

    def sizes(self, constraint: Constraint, state: State, p: Tensor) -> Tensor:
        return sizes(state, p, constraint)

    def align(self, options: Options, state: State, p: Tensor) -> None:
        align(options, state, p)

    def prune(self, constraint: Constraint, state: State, p: Tensor, pruned: Tensor) -> None:
        if "factor_u" in state:
            cut(state, p, pruned)
        else:  # nothing has stepped it yet
            p.copy_(constraint.fold(p))

    def owns(self, key: str) -> bool:
        return key.startswith("factor_")


def _constraint(binding: Binding) -> LowRank:
    assert isinstance(binding.constraint, LowRank)
    return binding.constraint
