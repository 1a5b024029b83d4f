"""report: a row and a number for everything, whatever the weights are; totals without a fold; how it reads."""

import io
import json
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import symopt
from support.cases import cases

NAMES = ("0.weight", "2.weight")


def made(constraint=None, optimizer=symopt.AdamW):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 2))
    if constraint is not None:
        symopt.constrain(net, {NAMES: constraint})
    return net, optimizer(net, lr=1e-2)


class Terminal(io.StringIO):
    def isatty(self):
        return True


# -- totals ----------------------------------------------------------------------------------------------------------


def test_totals_are_counted_and_nothing_is_folded(monkeypatch):
    net, _ = made(symopt.Sparse())
    with torch.no_grad():
        net[0].weight[:3] = 0
    monkeypatch.setattr(sys.modules["symopt.report"], "folded", None)
    found = symopt.report(net)
    assert (found.parameters, found.constrained, found.zeros) == (108 + 156 + 26, 96 + 144, 24)
    assert found.parameters_folded is found.flops is found.flops_folded is None
    assert "290 parameters, 240 constrained, 24 of these zero (10.00%)" in str(found)


def test_with_examples_it_says_what_folding_would_leave():
    net, _ = made(symopt.GroupSparse("out"))
    with torch.no_grad():
        net[0].weight[:3] = 0
    x = torch.randn(5, 8)
    found, small = symopt.report(net, example_inputs=x), symopt.fold(net, x)
    assert found.parameters_folded == sum(p.numel() for p in small.parameters()) < found.parameters
    assert found.flops == 2 * (96 + 144 + 24) and found.flops_folded == 2 * (8 * 9 + 9 * 12 + 24)
    assert f"; {found.parameters_folded} left when folded" in str(found)


# -- any weights -----------------------------------------------------------------------------------------------------

CONSTRAINTS = {
    "density": lambda: symopt.Sparse(density=0.1),
    "global": lambda: symopt.Sparse(density=0.1, scope="global"),
    "pattern": lambda: symopt.Sparse(pattern="1:4"),
    "keep": lambda: symopt.GroupSparse("out", keep=0.25),
    "flops": lambda: symopt.GroupSparse("out", keep=0.25, scope="flops"),
    "less than fits": lambda: symopt.GroupSparse("out", keep=0.01, scope="flops"),
    "spanning": lambda: symopt.GroupSparse({"0.weight": (0, None), "2.weight": (1, None)}, keep=3),
    "map": lambda: symopt.GroupSparse(lambda w: torch.arange(w.numel()).reshape(w.shape) // 2, keep=3),
    "rank": lambda: symopt.LowRank(rank=2),
    "max_rank": lambda: symopt.LowRank(max_rank=2),
    "strength": lambda: symopt.Sparse(strength=0.1),
    "list": lambda: [symopt.Sparse(strength=0.1), symopt.GroupSparse("out", strength=0.1)],
    "bridge": lambda: symopt.GroupBridge("out"),
    "depth": lambda: symopt.Sparse(depth=3),
    "plane": lambda: symopt.ZeroMean(),
}
WEIGHTS = {
    "dense": lambda p: p.normal_(),
    "zero": lambda p: p.zero_(),
    "one left": lambda p: p.zero_().view(-1)[0].fill_(1),
    "nan": lambda p: p.view(-1)[0].fill_(float("nan")),
    "infinite": lambda p: p.view(-1)[0].fill_(float("inf")),
    "tiny": lambda p: p.mul_(1e-30),
}


@cases(constraint=CONSTRAINTS, weights=WEIGHTS, stepped=[False, True])
def test_any_weights_give_numbers(constraint, weights, stepped):
    net, opt = made(CONSTRAINTS[constraint]())
    if stepped and constraint in ("strength", "list", "bridge", "depth", "plane", "max_rank"):
        net(torch.randn(5, 8)).square().sum().backward()
        opt.step()
    with torch.no_grad():
        for name in NAMES:
            WEIGHTS[weights](net.get_parameter(name))
    found = symopt.report(net, opt)
    assert [row.name for row in found.rows] == list(NAMES)
    for row in found.rows:
        assert 0 <= row.live <= row.units and row.zeros >= 0
        budgeted = constraint in ("density", "global", "pattern", "keep", "flops", "spanning", "map", "rank")
        assert (row.share is not None) == (row.target is not None) == budgeted
        assert row.share is None or 0 <= row.share <= 1
    json.dumps(found.to_dict())
    assert all(name in text for name in NAMES for text in (str(found), found._repr_html_()))


def test_what_is_gone_or_has_no_values_is_noted():
    net, _ = made(symopt.GroupSparse("out"))
    prune.l1_unstructured(net[0], "weight", 0.5)
    with pytest.raises(ValueError, match=r"0\.weight is computed from other parameters now"):
        symopt.report(net)
    net, _ = made(symopt.GroupSparse("out"))
    found = symopt.report(net.to("meta"))
    assert found.rows == () and [note.split(":")[0] for note in found.notes] == list(NAMES)
    str(found)


def test_a_model_that_cannot_be_folded_has_a_report():
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    symopt.constrain(net, {"0.weight": symopt.GroupSparse("out", keep=2)})
    found = symopt.report(net, example_inputs=torch.randn(3, 8, device="meta"))
    assert found.flops == 2 * (32 + 8) and found.flops_folded is None
    assert any(note.startswith("not folded: ") and "0.weight" in note for note in found.notes)


def test_an_unmet_budget_is_no_warning_of_a_report():
    net, _ = made(symopt.GroupSparse("out", keep=0.25))
    found = symopt.report(net, example_inputs=torch.randn(3, 8))
    assert found.parameters_folded < found.parameters  # warnings are errors here


# -- budgets and progress --------------------------------------------------------------------------------------------


@cases(kind=["density", "keep", "rank", "pattern"])
def test_a_budget_reads_as_the_share_that_lives_and_the_share_that_may(kind):
    net, _ = made(CONSTRAINTS[kind]())
    with torch.no_grad():
        net[0].weight[:, 2:] = 0
        net[0].weight[6:] = 0
    row, other = symopt.report(net).rows
    want = {"density": (12 / 96, 10 / 96), "keep": (0.5, 0.25), "rank": (2 / 8, 2 / 8), "pattern": (12 / 96, 0.25)}[
        kind
    ]
    assert (row.share, row.target) == pytest.approx(want) and other.share == 1
    assert f"{100 * want[0]:.3g} % of {100 * want[1]:.3g} %" in str(symopt.report(net)).splitlines()[1]


@cases(scope=["global", "flops"])
def test_tensors_that_share_a_budget_read_alike(scope):
    net, _ = made(symopt.GroupSparse("out", keep=0.25, scope=scope))
    with torch.no_grad():
        net[0].weight[3:] = 0
    one, two = symopt.report(net).rows
    total, live = (24, 15) if scope == "global" else (12 * 20, 3 * 8 + 12 * 12)
    assert one.share == two.share == pytest.approx(live / total) and one.target == two.target == pytest.approx(0.25)
    assert (one.live, two.live) == (3, 12)


def test_progress_is_read_from_the_optimizer():
    net, opt = made(symopt.Sparse(strength=0.1))
    assert "step" not in str(symopt.report(net, opt)).replace("steps left", "")
    for group in opt.param_groups:
        group["total_steps"] = 1000
    assert "step 0 of 1000" in str(symopt.report(net, opt))
    for name in NAMES:
        opt.state[net.get_parameter(name)]["progress"] = torch.tensor(300.0)
    found = symopt.report(net, opt)
    assert [(row.step, row.total_steps) for row in found.rows] == [(300, 1000)] * 2
    assert str(found).splitlines()[-2].startswith("290 parameters") and "step 300 of 1000" in str(found)
    opt.state[net[0].weight]["progress"] = torch.tensor(40)
    assert "step 40/300 of 1000" in str(symopt.report(net, opt))
    for group in opt.param_groups:
        group["total_steps"] = None
    assert "step 40/300\n" in str(symopt.report(net, opt))
    assert symopt.report(net).rows[0].step is None


# -- how it reads ----------------------------------------------------------------------------------------------------

PLANES = {
    "tie": (lambda: symopt.Tied(), ("0.weight", "2.weight"), "on plane", "off plane"),
    "tie of every index": (lambda: symopt.Tied(mode="elementwise"), NAMES, "on plane", "16/16 off plane"),
    "symmetric": (lambda: symopt.Symmetric(), ("0.weight",), "on plane", "off plane"),
    "zero mean": (lambda: symopt.ZeroMean(), ("0.weight",), "on plane", "off plane"),
}


@cases(kind=PLANES)
def test_a_plane_reads_as_reached_or_not(kind):
    make, names, on, off = PLANES[kind]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    symopt.constrain(net, {names: make()} if len(names) > 1 else {names[0]: make()})
    first = str(symopt.report(net)).splitlines()[1]
    assert off in first and "0/" not in first
    with torch.no_grad():
        for name in names:
            net.get_parameter(name).zero_()
    first = str(symopt.report(net)).splitlines()[1]
    assert on in first and "/" not in first.replace("0.00%", "")


def test_print_in_a_terminal_is_a_table_and_elsewhere_plain_text(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    net, opt = made([symopt.Sparse(strength=0.1), symopt.GroupSparse("out", strength=0.1)])
    found = symopt.report(net, opt)
    print(found)
    plain = capsys.readouterr().out
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    print(found)
    table = screen.getvalue()
    assert "\x1b" not in table + plain and "┃" in table and "┃" not in plain
    assert all(cell in shown for line in found._cells() for cell in line for shown in (plain, table))
    monkeypatch.setitem(sys.modules, "rich.console", None)  # not installed
    assert str(found) == plain.rstrip("\n")


def test_an_index_tensor_takes_one_line():
    net, _ = made(CONSTRAINTS["map"]())
    assert len(str(symopt.report(net)).splitlines()) == 1 + 2 + 2
