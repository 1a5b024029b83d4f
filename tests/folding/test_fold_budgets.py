"""fold where more lives than a budget allows: one warning with numbers, an error if strict, silence where it is met."""

import copy
import re
import warnings

import pytest
import torch
from torch import nn

import symopt
from support.cases import cases

UNITS = {"0.weight": (0, None), "0.bias": (0, None)}
BUDGETS = {
    "density": lambda: symopt.Sparse(density=0.25),
    "pattern": lambda: symopt.Sparse(pattern="1:4"),
    "rows": lambda: symopt.GroupSparse("out", keep=3),
    "columns": lambda: symopt.GroupSparse("in", keep=0.25),
    "blocks": lambda: symopt.GroupSparse("block:3x2", keep=4),
    "map": lambda: symopt.GroupSparse(torch.arange(12) // 2, keep=2),
    "spanning": lambda: symopt.GroupSparse(UNITS, keep=3),
    "rank": lambda: symopt.LowRank(rank=2),
    "max_rank": lambda: symopt.LowRank(max_rank=2),
}


def made(kind):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 2)).double()
    return symopt.constrain(net, {("0.*" if kind == "spanning" else "0.weight"): BUDGETS[kind]()})


def constrained(net):
    return torch.cat([net.get_parameter(name).detach().flatten() for name in symopt.constraints(net)])


def told(net, **options):
    """Lines of the one warning, and what was folded; no lines without a warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        small = symopt.fold(net, **options)
    assert len(caught) <= 1 and all(w.filename == __file__ and w.category is UserWarning for w in caught)
    return (str(caught[0].message).split("\n") if caught else []), small


def enforced(net):
    """The weights of ``net`` with its budget met, without any unit removed."""
    plain = nn.ModuleList(copy.deepcopy(m) for m in net)  # without a forward nothing is removed
    return torch.cat([told(plain)[1].get_parameter(name).detach().flatten() for name in symopt.constraints(net)])


@cases(kind=BUDGETS)
def test_what_is_cut_is_said_in_numbers(kind):
    net = made(kind)
    before, after = constrained(net), enforced(net)
    lines, small = told(net)
    name = ", ".join(symopt.constraints(net)) if kind == "spanning" else "0.weight"
    line = next(line for line in lines if line.strip().startswith(f"{name}: "))
    live, cut = (int(n.replace(",", "")) for n in re.search(r": ([\d,]+) .* live, .*: ([\d,]+)", line).groups())
    share = float(re.search(r"cut, (\S+) %", line)[1]) / 100
    rest = (before - after).square().sum() / before.square().sum()
    assert share == pytest.approx(float(rest), abs=6e-4)
    units = {"density": 96, "pattern": 96, "rows": 12, "columns": 8, "blocks": 16, "map": 6, "spanning": 12}
    may = {"density": 24, "pattern": 24, "rows": 3, "columns": 2, "blocks": 4, "map": 2, "spanning": 3}
    assert live == units.get(kind, 8) and live - cut == may.get(kind, 2)
    if "rank" not in kind:
        assert small.fold_config["cut"] == {name: int((before != after).sum())}


@cases(kind=BUDGETS)
def test_strict_raises_and_a_met_budget_is_silent(kind):
    net = made(kind)
    start = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=r"fold: a budget was not met(.|\n)*strict=True"):
        symopt.fold(net, strict=True)
    assert all(torch.equal(value, start[key]) for key, value in net.state_dict().items())
    place = 0
    after = enforced(net)
    with torch.no_grad():
        for name in symopt.constraints(net):
            p = net.get_parameter(name)
            p.copy_(after[place : place + p.numel()].reshape(p.shape))
            place += p.numel()
    assert told(net)[0] == told(net, strict=True)[0] == []
    assert set(symopt.fold(net).fold_config["cut"].values()) == {0}


def test_all_weights_are_in_one_warning_and_those_that_are_met_are_not():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    symopt.constrain(net, {"*.weight": symopt.GroupSparse("in", keep=2)})
    with torch.no_grad():
        net[2].weight[:, 1:3] = 0
    lines, _ = told(net)
    assert lines[0] == "fold: 2 budgets were not met, so live weights have to become zero:"
    assert [line.split(":")[0].strip() for line in lines[1:3]] == ["0.weight", "4.weight"] and len(lines) == 4


@cases(scope=["global", "flops"])
def test_a_shared_budget_is_judged_as_a_whole(scope):
    """A tensor that died leaves its room to others, and what is over is said of every tensor."""
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6))
    symopt.constrain(net, {("0.weight", "2.weight"): symopt.GroupSparse("out", keep=0.5, scope=scope)})
    with torch.no_grad():
        net[0].weight.zero_()
        net[2].weight[5:] = 0
    assert told(net)[0] == []
    with torch.no_grad():
        net[0].weight.normal_()
        net[2].weight.normal_()
    lines, small = told(net)
    assert all("for 2 weights in all" in line for line in lines[1:-1]) and len(lines) > 2
    assert sum(small.fold_config["cut"].values()) > 0


@cases(average=["ema", "swa"])
def test_an_average_of_weights_that_die_is_never_exactly_zero(average):
    """As torch's AveragedModel makes it from a run whose budget was met in the end."""
    torch.manual_seed(0)
    net = symopt.constrain(
        nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 2)), {"0.weight": BUDGETS["rows"]()}
    )
    function = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9) if average == "ema" else None
    averaged = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=function)
    for _ in range(30):
        with torch.no_grad():
            net[0].weight[3:] *= 0.5
        averaged.update_parameters(net)
    with torch.no_grad():
        net[0].weight[3:] = 0
    averaged.update_parameters(net)
    assert told(net)[0] == []
    lines, small = told(averaged.module)
    assert "12 units live, the budget is 3" in lines[1] and "EMA, SWA" in lines[-1]
    assert int(small[0].weight.any(1).sum()) == 3


def test_numbers_alone_decide_of_weights_that_were_loaded():
    torch.manual_seed(0)
    sparse, net = made("density"), made("density")
    with torch.no_grad():
        sparse[0].weight[3:] = 0
    net.load_state_dict(sparse.state_dict())
    assert told(net)[0] == []
    net.load_state_dict(made("density").state_dict())
    assert len(told(net)[0]) == 3


def test_what_has_no_budget_is_silent():
    net = symopt.constrain(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)), {"*.weight": symopt.Sparse()})
    assert told(net, strict=True)[0] == []


@cases(kind=["rows", "columns", "blocks", "map", "spanning"], size=[1e-25, 1e-38])
def test_units_whose_squares_underflow_live(kind, size):
    """As in a long average: each weight of such a unit is a number, its size is none."""
    net = made(kind).float()
    with torch.no_grad():
        for name in symopt.constraints(net):
            net.get_parameter(name).fill_(size)
    rows = symopt.report(net).rows
    assert all(row.live == row.units and row.zeros == 0 for row in rows)
    lines, small = told(net)
    name = ", ".join(symopt.constraints(net)) if kind == "spanning" else "0.weight"
    assert lines and small.fold_config["cut"][name] > 0 and told(small)[0] == []


def test_a_model_inside_of_an_average_is_found():
    averaged = torch.optim.swa_utils.AveragedModel(made("rows"))
    lines, _ = told(averaged)
    assert "module.0.weight: 12 units live, the budget is 3" in lines[1]
