"""The fused step on GPUs: ``native``'s interface in front of the kernels of :mod:`symopt_kernels.triton.elementwise`.

Nothing is ever read back from the device, and Triton itself is imported by the first step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from symopt_kernels.triton import table as triton_table
from symopt_kernels.triton.table import (
    DTYPES,
    INTERPRETED,
    PATTERNS,
    UNAVAILABLE,
    Entry,
    LaunchPlan,
    PlaneEntry,
    fill,
    fill_plane,
    straight,
    tile,
)

__all__ = [
    "DTYPES",
    "INTERPRETED",
    "PATTERNS",
    "UNAVAILABLE",
    "Entry",
    "PlaneEntry",
    "fill",
    "fill_plane",
    "launches",
    "step",
    "tile",
]

Launch = tuple[Any, dict[str, Any], dict[str, Any]]


def launches(
    key: tuple[Any, ...],
    direction: str,
    *,
    nesterov: bool = False,
    maximize: bool = False,
    saturated: bool = True,
    weight_decay: bool = False,
    stochastic: bool = False,
) -> list[Launch]:
    """What steps a bucket: kernels, one after the other, with their compile-time arguments and launch options."""
    import triton.language as tl

    from symopt_kernels.triton import coordinates as triton_coordinates
    from symopt_kernels.triton import directions as triton_directions
    from symopt_kernels.triton import elementwise as triton_step
    from symopt_kernels.triton import group as triton_groups
    from symopt_kernels.triton import orbit as triton_mirror
    from symopt_kernels.triton import retractions as triton_retractions

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

    def fit(kernel: Any, options: dict[str, Any]) -> Launch:
        return kernel, {k: v for k, v in shared.items() if k in kernel.arg_names}, options

    lead = triton_directions.adam_lead if adaptive else triton_directions.sgd_lead
    if retraction == "group":
        r, c, p, aligned = form
        options["num_warps"] = max(1, min(8, r * c // 256))
        return [(triton_groups.groups, {"LEAD": lead, **shared, "R": r, "C": c, "P": p, "ALIGNED": aligned}, options)]
    if retraction == "mirror":
        pair, each, automatic, gathered, aligned = form
        if (each or gathered) and "maxnreg" in options:  # moments, weights and their copies, or places, in registers
            options["maxnreg"] = 168 if master or gathered else 144
        options["num_warps"] = max(1, triton_table.BLOCK // 512)
        shared |= {"LEAD": lead, "DECOUPLED": direction == "adamw", "PAIR": pair, "EACH": each, "AUTOMATIC": automatic}
        shared |= {"GATHERED": gathered, "BLOCK": triton_table.BLOCK // 2, "ALIGNED": aligned}
        several = [triton_mirror.surveys, triton_mirror.moves, triton_mirror.snaps]
        kernels = [triton_mirror.moves] if each else several
        return [fit(kernel, options) for kernel in kernels]
    if retraction in ("centred", "basis"):
        *form, together, automatic, aligned = form
        shared |= {"LEAD": lead, "DECOUPLED": direction == "adamw", "AUTOMATIC": automatic, "ALIGNED": aligned}
        shared |= {"BASIS": retraction == "basis", "Q": together}
        if retraction == "centred":
            r, c, p = form
            shared |= {"R": r, "C": c, "P": p, "G": c // p}
            kernels = [triton_coordinates.reduce_groups, triton_coordinates.settle, triton_coordinates.shift_groups]
            options["num_warps"] = max(1, min(8, r * c // 256))
        else:
            shared |= {"G": form[0], "BLOCK": triton_table.BLOCK // 2}
            kernels = [triton_coordinates.reduce_basis, triton_coordinates.settle, triton_coordinates.shift_basis]
            options["num_warps"] = max(1, triton_table.BLOCK // 512)
        before, settle, after = kernels
        return [fit(before, options), fit(settle, {**options, "num_warps": 16}), fit(after, options)]
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
    return [(triton_step.singles, {**shared, **own}, options)]


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
    imbalance_factor: float | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    seed: int | None = None,
) -> None:
    """``native.step`` on the device: one launch per bucket (of planes up to three), and the host waits for nothing.

    ``lr`` and an entry's strength (``inside``) may be fp32 tensors on the device, read when the kernel runs.  With a
    ``seed``, bf16 weights without an fp32 copy are rounded stochastically; give every step another one.
    """
    plan = entries[0].plan
    if plan is None or plan.entries != list(entries) or plan.straight != straight(entries):
        plan = entries[0].plan = LaunchPlan(entries)
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
        "imbalance_factor": -1.0 if imbalance_factor is None else imbalance_factor,
    }
    for key, bucket in plan.buckets:
        given: dict[str, Any] = {name: float(value) for name, value in numbers.items()}
        amplified = direction == "sgd" and key[4]
        given["amplify"] = float((1 - dampening) / (1 - momentum)) if amplified else 1.0
        given |= {"lr_at": lr_at, "found_inf": found_inf, "grad_scale": grad_scale}
        given |= {"seed": 0 if seed is None else seed, "programs": bucket.programs}
        bucket.send()
        for kernel, fixed, options in launches(
            key,
            direction,
            nesterov=nesterov,
            maximize=maximize,
            saturated=saturated,
            weight_decay=weight_decay != 0,
            stochastic=seed is not None,
        ):
            own = {k: given[k] if k in given else getattr(bucket, k) for k in kernel.arg_names if k not in fixed}
            kernel[(bucket.programs,)](**own, **fixed, **options)
