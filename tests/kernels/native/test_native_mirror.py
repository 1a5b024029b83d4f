"""The native step of a plane against the reference: the same weights and state, off the plane and on it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import symopt
from support.cases import cases, pairs, some
from support.planes import (
    FEW,
    MORE,
    OTHERS,
    SIMPLE,
    TIES,
    along,
    both,
    bound_weight,
    constraint_of,
    large,
    make_equal,
    nearly,
    three_views,
    tied,
    weights,
)
from support.runs import HALF, Run, close, equal, step_alike, take, tensors
from support.table import OPTIMIZERS, OptimizerRow, PlaneRow, plane_module
from symopt.constraints.planes.plane import flat
from symopt_kernels.native import binding as native

EVERY_COUNT = [*TIES, *MORE]


def meet(row: PlaneRow, opt_row: OptimizerRow, **_: Any) -> bool:
    """Where weights lie is no matter of the optimizer, so with those that are gathered only some meet."""
    return row in SIMPLE or opt_row in FEW


def test_which_planes_have_a_kernel_and_why_others_have_not() -> None:
    ids = {row.id for row in OTHERS}
    assert ids == {"mirror", "mirror-coordinates"}
    for row in TIES:
        module = plane_module(row)
        assert [backend for _, backend, _ in symopt.AdamW(module).backends()] == ["native"] * len(row.shapes)
    for row in OTHERS:
        said = symopt.explain(symopt.AdamW(plane_module(row)))
        retraction = constraint_of(plane_module(row)).retraction
        assert f"no step for the direction 'adamw' with the retraction {retraction!r}" in said
    module = plane_module(TIES[0])
    module.w1.data = module.w1.data.T.contiguous().T
    assert "contiguous" in symopt.explain(symopt.AdamW(module))
    with pytest.raises(ValueError, match="contiguous"):
        opt = symopt.AdamW(module, backend="native")
        module.w0.grad = torch.ones_like(module.w0)
        opt.step()


@pairs(meet, row=TIES, opt_row=OPTIMIZERS, strength=[None, 0.3], time_scale=["none", "saturated"])
def test_twenty_steps(row: PlaneRow, opt_row: OptimizerRow, strength: float | None, time_scale: str) -> None:
    for made in (row, large(row)) if time_scale == "saturated" else (row,):  # many weights grow without bounds
        runs = both(made, opt_row, strength, time_scale=time_scale)
        start = [w.clone() for w in weights(runs[0])]
        for t in range(20):
            step_alike(runs, t)
            close(*runs)
        assert not any(torch.equal(w, old) for w, old in zip(weights(runs[0]), start, strict=True))


@pairs(meet, row=TIES, opt_row=OPTIMIZERS, strength=[None, 20.0], imbalance=[0.0, 0.1], sign=[1, -1])
def test_onto_the_plane_and_along_it(
    row: PlaneRow, opt_row: OptimizerRow, strength: float | None, imbalance: float, sign: int
) -> None:
    """Gradients that leave it by little: the plane is reached, at the same step, and held, bit for bit if a tie."""
    onto_the_plane_and_along_it(row, opt_row, strength, imbalance, sign)


@pairs(row=MORE, opt_row=FEW, imbalance=[0.0, 0.1])
def test_more_copies_onto_the_plane(row: PlaneRow, opt_row: OptimizerRow, imbalance: float) -> None:
    onto_the_plane_and_along_it(row, opt_row, None, imbalance, 1)


def onto_the_plane_and_along_it(
    row: PlaneRow, opt_row: OptimizerRow, strength: float | None, imbalance: float, sign: int
) -> None:
    runs = both(row, opt_row, strength, imbalance=imbalance, lr=0.01)
    nearly(runs)
    arrived = None
    for t in range(400):
        take(runs, [sign * g for g in along(runs[0], t)])
        close(*runs)
        assert tied(runs[0]) == tied(runs[1])
        if tied(runs[0]) and arrived is None:
            arrived = t
        if arrived is not None and imbalance == 0:
            assert tied(runs[0])
        if arrived is not None and t > arrived + 10:
            break
    assert arrived is not None or imbalance > 0


@cases(dtype=[torch.float64, torch.bfloat16], opt_row=FEW)
def test_parts_of_parameters_of_several_shapes(opt_row: OptimizerRow, dtype: torch.dtype) -> None:
    """Tied ones from each, and free ones in each."""
    row = replace(TIES[0], id="parts", make=three_views, shapes=((33, 40), (40, 33), (2, 35, 40)))
    for strength in (None, 0.3):
        runs = both(row, opt_row, strength, dtype)
        nearly(runs)
        start = bound_weight(runs[0])
        for t in range(8):
            step_alike(runs, t)
            close(*runs, "backends" if dtype == torch.float64 else "backends, fp32")
        assert not torch.equal(bound_weight(runs[0]), start)


_ORBITS: dict[str, tuple[symopt.Constraint, tuple[tuple[int, ...], ...], list[int]]] = {
    "parts": (three_views(None), ((33, 40), (40, 33), (2, 35, 40)), [1, 1, 1, 3]),
    "transposed": (symopt.Tied(views=[None, "T"]), ((70, 150), (150, 70)), [2]),
    "sliced": (symopt.Tied(views=[slice(30), slice(30, 60)]), ((64, 90),), [1, 2]),
    "vectors": (symopt.Tied(views=[slice(5, 705), slice(705, 1405)]), ((1500,),), [1, 2]),
    "symmetric": (symopt.Symmetric(), ((150, 150),), [1, 2]),
    "circulant": (symopt.Circulant(), ((30, 30),), [30]),
    "turned": (symopt.Equivariant([(None, torch.rot90(torch.arange(64).reshape(8, 8)).flatten())]), ((9, 64),), [4]),
    "random": (
        symopt.Equivariant([(None, torch.randperm(70, generator=torch.Generator().manual_seed(0)))]),
        ((40, 70),),
        [],
    ),
}


def _bound(constraint: Any, shapes: tuple[tuple[int, ...], ...]) -> tuple[Any, Tensor]:
    """The constraint of weights of these shapes, and a weight as it sees them."""
    parts = tuple(torch.empty(shape) for shape in shapes)
    bound = constraint.bind_all("abc"[: len(parts)], parts) if constraint.binds_many else constraint.bind("a", parts[0])
    return bound, flat(parts)


@pytest.mark.parametrize(("constraint", "shapes", "copies"), _ORBITS.values(), ids=list(_ORBITS))
def test_segments_hold_every_weight_once_and_tiles_say_where(
    constraint: Any, shapes: tuple[tuple[int, ...], ...], copies: list[int]
) -> None:
    bound, w = _bound(constraint, shapes)
    groups, parts = bound.partition(w), bound.segments(w)
    label = groups.expand(torch.arange(groups.count)).flatten()
    numels = torch.tensor([math.prod(shape) for shape in shapes])
    starts = numels.cumsum(0) - numels
    seen, first = torch.zeros(w.numel(), dtype=torch.long), 0
    for part in parts:
        count, orbits = part.places.shape
        places = part.places + starts[part.of.long()][:, None]
        assert part.first == first
        assert torch.equal(label[places], torch.arange(first, first + orbits).expand(places.shape))
        seen, first = seen + torch.bincount(places.flatten(), minlength=len(seen)), first + orbits
        sizes = part.begins.diff()
        assert part.begins[0] == 0 and part.begins[-1] == orbits and int(sizes.min()) > 0 and int(sizes.max()) <= 512
        for j in range(count):
            for t, (at, down, across, rows) in enumerate(part.tiles[j].tolist()):
                r = torch.arange(rows)[:, None]
                c = torch.arange(int(sizes[t]) // rows if rows else 0)
                if rows:
                    lies = (at + r * down + c * across).flatten()
                    assert torch.equal(lies.int(), part.places[j, part.begins[t] : part.begins[t + 1]])
    assert first == groups.count and bool((seen == 1).all())
    assert sorted(len(part.of) for part in parts) == copies or not copies


def test_what_is_a_piece_of_a_matrix_is_not_looked_up() -> None:
    for name, least in {"transposed": 1.0, "sliced": 1.0, "vectors": 1.0, "symmetric": 0.8}.items():
        constraint, shapes, _ = _ORBITS[name]
        bound, w = _bound(constraint, shapes)
        part = bound.segments(w)[-1]
        known = (part.tiles[..., 3] > 0) * part.begins.diff()
        assert int(known.sum()) >= least * part.places.numel(), name


# How groups may lie in memory: rows, columns, both sides of them, runs, and those that are cut into parts.
_CENTRED: list[tuple[tuple[int, ...], int | tuple[int, ...] | None]] = [
    *[((7,), None), ((1, 5), 0), ((5, 1), None), ((3, 40_000), None), ((40_000, 3), 0), ((90, 600), 0)],
    *[
        ((5, 300, 17), 1),
        ((40, 30, 3, 3), (2, 3)),
        ((40, 30, 3, 3), (0, 1)),
        ((6, 40, 150), 1),
        ((900, 4, 130), (0, 1)),
    ],
    *[((700, 3, 160), 0), ((4, 9_000, 2), 1), ((8, 5, 300), (0, 2)), ((2, 3, 5, 7), (0, 2))],
]


@pairs(layout=_CENTRED, opt_row=FEW, dtype=[torch.float64, torch.float32])
def test_means_over_every_layout(layout: Any, opt_row: OptimizerRow, dtype: torch.dtype) -> None:
    shape, dim = layout
    row = PlaneRow("zero-mean", lambda k: symopt.ZeroMean(strength=k, dim=dim), (shape,), list)
    if native.layout(torch.empty(shape), symopt.ZeroMean(dim=dim).partition(torch.empty(shape))) is None:
        assert "interleave" in symopt.explain(symopt.AdamW(plane_module(row)))
        return
    runs = both(row, opt_row, 0.3, dtype, imbalance=0.1)
    nearly(runs)
    for t in range(4):
        step_alike(runs, t)
        close(*runs, "backends" if dtype == torch.float64 else "backends, fp32")


@pairs(meet, row=TIES, opt_row=OPTIMIZERS, dtype=[torch.float32, *HALF])
def test_lower_precision(row: PlaneRow, opt_row: OptimizerRow, dtype: torch.dtype) -> None:
    for made in (row, large(row)):
        runs = both(made, opt_row, None, dtype)
        for t in range(12):
            step_alike(runs, t)
            close(*runs, "backends, fp32")


@pairs(row=[row for row in EVERY_COUNT if not row.id.startswith("mirror")], opt_row=FEW, imbalance=[0.0, 1.0])
def test_blocks_that_are_on_the_plane_beside_others_that_are_not(
    row: PlaneRow, opt_row: OptimizerRow, imbalance: float
) -> None:
    runs = both(large(row), opt_row, None if imbalance == 0 else 0.3, imbalance=imbalance)
    make_equal(runs, 0.15, 0.6)
    for t in range(6):
        step_alike(runs, t)
        close(*runs)
    assert not tied(runs[0])


@pairs(
    row=EVERY_COUNT,
    opt_row=FEW,
    instructions=native.INSTRUCTIONS,
    dtype=[torch.float64, torch.float32],
    imbalance=[0.0, 1.0],
)
def test_every_instruction_set(
    row: PlaneRow,
    opt_row: OptimizerRow,
    instructions: str,
    dtype: torch.dtype,
    imbalance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(native.step.__kwdefaults__, "instructions", instructions)
    strength, kind = (0.3 if imbalance else None), ("backends" if dtype == torch.float64 else "backends, fp32")
    runs = both(large(row), opt_row, strength, dtype, imbalance=imbalance)
    for t in range(4):
        step_alike(runs, t)
        close(*runs, kind)
    make_equal(runs)
    for t in range(4):
        step_alike(runs, t)
        close(*runs, kind)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@some(row=TIES, opt_row=FEW)
def test_results_do_not_depend_on_the_number_of_threads(row: PlaneRow, opt_row: OptimizerRow, threads: None) -> None:
    results = []
    for count in (1, 2, 3):
        run = both(large(row, (300, 257)), opt_row, dtype=torch.float32)[0]
        for t in range(2):
            step_alike([run], t)
            torch.set_num_threads(count)  # not before: the first step's metric_scale is a sum of torch's
        make_equal([run], 0.0, 0.52)
        step_alike([run], 3)
        torch.set_num_threads(1)
        results.append({key: value.clone() for key, value in tensors(run).items()})
    assert all(torch.equal(results[0][key], other[key]) for other in results[1:] for key in results[0])


@pairs(row=EVERY_COUNT, opt_row=FEW, bad=[float("nan"), float("inf")], on_the_plane=[False, True])
def test_bad_gradients_show_in_the_weight(row: PlaneRow, opt_row: OptimizerRow, bad: float, on_the_plane: bool) -> None:
    runs = both(large(row), opt_row)
    if on_the_plane:
        make_equal(runs)
    for module, opt in runs:
        for p in module.parameters():
            p.grad = torch.ones_like(p)
        module.w0.grad.view(-1)[5] = bad
        opt.step()
    have, want = ([w.isfinite() for w in weights(run)] for run in runs)
    assert all(torch.equal(x, y) for x, y in zip(have, want, strict=True))


@cases(row=TIES, opt_row=FEW)
def test_whatever_happens_between_steps_is_noticed(row: PlaneRow, opt_row: OptimizerRow) -> None:
    def other_values(run: Run) -> None:
        with torch.no_grad():
            run[0].w0.mul_(1.5)

    def swap_data(run: Run) -> None:
        run[0].w0.data = run[0].w0.data.clone() + 0.1

    def given_strength(run: Run) -> None:
        run[1].param_groups[0]["strength"] = 0.3

    def automatic_strength(run: Run) -> None:
        run[1].param_groups[0]["strength"] = None

    def reload(run: Run) -> None:
        run[1].load_state_dict(copy.deepcopy(run[1].state_dict()))

    def no_gradient(run: Run) -> None:
        run[0].w0.requires_grad_(False)

    def anneal(run: Run) -> None:
        run[1].param_groups[0]["imbalance_factor"] = 0.9

    def toggle(run: Run) -> None:
        group = run[1].param_groups[0]
        group["backend"] = {"native": "reference", "reference": "native"}[group["backend"]]

    runs = both(row, opt_row)
    for t, event in enumerate(
        (swap_data, other_values, given_strength, reload, automatic_strength, anneal, no_gradient, toggle, toggle)
    ):
        for _ in range(2):
            step_alike(runs, t)
            close(*runs)
        for run in runs:
            event(run)
        if event is no_gradient:
            for module, opt in runs:
                module.w0.grad = None
                opt.step()
            close(*runs)


@cases(row=TIES, opt_row=FEW)
def test_scaled_gradients_and_those_that_overflowed(row: PlaneRow, opt_row: OptimizerRow) -> None:
    runs = both(row, opt_row)
    step_alike(runs, 0)
    for _, opt in runs:
        opt.grad_scale = torch.tensor(8.0)
    step_alike(runs, 1)
    close(*runs)
    before = copy.deepcopy(runs[0])
    for _, opt in runs:
        opt.found_inf = torch.tensor(1.0)
    step_alike(runs, 2)
    assert equal(runs[0], before)


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "metric_scale"])
def test_state_that_does_not_fit_is_refused(key: str) -> None:
    module = plane_module(TIES[0])
    opt = symopt.AdamW(module)
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    for p in module.parameters():
        opt.state[p][key] = torch.ones(3, 7, dtype=torch.float64)
    with pytest.raises((ValueError, RuntimeError)):
        opt.step()


def test_weights_that_became_different_are_refused() -> None:
    for change in (lambda w: w.float(), lambda w: w[:2].clone()):
        module = plane_module(TIES[0])
        opt = symopt.SGD(module, lr=0.1)
        module.w1.data = change(module.w1.data)
        for p in module.parameters():
            p.grad = torch.ones_like(p)
        with pytest.raises((ValueError, RuntimeError)):
            opt.step()


def test_the_comparison_notices_a_wrong_learning_rate() -> None:
    for row in TIES:
        runs = both(row, OPTIMIZERS[0])
        runs[1][1].param_groups[0]["lr"] *= 1 + 1e-6
        with pytest.raises(AssertionError):
            for t in range(20):
                step_alike(runs, t)
                close(*runs)


def test_copies_that_became_different_are_refused() -> None:
    module = plane_module(TIES[0], dtype=torch.float32)
    opt = symopt.AdamW(module)
    with torch.no_grad():
        module.w1.data = module.w1.double()
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"w0, w1: tied weights must be of one dtype.* change all of them alike"):
        opt.step()
