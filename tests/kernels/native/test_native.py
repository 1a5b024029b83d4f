"""The native kernel against ``reference`` evaluated in fp64 on the same numbers, and against torch.optim.

Every result is a sum, and rounding is relative to what is added up, not to what is left when it cancels.  So each
expected number comes with its *terms*, the same formula with every minus turned into a plus, and a tolerance counts
ulps of those: see :func:`expect`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import symopt
from support.cases import cases
from support.kernel_cases import (
    AXES,
    BETA1,
    BETA2,
    DIRECTIONS,
    EPS,
    FORMATS,
    GRADIENT,
    GROUPS,
    LR,
    OUTSIDE,
    RETRACTIONS,
    SCALE,
    SIZES,
    SNAP,
    STEP,
    STRENGTH,
    THRESHOLD,
    Case,
    Problem,
    applies,
    arguments,
    in_order,
    make,
    partition,
    product_of_axes,
)
from support.kernel_oracle import Expected, allowed, distances, expect, rebalanced, same
from support.roles import roles
from symopt_kernels.groups import Groups
from symopt_kernels.native import binding as native
from symopt_kernels.reference import elementwise, gauge
from symopt_kernels.reference import group as group_kernel


def run(case: Case, problem: Problem, **changes: Any) -> native.Entry:
    entry = native.Entry()
    native.fill(
        entry, problem.w, roles(problem.state), case.retraction, problem.groups, fresh=bool(case.option("fresh"))
    )  # fmt: skip
    entry.grad = problem.g.data_ptr()
    entry.strength_kept = changes.pop("strength", STRENGTH)
    entry.strength_pruned = OUTSIDE if case.budgeted else entry.strength_kept
    entry.threshold = THRESHOLD if case.budgeted else -1.0
    native.step([entry], case.kind, **{**arguments(case), **changes})
    return entry


# ---------------------------------------------------------------------------------------------------------- the oracle


def check(case: Case, **changes: Any) -> dict[str, float]:
    """Step and compare everything: outputs with the oracle, and that nothing else has changed."""
    problem = make(case)
    expected = expect(case, problem)
    entry = run(case, problem, **changes)
    errors = distances(case, problem, expected)
    bad = {key: f"{error:.1f} ulp" for key, error in errors.items() if not error <= allowed(case, key)}
    assert not bad, f"{case}: {bad}"
    assert entry.zeros == int((problem.w == 0).sum()), f"{case}: zeros"
    dtype, has_master = FORMATS[case.format]
    if has_master:  # torch's rounding is the oracle for the kernel's own
        rounded = problem.state["master"].to(dtype)
        assert bool(((problem.w == rounded) | (problem.w.isnan() & rounded.isnan())).all()), f"{case}: rounding"
    for key, value in problem.all().items():
        if key == "step":
            assert value == STEP + 1, f"{case}: step"
        elif key not in expected and not (key == "imbalance" and case.retraction == "sparse_free"):
            assert same(value, problem.start[key]), f"{case}: {key} was written to"
    for guard in itertools.chain.from_iterable(problem.guards):
        assert bool((guard == 77).all()), f"{case}: wrote beyond a tensor"
    return errors


# --------------------------------------------------------------------------------------- one step, every combination


def test_the_extension_is_built() -> None:
    """Whatever runs these tests has a compiler; without one all others here would fail for the wrong reason."""
    assert native.UNAVAILABLE is None


@cases(direction=DIRECTIONS, retraction=RETRACTIONS)
def test_a_step_is_the_references(direction: str, retraction: str) -> None:
    for case in product_of_axes(direction, retraction):
        check(case)


def rotated(direction: str, i: int, **fixed: Any) -> Case:
    """Combination number i of the axes: neighbours differ in all of them."""
    values = {axis: options[(i // (1 + k)) % len(options)] for k, (axis, options) in enumerate(AXES.items())}
    return Case(direction, seed=i, **{**values, **fixed})


def large_cases(retraction: str) -> Iterator[Case]:
    """Every size with several directions; a step between neighbours that is prime to all lengths of axes."""
    directions = list(DIRECTIONS)
    rows = [((n,), None) for n in SIZES] if retraction != "group" else list(GROUPS.values())
    for i, (shape, groups) in enumerate(rows):
        for k in range(4):
            case = rotated(directions[(4 * i + k) % len(directions)], 5 * i + 7 * k, retraction=retraction)
            case = replace(case, shape=shape, groups=groups)
            yield case if applies(case) else replace(case, format=case.format.removesuffix("+master"))


@cases(retraction=RETRACTIONS)
def test_a_step_is_the_references_at_every_size(retraction: str) -> None:
    for case in large_cases(retraction):
        check(case)


def meets(case: Case) -> set[str]:
    """What happens in a case, so that the cases above are known to reach every branch."""
    problem = make(case)
    new, old = expect(case, problem)["w"].values[-1], problem.start["w"].double()
    scale = SNAP * SCALE
    found = {
        "snaps": (old != 0) & (new == 0),
        "revives": (old == 0) & (new != 0),
        "survives just above the threshold": (new.abs() > scale) & (new.abs() < 10 * scale),
        "survives below the threshold, driven": (new.abs() < scale) & (new != 0) & (old.abs() > 1e-30),
        "stays zero": (old == 0) & (new == 0),
        "turns": old * new < 0,
    }
    names = {name for name, where in found.items() if bool(where.any())}
    if "imbalance" in problem.start and case.retraction != "sparse_free" and case.imbalance:
        kept = float(expect(case, problem)["imbalance"].values[0]) / float(problem.start["imbalance"])
        if gauge.MIN_IMBALANCE_FACTOR * (1 + 1e-6) < kept < 1 - 1e-6:
            names.add("the imbalance's own law")
    return names


@cases(retraction=RETRACTIONS[1:])
def test_the_cases_above_reach_every_branch(retraction: str) -> None:
    directions = ("momentum", "adam", "adamw")
    together = set().union(*(meets(case) for d in directions for case in product_of_axes(d, retraction)))
    law = {"the imbalance's own law"} if retraction != "sparse_free" else set()
    assert together == law | {
        "snaps",
        "revives",
        "survives just above the threshold",
        "survives below the threshold, driven",
        "stays zero",
        "turns",
    }


@cases(retraction=RETRACTIONS)
def test_every_value_of_every_axis_occurs_at_large_sizes_too(retraction: str) -> None:
    cases = list(large_cases(retraction))
    for axis, values in (*AXES.items(), ("direction", DIRECTIONS)):
        seen = {getattr(case, axis) for case in cases}
        wanted = {v for v in values if retraction != "sparse_free" or not str(v).endswith("+master")}
        assert seen == wanted, axis


@cases(instructions=native.INSTRUCTIONS)
def test_a_group_whose_terms_nearly_cancel_is_not_taken_for_zero(instructions: str) -> None:
    """Its norm comes from four fp32 sums and drowns in their rounding; the members know that they are not yet zero."""
    n, lr, decay = 1 << 16, 1.0, 0.1
    generator = torch.Generator().manual_seed(0)
    pull = 0.05 * (1 + torch.rand(n, generator=generator, dtype=torch.float64))
    off = 1 + (1e-5 + 4e-5 * torch.rand(n, generator=generator, dtype=torch.float64))
    w = pull
    for _ in range(50):  # to where the group retraction at c = 1 ends in zero: rho w = s**2 t pull
        metric = (1 + 4 * w * w).sqrt()
        w = (1 + metric) / 2 * pull / (metric - decay)
    w, g = (w * off).float(), pull.float()
    groups = symopt.GroupSparse("out").partition(w)
    state = {"imbalance": torch.tensor(1.0), "metric_scale": torch.tensor(0.01)}
    c, scale = (state[key].double() for key in ("imbalance", "metric_scale"))
    want = group_kernel.group(w.double(), lr * g.double(), decay, c, scale, groups)
    assert bool((want.abs() < 1e-4 * w).all()) and bool((want != 0).all())
    entry = native.Entry()
    native.fill(entry, w, roles(state), "group", groups)
    entry.grad, entry.strength_kept, entry.strength_pruned = g.data_ptr(), decay, decay
    native.step([entry], "sgd", lr=lr, **GRADIENT, instructions=instructions)
    assert entry.zeros == int((w == 0).sum()) == 0


MEANT = {"lr": Case().lr, "strength": STRENGTH, "beta1": BETA1, "beta2": BETA2, "momentum": 0.8, "dampening": 0.3}
MEANT |= {"imbalance_factor": 0.9, "weight_decay": 0.1, "grad_scale": 3.0}


@cases(name=MEANT, format=["fp32", "fp64", "bf16+master"])
def test_the_comparison_notices_a_relative_error_of_1e_5(name: str, format: str) -> None:
    """In any one number handed to the kernel."""
    direction = "dampening" if name in ("momentum", "dampening", "grad_scale") else "adam"
    case = Case(direction, "plain" if name == "weight_decay" else "sparse", (2000,), format=format)
    if name in ("imbalance_factor", "weight_decay", "grad_scale"):
        case = replace(case, **{name: MEANT[name]})
    wrong = MEANT[name] * (1 + 1e-5)
    check(case)
    with pytest.raises(AssertionError, match="ulp"):
        check(case, **{name: torch.tensor(wrong) if name == "grad_scale" else wrong})


@cases(key=["w", "g", "exp_avg", "exp_avg_sq", "imbalance", "metric_scale", "factor_0"])
def test_the_comparison_notices_a_single_wrong_element(key: str) -> None:
    """A thousandth of one element of the smallest input that shows."""
    case = Case("adam", "sparse_free" if key == "factor_0" else "sparse", (2000,))
    problem = make(case)
    expected = expect(case, problem)
    value = problem.all()[key]
    value.view(-1)[int(value.abs().argmax())] *= 1 + 1e-3
    run(case, problem)
    errors = distances(case, problem, expected)
    assert any(error > allowed(case, name) for name, error in errors.items())


seeds = st.integers(0, 2**20)


@st.composite
def any_case(draw: Any) -> Case:
    """Any shape, any partition that fits it, any order of its dimensions in memory, any setting."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    shape = (shape[0] * draw(st.sampled_from([1, 1, 3, 40])), *shape[1:])
    retraction = draw(st.sampled_from(RETRACTIONS))
    partitions: list[str | int] = ["out", draw(st.integers(1, math.prod(shape)))]
    partitions += [f"head:{n}" for n in range(2, shape[0]) if shape[0] % n == 0][:2]
    if len(shape) > 1:
        partitions += ["in", *(f"block:{r}x{c}" for r, c in itertools.product(range(1, 5), range(1, 5))
                               if shape[0] % r == 0 and shape[1] % c == 0)]  # fmt: skip
        if len(shape) == 2 and shape[0] == 3 * shape[1]:
            partitions = [p for p in partitions if not str(p).startswith("head")]  # packed: heads of another size
    groups = draw(st.sampled_from(partitions)) if retraction == "group" else None
    order = tuple(draw(st.permutations(range(len(shape)))))
    if native.layout(in_order(torch.empty(shape), order), partition(shape, groups, 0)) is None:
        order = None
    format = draw(st.sampled_from([f for f in FORMATS if retraction != "sparse_free" or "master" not in f]))
    return Case(
        draw(st.sampled_from(list(DIRECTIONS))),
        retraction,
        shape,
        groups,
        format,
        draw(st.sampled_from(native.INSTRUCTIONS)),
        saturated=draw(st.booleans()),
        budgeted=draw(st.booleans()),
        imbalance=draw(st.sampled_from([0.0, 1e-6, 0.02, 3.0])),
        imbalance_factor=draw(st.sampled_from([None, None, 0.0, 0.9, 1.0])),
        maximize=draw(st.booleans()),
        grad_scale=draw(st.sampled_from([None, 1024.0, 3.0])),
        weight_decay=draw(st.sampled_from([0.0, 0.1])),
        order=order,
        seed=draw(seeds),
    )


@settings(max_examples=300, deadline=None, derandomize=True)
@given(any_case())
def test_any_step_is_the_references(case: Case) -> None:
    check(case)


# --------------------------------------------------------------------------------------------------- numbers gone bad

POISONED: list[tuple[str, tuple[int, ...], str | int | None]] = [
    ("plain", (3000,), None),
    ("sparse", (3000,), None),
    ("sparse_free", (3000,), None),
    ("group", (60, 50), "out"),
    ("group", (60, 150), "out"),
    ("group", (60, 50), "in"),
    ("group", (700, 130), "in"),
    ("group", (60, 50), 40),
]


@pytest.mark.parametrize(("retraction", "shape", "groups"), POISONED, ids=str)
@cases(instructions=native.INSTRUCTIONS)
def test_nan_and_infinity_stay_where_they_are(
    retraction: str, shape: tuple[int, ...], groups: str | int | None, instructions: str
) -> None:
    """They appear where the reference has them, move no other unit by a bit, and leave the imbalance finite."""
    for i, direction in enumerate(DIRECTIONS):
        saturated = i % 2 == 0
        format = ["fp32", "fp64", "bf16", "bf16+master", "fp16", "fp16+master"][i % 6]
        format = format.removesuffix("+master") if retraction == "sparse_free" else format
        clean = Case(
            direction, retraction, shape, groups, format, instructions, saturated, budgeted=i % 4 > 1, seed=2 * i
        )
        poisoned = replace(clean, poison=True)
        check(poisoned)
        with_it, without = make(poisoned), make(clean)
        hit = ~(with_it.w.isfinite() & with_it.g.isfinite() & (with_it.w == without.w) & (with_it.g == without.g))
        if with_it.groups is not None:
            hit = with_it.groups.expand(with_it.groups.sum(hit.double()) > 0).reshape(shape)
        run(poisoned, with_it)
        run(clean, without)
        assert bool(hit.any()) and not bool(hit.all())
        for key, value in with_it.all().items():
            other = without.all()[key]
            if value.shape == hit.shape:
                assert same(value[~hit], other[~hit]), f"{poisoned}: {key}"
        if retraction != "plain":
            assert bool(with_it.state["imbalance"].isfinite())


@cases(direction=["adam", "adam-amsgrad"], instructions=native.INSTRUCTIONS)
def test_many_nan_gradients_leave_the_imbalance_what_the_finite_ones_make_it(direction: str, instructions: str) -> None:
    """Adam's rate of the imbalance is a quantile of preconditioners, some of which are NaN now."""
    for share in (0.05, 0.5, 0.8):
        for retraction, shape, groups in POISONED[1:]:
            case = Case(direction, retraction, shape, groups, instructions=instructions)
            problem = make(case)
            bad = torch.rand(shape, generator=torch.Generator().manual_seed(5)) < share
            if problem.groups is not None:
                bad = problem.groups.expand(torch.arange(problem.groups.count) % 20 < 20 * share).reshape(shape)
            problem.g[bad] = math.nan
            problem.start["g"][bad] = math.nan
            expected = expect(case, problem)
            run(case, problem)
            errors = distances(case, problem, expected)
            assert errors.get("imbalance", 0.0) <= allowed(case, "imbalance"), f"{case}: {share} are NaN"
            assert bool(problem.state["imbalance"].isfinite())


# --------------------------------------------------------------------------------------------------- threads, repeats


def everything(direction: str, format: str) -> list[tuple[Case, Problem]]:
    """A tensor of every kind and size, for one call."""
    cases = []
    for retraction in RETRACTIONS:
        rows: list[Any] = [((n,), None) for n in SIZES] if retraction != "group" else list(GROUPS.values())
        cases += [Case(direction, retraction, shape, groups, format, seed=4) for shape, groups in rows]
    return [(case, make(case)) for case in cases if applies(case)]


def run_all(pairs: list[tuple[Case, Problem]]) -> list[Tensor]:
    """Steps all of them in one call, from where they started, and returns all there is afterwards."""
    entries = []
    for case, problem in pairs:
        for key, value in problem.all().items():
            value.copy_(problem.start[key])
        entry = native.Entry()
        fresh = bool(case.option("fresh"))
        native.fill(entry, problem.w, roles(problem.state), case.retraction, problem.groups, fresh=fresh)
        entry.grad = problem.g.data_ptr()
        entry.strength_kept = entry.strength_pruned = STRENGTH
        entries.append(entry)
    native.step(entries, pairs[0][0].kind, **arguments(pairs[0][0]))
    zeros = torch.tensor([entry.zeros for entry in entries])
    return [zeros, *(value.clone() for _, problem in pairs for value in problem.all().values())]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("direction", "format"), [("nesterov", "fp32"), ("adam-amsgrad", "fp32"), ("adamw", "bf16")])
def test_results_do_not_depend_on_the_number_of_threads(direction: str, format: str, threads: None) -> None:
    torch.set_num_threads(1)
    pairs = everything(direction, format)
    want = run_all(pairs)
    for count in (1, 2, 2, 3, 8):
        torch.set_num_threads(count)
        have = run_all(pairs)
        assert all(same(x, y) for x, y in zip(have, want, strict=True)), f"{count} threads"


@cases(direction=["nesterov", "adamw"])
def test_a_tensor_does_not_notice_its_neighbours(direction: str) -> None:
    pairs = everything(direction, "fp32")
    together = run_all(pairs)[1:]
    alone = []
    for case, problem in pairs:
        for key, value in problem.all().items():
            value.copy_(problem.start[key])
        run(case, problem)
        alone += list(problem.all().values())
    assert all(same(x, y) for x, y in zip(alone, together, strict=True))


def test_a_tensor_large_enough_for_large_chunks(threads: None) -> None:
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        case = Case("adam", "sparse", ((1 << 20) + 3,))
        problem = make(case)
        expected = expect(case, problem)
        entry = run(case, problem)
        errors = distances(case, problem, expected)
        assert {key: error for key, error in errors.items() if error > allowed(case, key)} == {}
        assert entry.zeros == int((problem.w == 0).sum())
        results.append(problem.all())
    assert all(same(results[0][key], results[1][key]) for key in results[0])


# ------------------------------------------------------------------------------------------------ nothing may change


@cases(direction=DIRECTIONS, retraction=RETRACTIONS)
def test_a_step_of_length_zero_changes_no_bit_of_a_weight(direction: str, retraction: str) -> None:
    """Nor of factors and masters.  Only a negative zero may lose its sign."""
    for case in product_of_axes(direction, retraction):
        for decay in (None, 0.0) if retraction == "sparse_free" else (None,):
            problem = make(case)
            for key in ("w", "master"):
                if key in problem.start:
                    problem.all()[key].add_(0.0)  # turns -0.0 into 0.0
            dtype, has_master = FORMATS[case.format]
            w = problem.w.clone()
            used = w
            if has_master:
                master = problem.state["master"]
                used = torch.where(master.to(dtype) == w, master, w.to(master.dtype))
            valid = (
                retraction == "sparse_free" and (problem.start["factor_0"] * problem.start["factor_1"]).to(dtype) == w
            )
            run(case, problem, lr=0.0, imbalance_factor=decay)
            assert same(problem.w, w), case
            if has_master:
                assert same(problem.state["master"], used), case
            for key in ("factor_0", "factor_1"):
                if key in problem.state:
                    assert same(problem.state[key][valid], problem.start[key][valid]), f"{case}: {key}"


@cases(direction=DIRECTIONS, retraction=RETRACTIONS)
def test_gradients_that_overflowed_change_nothing(direction: str, retraction: str) -> None:
    shape, groups = GROUPS["in"] if retraction == "group" else ((50,), None)
    for flag in (1.0, 0.0):
        problem = make(case := Case(direction, retraction, shape, groups, poison=flag != 0))
        entry = native.Entry()
        entry.zeros = -7
        run(case, problem, found_inf=torch.tensor(flag))
        unchanged = all(same(value, problem.start[key]) for key, value in problem.all().items())
        assert unchanged == bool(flag)


def test_no_tensors_and_empty_tensors() -> None:
    native.step([], "adamw", lr=LR, beta1=BETA1, beta2=BETA2, eps=EPS)
    problem = make(case := Case("adamw", "plain", (5,)))
    empty, nothing = native.Entry(), torch.empty(0)
    state = {"exp_avg": nothing, "exp_avg_sq": nothing, "step": torch.tensor(STEP)}
    native.fill(empty, nothing, roles(state), "plain")
    other = native.Entry()
    native.fill(other, problem.w, roles(problem.state), "plain")
    other.grad = problem.g.data_ptr()
    expected = expect(case, problem)
    native.step([empty, other], "adamw", **arguments(case))
    assert empty.zeros == 0 and state["step"] == STEP + 1
    assert all(error <= allowed(case, key) for key, error in distances(case, problem, expected).items())


# ----------------------------------------------------------------------------------------------------- torch's numbers


@cases(
    direction=DIRECTIONS,
    format=["fp32", "fp64"],
    maximize=[False, True],
    weight_decay=[0.0, 0.1],
)
def test_plain_tensors_take_torchs_own_step(direction: str, format: str, maximize: bool, weight_decay: float) -> None:
    for instructions, scale in itertools.product(native.INSTRUCTIONS, (None, 1024.0, 3.0)):
        case = Case(direction, "plain", (1000,), None, format, instructions, maximize=maximize, grad_scale=scale)
        case = replace(case, weight_decay=weight_decay, seed=3)
        problem = make(case)
        p = torch.nn.Parameter(problem.w.double().clone())
        p.grad = problem.g.double().clone() / (1.0 if scale is None else scale)
        options: dict[str, Any] = {"lr": case.lr, "weight_decay": weight_decay, "maximize": maximize, "foreach": False}
        if case.kind == "sgd":
            options |= {name: case.option(name) for name in ("momentum", "dampening")}
            opt: torch.optim.Optimizer = torch.optim.SGD([p], nesterov=bool(case.option("nesterov")), **options)
        else:
            cls = torch.optim.Adam if case.kind == "adam" else torch.optim.AdamW
            opt = cls([p], betas=(BETA1, BETA2), eps=EPS, amsgrad=bool(case.option("amsgrad")), **options)
        if not case.option("fresh"):
            opt.state[p] = {k: v.clone() if k == "step" else v.double().clone() for k, v in problem.state.items()}
        opt.step()
        terms = expect(case, problem)
        run(case, problem)
        theirs = {"w": p.detach(), **opt.state[p]}
        want = {key: replace(value, values=(theirs[key],)) for key, value in terms.items()}
        errors = distances(case, problem, want)
        assert {key: error for key, error in errors.items() if not error <= allowed(case, key)} == {}, case


def test_the_step_count_may_be_fp32_or_fp64_and_large() -> None:
    for count in (0.0, 5.0, 1e6):
        for dtype in (torch.float32, torch.float64):
            problem = make(case := Case("adam", "plain", (300,)))
            problem.state["step"] = torch.tensor(count, dtype=dtype)
            p = torch.nn.Parameter(problem.w.double())
            p.grad = problem.g.double()
            opt = torch.optim.Adam([p], lr=case.lr, betas=(BETA1, BETA2), eps=EPS, foreach=False)
            opt.state[p] = {k: v.double().clone() for k, v in problem.state.items()}
            opt.step()
            run(case, problem)
            assert problem.state["step"] == count + 1 and problem.state["step"].dtype == dtype
            terms = p.detach().abs() + (p.detach() - problem.start["w"].double()).abs() + problem.start["w"].abs()
            want = {"w": Expected((p.detach(),), terms)}
            # The step itself is a small difference of moments; here it is only its length that is compared.
            assert distances(case, problem, want)["w"] <= 100 * allowed(case, "w")


# ------------------------------------------------------------------------------------------------------- imbalance law


@cases(retraction=RETRACTIONS[1:], keep=[1.0, 0.9, 1e-3, 0.0])
def test_a_given_decay_of_the_imbalance(retraction: str, keep: float) -> None:
    """Alike in every direction and instruction set; in the free gauge it rebalances each weight's factors."""
    for i, (direction, instructions) in enumerate(itertools.product(DIRECTIONS, native.INSTRUCTIONS)):
        format = list(FORMATS)[i % len(FORMATS)]
        shape, groups = GROUPS["in-rows-33"] if retraction == "group" else ((700,), None)
        case = Case(direction, retraction, shape, groups, format, instructions, imbalance_factor=keep, seed=1)
        if not applies(case):
            continue
        errors = check(case)
        assert ("imbalance" in errors) == (retraction != "sparse_free")


@cases(keep=[None, 0.9])
def test_an_imbalance_at_its_end_becomes_zero(keep: float | None) -> None:
    for retraction, (shape, groups) in {"sparse": ((50,), None), "group": GROUPS["out"]}.items():
        for factor in (1 - 1e-3, 1 + 1e-3):
            decay = gauge.MIN_IMBALANCE_FACTOR if keep is None else keep
            start = factor * SNAP * SCALE / decay
            case = Case("sgd", retraction, shape, groups, imbalance=start, imbalance_factor=keep)
            problem = make(case)
            run(case, problem, strength=1e3)  # so strong that the automatic law takes its fastest step
            assert bool(problem.state["imbalance"] == 0) == (factor < 1), case


@cases(dtype=[torch.float32, torch.float64])
def test_the_reference_rebalances_to_the_same_weight(dtype: torch.dtype) -> None:
    """Whatever the sizes of the factors: the oracle above is its closed form, and the product is the weight."""
    for ratio in (1.0, 0.5, 1e-1, 1e-2, 1e-3, 1e-4):
        a = torch.tensor([0.14, -0.14], dtype=dtype)
        b = ratio * a.flip(0)
        for keep in (0.99, 0.5, 0.0):
            one, two = elementwise.rebalance((a, b), keep), rebalanced(a.double(), b.double(), keep)
            tol = 100 * torch.finfo(dtype).eps
            torch.testing.assert_close(one[0] * one[1], a * b, rtol=tol, atol=0)
            for have, want in zip(one, two, strict=True):
                torch.testing.assert_close(have.double(), want, rtol=tol, atol=0)


# ------------------------------------------------------------------------------------------------------ half precision


def halves(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)


@cases(dtype=[torch.bfloat16, torch.float16], instructions=native.INSTRUCTIONS)
def test_every_half_precision_number_is_read_and_written_as_torch_does(dtype: torch.dtype, instructions: str) -> None:
    """All 65 536 of them, at every offset of a vector; and fp32 numbers at and next to the midpoints between them."""
    every = halves(dtype)
    for shift in range(0, 8, 3):
        w, g = every[shift:].clone(), every.roll(shift)[shift:].clone()
        buffer = torch.full(w.shape, math.nan)
        entry = native.Entry()
        native.fill(entry, w, {"first": buffer}, "plain", fresh=True)
        entry.grad = g.data_ptr()
        native.step([entry], "sgd", lr=0.0, **{**GRADIENT, "momentum": 0.9}, instructions=instructions)
        finite = g.isfinite()  # 0 * infinity
        assert same((w + 0.0)[finite & ~w.isnan()], (every[shift:] + 0.0)[finite & ~w.isnan()])  # -0.0 - -0.0 is 0.0
        assert torch.equal(buffer[~g.isnan()], g[~g.isnan()].float()) and bool(buffer[g.isnan()].isnan().all())
    wide = every[every.isfinite()].float().sort().values
    middle = (wide[1:].double() + wide[:-1].double()) / 2
    near = [middle.float(), *(torch.nextafter(middle.float(), wide.new_tensor(side)) for side in (-math.inf, math.inf))]
    random = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 10 ** torch.linspace(-46, 38, 5000)
    for x in (wide, *near, random, torch.tensor([65519.99, 65520.0, 65520.01, 1e38, 3.3953e38, 3.4e38, math.inf])):
        x = x + 0.0
        master, w = x.clone(), x.to(dtype)
        entry = native.Entry()
        native.fill(entry, w, {"master": master}, "plain")
        entry.grad = (zero := torch.zeros_like(w)).data_ptr()
        native.step([entry], "sgd", lr=LR, **GRADIENT, instructions=instructions)
        assert same(w, x.to(dtype)) and zero.eq(0).all()
        # Had the kernel rounded otherwise it would have taken the master for stale, and with it the weight's value.
        assert same(master, x)
        assert entry.zeros == int((w == 0).sum())


# --------------------------------------------------------------------------------------------------------------- layout


def positions(w: Tensor) -> Tensor:
    """Where in memory every element of a dense tensor lies."""
    return sum((torch.arange(n).reshape([-1 if i == d else 1 for i in range(w.dim())]) * w.stride(d)
                for d, n in enumerate(w.shape)), torch.zeros(w.shape, dtype=torch.int64))  # fmt: skip


def in_memory(w: Tensor, groups: Groups) -> Tensor:
    labels = torch.empty(w.numel(), dtype=torch.int64)
    labels[positions(w).flatten()] = groups.expand(torch.arange(groups.count)).reshape(w.shape).flatten()
    return labels


def from_layout(form: tuple[int, int, int, int]) -> Tensor:
    bands, rows, groups, run = form
    return (torch.arange(bands * groups).reshape(bands, 1, groups, 1)).expand(bands, rows, groups, run).flatten()


@st.composite
def layouts(draw: Any) -> tuple[Tensor, Groups]:
    view = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=5)))
    dims = tuple(d for d in range(len(view)) if draw(st.booleans()))
    order = tuple(draw(st.permutations(range(len(view)))))
    if draw(st.booleans()):
        order = tuple(range(len(view)))
    count = math.prod(n for d, n in enumerate(view) if d not in dims)
    return in_order(torch.empty(view), order), Groups(count, view, dims)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(layouts())
def test_the_layout_of_groups_is_found_exactly_where_there_is_one(made: tuple[Tensor, Groups]) -> None:
    """Against all forms there are: whatever it returns puts every element into its group, and None means none does."""
    w, groups = made
    want, n = in_memory(w, groups), w.numel()
    form = native.layout(w, groups)
    if form is not None:
        assert math.prod(form) == n and form[0] * form[2] == groups.count
        assert torch.equal(from_layout(form), want)
        return
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    for form in itertools.product(divisors, repeat=4):
        if math.prod(form) == n:
            assert not torch.equal(from_layout(form), want), f"{w.shape} {w.stride()} {groups.dims}: {form}"


@pytest.mark.parametrize(("shape", "groups"), GROUPS.values(), ids=list(GROUPS))
def test_named_groups_of_contiguous_tensors_have_a_layout(shape: tuple[int, ...], groups: str | int) -> None:
    made = partition(shape, groups, 0)
    assert made is not None
    form = native.layout(torch.empty(shape), made)
    if isinstance(groups, int):
        assert form == (1, 1, groups, 1)
    else:
        assert form is not None and torch.equal(from_layout(form), in_memory(torch.empty(shape), made))


def test_tensors_with_gaps_or_overlaps_have_no_layout() -> None:
    base = torch.empty(6, 8, 4)
    for w in (base[:, ::2], base[:, :, 1:3], base[:, 0:1].expand(6, 3, 4), base.as_strided((3, 3), (2, 1))):
        assert native.layout(w) is None
        assert native.layout(w, symopt.GroupSparse("out").partition(w)) is None
    for w in (
        base,
        base[2],
        base[1:3],
        base.transpose(0, 2),
        base[:, :1, :1][:1],
        torch.empty(()),
        torch.empty(1, 5)[0],
    ):
        assert native.layout(w) == (1, 1, w.numel(), 1) or native.layout(w) == (1, 1, 1, 1)
