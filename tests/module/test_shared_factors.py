"""Units that span several parameters, in explicit mode: one gate per unit for all, one direction per parameter.

What is expected is written out by autograd.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import symopt
from support.tolerances import tolerance

torch.set_num_threads(1)


def close(one: Tensor, two: Tensor, kind: str = "identity") -> None:
    torch.testing.assert_close(one, two, rtol=tolerance(kind), atol=tolerance(kind))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 4)
        self.norm = nn.LayerNorm(4)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x))))


INDEX = torch.tensor([0, 1, -1, 2])
BOUND = ["first.weight", "first.bias", "norm.weight"]


def made(mode: str, **options: object) -> Net:
    torch.manual_seed(0)
    groups = {"first.*": (0, INDEX), "norm.weight": (0, INDEX)}
    constraint = symopt.GroupSparse(groups, strength=0.1, factors={"first.*": 2.0, "norm.weight": 0.5})
    return symopt.constrain(Net().double(), {"*": constraint}, mode=mode, **options)


def trained(net: nn.Module, opt: torch.optim.Optimizer, steps: int) -> None:
    x, y = torch.randn(16, 5, dtype=torch.float64), torch.randn(16, 3, dtype=torch.float64)
    for _ in range(steps):
        opt.zero_grad()
        (net(x) - y).square().mean().backward()
        opt.step()


@pytest.mark.parametrize("mode", ["optimizer", "explicit"])
def test_a_wildcard_binds_what_the_mapping_lists_vectors_included(mode: str) -> None:
    assert list(symopt.constraints(made(mode))) == BOUND


def test_a_mapping_that_lists_nothing_of_the_key_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"pattern 'last\.\*' matches last.weight, last.bias, but .* none of them"):
        symopt.constrain(Net(), {"last.*": symopt.GroupSparse({"first.*": (0, INDEX)})})


@pytest.mark.parametrize("init", ["imbalanced", "balanced", "gates", 0.5, 0.0])
def test_the_factors_compose_to_the_weights(init: str | float) -> None:
    torch.manual_seed(0)
    start, net = Net().double().state_dict(), made("explicit", init=init)
    for name, value in symopt.plain_state_dict(net).items():
        close(value, start[name])
    rest, gate, direction = net.first.parametrizations.weight[0].shared.factors()
    assert gate.shape == (3,) and rest.shape == direction.shape == (20 + 4 + 4,)
    assert [len(list(h.parameters())) for h in net.first.parametrizations.values()] == [3, 2]


def test_it_is_descent_on_one_gate_per_unit_and_one_direction_per_parameter() -> None:
    net, oracle = made("explicit"), Net().double()
    names, units = [n for n, _ in oracle.named_parameters()], INDEX.clamp(min=0)
    first, bias = net.first.parametrizations.values()
    (norm,) = net.norm.parametrizations.values()
    gate = first.original1.detach().clone().requires_grad_()
    pairs = [(first.original0, first.original2), (bias.original0, bias.original1), (norm.original0, norm.original1)]
    rests, directions = ([x.detach().clone().requires_grad_() for x in column] for column in zip(*pairs, strict=True))
    plain = {n: p.detach().clone().requires_grad_() for n, p in net.named_parameters() if n in names}
    mine = torch.optim.SGD(
        [{"params": [gate, *directions], "weight_decay": 0.1}, {"params": [*rests, *plain.values()]}], lr=0.05
    )

    def forward(x: Tensor) -> Tensor:
        inside, s = INDEX >= 0, gate[units]
        w = dict(plain)
        for name, a, rest, d in zip(BOUND, (2.0, 2.0, 0.5), rests, directions, strict=True):
            slices = [-1] + [1] * (d.dim() - 1)
            w[name] = torch.where(inside.view(slices), a * s.view(slices) * d, rest)
        return torch.func.functional_call(oracle, w, (x,))

    class Written(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return forward(x)

    torch.manual_seed(1)
    trained(net, torch.optim.SGD(symopt.param_groups(net), lr=0.05), 20)
    torch.manual_seed(1)
    trained(Written(), mine, 20)
    close(first.original1.detach(), gate.detach(), "factor step")
    for (rest, direction), r, d in zip(pairs, rests, directions, strict=True):
        close(rest.detach(), r.detach(), "factor step")
        close(direction.detach(), d.detach(), "factor step")


def test_checkpoints_copies_assignment_and_release() -> None:
    net = made("explicit")
    start = {name: value.clone() for name, value in symopt.plain_state_dict(net).items()}
    copied, other = copy.deepcopy(net), made("explicit", init=0.3)
    trained(net, torch.optim.SGD(symopt.param_groups(net), lr=0.05), 5)
    state = symopt.plain_state_dict(net)
    for name, value in symopt.plain_state_dict(copied).items():
        close(value, start[name])
        assert not torch.equal(value, state[name])
    copied.load_state_dict(state)
    other.load_state_dict(net.state_dict())
    for loaded in (copied, other):
        for name, value in symopt.plain_state_dict(loaded).items():
            close(value, state[name])
    with torch.no_grad():
        copied.first.bias = torch.ones(4, dtype=torch.float64)
    now = symopt.plain_state_dict(copied)
    close(now["first.bias"], torch.ones(4, dtype=torch.float64))
    close(now["first.weight"], state["first.weight"])
    close(now["norm.weight"], state["norm.weight"])
    with pytest.raises(ValueError, match="shares an explicit constraint with weights outside"):
        symopt.release(net.first)
    symopt.release(net)
    assert sorted(dict(net.named_parameters())) == sorted(dict(Net().named_parameters()))
    for name, value in net.state_dict().items():
        close(value, state[name])


@pytest.mark.parametrize("mode", ["optimizer", "explicit"])
def test_report_and_fold_see_whole_units(mode: str) -> None:
    net = made(mode)
    report = symopt.report(net)
    assert [(row.name, row.units, row.live) for row in report.rows] == [(name, 3, 3) for name in BOUND]
    assert report.unconstrained == ("norm.bias", "last.weight", "last.bias")


def test_fold_meets_the_budget_of_units_over_several_parameters() -> None:
    net = Net().double()
    groups = {"first.*": (0, INDEX), "norm.weight": (0, INDEX)}
    symopt.constrain(net, {"*": symopt.GroupSparse(groups, keep=2)})
    with torch.no_grad():
        net.first.weight[1], net.first.bias[1], net.norm.weight[1] = 1e-3, 1e-3, 1e-3  # unit 1 is the smallest
    with pytest.warns(UserWarning, match=r"first\.weight.*: 3 units live, the budget is 2 .*: 1 \(7 weights\) cut"):
        small = symopt.fold(net)
    for name in BOUND:
        before, after = net.get_parameter(name).detach(), small.get_parameter(name).detach()
        assert not after[1].any() and torch.equal(after[[0, 2, 3]], before[[0, 2, 3]])
    assert small.fold_config["cut"] == {", ".join(BOUND): 5 + 1 + 1}


@pytest.mark.parametrize("init", ["independent", "matched"])
def test_loading_weights_keeps_them_whatever_the_init(init: str) -> None:
    state = {name: value.clone() for name, value in symopt.plain_state_dict(made("optimizer")).items()}
    net = made("explicit", init=init)
    assert not torch.allclose(net.first.weight, state["first.weight"])
    net.load_state_dict(dict(state))
    for name, value in symopt.plain_state_dict(net).items():
        close(value, state[name])
