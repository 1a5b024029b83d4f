"""Checkpoints of units that span several parameters, and weights that others change."""

import copy
import io
import pickle

import pytest
import torch

import symopt
from support import table
from support.cases import cases
from support.runs import close, equal, optimizer, take
from support.table import EVERY_OPTIMIZER, OPTIMIZERS, UNITS, UnitsRow, bound_module, taken
from support.tolerances import tolerance
from support.units import ExplicitUnits, gradients_of, units_of

TAKEN = [opt_row for opt_row in EVERY_OPTIMIZER if taken(UNITS[0], opt_row)]
BACKENDS = ["reference", "native"]
VECTORS = UnitsRow("units-of-vectors", ((3,), (3,)), (0, 0), ((2, 0, 1), (1, 2, 0)), (1.0, 0.5))
"""Numbers per unit and per weight have one shape."""
VECTOR = UnitsRow("units-of-one-vector", ((3,),), (0,), ((2, 0, 1),), (0.5,))
ODD = UnitsRow("units-with-odd-factors", ((4, 3), (4,)), (0, 0), ((0, 1, 2, 3), (3, 1, 0, 2)), (0.7, 3.0))
ROWS = [*UNITS, VECTORS, VECTOR]


def available(opt_row, backend, **_):
    return table.available(UNITS[0], opt_row, backend)


def started(row, opt_row, backend="reference", steps=4):
    module = bound_module(row)
    run = module, optimizer(module, opt_row, backend=backend)
    go(run, 0, steps)
    return run


def go(run, first, last):
    for t in range(first, last):
        take([run], gradients_of(run[0], t))


def saved(*objects):
    file = io.BytesIO()
    torch.save([x.state_dict() for x in objects], file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def loaded(run, row, opt_row, backend="reference"):
    module = bound_module(row)
    opt = optimizer(module, opt_row)
    weights, state = saved(*run)
    for group in state["param_groups"]:
        group["backend"] = backend
    module.load_state_dict(weights)
    opt.load_state_dict(state)
    return module, opt


@cases(available, row=ROWS, opt_row=TAKEN, backend=BACKENDS)
def test_saving_and_loading_changes_no_bit(row, opt_row, backend):
    run = started(row, opt_row, backend)
    other = loaded(run, row, opt_row, backend)
    for each in (run, other):
        go(each, 4, 8)
    assert equal(run, other)
    go(run, 8, 9)
    assert not equal(run, other)


@cases(available, row=ROWS, opt_row=TAKEN, backend=BACKENDS)
def test_copies_go_on_by_themselves(row, opt_row, backend):
    run = started(row, opt_row, backend)
    copies = [copy.deepcopy(run), pickle.loads(pickle.dumps(run))]
    before = [p.detach().clone() for p in run[0].parameters()]
    for each in copies:
        go(each, 4, 8)
    assert all(torch.equal(p, q) for p, q in zip(run[0].parameters(), before, strict=True))
    go(run, 4, 8)
    for each in copies:
        assert equal(run, each)
        first, *others = each[0].parameters()
        for key in ("imbalance", "exp_avg_sq"):
            assert all(each[1].state[p].get(key) is each[1].state[first].get(key) for p in others)


@cases(opt_row=TAKEN)
def test_odd_factors_cost_the_second_moments_one_rounding(opt_row):
    run = started(ODD, opt_row)
    other = loaded(run, ODD, opt_row)
    for each in (run, other):
        go(each, 4, 8)
    for p, q in zip(run[0].parameters(), other[0].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance("identity"), atol=tolerance("identity"))


@cases(row=ROWS, opt_row=[row for row in OPTIMIZERS if "adam" in row.id])
def test_second_moments_are_saved_per_weight_as_torch_has_them(row, opt_row):
    """Every weight has that of its unit, over its factor squared, as its gradient has its factor less."""
    run = started(row, opt_row)
    of_weights, count = units_of(row)
    state, params = run[1].state_dict()["state"], list(run[0].parameters())
    for key in {"exp_avg_sq", "max_exp_avg_sq"} & state[0].keys():
        units = run[1].state[params[0]][key]
        assert units.shape == (count + sum(u >= count for part in of_weights for u in part),)
        for i, (p, unit, factor) in enumerate(zip(params, of_weights, row.factors, strict=True)):
            unit = torch.tensor(unit)
            expected = torch.where(unit < count, units[unit] / factor**2, units[unit])
            assert state[i][key].shape == p.shape
            assert torch.equal(state[i][key].flatten(), expected)


@cases(row=[*ROWS, ODD], opt_row=TAKEN)
def test_checkpoints_go_to_torch_and_back(row, opt_row):
    """Its second moments are those that torch would have, up to the mean over a unit."""
    ours = started(row, opt_row)
    plain = torch.nn.ParameterList(torch.nn.Parameter(p.detach().clone()) for p in ours[0].parameters())
    theirs = opt_row.torch_cls(plain.parameters(), lr=opt_row.lr, **opt_row.options)
    theirs.load_state_dict(saved(ours[1])[0])
    go((plain, theirs), 4, 6)
    assert all(bool(p.isfinite().all()) for p in plain)
    module = bound_module(row)
    back = optimizer(module, opt_row)
    back.load_state_dict(saved(theirs)[0])
    module.load_state_dict({f"w{i}": p.detach() for i, p in enumerate(plain)})
    go((module, back), 6, 7)
    of_weights, count = units_of(row)
    unit = torch.tensor([u for part in of_weights for u in part])
    a = torch.tensor([a for part, a in zip(of_weights, row.factors, strict=True) for _ in part], dtype=torch.float64)
    go((plain, theirs), 6, 7)
    if "exp_avg_sq" in theirs.state[plain[0]]:
        per_weight = torch.cat([theirs.state[p]["exp_avg_sq"].flatten() for p in plain])
        per_weight = torch.where(unit < count, a * a * per_weight, per_weight)
        means = torch.stack([per_weight[unit == u].mean() for u in range(int(unit.max()) + 1)])
        mine = back.state[module.w0]["exp_avg_sq"]
        torch.testing.assert_close(mine, means, rtol=tolerance("factor step"), atol=tolerance("factor step"))


@cases(opt_row=TAKEN)
def test_weights_without_a_constraint_may_get_one_and_lose_it(opt_row):
    """With the moments that they have."""
    row = UNITS[1]
    module = torch.nn.Module()
    for name, p in bound_module(row).named_parameters():
        module.register_parameter(name, torch.nn.Parameter(p.detach().clone()))
    opt = optimizer(module, opt_row)
    go((module, opt), 0, 3)
    symopt.constrain(module, {"*": row.make(0.3)})
    go((module, opt), 3, 6)
    state = saved(opt)[0]["state"]
    symopt.release(module)
    for i, p in enumerate(module.parameters()):
        for key, value in opt.state[p].items():
            if isinstance(value, torch.Tensor) and key != "step":
                assert value.shape == p.shape and torch.equal(value, state[i][key])
    go((module, opt), 6, 9)
    assert all(bool(p.isfinite().all()) for p in module.parameters())


@cases(available, row=UNITS, opt_row=TAKEN, backend=BACKENDS)
def test_weights_that_others_change_are_stepped_from_where_they_are(row, opt_row, backend):
    module, opt = started(row, opt_row, backend)
    oracle = ExplicitUnits(row, opt_row, bound_module(row))
    for t in range(4):
        oracle.step(gradients_of(module, t))
    oracle.compare(module, opt)
    first = module.w0
    with torch.no_grad():
        first[0] = 3.0  # part of a unit
        first[1:] *= -0.5
    oracle.v = torch.cat([p.detach().flatten() for p in module.parameters()]) / oracle.a
    for t in range(4, 7):
        take([(module, opt)], gradients_of(module, t))
        oracle.step(gradients_of(module, t))
        oracle.compare(module, opt)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_checkpoint_of_other_units_is_refused(backend):
    run = started(UNITS[0], OPTIMIZERS[7], backend)
    state = run[1].state_dict()
    state["state"][1]["exp_avg_sq"] = torch.ones(9)
    before = [p.detach().clone() for p in run[0].parameters()]
    with pytest.raises(ValueError, match=r"parameter 1: exp_avg_sq is .* shape \(9,\).* weight of shape \(4,\)"):
        run[1].load_state_dict(state)
    assert all(torch.equal(p, q) for p, q in zip(run[0].parameters(), before, strict=True))


@cases(row=UNITS, opt_row=OPTIMIZERS, dtype=[torch.bfloat16, torch.float16, torch.float32])
def test_both_backends_agree_in_low_precision(row, opt_row, dtype):
    runs = []
    for backend in BACKENDS:
        module = bound_module(row, dtype=dtype)
        runs.append((module, optimizer(module, opt_row, backend=backend)))
    for t in range(6):
        take(runs, gradients_of(runs[0][0], t))
        close(*runs, "backends, fp32")
    for module, opt in runs:
        for p in module.parameters():
            if dtype != torch.float32:  # a copy of every parameter
                master = opt.state[p]["master"]
                assert master.dtype == torch.float32 and torch.equal(p, master.to(dtype))
                assert not torch.equal(p.float(), master)
