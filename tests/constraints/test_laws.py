"""What every constraint promises about its factors, its symmetry, its units and its zeros, as properties.

Each law is checked against something it was not computed from: autograd, an explicit loop over groups, the factors.
"""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import symopt
from support.cases import cases, pairs
from support.oracles import labels, labels_of
from support.runs import gradients, optimizer
from support.table import CONSTRAINTS, EVERY_OPTIMIZER, OWN_FACTORS, constrained_parameter, taken
from support.tolerances import tolerance

bounded = settings(max_examples=25, deadline=None, derandomize=True)

# Zeros often; the rest over eight decades, but not where squares underflow.
number = st.one_of(st.just(0.0), st.floats(1e-5, 1e3).flatmap(lambda x: st.sampled_from([x, -x])))
imbalances = st.sampled_from([0.0, 1e-4, 0.3, 1.0, 50.0])
seeds = st.integers(0, 2**31)


FACTORED = [*CONSTRAINTS, *OWN_FACTORS]


def tensor_of(data, shape) -> torch.Tensor:
    """A weight of any numbers, in which whole units may be zero too."""
    n = torch.Size(shape).numel()
    if data.draw(st.booleans()):
        return torch.tensor(data.draw(st.lists(number, min_size=n, max_size=n)), dtype=torch.float64).reshape(shape)
    w = randn(shape, data.draw(seeds))
    w[data.draw(st.integers(0, shape[0] - 1))] = 0
    return w * 10.0 ** data.draw(st.integers(-5, 3))


def randn(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_factors(constraint, shape, seed):
    """Factors in no particular gauge, of both signs."""
    template = constraint.split(randn(shape, 0))
    return tuple(randn(f.shape, seed + i) for i, f in enumerate(template))


def close(a, b, scale=1.0):
    tol = tolerance("identity")
    torch.testing.assert_close(a, b, rtol=tol, atol=tol * float(scale))


def squares(factors):
    return sum(f.square().sum() for f in factors) / 2


# -- factors ---------------------------------------------------------------------------------------------------------


@cases(row=FACTORED)
@bounded
@given(data=st.data(), c=imbalances)
def test_compose_undoes_split(row, data, c):
    constraint, w = row.make(None), tensor_of(data, row.shape)
    factors = constraint.split(w, c)
    assert all(bool(f.isfinite().all()) for f in factors)
    close(constraint.compose(factors), w)
    assert torch.equal(constraint.compose(factors) == 0, w == 0)  # zeros stay exact


@cases(row=CONSTRAINTS)
@bounded
@given(data=st.data(), c=imbalances)
def test_split_is_in_the_gauge_it_was_asked_for(row, data, c):
    constraint, w = row.make(None), tensor_of(data, row.shape)
    s, d = constraint.split(w, c)
    member = torch.nn.functional.one_hot(labels(row)).double()
    gate, part = s.flatten().square(), d.flatten().square() @ member
    close(gate - part, torch.full_like(gate, c), scale=(gate + part).max())


@cases(row=FACTORED)
@bounded
@given(seed=seeds)
def test_pullback_is_the_gradient_of_compose(row, seed):
    constraint = row.make(None)
    factors = tuple(f.requires_grad_() for f in random_factors(constraint, row.shape, seed))
    grad = randn(row.shape, seed + 7)
    expected = torch.autograd.grad(constraint.compose(factors), factors, grad)
    for mine, theirs in zip(constraint.pullback(factors, grad), expected, strict=True):
        close(mine.detach(), theirs, scale=10)


@cases(row=FACTORED)
@bounded
@given(data=st.data(), c=imbalances)
def test_the_penalty_is_the_least_decay_over_factors(row, data, c):
    constraint, w = row.make(None), tensor_of(data, row.shape)
    penalty, slack = constraint.penalty(w), 1 + tolerance("identity")
    close(squares(constraint.split(w, 0.0)), penalty)  # the balanced gauge attains it
    assert bool(penalty <= squares(constraint.split(w, c)) * slack)
    factors = random_factors(constraint, row.shape, data.draw(seeds))
    assert bool(constraint.penalty(constraint.compose(factors)) <= squares(factors) * slack)


@cases(row=CONSTRAINTS)
def test_an_unbalanced_gauge_costs_more(row):
    """The inequality above is strict off balance, so a penalty that is too small would be seen."""
    constraint, w = row.make(None), randn(row.shape, 0)
    assert bool(constraint.penalty(w) * 1.001 < squares(constraint.split(w, 1.0)))


# -- the symmetry ----------------------------------------------------------------------------------------------------


@cases(row=FACTORED)
@bounded
@given(seed=seeds)
def test_the_loss_cannot_see_the_mirror(row, seed):
    constraint = row.make(None)
    factors = random_factors(constraint, row.shape, seed)
    image = constraint.mirror(factors)
    target, x = randn(row.shape, seed + 5), randn((row.shape[-1], 3), seed + 6)

    def loss(w):
        return ((w - target) @ x).tanh().square().sum()

    close(loss(constraint.compose(image)), loss(constraint.compose(factors)))
    assert any(not torch.equal(a, b) for a, b in zip(image, factors, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(constraint.mirror(image), factors, strict=True))
    # its plane, factors that are their own image, is the structure: zero
    middle = tuple((a + b) / 2 for a, b in zip(image, factors, strict=True))
    assert int(constraint.compose(middle).count_nonzero()) == 0


# -- exact zeros are kept, and nothing else moves by itself ------------------------------------------------------------


def half_zero(row):
    """A constrained module, half of whose units are exactly zero."""
    module = constrained_parameter(row)
    dead = (labels(row) % 2 == 0).reshape(row.shape)
    module.weight.data[dead] = 0
    return module, dead


@pairs(
    # Without a time scale three factors grow beyond all numbers under a gradient that leans one way.
    lambda row, opt_row, time_scale: taken(row, opt_row) and (row in CONSTRAINTS or time_scale == "saturated"),
    row=FACTORED,
    opt_row=EVERY_OPTIMIZER,
    time_scale=["saturated", "none"],
)
def test_structure_is_kept_bit_for_bit(row, opt_row, time_scale):
    module, dead = half_zero(row)
    p, live = module.weight, module.weight.detach().clone()
    opt = optimizer(module, opt_row, imbalance=0.0, time_scale=time_scale, strength=1e-3)
    for g in gradients(row.shape, 50):
        p.grad = g
        opt.step()
        assert int(p[dead].count_nonzero()) == 0
    assert bool(p.isfinite().all()) and bool((p != live)[~dead].all())


@cases(taken, row=CONSTRAINTS, opt_row=EVERY_OPTIMIZER)
def test_zeros_move_while_there_is_imbalance(row, opt_row):
    module, dead = half_zero(row)
    opt = optimizer(module, opt_row)
    module.weight.grad = gradients(row.shape, 1)[0]
    opt.step()
    assert bool((module.weight[dead] != 0).all())


# -- fold and violation ----------------------------------------------------------------------------------------------


@cases(row=FACTORED)
@bounded
@given(data=st.data())
def test_fold_is_idempotent_and_ends_without_violation(row, data):
    constraint, w = row.make(None), tensor_of(data, row.shape)
    once = constraint.fold(w)
    assert torch.equal(constraint.fold(once), once)
    assert torch.equal(once == 0, w == 0)


@cases(row=CONSTRAINTS)
def test_violation(row):
    constraint = row.make(None)
    label = labels(row).reshape(row.shape)
    w = torch.ones(row.shape, dtype=torch.float64)
    assert float(constraint.violation(w)) == 0.0
    exact = torch.where(label == 0, 0.0, w)
    assert float(constraint.violation(exact)) == 0.0
    nearly = torch.where(label == 0, 1e-4, w)
    # 1e-4 of the units' size, over the whole weight
    share = float(nearly[label == 0].norm() / nearly.norm())
    assert float(constraint.violation(nearly)) == pytest.approx(share, rel=tolerance("identity"))
    well_apart = torch.where(label == 0, 1e-2, w)
    assert float(constraint.violation(well_apart)) == 0.0
    assert float(constraint.violation(torch.zeros(row.shape))) == 0.0


# -- units -----------------------------------------------------------------------------------------------------------


def listed(name, constraint, shape):
    return name, constraint, shape, labels_of(constraint, shape)


PARTITIONS = [(row.id, row.make(None), row.shape, labels(row)) for row in CONSTRAINTS]
PARTITIONS += [
    listed(f"{groups}-{'x'.join(map(str, shape))}", symopt.GroupSparse(groups), shape)
    for groups, shape in [
        ("out", (5,)),
        ("in", (4, 3, 2)),
        ("head:3", (6, 4)),
        ("head:3", (9, 3)),  # packed: q, k and v of three heads with one row each
        ("head:2", (6,)),
        ("head:2", (6, 2, 3, 3)),  # out = 3 * in, but a convolution is not packed
        ("block:2x2", (4, 6, 3, 2)),
        ("block:1x6", (4, 6)),
        ("block:4x6", (4, 6)),
    ]
]
PARTITIONS += [
    listed("index per slice", symopt.GroupSparse(torch.tensor([3, -1, 3, 8])), (4, 3, 2)),
    listed("index per weight", symopt.GroupSparse(torch.arange(24).reshape(4, 3, 2) // 5 * 7), (4, 3, 2)),
    listed("callable per slice", symopt.GroupSparse(lambda w: torch.arange(w.shape[0]) // 2), (4, 3, 2)),
]


@pytest.mark.parametrize(("constraint", "shape", "label"), [p[1:] for p in PARTITIONS], ids=[p[0] for p in PARTITIONS])
def test_units_are_those_of_a_loop_over_indices(constraint, shape, label):
    w = randn(shape, 0)
    units = int(label.max()) + 1
    sums, squares_, members = [0.0] * units, [0.0] * units, [[] for _ in range(units)]
    for flat, index in enumerate(itertools.product(*map(range, shape))):
        unit, value = int(label[flat]), float(w[index])
        sums[unit] += value
        squares_[unit] += value**2
        members[unit].append(value)
    size = torch.tensor(squares_, dtype=torch.float64).sqrt()
    close(constraint.size(w), size)
    close(constraint.penalty(w), size.sum())
    groups = constraint.partition(w)
    if groups is None:  # every weight is its own unit
        assert units == w.numel()
        return
    assert groups.count == units
    close(groups.sum(w), torch.tensor(sums, dtype=torch.float64), scale=10)
    close(constraint.size(w, groups), size)
    assert groups.size(w).tolist() == [len(m) for m in members]
    v = randn((units,), 1)
    assert torch.equal(groups.expand(v).reshape(shape), v[label].reshape(shape))
    close(groups.scale(v, w), v[label].reshape(shape) * w)
    assert all(float(x) in m for x, m in zip(groups.first(w), members, strict=True))


# -- what is not a number ----------------------------------------------------------------------------------------------


@cases(row=CONSTRAINTS)
def test_a_zero_unit_without_imbalance_takes_any_step_to_zero(row):
    constraint, zero = row.make(None), torch.zeros(row.shape, dtype=torch.float64)
    c, scale = torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    for saturated, factor in itertools.product((True, False), (0.0, 1e-3, 1.0, 1e3, -1e3)):
        delta = factor * randn(row.shape, 2)
        new = constraint.retract(zero, delta, 0.1, c, scale, constraint.partition(zero), saturated=saturated)
        assert torch.equal(new, zero)
