"""Units that span several parameters: every step, against a gate and directions written out unit by unit."""

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import symopt
from support.cases import cases, pairs
from support.oracles import STRENGTH
from support.runs import close, equal, optimizer, take
from support.table import EVERY_OPTIMIZER, OPTIMIZERS, UNITS, UnitsRow, available, bound_module, taken
from support.tolerances import tolerance
from support.units import ExplicitUnits, gradients_of, units_of
from symopt.optim import registry
from symopt.optim.binding import Binding
from symopt_kernels.reference import units as kernel
from symopt_kernels.units import Part, Units

TAKEN = [opt_row for opt_row in EVERY_OPTIMIZER if taken(UNITS[0], opt_row)]
SPANNING = UNITS[:2]


def follow(row, opt_row, steps=6, backend="reference", strength=STRENGTH, **options):
    module = bound_module(row, strength)
    opt = optimizer(module, opt_row, backend=backend, **options)
    oracle = ExplicitUnits(row, opt_row, module, strength=strength, **options)
    for t in range(steps):
        grads = gradients_of(module, t)
        take([(module, opt)], grads)
        oracle.step(grads)
        oracle.compare(module, opt)
    return module, oracle


# -- the step --------------------------------------------------------------------------------------------------------


@pairs(
    available,
    row=UNITS,
    opt_row=TAKEN,
    backend=["reference", "native"],
    imbalance=[1.0, 0.2, 0.0],
    time_scale=["none", "saturated"],
)
def test_steps_are_those_of_one_gate_per_unit(row, opt_row, backend, imbalance, time_scale):
    follow(row, opt_row, backend=backend, imbalance=imbalance, time_scale=time_scale)


@pairs(available, row=UNITS, opt_row=TAKEN, backend=["reference", "native"], time_scale=["none", "saturated"])
def test_units_die_as_one_while_free_weights_live(row, opt_row, backend, time_scale):
    module, oracle = follow(row, opt_row, 40, backend, strength=600.0, imbalance=0.0, time_scale=time_scale)
    for p, unit in zip(module.parameters(), units_of(row)[0], strict=True):
        assert torch.equal(p.detach().flatten() != 0, torch.tensor(unit) >= oracle.count)


LARGE = UnitsRow(
    "units-large",
    ((96, 40, 9), (96,), (300, 96)),
    (0, 0, 1),
    (tuple(range(96)), tuple(reversed(range(96))), tuple(i % 7 - 1 for i in range(96))),
    (1.0, 0.5, 1.5),
)
"""Several blocks of each parameter."""


@cases(backend=["reference", "native"], opt_row=[r for r in OPTIMIZERS if r.id in ("sgd-momentum", "adamw-amsgrad")])
def test_equal_inputs_give_equal_bits_whatever_the_number_of_threads(opt_row, backend):
    """Sums are added in a fixed order."""
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            module = bound_module(LARGE, dtype=torch.float32)
            runs.append((module, optimizer(module, opt_row, backend=backend)))
            for t in range(3):
                take(runs[-1:], gradients_of(module, t))
    finally:
        torch.set_num_threads(before)
    assert all(equal(runs[0], run) for run in runs[1:])


@pytest.mark.parametrize("part", ["survey", "combine", "move"])
def test_the_suite_notices_a_wrong_step(part, monkeypatch):
    original = getattr(kernel, part)

    def wrong(*args, **kwargs):
        found = original(*args, **kwargs)
        return found * (1 + 1e-9) if isinstance(found, torch.Tensor) else (found[0] * (1 + 1e-9), *found[1:])

    monkeypatch.setattr(kernel, part, wrong)
    with pytest.raises(AssertionError, match="not close"):
        follow(UNITS[0], next(row for row in OPTIMIZERS if row.id == "adamw"))


# -- one parameter with all of its units -------------------------------------------------------------------------------

WHOLE = {"rows": ("out", (6, 5), 0), "filters": ("out", (4, 3, 2, 2), 0), "columns": ("in", (6, 5), 1)}
WHOLE |= {"input channels": ("in", (4, 3, 2, 2), 1), "weights": ("out", (5,), 0)}


@cases(
    lambda opt_row, backend, **_: available(UNITS[0], opt_row, backend),
    whole=WHOLE,
    opt_row=TAKEN,
    backend=["reference", "native"],
)
def test_units_of_one_parameter_are_its_groups(whole, opt_row, backend):
    name, shape, dim = WHOLE[whole]
    runs = []
    for groups in (name, {"w": (dim, None)}):
        module = torch.nn.Module()
        generator = torch.Generator().manual_seed(0)
        module.w = torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        symopt.constrain(module, {"w": symopt.GroupSparse(groups, strength=STRENGTH)})
        runs.append((module, optimizer(module, opt_row, backend=backend)))
    for t in range(12):
        take(runs, gradients_of(runs[0][0], t))
        close(*runs)
    assert not equal(runs[0], (runs[0][0], optimizer(runs[0][0], opt_row)))


# -- units whose weights are on several machines -----------------------------------------------------------------------


def cut(x, part):
    """In two, across the slices; a vector into slices."""
    return x.chunk(2, 1 - part.dim if x.dim() > 1 else 0)


def halves(module):
    """The weights and the constraint of each of two machines."""
    constraint = next(iter(symopt.constraints(module).values()))
    units = constraint.spanning_units
    sizes, found = units.sizes(torch.zeros((), dtype=torch.float64)), []
    for i in range(2):
        weights = [cut(p.detach(), part)[i].clone() for p, part in zip(module.parameters(), units.parts, strict=True)]
        parts = tuple(
            Part(tuple(w.shape), part.dim, cut(part.index, part)[i] if w.dim() == 1 else part.index, part.factor)
            for w, part in zip(weights, units.parts, strict=True)
        )
        found.append((weights, dataclasses.replace(constraint, units_=Units(units.count, parts, sizes))))
    return found


class Sums:
    """Adds what two threads have, each of which gets the same bits."""

    def __init__(self):
        self.barrier, self.given, self.calls = threading.Barrier(2, timeout=60), [None, None], [0, 0]

    def combine(self, i):
        def reduce(sums):
            self.given[i] = sums.clone()
            self.calls[i] += 1
            self.barrier.wait()
            total = self.given[0] + self.given[1]
            self.barrier.wait()
            sums.copy_(total)

        return reduce


class Half:
    """One machine: an optimizer, and what binds the parameters that it holds."""

    def __init__(self, weights, constraint, combine, start):
        self.module = torch.nn.Module()
        for k, w in enumerate(weights):
            self.module.register_parameter(f"w{k}", torch.nn.Parameter(w))
        params = tuple(self.module.parameters())
        self.bound = Binding(constraint, tuple(f"w{k}" for k in range(len(params))), params)
        self.bound.combine = combine
        registry.add(self)
        self.start = start

    def binding(self):
        return self.bound

    def optimizer(self, opt_row, **options):
        opt = optimizer(self.module, opt_row, **options)
        for p in self.bound.parameters:
            opt.state[p] |= {key: value.clone() for key, value in self.start.items()}
        return opt


def follow_halves(row, opt_row, backend, sums, steps=5):
    module = bound_module(row)
    constraint = next(iter(symopt.constraints(module).values()))
    parts, count = constraint.spanning_units.parts, constraint.spanning_units.count
    flat = torch.cat([p.detach().flatten() for p in module.parameters()])
    start = dict(zip(("imbalance", "metric_scale"), constraint.start(flat, 1.0), strict=True))
    runs = [Half(*half, sums.combine(i), start) for i, half in enumerate(halves(module))]
    opts = [half.optimizer(opt_row, backend=backend) for half in runs]
    whole = optimizer(module, opt_row, backend=backend)
    grads = [gradients_of(module, t) for t in range(steps)]

    def train(i):
        for t in range(steps):
            take([(runs[i].module, opts[i])], [cut(g, part)[i] for g, part in zip(grads[t], parts, strict=True)])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(train, range(2)))
    for t in range(steps):
        take([(module, whole)], grads[t])
    tol = {"rtol": tolerance("backends"), "atol": tolerance("backends")}
    for k, (p, part) in enumerate(zip(module.parameters(), parts, strict=True)):
        for half, piece in zip(runs, cut(p.detach(), part), strict=True):
            torch.testing.assert_close(half.bound.parameters[k].detach(), piece, **tol)
    theirs = whole.state[next(module.parameters())]
    for half, opt in zip(runs, opts, strict=True):
        mine = opt.state[half.bound.parameters[0]]
        assert mine.keys() == theirs.keys()
        for key in {"exp_avg_sq", "max_exp_avg_sq", "imbalance", "metric_scale", "step"} & mine.keys():
            torch.testing.assert_close(mine[key].flatten()[:count], theirs[key].flatten()[:count], **tol)


@cases(available, row=SPANNING, opt_row=TAKEN, backend=["reference", "native"])
def test_two_halves_that_add_their_sums_step_as_the_whole(row, opt_row, backend):
    sums, steps = Sums(), 5
    follow_halves(row, opt_row, backend, sums, steps)
    assert sums.calls == [steps, steps]


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_a_half_that_does_not_see_the_other_steps_otherwise(backend, monkeypatch):
    monkeypatch.setattr(Sums, "combine", lambda self, i: lambda sums: None)
    with pytest.raises(AssertionError, match="not close"):
        follow_halves(UNITS[0], OPTIMIZERS[0], backend, Sums())
