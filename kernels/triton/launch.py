"""The fused step on GPUs: the interface of ``native.binding`` in front of the Triton kernels.

Nothing is ever read back from the device, and Triton itself is imported by the first step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from symopt_kernels.reference.directions import amplification
from symopt_kernels.settings import SETTINGS, check_settings
from symopt_kernels.triton import table
from symopt_kernels.triton.backend import BACKEND, DIRECTIONS, DTYPES, PATTERNS, ROWS, why_not
from symopt_kernels.triton.launch_plan import Bucket, LaunchPlan
from symopt_kernels.triton.table import INTERPRETED, UNAVAILABLE, Entry, fill, tile
from symopt_kernels.triton.table_planes import PlaneEntry, fill_plane
from symopt_kernels.triton.table_units import UnitsEntry, fill_units

__all__ = [
    "BACKEND",
    "DTYPES",
    "INTERPRETED",
    "PATTERNS",
    "ROWS",
    "UNAVAILABLE",
    "Entry",
    "Launch",
    "PlaneEntry",
    "UnitsEntry",
    "fill",
    "fill_plane",
    "fill_units",
    "launches",
    "step",
    "tile",
    "why_not",
]


@dataclass(frozen=True)
class Launch:
    """A kernel, its compile-time arguments, its launch options, and which of the bucket's grids it has."""

    kernel: Any
    fixed: dict[str, Any]
    options: dict[str, Any]
    grid: Any = "all"


def launches(
    key: tuple[Any, ...],
    direction: str,
    *,
    nesterov: bool = False,
    maximize: bool = False,
    saturated: bool = True,
    weight_decay: bool = False,
    stochastic: bool = False,
    hooked: bool = False,
) -> list[Launch]:
    """What steps a bucket: launches one after the other.  ``hooked``: sums of units are reduced in between."""
    import triton.language as tl

    from symopt_kernels.triton import coordinates, directions, elementwise, elementwise_step, group, group_units, orbit

    retraction, dtype, master, peak, first, budgeted, form = key
    if (direction, retraction) not in ROWS:
        raise ValueError(f"the Triton step has no direction {direction!r} with the retraction {retraction!r}")
    known = DIRECTIONS[direction]
    momentum = first and known.buffer
    fixed: dict[str, Any] = {
        "DTYPE": getattr(tl, dtype),
        "MASTER": master,
        "PEAK": peak,
        "ADAPTIVE": known.moments,
        "DECOUPLED": known.decoupled,
        "MOMENTUM": momentum,
        "NESTEROV": nesterov and momentum,
        "MAXIMIZE": maximize,
        "BUDGETED": budgeted,
        "COUPLED": known.coupled and not budgeted,  # a budget's strengths are AdamW's
        "SATURATED": saturated,
        "STOCHASTIC": stochastic and dtype == "bfloat16" and not master,
        "LEAD": None if known.lead is None else getattr(directions, known.lead),
    }
    # FMA contraction is on: fewer roundings.  Its default differs between Triton's versions.
    options = {"num_warps": max(1, table.BLOCK // 256), "enable_fp_fusion": True}
    if torch.version.hip is None:
        options["maxnreg"] = 128  # ptxas 12.9 otherwise sometimes spills 8 bytes to get by with 64

    def launch(kernel: Any, grid: Any = "all", **changed: Any) -> Launch:
        return Launch(kernel, {k: v for k, v in fixed.items() if k in kernel.arg_names}, options | changed, grid)

    if retraction == "group":
        r, c, p, aligned = form
        fixed |= {"R": r, "C": c, "P": p, "ALIGNED": aligned}
        return [launch(group.step_groups, num_warps=max(1, min(8, r * c // 256)))]
    if retraction == "units":
        surveys, moves = [], []
        for shape in form:
            r, c, p, unbound, aligned = shape
            fixed |= {"R": r, "C": c, "P": p, "UNBOUND": unbound, "ALIGNED": aligned}
            own: dict[str, Any] = {"num_warps": max(1, min(8, r * c // 256))}
            if unbound and "maxnreg" in options:  # the sums and the whole step in registers
                own["maxnreg"] = 168
            surveys.append(launch(group_units.survey_units, grid=shape, **own))
            moves.append(launch(group_units.move_units, grid=shape, **own))
        combines = []
        for add, decide in ((True, False), (False, True)) if hooked else ((True, True),):
            fixed |= {"ADD": add, "DECIDE": decide, "LANES": table.UNITS}
            combines.append(launch(group_units.combine_units, grid="combine", num_warps=4))
        return [*surveys, *combines, *moves]
    if retraction == "orbit":
        two_copies, gate_per_orbit, automatic, gathered, aligned = form
        if (gate_per_orbit or gathered) and "maxnreg" in options:  # moments, weights, their copies, places in registers
            options["maxnreg"] = 168 if master or gathered else 144
        options["num_warps"] = max(1, table.BLOCK // 512)
        fixed |= {"TWO_COPIES": two_copies, "GATE_PER_ORBIT": gate_per_orbit, "AUTOMATIC": automatic}
        fixed |= {"GATHERED": gathered, "BLOCK": table.BLOCK // 2, "ALIGNED": aligned}
        phases = [orbit.survey_orbits, orbit.move_orbits, orbit.snap_orbits]
        return [launch(kernel) for kernel in (phases[1:2] if gate_per_orbit else phases)]
    if retraction in ("centred", "basis"):
        *shape, side_by_side, automatic, aligned = form
        fixed |= {"AUTOMATIC": automatic, "ALIGNED": aligned, "BASIS": retraction == "basis", "Q": side_by_side}
        if retraction == "centred":
            r, c, p = shape
            fixed |= {"R": r, "C": c, "P": p, "G": c // p}
            survey, move = coordinates.survey_means, coordinates.move_means
            options["num_warps"] = max(1, min(8, r * c // 256))
        else:
            fixed |= {"G": shape[0], "BLOCK": table.BLOCK // 2}
            survey, move = coordinates.survey_basis, coordinates.move_basis
            options["num_warps"] = max(1, table.BLOCK // 512)
        return [launch(survey), launch(coordinates.combine_coordinates, num_warps=16), launch(move)]
    fixed |= {
        "DIRECTION": getattr(directions, direction),
        "RETRACTION": getattr(elementwise, retraction),
        "CONSTRAINED": retraction != "plain",
        "IMBALANCE_LAW": retraction in ("sparse", "nm"),
        "DECAYS": retraction == "plain" and weight_decay and not known.decoupled,
        "DEPTH": form[0],
        "BLOCK": table.BLOCK,
    }
    return [launch(elementwise_step.step_elementwise)]


def step(
    entries: Sequence[Entry],
    direction: str,
    *,
    lr: float | Tensor,
    weight_decay: float = 0.0,
    maximize: bool = False,
    saturated: bool = True,
    imbalance_factor: float | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    seed: int | None = None,
    combine: Callable[[Tensor], None] | None = None,
    **settings: float,
) -> None:
    """``native.step`` on the device: one launch per bucket, or one per phase, and the host waits for nothing.

    ``settings`` are those of the direction (:data:`~symopt_kernels.settings.SETTINGS`), all of them and no others.

    ``lr`` and an entry's strength (``strength_kept``) may be fp32 tensors on the device, read when the kernel runs.
    With a ``seed``, bf16 weights without an fp32 copy are rounded stochastically; give every step another one.

    ``combine`` is called for every :class:`UnitsEntry` between survey and move, with the fp32 tensor ``(4, count)`` of
    the sums ``gg, mm, mw, ww`` on the device, to reduce it in place over other processes.
    """
    if direction in SETTINGS:  # what is not listed is refused with its retraction, below
        check_settings("triton", direction, settings)
    from symopt_kernels.triton.constants import LaunchSettings

    beta1, beta2, momentum, dampening = (
        float(settings.get(name, 0.0)) for name in ("beta1", "beta2", "momentum", "dampening")
    )
    plan = entries[0].plan
    if not (isinstance(plan, LaunchPlan) and plan.holds(entries)):
        plan = entries[0].plan = LaunchPlan(entries)
    lr_at = lr if isinstance(lr, Tensor) else None
    given = LaunchSettings(
        lr_at=lr_at,
        found_inf=found_inf,
        grad_scale=grad_scale,
        lr=0.0 if lr_at is not None else float(lr),
        beta1=beta1,
        one_minus_beta1=1 - beta1,
        beta2=beta2,
        one_minus_beta2=1 - beta2,
        log_beta1=math.log(beta1) if beta1 else -math.inf,
        log_beta2=math.log(beta2) if beta2 else -math.inf,
        eps=float(settings.get("eps", 0.0)),
        momentum=momentum,
        one_minus_dampening=1 - dampening,
        amplify=1.0,
        weight_decay=float(weight_decay),
        imbalance_factor=-1.0 if imbalance_factor is None else float(imbalance_factor),
    )
    amplified = given._replace(amplify=amplification(momentum, dampening))
    options = {"maximize": maximize, "saturated": saturated, "weight_decay": weight_decay != 0}
    options |= {"nesterov": bool(settings.get("nesterov", False))}
    options |= {"stochastic": seed is not None, "hooked": combine is not None}
    found = [(key, bucket, launches(key, direction, **options)) for key, bucket in plan.buckets]
    for key, bucket, kernels in found:
        bucket.send()
        sent = amplified if DIRECTIONS[direction].buffer and key[4] else given
        for launch in kernels:
            _run(launch, bucket, sent, 0 if seed is None else seed)
            if combine is not None and launch.fixed.get("DECIDE") is False:
                for entry in bucket.entries:
                    combine(bucket.unit_sums(entry))


def _run(launch: Launch, bucket: Bucket, given: Any, seed: int) -> None:
    grid = bucket.grids[launch.grid]
    found = {"given": given, "seed": seed, "programs": grid.programs, "owners": grid.owners}
    names = [name for name in launch.kernel.arg_names if name not in launch.fixed]
    arguments = {name: found[name] if name in found else getattr(bucket, name) for name in names}
    launch.kernel[(grid.programs,)](**arguments, **launch.fixed, **launch.options)
