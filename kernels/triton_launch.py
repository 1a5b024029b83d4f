"""The fused step on GPUs: ``native``'s interface in front of the kernels of :mod:`symopt_kernels.triton_step`.

Nothing is ever read back from the device, and Triton itself is imported by the first step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from symopt_kernels import triton_table
from symopt_kernels.triton_table import DTYPES, INTERPRETED, PATTERNS, UNAVAILABLE, Entry, Plan, fill, straight, tile

__all__ = ["DTYPES", "INTERPRETED", "PATTERNS", "UNAVAILABLE", "Entry", "constants", "fill", "step", "tile"]


def constants(
    key: tuple[Any, ...],
    direction: str,
    *,
    nesterov: bool = False,
    maximize: bool = False,
    saturated: bool = True,
    weight_decay: bool = False,
    stochastic: bool = False,
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The kernel of a bucket, its compile-time arguments and its launch options."""
    import triton.language as tl

    from symopt_kernels import triton_directions, triton_groups, triton_retractions, triton_step

    retraction, dtype, master, peak, first, trimmed, form = key
    adaptive = direction != "sgd"
    shared: dict[str, Any] = {
        "DTYPE": getattr(tl, dtype),
        "MASTER": master,
        "PEAK": peak,
        "ADAPTIVE": adaptive,
        "MOMENTUM": first and not adaptive,
        "NESTEROV": nesterov and first and not adaptive,
        "MAXIMIZE": maximize,
        "TRIMMED": trimmed,
        "COUPLED": direction == "adam" and not trimmed,  # a budget's strengths are AdamW's
        "SATURATED": saturated,
        "STOCHASTIC": stochastic and dtype == "bfloat16" and not master,
    }
    # FMA contraction is on: fewer roundings.  Its default differs between Triton's versions.
    options = {"num_warps": max(1, triton_table.BLOCK // 256), "enable_fp_fusion": True}
    if torch.version.hip is None:
        options["maxnreg"] = 128  # ptxas 12.9 otherwise sometimes spills 8 bytes to get by with 64
    if retraction == "group":
        r, c, p, aligned = form
        options["num_warps"] = max(1, min(8, r * c // 256))
        lead = triton_directions.adam_lead if adaptive else triton_directions.sgd_lead
        return triton_groups.groups, {"LEAD": lead, **shared, "R": r, "C": c, "P": p, "ALIGNED": aligned}, options
    own = {
        "DIRECTION": triton_directions.adam if adaptive else triton_directions.sgd,
        "RETRACTION": getattr(triton_retractions, retraction),
        "DECOUPLED": direction == "adamw",
        "CONSTRAINED": retraction != "plain",
        "LAW": retraction in ("sparse", "nm"),
        "DECAYS": retraction == "plain" and weight_decay and direction != "adamw",
        "DEPTH": form[0],
        "BLOCK": triton_table.BLOCK,
    }
    return triton_step.singles, {**shared, **own}, options


def step(
    entries: Sequence[Entry],
    direction: str,
    *,
    lr: float | Tensor,
    beta1: float = 0.0,
    beta2: float = 0.0,
    eps: float = 0.0,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    maximize: bool = False,
    saturated: bool = True,
    imbalance_decay: float | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    seed: int | None = None,
) -> None:
    """``native.step`` on the device: one launch per bucket, and the host waits for nothing.

    ``lr`` and an entry's strength (``inside``) may be fp32 tensors on the device, read when the kernel runs.  With a
    ``seed``, bf16 weights without an fp32 copy are rounded stochastically; give every step another one.
    """
    plan = entries[0].plan
    if plan is None or plan.entries != list(entries) or plan.straight != straight(entries):
        plan = entries[0].plan = Plan(entries)
    lr_at = lr if isinstance(lr, Tensor) else None
    numbers = {
        "lr": 0.0 if lr_at is not None else float(lr),
        "fresh1": 1 - beta1,
        "beta2": beta2,
        "fresh2": 1 - beta2,
        "log1": math.log(beta1) if beta1 else -math.inf,
        "log2": math.log(beta2) if beta2 else -math.inf,
        "eps": eps,
        "momentum": momentum,
        "undamped": 1 - dampening,
        "weight_decay": weight_decay,
        "imbalance_decay": -1.0 if imbalance_decay is None else imbalance_decay,
    }
    for key, bucket in plan.buckets:
        kernel, fixed, options = constants(
            key,
            direction,
            nesterov=nesterov,
            maximize=maximize,
            saturated=saturated,
            weight_decay=weight_decay != 0,
            stochastic=seed is not None,
        )
        given = {name: float(value) for name, value in numbers.items()}
        amplified = direction == "sgd" and key[4]
        given["amplify"] = float((1 - dampening) / (1 - momentum)) if amplified else 1.0
        tensors = {k: getattr(bucket, k) for k in ("table", "live", "owners", "arrived", "partial", "zeros")}
        if key[0] == "group":
            tensors |= {"ticket": bucket.ticket, "room": bucket.room, "marks": bucket.marks}
            del given["weight_decay"]
        bucket.send()
        kernel[(bucket.programs,)](
            **tensors,
            **given,
            **fixed,
            lr_at=lr_at,
            found_inf=found_inf,
            grad_scale=grad_scale,
            seed=0 if seed is None else seed,
            programs=bucket.programs,
            **options,
        )
