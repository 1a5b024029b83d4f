"""The Triton step of ties against the reference; run by ``test_triton.py``, as ``triton_cases.py`` is.

The reference steps fp32 weights in fp32 too, so that both see the same rounding of what they store.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from typing import Any

import pytest
import torch

import symopt
from support import cases as case_support
from support import planes as plane_runs
from support import runs as runs_of
from support.cases import cases, some
from support.interpreter import DEVICE, poisoned, pytestmark
from support.planes import FEW, SIMPLE, along, constraint_of, large, make_equal, nearly, planes, tied, weights
from support.runs import HALF, Run, gradient, step_alike, take, tensors
from support.table import OPTIMIZERS, OptimizerRow, PlaneRow, plane_module
from symopt_kernels.triton import launch as triton_launch
from symopt_kernels.triton import table as triton_table

__all__ = ["poisoned", "pytestmark"]

TIES = planes("triton", DEVICE)
OTHERS = {row.id: row for row in TIES if row not in SIMPLE}
# Three copies, two copies element-wise, one and two gathered; coordinates of groups and of several tensors.
COORDINATES = [OTHERS["zero-mean"], OTHERS["mirror-basis-two"]]
FEW_TIES = [SIMPLE[1], SIMPLE[2], OTHERS["symmetric"], *COORDINATES]


def kernel_of(row: PlaneRow) -> tuple[object, ...]:
    """What tells rows apart that are stepped by different kernels, or differently compiled ones."""
    return constraint_of(plane_module(row)).retraction, row in SIMPLE or "elementwise" in row.id


def in_turn(row: PlaneRow, opt_row: OptimizerRow) -> bool:
    """Every row, and every kernel with every optimizer; the simple ones with all variants of the optimizers."""
    optimizers = OPTIMIZERS if row in SIMPLE else FEW
    alike = [other for other in TIES if kernel_of(other) == kernel_of(row)]
    if opt_row not in optimizers:
        return False
    turn = optimizers.index(opt_row) - alike.index(row)
    return case_support.EXHAUSTIVE or turn % min(len(alike), 4) == 0


def unaligned(row: PlaneRow) -> PlaneRow:
    """Several blocks, the last one not full; no multiple of what 128 bits hold."""
    return large(row, (9, 11))


def aligned(row: PlaneRow) -> PlaneRow:
    return large(row, (8, 12))


both = functools.partial(plane_runs.both, dtype=torch.float32, fused="triton", device=DEVICE)
close = functools.partial(runs_of.close, kind="backends, fp32")


@cases(in_turn, row=TIES, opt_row=OPTIMIZERS)
def test_many_steps(row: PlaneRow, opt_row: OptimizerRow) -> None:
    """Strengths, formats, shapes and the other choices rotate."""
    i, j = TIES.index(row), OPTIMIZERS.index(opt_row)
    dtype, unbounded = (torch.float32, *HALF)[(i + 2 * j) % 3], (i + j) % 5 == 4
    # Without the time scale many weights grow without bounds.
    made = row if unbounded else (unaligned, aligned)[(i + j // 2) % 2](row)
    options = {"maximize": j % 3 == 0, "time_scale": "none" if unbounded else "saturated"}
    runs = both(made, opt_row, (None, 0.3)[(i + j) % 2], dtype=dtype, **options)
    start = [w.clone() for w in weights(runs[0])]
    for t in range(5):
        step_alike(runs, t)
        close(*runs)
    assert not any(torch.equal(w, old) for w, old in zip(weights(runs[0]), start, strict=True))


ONTO = [(row, *case) for row in SIMPLE for case in ((None, 1, 0.0), (20.0, -1, 0.0))]
ONTO += [(SIMPLE[0], 20.0, 1, 0.1), (SIMPLE[3], None, -1, 0.1)]
ONTO += [(OTHERS[name], None, 1, 0.0) for name in ("tied-slices-elementwise", "symmetric")]
ONTO += [(row, *case) for row in (*COORDINATES, OTHERS["zero-mean-in"]) for case in ((None, 1, 0.0), (20.0, -1, 0.1))]


@some(case=ONTO, opt_row=FEW)
def test_onto_the_plane_and_along_it(case: tuple[PlaneRow, float | None, int, float], opt_row: OptimizerRow) -> None:
    """Gradients that differ by little: the plane is reached and held bit for bit."""
    row, strength, sign, imbalance = case
    runs = both(row, opt_row, strength, imbalance=imbalance, lr=0.02)
    nearly(runs, 0.003)
    arrived: list[int] = []
    for t in range(300 if imbalance == 0 else 20):
        take(runs, [sign * g for g in along(runs[0], t)])
        close(*runs)
        if tied(runs[0]):
            arrived.append(t)
        elif imbalance == 0:
            assert not arrived
        if arrived and tied(runs[1]) and t >= arrived[0] + 5:
            return
    assert imbalance > 0


@some(row=FEW_TIES[:-1], opt_row=FEW)
def test_blocks_that_are_on_the_plane_beside_others_that_are_not(row: PlaneRow, opt_row: OptimizerRow) -> None:
    for strength, imbalance in ((None, 0.0), (0.3, 1.0)):
        runs = both(unaligned(row), opt_row, strength, imbalance=imbalance)
        make_equal(runs, 0.2, 0.8)
        for t in range(2):
            step_alike(runs, t)
            close(*runs)
        assert not tied(runs[0])


@cases(opt_row=[FEW[1], FEW[-1]])
def test_parts_of_parameters_of_several_shapes(opt_row: OptimizerRow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_table, "BLOCK", 512)
    row = replace(SIMPLE[0], id="parts", make=plane_runs.three_views, shapes=((33, 40), (40, 33), (2, 35, 40)))
    runs = both(row, opt_row, None if opt_row.id == "adamw" else 0.3)
    nearly(runs)
    start = [w.clone() for w in weights(runs[0])]
    for t in range(2):
        step_alike(runs, t)
        close(*runs)
    assert not any(torch.equal(w, old) for w, old in zip(weights(runs[0]), start, strict=True))


SUMS: list[tuple[tuple[int, ...], int | tuple[int, ...], int, int]] = [
    ((2, 1500), 1, 1, 128), ((8500,), 0, 1, 128), ((100, 10), 0, 2, 128),
    ((40, 66), 0, 16, 128), ((2, 90, 3), (0, 2), 16, 128), ((2100, 2), 1, 16, 1024),
]  # fmt: skip
"""A shape, the dimensions of a mean, lines of a program, weights of a block."""


@some(case=SUMS, opt_row=[FEW[1], FEW[-1]])
def test_sums_of_many_parts(
    case: tuple[tuple[int, ...], int | tuple[int, ...], int, int],
    opt_row: OptimizerRow,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Groups in one tile and in several, tiles in one part and in several, more groups than are combined at a time."""
    shape, dim, lines, block = case
    monkeypatch.setattr(triton_table, "LINES_PER_PROGRAM", lines)
    monkeypatch.setattr(triton_table, "BLOCK", block)
    row = replace(OTHERS["zero-mean"], make=lambda k: symopt.ZeroMean(strength=k, dim=dim), shapes=(shape,))
    runs = both(row, opt_row, None if opt_row.id == "adamw" else 0.3)
    step_alike(runs, 0)
    close(*runs)
    make_equal(runs)
    step_alike(runs, 1)
    close(*runs)


@some(resident=[3, 2048], opt_row=[FEW[1], FEW[-1]])
def test_a_basis_over_many_blocks(resident: int, opt_row: OptimizerRow, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks to a program, and as many programs as there are blocks; 3 directions are no power of two."""
    monkeypatch.setattr(triton_table, "RESIDENT", resident)
    monkeypatch.setattr(triton_table, "BLOCK", 64)
    shapes = ((34, 33), (3, 5), (50,))
    numel = sum(torch.Size(shape).numel() for shape in shapes)
    basis = torch.linalg.qr(gradient(torch.zeros(numel, 3, dtype=torch.float64), 0)).Q
    row = replace(OTHERS["mirror-basis-two"], make=lambda k: symopt.Mirror(basis=basis, strength=k), shapes=shapes)
    runs = both(row, opt_row, None if opt_row.id == "adamw" else 0.3)
    for t in range(2):
        step_alike(runs, t)
        close(*runs)
    (slot,) = {id(slot): slot for slot in runs[0][1]._slots.values()}.values()
    assert sum(entry.fields["count"] for entry in slot.entry.working) == (39 if resident == 2048 else 5)


def test_planes_of_coordinates_share_launches() -> None:
    runs: list[Run] = []
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        net = torch.nn.ModuleList(torch.nn.Linear(n, 12, bias=False) for n in (7, 9, 12)).to(DEVICE)
        directions = torch.linalg.qr(torch.randn(12 * 12, 2)).Q
        symopt.constrain(
            net, {("0.weight", "1.weight"): symopt.ZeroMean(), "2.weight": symopt.Mirror(basis=directions)}
        )
        runs.append((net, symopt.AdamW(net, lr=0.01, backend=backend)))
    for t in range(3):
        step_alike(runs, t)
        close(*runs)
    (plan,) = {id(s.entry.plan): s.entry.plan for s in runs[0][1]._slots.values() if s.entry.plan is not None}.values()
    for key, bucket in plan.buckets:
        names = [one.kernel.__name__ for one in triton_launch.launches(key, "adamw")]
        kind = "basis" if key[0] == "basis" else "means"
        assert names == [f"survey_{kind}", "combine_coordinates", f"move_{kind}"]
        assert len(bucket.rows) == (1 if kind == "basis" else 2)
    assert len(plan.buckets) == 2


def test_planes_whose_orbits_are_gathered_share_launches() -> None:
    runs: list[Run] = []
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        net = torch.nn.ModuleList(torch.nn.Linear(n, n, bias=False) for n in (7, 33)).to(DEVICE)
        symopt.constrain(net, {"*.weight": symopt.Symmetric()})
        runs.append((net, symopt.AdamW(net, lr=0.01, backend=backend)))
    for t in range(3):
        step_alike(runs, t)
        close(*runs)
    assert len({id(slot.entry.plan) for slot in runs[0][1]._slots.values() if slot.entry.plan is not None}) == 1
    (first, *_) = (slot.entry.plan for slot in runs[0][1]._slots.values() if slot.entry.plan is not None)
    assert len(first.buckets) == 1


def test_large_orbits_are_left_to_the_reference() -> None:
    row = next(row for row in TIES if row.id == "circulant")
    for size in (64, 65):
        module = plane_module(replace(row, shapes=((size, size),))).float().to(DEVICE)
        ((_, _, reasons),) = symopt.AdamW(module).backends()
        assert ("more than 64 weights" in str(reasons["triton"])) == (size == 65)


@some(row=FEW_TIES, opt_row=FEW)
def test_a_step_without_lr_and_gradients_changes_no_bit(row: PlaneRow, opt_row: OptimizerRow) -> None:
    run = both(unaligned(row), opt_row, 0.3, lr=0.0)[0]
    before = [w.clone() for w in weights(run)]
    take([run], [torch.zeros_like(w) for w in before])
    assert all(torch.equal(w, old) for w, old in zip(weights(run), before, strict=True))


@some(row=FEW_TIES, opt_row=FEW)
def test_what_changes_between_steps(row: PlaneRow, opt_row: OptimizerRow) -> None:
    """Numbers on the device, a given factor of the imbalance, scaled gradients, and none for one of the members."""
    runs = both(row, opt_row)
    changes: list[dict[str, Any]] = [
        {"lr": torch.tensor(0.004, device=DEVICE)},
        {"strength": torch.tensor(0.3, device=DEVICE)},
        {"imbalance_factor": 0.9},
        {"strength": None},
    ]
    for t, change in enumerate(changes):
        for _, opt in runs:
            opt.param_groups[0].update(change)
        step_alike(runs, t)
        close(*runs)
    for _, opt in runs:
        opt.grad_scale = torch.tensor(8.0, device=DEVICE)
    step_alike(runs, 5)
    close(*runs)
    for module, opt in runs:
        module.w0.grad = None
        opt.step()
    close(*runs)
    for run in runs:
        run[1].load_state_dict(copy.deepcopy(run[1].state_dict()))
    step_alike(runs, 6)
    close(*runs)


@some(row=FEW_TIES, opt_row=FEW)
def test_an_overflow_moves_nothing(row: PlaneRow, opt_row: OptimizerRow) -> None:
    """In the first step too, whose momentum is then still to come."""
    runs = both(row, opt_row)
    ours = runs[0]
    before = [w.clone() for w in weights(ours)]
    ours[1].found_inf = torch.ones((), device=DEVICE)
    step_alike([ours], 0)
    assert all(torch.equal(w, old) for w, old in zip(weights(ours), before, strict=True))
    ours[1].found_inf.zero_()
    for t in range(2):
        step_alike(runs, t)
        close(*runs)
    kept = {key: value.clone() for key, value in tensors(ours).items()}
    ours[1].found_inf.fill_(1)
    step_alike([ours], 2)
    assert all(torch.equal(value, kept[key]) for key, value in tensors(ours).items())


@some(row=FEW_TIES, opt_row=FEW, bad=[float("nan"), float("inf")])
def test_bad_gradients_show_in_the_weight(row: PlaneRow, opt_row: OptimizerRow, bad: float) -> None:
    for on_the_plane in (False, True):
        runs = both(unaligned(row), opt_row, None if on_the_plane else 0.3)
        if on_the_plane:
            make_equal(runs)
        grads = [torch.ones(w.shape) for w in weights(runs[0])]
        grads[0].view(-1)[7] = bad
        take(runs, grads)
        have, want = ([w.isfinite() for w in weights(run)] for run in runs)
        assert all(torch.equal(x, y) for x, y in zip(have, want, strict=True))


def test_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ties of one kind share theirs; gates for every index need one, a joint gate three."""
    for mode, strength, expected in (
        ("joint", None, ["survey_orbits", "move_orbits", "snap_orbits"]),
        ("elementwise", None, ["move_orbits"]),
        ("elementwise", 0.3, ["move_orbits"]),
    ):
        net = torch.nn.ModuleList(torch.nn.Linear(5, 3) for _ in range(4)).to(DEVICE)
        made = symopt.Tied(strength=strength, mode=mode)
        symopt.constrain(net, {("0.weight", "1.weight"): made, ("2.weight", "3.weight"): made})
        opt = symopt.AdamW(net)
        if DEVICE == "cpu":
            opt.param_groups[0]["backend"] = "triton"
        for layer in net:
            layer.weight.grad = torch.randn_like(layer.weight)
        opt.step()
        (plan,) = {id(s.entry.plan): s.entry.plan for s in opt._slots.values() if s.entry.plan is not None}.values()
        ((key, _),) = plan.buckets
        assert [one.kernel.__name__ for one in triton_launch.launches(key, "adamw")] == expected


def test_the_comparison_notices_a_wrong_learning_rate() -> None:
    for row in TIES:
        runs = both(row, OPTIMIZERS[0])
        runs[1][1].param_groups[0]["lr"] *= 1 + 1e-2
        with pytest.raises(AssertionError):
            for t in range(20):
                step_alike(runs, t)
                close(*runs)
