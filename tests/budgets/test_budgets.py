"""A budget is met to the unit, always, and what it leaves is the best fit on its support."""

from __future__ import annotations

import copy
import io
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import symopt
from support.cases import cases, pairs, some
from support.kernel_cases import GRADIENT
from support.roles import roles
from support.tolerances import tolerance
from symopt.budgets import schedule, selection
from symopt.budgets.pools import BudgetedWeight, Pool, pools
from symopt_kernels.native import binding as native
from symopt_kernels.native import selection as native_selection
from symopt_kernels.reference import elementwise

OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "adamw": lambda net: symopt.AdamW(net, lr=1e-2),
    "adam": lambda net: symopt.Adam(net, lr=1e-2),
    "sgd": lambda net: symopt.SGD(net, lr=0.1, momentum=0.9),
    "adamw-reference": lambda net: symopt.AdamW(net, lr=1e-2, backend="reference"),
}

pytestmark = pytest.mark.filterwarnings("ignore:.* steps at lr .* are too few to ramp (its|their) budget in")

Make = Callable[[], symopt.Constraint]
BUDGETS: dict[str, tuple[Make, Callable[[list[Tensor]], bool]]] = {
    "density": (
        lambda: symopt.Sparse(density=0.1),
        lambda ws: all(int(w.count_nonzero()) == round(0.1 * w.numel()) for w in ws),
    ),
    "density-full": (
        lambda: symopt.Sparse(density=1.0),
        lambda ws: all(int(w.count_nonzero()) == w.numel() for w in ws),
    ),
    "one": (lambda: symopt.Sparse(density=1e-9), lambda ws: all(int(w.count_nonzero()) == 1 for w in ws)),
    "global": (
        lambda: symopt.Sparse(density=0.05, scope="global"),
        lambda ws: sum(int(w.count_nonzero()) for w in ws) == round(0.05 * sum(w.numel() for w in ws)),
    ),
    "2:4": (
        lambda: symopt.Sparse(pattern="2:4"),
        lambda ws: all(bool((w.unflatten(1, (-1, 4)).count_nonzero(2) == 2).all()) for w in ws),
    ),
    "1:8": (
        lambda: symopt.Sparse(pattern="1:8"),
        lambda ws: all(bool((w.unflatten(1, (-1, 8)).count_nonzero(2) == 1).all()) for w in ws),
    ),
    "rows": (lambda: symopt.GroupSparse("out", keep=3), lambda ws: all(int(w.any(1).sum()) == 3 for w in ws)),
    "share of columns": (
        lambda: symopt.GroupSparse("in", keep=0.25),
        lambda ws: all(int(w.any(0).sum()) == w.shape[1] // 4 for w in ws),
    ),
    "rows of all": (
        lambda: symopt.GroupSparse("out", keep=6, scope="global"),
        lambda ws: sum(int(w.any(1).sum()) for w in ws) == 6,
    ),
    "flops": (
        lambda: symopt.GroupSparse("out", keep=0.3, scope="flops"),
        lambda ws: 0 <= 0.3 * sum(w.numel() for w in ws) - sum(int(w.any(1).sum()) * w.shape[1] for w in ws) < 32,
    ),
}


def problem(seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    """A small classification; some inputs are constant 0, so their weights never see a gradient."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(128, 32, generator=generator)
    x[:, :6] = 0
    y = (x[:, 8] * x[:, 9] + x[:, 10] > 0).long()
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2)), x, y


NAMES = ("0.weight", "2.weight")


def train(net: nn.Module, opt: Any, x: Tensor, y: Tensor, steps: int, start: int = 0) -> None:
    for k in range(start, steps):
        rows = slice(32 * (k % 4), 32 * (k % 4 + 1))
        opt.zero_grad()
        nn.functional.cross_entropy(net(x[rows].to(net[0].weight.dtype)).float(), y[rows]).backward()
        opt.step()


def budgeted(
    kind: str, optimizer: str, steps: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Any, ...]:
    net, x, y = problem(seed)
    net = net.to(dtype)
    if dtype == torch.float16:  # torch.optim's own moments underflow there
        for name, p in net.named_parameters():
            p.requires_grad_(name in NAMES)
    symopt.constrain(net, {NAMES: BUDGETS[kind][0]()})
    opt = OPTIMIZERS[optimizer](net)
    opt.reschedule(steps)
    return net, opt, x, y


def met(net: nn.Module, kind: str) -> bool:
    return BUDGETS[kind][1]([net.get_parameter(name).detach() for name in NAMES])


@pairs(kind=BUDGETS, optimizer=OPTIMIZERS, steps=[1, 2, 7, 300])
def test_a_budget_is_met_to_the_unit(kind: str, optimizer: str, steps: int) -> None:
    net, opt, x, y = budgeted(kind, optimizer, steps)
    train(net, opt, x, y, steps)
    assert met(net, kind)
    small = symopt.fold(net)
    assert small.fold_config["cut"] == dict.fromkeys(NAMES, 0)


@cases(kind=BUDGETS, dtype=[torch.bfloat16, torch.float16, torch.float64])
def test_in_every_precision(kind: str, dtype: torch.dtype) -> None:
    net, opt, x, y = budgeted(kind, "adamw", 200, dtype=dtype)
    train(net, opt, x, y, 200)
    assert met(net, kind)


@some(kind=BUDGETS, optimizer=OPTIMIZERS)
def test_it_stays_met_after_the_last_step(kind: str, optimizer: str) -> None:
    net, opt, x, y = budgeted(kind, optimizer, 100)
    train(net, opt, x, y, 100)
    zero = [net.get_parameter(name) == 0 for name in NAMES]
    train(net, opt, x, y, 200)
    assert met(net, kind)
    assert all(torch.equal(z, net.get_parameter(name) == 0) for z, name in zip(zero, NAMES, strict=True))


@cases(optimizer=OPTIMIZERS, kind=["density", "2:4", "rows"])
def test_steps_of_any_size_kill_nothing_inside_it(kind: str, optimizer: str) -> None:
    """With t (decay + |delta|) <= 1 a weight whose delta exceeds metric_scale would become exactly zero."""
    net, opt, x, y = budgeted(kind, optimizer, 50)
    train(net, opt, x, y, 50)
    for group in opt.param_groups:
        group["lr"] *= 1e3
    for k in range(100):
        for p in net.parameters():  # first at random, then in one direction, against which every other sign stands
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(min(k, 20)))
        opt.step()
        assert met(net, kind)


@cases(kind=BUDGETS)
def test_fold_meets_it_whenever_training_stops(kind: str) -> None:
    net, opt, x, y = budgeted(kind, "adamw", 400)
    train(net, opt, x, y, 120)
    assert not met(net, kind) or kind == "density-full"
    plain = copy.deepcopy(net)
    symopt.release(plain)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        small = symopt.fold(net)
    assert [str(w.message).startswith("fold: ") for w in caught] == [True] * (kind != "density-full")
    if small[0].weight.shape == net[0].weight.shape and small[2].weight.shape == net[2].weight.shape:
        assert met(small, kind)
    assert all(n > 0 for n in small.fold_config["cut"].values()) or kind in ("density-full", "global")


@cases(kind=BUDGETS)
def test_interrupted_training_continues_to_the_bit(kind: str) -> None:
    net, opt, x, y = budgeted(kind, "adamw", 150)
    for stop in (33, 113):
        net, opt, x, y = budgeted(kind, "adamw", 150)
        train(net, opt, x, y, stop)
        file = io.BytesIO()
        torch.save([net.state_dict(), opt.state_dict()], file)
        file.seek(0)
        other, other_opt, _, _ = budgeted(kind, "adamw", 150, seed=1)
        saved = torch.load(file)
        other.load_state_dict(saved[0])
        other_opt.load_state_dict(saved[1])
        train(net, opt, x, y, 150, stop)
        train(other, other_opt, x, y, 150, stop)
        for a, b in zip(net.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)


@cases(kind=["density", "rows", "2:4"])
def test_the_backends_agree(kind: str) -> None:
    results = []
    for optimizer in ("adamw", "adamw-reference"):
        net, opt, x, y = budgeted(kind, optimizer, 60, dtype=torch.float64)
        train(net, opt, x, y, 40)  # before rounding could decide between two units
        results.append(net)
    for name in NAMES:
        a, b = (net.get_parameter(name) for net in results)
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance("backends") * 1e3)


def test_survivors_are_the_least_squares_fit_on_their_support() -> None:
    """No shrinkage is left: the normal equations hold for the weights inside the budget."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(200, 20, generator=generator, dtype=torch.float64)
    truth = torch.zeros(20, dtype=torch.float64)
    truth[[2, 5, 11, 17]] = torch.tensor([1.5, -2.0, 0.7, 1.0], dtype=torch.float64)
    y = x @ truth + 0.1 * torch.randn(200, generator=generator, dtype=torch.float64)
    net = nn.Linear(20, 1, bias=False, dtype=torch.float64)
    symopt.constrain(net, {"weight": symopt.Sparse(density=0.2)})
    opt = symopt.SGD(net, lr=0.05)
    opt.reschedule(4000)
    for _ in range(4000):
        opt.zero_grad()
        (net(x).flatten() - y).square().mean().div(2).backward()
        opt.step()
    support = net.weight.detach().flatten().nonzero().flatten()
    assert support.tolist() == [2, 5, 11, 17]
    fit = torch.linalg.lstsq(x[:, support], y[:, None]).solution.flatten()
    torch.testing.assert_close(net.weight.detach().flatten()[support], fit, rtol=0, atol=tolerance("stationary"))


# ------------------------------------------------------------------------------------------------------- selections


@given(st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=60), st.data())
def test_rank_is_the_sorted_tensors_element(values: list[float], data: st.DataObject) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    k = data.draw(st.integers(1, len(x)))
    assert native_selection.rank(x, k, native_selection.histogram(x)) == float(x.abs().sort().values[k - 1])


def test_rank_with_special_values() -> None:
    x = torch.tensor([math.nan, -math.inf, 0.0, -0.0, 1e-45, -1e-38, 3.0, -2.0])
    finite, counts = x[2:].abs().sort().values, native_selection.histogram(x)
    assert [native_selection.rank(x, k, counts) for k in range(1, 7)] == finite.tolist()
    assert native_selection.rank(x, 7, counts) == math.inf and math.isnan(native_selection.rank(x, 8, counts))


def test_histograms_of_both_kinds_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.cat([torch.randn(1000), torch.tensor([0.0, -0.0, 1e-45, math.inf, -math.inf, math.nan])])
    native_counts = selection._histogram(x)
    monkeypatch.setattr(selection, "_native", lambda w: False)
    assert torch.equal(native_counts, selection._histogram(x))


def member(w: Tensor, constraint: symopt.Constraint, name: str = "w") -> BudgetedWeight:
    return BudgetedWeight(name, w, constraint, constraint.partition(w))


@cases(distinct=[3, 10**6], dtype=[torch.float32, torch.float64])
def test_a_pool_selects_exactly_and_by_size(dtype: torch.dtype, distinct: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for density in (0.001, 0.05, 0.5, 0.999, 1.0):
        w = (torch.randint(0, distinct, (41, 30), generator=generator).to(dtype) - distinct // 2) / distinct
        (pool,) = pools([member(w, symopt.Sparse(density=density))])
        (outside,) = pool.pruned()
        inside = ~outside
        assert int(inside.sum()) == pool.count == max(1, round(density * w.numel()))
        if outside.any():
            assert float(w.abs().flatten()[outside].max()) <= float(w.abs().flatten()[inside].min())


def layer_adaptive(w: Tensor) -> Tensor:
    """Lee et al.'s score, by its definition."""
    square, order = w.double().flatten().square().sort(descending=True)
    return torch.empty_like(square).scatter_(0, order, square / square.cumsum(0))


@cases(density=[0.02, 0.5, 0.99])
def test_weights_of_several_tensors_compete_by_their_layer_adaptive_scores(density: float) -> None:
    constraint = symopt.Sparse(density=density, scope="global")
    torch.manual_seed(0)
    ws = [torch.randn(50, 40), torch.randn(90, 40) ** 3, torch.rand(40, 40) * 1e-6, torch.randn(3, 2) * 1e9]
    (pool,) = pools([member(w, constraint, str(i)) for i, w in enumerate(ws)])
    inside = [~outside for outside in pool.pruned()]
    assert sum(int(i.sum()) for i in inside) == pool.count == round(density * sum(w.numel() for w in ws))
    assert all(i.any() for i in inside)
    scores = [layer_adaptive(w) for w in ws]
    for w, i in zip(ws, inside, strict=True):  # within a tensor by size, exactly
        assert i.all() or float(w.abs().flatten()[i].min()) >= float(w.abs().flatten()[~i].max())
    worst = min(float(s[i].min()) for s, i in zip(scores, inside, strict=True) if int(i.sum()) > 1)
    best = max(float(s[~i].max()) for s, i in zip(scores, inside, strict=True) if not i.all())
    # A score is that of a bin: off by its width in the size, which is squared, and in the sum; two are compared.
    assert best <= worst * (1 + 2**-7) ** 6


def test_the_scale_of_a_tensor_does_not_matter_in_a_global_budget() -> None:
    constraint = symopt.Sparse(density=0.05, scope="global")
    ws = [torch.randn(30, 40) ** 3, torch.randn(20, 10)]
    (one,) = pools([member(w, constraint, str(i)) for i, w in enumerate(ws)])
    (two,) = pools(
        [member(w * s, constraint, str(i)) for i, (w, s) in enumerate(zip(ws, (2.0**9, 2.0**-30), strict=True))]
    )
    assert all(torch.equal(a, b) for a, b in zip(one.pruned(), two.pruned(), strict=True))


@cases(w=[torch.ones(40), torch.zeros(40), torch.full((40,), math.inf)])
def test_no_tensor_of_a_global_budget_dies(w: Tensor) -> None:
    constraint = symopt.Sparse(density=0.1, scope="global")
    (pool,) = pools([member(w, constraint, "same"), member(torch.randn(100), constraint, "other")])
    inside = [int((~outside).sum()) for outside in pool.pruned()]
    assert sum(inside) == 14 and min(inside) >= 1


def test_a_global_budget_of_one_unit_each_is_the_smallest() -> None:
    ws = [torch.randn(n, 100) for n in (90, 3, 3, 3)]
    (pool,) = pools([member(w, symopt.Sparse(density=4 / 9900, scope="global"), str(i)) for i, w in enumerate(ws)])
    assert [int((~o).sum()) for o in pool.pruned()] == [1, 1, 1, 1]
    for constraint, unit in (
        (symopt.Sparse(density=3 / 9900, scope="global"), "4"),
        (symopt.GroupSparse("out", keep=3, scope="global"), "4"),
        (symopt.GroupSparse("out", keep=0.001, scope="flops"), "400"),
    ):
        with pytest.raises(ValueError, match=rf"less than one unit of each of 0, 1, 2, 3 takes \({unit}\)"):
            pools([member(w, constraint, str(i)) for i, w in enumerate(ws)])


@cases(scope=["global", "flops"])
def test_groups_of_several_tensors_compete_by_their_scores_per_cost(scope: str) -> None:
    generator = torch.Generator().manual_seed(1)
    ws = [torch.randn(*shape, generator=generator) for shape in ((20, 5), (10, 40), (8, 4, 3, 3))]
    places = [1, 1, 7]
    constraints = [
        symopt.GroupSparse("out", keep=0.5, scope=scope, positions=n if scope == "flops" else None) for n in places
    ]
    (pool,) = pools([member(w, c, str(i)) for i, (w, c) in enumerate(zip(ws, constraints, strict=True))])
    inside = [~o for o in pool.pruned()]
    cost = [w[0].numel() * n if scope == "flops" else 1 for w, n in zip(ws, places, strict=True)]
    spent = sum(int(i.sum()) * c for i, c in zip(inside, cost, strict=True))
    total = sum(len(w) * c for w, c in zip(ws, cost, strict=True))
    assert 0 <= 0.5 * total - spent < max(cost)
    scores = [layer_adaptive(w.flatten(1).norm(dim=1)) / c for w, c in zip(ws, cost, strict=True)]
    best = [int(w.flatten(1).norm(dim=1).argmax()) for w in ws]
    assert all(bool(i[b]) for i, b in zip(inside, best, strict=True))
    worst = min(float(s[i].min()) for s, i in zip(scores, inside, strict=True) if int(i.sum()) > 1)
    assert max(float(s[~i].max()) for s, i in zip(scores, inside, strict=True) if not i.all()) <= worst
    limits = pool.thresholds(pool.count)
    for w, i, t in zip(ws, inside, limits, strict=True):
        assert torch.equal(w.flatten(1).norm(dim=1) > t, i)


@pytest.mark.parametrize("kind", ["one weight", "several weights", "groups", "groups by cost"])
def test_thresholds_on_a_device_are_found_there(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device everything raises for which a host would have to wait for a value."""
    constraint: symopt.Constraint = symopt.Sparse(density=0.1, scope="global")
    if kind.startswith("groups"):
        constraint = symopt.GroupSparse("out", keep=0.5, scope="flops" if kind.endswith("cost") else "global")
    monkeypatch.setattr(selection, "_kth", lambda w, k, counts=None: w.new_empty(()))
    ws = [torch.empty(8, 4, device="meta") for _ in range(1 if kind == "one weight" else 3)]
    (pool,) = pools([member(w, constraint, str(i)) for i, w in enumerate(ws)])
    limits = pool.thresholds(pool.count)
    assert all(isinstance(limit, Tensor) and limit.is_meta for limit in limits)
    with pytest.raises((RuntimeError, NotImplementedError)):
        float(limits[0])


@given(st.integers(0, 2**31), st.integers(2, 6), st.data())
def test_shares_are_exact_over_all_magnitudes(seed: int, count: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    numels, powers = (torch.randint(1, top, (count,), generator=generator).tolist() for top in (2000, 9))
    ws = [torch.randn(n, generator=generator) ** k for n, k in zip(numels, powers, strict=True)]
    ws = [w * 10.0 ** data.draw(st.integers(-20, 12)) for w in ws]
    ws[0] = ws[0].where(torch.rand(numels[0], generator=generator) < 0.2, 0.0)
    keep = data.draw(st.integers(count, sum(numels)))
    counts = [selection._histogram(w) for w in ws]
    live = selection._shares(counts, keep).tolist()
    assert selection._sorted_shares(counts, keep).tolist() == live
    assert sum(live) == keep
    assert all(1 <= n <= numel for n, numel in zip(live, numels, strict=True))


def test_shares_on_a_device_are_those_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """There all bins take part, here those in use."""
    counts = [selection._histogram(w) for w in (torch.randn(50, 40), torch.randn(90, 40) ** 3, torch.zeros(30))]
    found = {keep: selection._shares(counts, keep) for keep in (3, 100, 3000, 5600)}
    monkeypatch.setattr(Tensor, "is_cpu", False)
    for keep, live in found.items():
        assert int(live.sum()) == keep and torch.equal(live, selection._shares(counts, keep))


class Reads(TorchDispatchMode):
    """Counts how often a value is handed to Python."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@cases(optimizer=["adamw", "sgd"])
def test_a_selection_between_the_first_step_and_the_commit_reads_nothing_back(optimizer: str) -> None:
    net, opt, x, y = budgeted("2:4", optimizer, 1000)
    train(net, opt, x, y, 39)
    with Reads() as reads:
        opt.schedule.end(opt.state, None, None)
    assert opt.schedule.steps == 40 and reads.count == 0


def test_flops_budgets_differ_in_positions_alone_and_still_share() -> None:
    one, two = (symopt.GroupSparse("out", keep=0.5, scope="flops", positions=n) for n in (1, 9))
    assert one != two
    (pool,) = pools([member(torch.randn(4, 3), one), member(torch.randn(4, 3), two)])
    assert pool.total == 4 * 3 * (1 + 9)


def test_equal_global_constraints_share_and_others_do_not() -> None:
    w = torch.randn(4, 4)
    one, two, own = (
        symopt.Sparse(density=0.5, scope="global"),
        symopt.Sparse(density=0.2, scope="global"),
        symopt.Sparse(density=0.5),
    )
    found = pools(
        [member(w, c) for c in (one, two, own, symopt.Sparse(density=0.5, scope="global"), own, symopt.Sparse())]
    )
    assert sorted(len(pool.weights) for pool in found) == [1, 1, 1, 2]


def test_losers_are_all_but_the_largest_of_every_run() -> None:
    w = torch.tensor([[1.0, -3.0, 2.0, 0.5, 0.0, 0.0, 0.0, 0.0], [5.0, 5.0, 5.0, 5.0, -1.0, 2.0, -3.0, 4.0]])
    lost = elementwise.nm_pruned_mask(w, 2, 4)
    assert lost.int().tolist() == [[1, 0, 0, 1, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1, 0, 0]]


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: symopt.Sparse(density=0.0), ValueError, ("Sparse", "density", "(0, 1]", "0.0")),
        (lambda: symopt.Sparse(density=1.5), ValueError, ("Sparse", "density", "(0, 1]", "1.5")),
        (lambda: symopt.Sparse(density="5%"), TypeError, ("Sparse", "density", "number", "str")),
        (lambda: symopt.Sparse(density=math.nan), ValueError, ("Sparse", "density", "nan")),
        (lambda: symopt.Sparse(scope="layer"), ValueError, ("Sparse", "scope", "'tensor' or 'global'", "'layer'")),
        (lambda: symopt.Sparse(scope="global"), ValueError, ("Sparse", "scope='global'", "give a density")),
        (lambda: symopt.Sparse(pattern="4:2"), ValueError, ("Sparse", "pattern", "'N:M'", "'4:2'")),
        (lambda: symopt.Sparse(pattern=24), TypeError, ("Sparse", "pattern", "string", "int")),
        (
            lambda: symopt.Sparse(density=0.5, pattern="2:4"),
            ValueError,
            ("Sparse", "density and pattern", "one of them"),
        ),
        (lambda: symopt.GroupSparse("out", keep=0), ValueError, ("GroupSparse", "keep", ">= 1", "0")),
        (lambda: symopt.GroupSparse("out", keep=1.2), ValueError, ("GroupSparse", "keep", "(0, 1]", "1.2")),
        (lambda: symopt.GroupSparse("out", scope="global"), ValueError, ("GroupSparse", "scope='global'", "keep")),
        (
            lambda: symopt.GroupSparse(torch.arange(4), keep=2, scope="global"),
            ValueError,
            ("GroupSparse", "scope='global'", "equal size", "string"),
        ),
        (
            lambda: symopt.GroupSparse("out", keep=2, scope="flops"),
            ValueError,
            ("GroupSparse", "keep", "share", "the count 2"),
        ),
        (
            lambda: symopt.GroupSparse("out", keep=0.5, positions=4),
            ValueError,
            ("GroupSparse", "positions", "scope='flops'", "4"),
        ),
        (
            lambda: symopt.GroupSparse("out", keep=0.5, scope="flops", positions=0),
            ValueError,
            ("GroupSparse", "positions", "integer >= 1", "0"),
        ),
        (lambda: symopt.GroupSparse("out", keep=True), TypeError, ("GroupSparse", "keep", "number", "bool")),
    ],
)
def test_a_bad_budget_is_refused(make: Callable[[], Any], error: type[Exception], words: tuple[str, ...]) -> None:
    with pytest.raises(error) as caught:
        make()
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_budget_that_does_not_fit_its_weight_is_refused() -> None:
    net = nn.Linear(6, 4)
    with pytest.raises(ValueError, match=r"on weight: dimension 1 of shape \(4, 6\) .* runs of 4; leave .* density"):
        symopt.constrain(net, {"weight": symopt.Sparse(pattern="2:4")})
    with pytest.raises(ValueError, match=r"on weight: keep=5 of 4 groups; give at most 4"):
        symopt.constrain(net, {"weight": symopt.GroupSparse("out", keep=5)})
    with pytest.raises(ValueError, match=r"on weight: a kernel of shape \(4, 2, 3, 3\) .*; give positions"):
        symopt.constrain(nn.Conv2d(2, 4, 3), {"weight": symopt.GroupSparse("out", keep=0.5, scope="flops")})
    with pytest.raises(ValueError, match=r"weight has a budget.*mode='optimizer'"):
        symopt.constrain(net, {"weight": symopt.Sparse(density=0.5)}, mode="explicit")
    with pytest.raises(ValueError, match="a list may not hold budgets"):
        symopt.constrain(net, {"weight": [symopt.Sparse(density=0.5), symopt.GroupSparse("out")]})


@cases(optimizer=OPTIMIZERS)
def test_without_a_length_the_first_step_says_what_is_missing(optimizer: str) -> None:
    net, x, y = problem()
    symopt.constrain(net, {"0.weight": symopt.Sparse(density=0.1)})
    opt = OPTIMIZERS[optimizer](net)
    before = net[0].weight.detach().clone()
    nn.functional.cross_entropy(net(x), y).backward()
    with pytest.raises(ValueError, match=r"0\.weight: .*density=0\.1.* total_steps=N .*reschedule\(total_steps=N\)"):
        opt.step()
    assert torch.equal(net[0].weight, before)


def test_the_pool_of_a_pattern_has_no_threshold() -> None:
    (pool,) = pools([member(torch.randn(4, 8), symopt.Sparse(pattern="2:4"))])
    assert isinstance(pool, Pool) and pool.thresholds(3) == [math.inf]


def test_report_follows_a_budget() -> None:
    net, opt, x, y = budgeted("density", "adamw", 40)
    train(net, opt, x, y, 21)
    row = symopt.report(net, opt).rows[0]
    assert not row.committed and row.strength == float(opt.state[net[0].weight]["budget"][0]) > 0
    assert row.collapse_steps is None
    train(net, opt, x, y, 40, 21)
    assert symopt.report(net, opt).rows[0].committed


def test_a_budget_that_cannot_be_ramped_in_is_told_once_for_all_weights() -> None:
    def first_step(lr: float, steps: int) -> list[str]:
        net, x, y = problem()
        symopt.constrain(net, {NAMES: symopt.Sparse(density=0.1)})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(net, symopt.AdamW(net, lr=lr, total_steps=steps), x, y, 2)
        return [str(w.message) for w in caught]

    (told,) = first_step(1e-3, 100)
    found = re.search(r"0\.weight, 2\.weight: 100 steps at lr 0\.001 .* use lr >= ([\d.e-]+) or (\d+) steps", told)
    assert found is not None
    assert first_step(float(found[1]), 100) == [] == first_step(1e-3, int(found[2]))


def test_tensors_that_die_are_told_once() -> None:
    net, x, y = problem()
    symopt.constrain(net, {NAMES: symopt.GroupSparse("out", strength=3.0)})
    opt = symopt.AdamW(net, lr=1e-2)
    opt.reschedule(1000)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(net, opt, x, y, 1000)
    assert not net[0].weight.any() and not net[2].weight.any()
    told = [str(w.message).split(":")[0] for w in caught if "weights have become zero" in str(w.message)]
    assert sorted(name for names in told for name in names.split(", ")) == list(NAMES)


@cases(kind=["density", "2:4", "rows"])
def test_a_trained_network_can_be_the_start(kind: str) -> None:
    """What it has learnt is not lost: half of the weights go and it still knows its training data."""
    net, x, y = problem()
    dense = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for _ in range(300):
        dense.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        dense.step()
    dense_right = float((net(x).argmax(1) == y).float().mean())
    make = {
        "density": symopt.Sparse(density=0.5),
        "2:4": symopt.Sparse(pattern="2:4"),
        "rows": symopt.GroupSparse("out", keep=0.5),
    }
    symopt.constrain(net, {NAMES: make[kind]})
    opt = symopt.AdamW(net, lr=3e-3)
    opt.reschedule(400)
    train(net, opt, x, y, 400)
    right = float((net(x).argmax(1) == y).float().mean())
    assert dense_right > 0.95 and right >= dense_right - 0.05


@pytest.mark.parametrize(("keep", "of", "columns"), [(2, 4, 36), (1, 2, 8), (2, 5, 20000), (3, 64, 1984)])
@cases(saturated=[True, False], dtype=[torch.float32, torch.float64], instructions=native.INSTRUCTIONS)
def test_the_native_pattern_is_the_references(
    keep: int, of: int, columns: int, dtype: torch.dtype, instructions: str, saturated: bool
) -> None:
    """Every run of neighbours stays together, whatever the blocks and chunks the kernel works in."""
    generator = torch.Generator().manual_seed(of)
    w, g = (0.05 * torch.randn(7, columns, generator=generator, dtype=torch.float64) for _ in range(2))
    w[:, ::3] = 0.04  # ties
    w, g = w.to(dtype), g.to(dtype)
    state = {"imbalance": torch.tensor(0.02, dtype=dtype), "metric_scale": torch.tensor(0.1, dtype=dtype)}
    state["budget"] = torch.tensor([0.01, 5.0, math.inf, 1.0, math.inf], dtype=torch.float64)
    lost = elementwise.nm_pruned_mask(w, keep, of)
    decay = 0.01 * (0.01 + 4.99 * lost.double())
    c, scale = (state[key].double() for key in ("imbalance", "metric_scale"))
    flags: Any = {"saturated": saturated, "snaps": lost}
    want = elementwise.sparse(w.double(), 0.01 * g.double(), decay, c, scale, **flags)
    entry = native.Entry()
    native.fill(entry, w, roles(state), "sparse")
    entry.grad, entry.pattern_n, entry.pattern_m = g.data_ptr(), keep, of
    native.step([entry], "sgd", lr=0.01, **GRADIENT, saturated=saturated, instructions=instructions)
    close = torch.finfo(dtype).eps * tolerance("native weight, fp64")
    torch.testing.assert_close(w.double(), want, rtol=close, atol=close * float(want.abs().max()))


def lived(lr: float, keep: float, seed: int) -> int:
    """Neurons that live after 300 steps, half of their inputs being zero and their labels chance."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 10))
    symopt.constrain(net, {"0.weight": symopt.GroupSparse("out", keep=keep)})
    opt = symopt.AdamW(net, lr=lr)
    opt.reschedule(300)
    x, y = torch.randn(128, 40, generator=generator), torch.randint(10, (128,), generator=generator)
    x[:, 20:] = 0
    train(net, opt, x, y, 300)
    return int(net.get_parameter("0.weight").any(1).sum())


@pytest.mark.filterwarnings("ignore:.* fewer live at the commit than the budget keeps")
def test_large_budgets_are_met_at_high_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """At these rates a unit outside dies in three steps, and one without a gradient, like a dead ReLU, stays so."""
    cases = [(0.1, 0.7, 0), (0.1, 0.7, 1), (0.1, 0.9, 0)]
    assert all(lived(lr, keep, seed) == round(64 * keep) for lr, keep, seed in cases)
    monkeypatch.setattr(schedule, "MAX_RELATIVE_DECAY", math.inf)
    monkeypatch.setattr(schedule, "_enough", lambda *_: None)
    assert all(lived(lr, keep, seed) < round(64 * keep) for lr, keep, seed in cases)


@cases(optimizer=OPTIMIZERS, kind=["density", "rows"], lr=[1e-3, 0.3])
def test_the_bound_on_the_decay_holds_at_the_lr_of_the_step(optimizer: str, kind: str, lr: float) -> None:
    """Whatever lr was at the selection: the step is that of the strength with which it keeps to the bound."""
    ends = []
    for bounded in (True, False):
        net, opt, x, y = budgeted(kind, optimizer, 1000, dtype=torch.float64)
        train(net, opt, x, y, 21)
        opt.param_groups[0]["lr"] = lr
        for name in NAMES:
            state = opt.state[net.get_parameter(name)]["budget"]
            state[2] = net.get_parameter(name).detach().abs().max() * 10  # every unit is pruned
            state[1], state[4] = (30.0, 1e-3) if bounded else (min(30.0, 1e-3 / lr), math.inf)
        train(net, opt, x, y, 24, 21)
        ends.append([p.detach() for p in net.parameters()])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance("backends"), atol=tolerance("backends"))


def test_a_budget_that_is_committed_with_fewer_units_warns_with_numbers() -> None:
    net, opt, *_ = budgeted("density", "adamw", 100)
    with torch.no_grad():
        for name in NAMES:
            net.get_parameter(name).view(-1)[3:] = 0.0
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.warns(
        UserWarning, match=r"0\.weight, 2\.weight: fewer live at the commit .*\(0\.weight: 3, the budget is"
    ):
        for _ in range(100):
            opt.step()
