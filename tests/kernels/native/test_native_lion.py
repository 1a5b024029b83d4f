"""The native Lion, written out in fp64; and no direction runs as another."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from support.cases import cases
from support.kernel_cases import FORMATS
from support.tolerances import tolerance
from symopt_kernels.groups import Groups
from symopt_kernels.native import binding as native
from symopt_kernels.native.capability import NATIVE
from symopt_kernels.reference import elementwise
from symopt_kernels.units import Part, Units

LR, BETA1, BETA2, KEPT, PRUNED, SCALE, WEIGHT_DECAY = 0.01, 0.9, 0.99, 0.3, 1.5, 0.1, 0.1


@cases(
    retraction=["plain", "sparse", "sparse-budget", "nm"],
    format=FORMATS,
    instructions=native.INSTRUCTIONS,
    imbalance=[0.0, 0.02],
)
def test_a_step_is_lions(retraction: str, format: str, instructions: str, imbalance: float) -> None:
    dtype, has_master = FORMATS[format]
    accurate = torch.float64 if format == "fp64" else torch.float32
    generator = torch.Generator().manual_seed(len(retraction) + len(format))
    w, g, m = (torch.randn(1036, generator=generator, dtype=torch.float64) * size for size in (0.05, 0.1, 0.1))
    g[3] = m[3] = 0.0
    g[5] = math.nan
    w, g, m = w.to(dtype), g.to(dtype), m.to(accurate)
    state: dict[str, Any] = {"first": m.clone()}
    if retraction != "plain":
        state |= {"imbalance": torch.tensor(imbalance, dtype=accurate)}
        state |= {"metric_scale": torch.tensor(SCALE, dtype=accurate)}
    if has_master:
        state["master"] = w.to(accurate) * (1 + torch.finfo(dtype).eps / 8)
    threshold = math.inf if retraction == "nm" else 0.05
    if retraction in ("nm", "sparse-budget"):
        state["budget"] = torch.tensor([KEPT, PRUNED, threshold, 0.99, math.inf], dtype=torch.float64)
    old = (state["master"] if has_master else w).double()
    lead = BETA1 * m.double() + (1 - BETA1) * g.double()
    terms = BETA1 * m.double().abs() + (1 - BETA1) * g.double().abs()
    certain = lead.isnan() | (lead == 0) | (lead.abs() > 8 * torch.finfo(accurate).eps * terms)
    assert int((~certain).sum()) < 3 and bool(certain[3]) and bool(certain[5])
    delta, strength = LR * torch.where(lead.isnan(), lead, lead.sign()), torch.full_like(old, KEPT)
    snaps: Any = True
    if retraction == "nm":
        snaps = elementwise.nm_pruned_mask(old.reshape(-1, 4), 2, 4).flatten()
    elif retraction == "sparse-budget":
        snaps = old.abs() <= threshold
    if isinstance(snaps, torch.Tensor):
        strength[snaps] = PRUNED
    c, scale = torch.tensor(imbalance, dtype=accurate).double(), torch.tensor(SCALE, dtype=accurate).double()
    if retraction == "plain":
        want, far = elementwise.plain(old, delta, LR * WEIGHT_DECAY), old.abs() + LR
    else:
        want = elementwise.sparse(old, delta, LR * strength, c, scale, snaps=snaps)
        far = (1 + LR) ** 2 * old.abs() + LR / SCALE * (c + 2 * old.abs())
    entry, start = native.Entry(), g.clone()
    native.fill(entry, w, state, "nm" if retraction == "nm" else retraction.split("-")[0])
    entry.pattern_n, entry.pattern_m = (2, 4) if retraction == "nm" else (0, 0)
    entry.grad, entry.strength_kept, entry.strength_pruned = g.data_ptr(), KEPT, KEPT
    options = {"lr": LR, "beta1": BETA1, "beta2": BETA2, "weight_decay": WEIGHT_DECAY}
    native.step([entry], "lion", instructions=instructions, **options)
    kind = ", fp64" if format == "fp64" else ""
    half_ulp = 1.001 * torch.finfo(dtype).eps / 2 * want.abs().clamp(min=torch.finfo(dtype).smallest_normal)
    error = (w.double() - want).abs() - (dtype != accurate) * half_ulp
    error = torch.where(w.isnan() & want.isnan(), 0.0, error)
    assert bool((error <= tolerance("native weight" + kind) * torch.finfo(accurate).eps * far)[certain].all())
    assert bool(w[5].isnan()) and torch.equal(g.nan_to_num(9.0), start.nan_to_num(9.0))
    moved = BETA2 * m.double() + (1 - BETA2) * g.double()
    terms = BETA2 * m.double().abs() + (1 - BETA2) * g.double().abs()
    error = (state["first"].double() - moved).abs()
    close = error <= tolerance("native state" + kind) * torch.finfo(accurate).eps * terms
    assert bool((close | (moved.isnan() & state["first"].isnan())).all())
    assert entry.zeros == int((w == 0).sum())


def test_a_direction_never_runs_as_another() -> None:
    w, g = torch.ones(6, 4), torch.ones(6, 4)
    state = {"imbalance": torch.tensor(0.0), "metric_scale": torch.tensor(0.1), "first": torch.zeros(6, 4)}
    group, units, plane = native.Entry(), native.UnitsEntry(), native.PlaneEntry()
    native.fill(group, w, state, "group", Groups(6, (6, 4), (1,)))
    native.fill_units(units, [w], [state], Units(6, (Part((6, 4), 0, torch.arange(6)),)))
    native.fill_plane(plane, [w, g], [state, state], sqrt_dim_per_gate=1.0, gate_per_orbit=False)
    for entry, name in ((group, "group"), (units, "UnitsEntry"), (plane, "PlaneEntry")):
        with pytest.raises(ValueError, match=f"no direction 'lion' with the retraction '{name}'"):
            native.step([entry], "lion", lr=LR)
    with pytest.raises(ValueError, match="no direction 'foreign'; it has sgd, adam, adamw, lion"):
        native.step([group], "foreign", lr=LR)
    assert bool((w == 1).all())
    assert ("lion", "nm") in NATIVE.rows and ("lion", "group") not in NATIVE.rows
