"""A budget that several weights share belongs to one optimizer: a part of them would keep all of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import symopt
from support.cases import cases

SHARED: dict[str, symopt.Constraint] = {
    "weights": symopt.Sparse(density=0.3, scope="global"),
    "rows": symopt.GroupSparse("out", keep=5, scope="global"),
    "share of rows": symopt.GroupSparse("out", keep=0.5, scope="global"),
    "columns": symopt.GroupSparse("in", keep=5, scope="global"),
}


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))


def shared(constraint: symopt.Constraint, *names: str) -> nn.Sequential:
    return symopt.constrain(network(), {names or ("0.weight", "2.weight"): constraint})


def take_step(net: nn.Module, *optimizers: symopt.SGD) -> None:
    for opt in optimizers:
        opt.reschedule(2_000)
    net(torch.randn(5, net[0].in_features, generator=torch.Generator().manual_seed(0))).square().mean().backward()
    for opt in optimizers:
        opt.step()


@cases(constraint=SHARED.values(), optimizer=[symopt.SGD, symopt.AdamW])
def test_a_second_optimizer_for_the_rest_is_refused(
    constraint: symopt.Constraint, optimizer: type[symopt.SGD] | type[symopt.AdamW]
) -> None:
    net = shared(constraint)
    first = optimizer(net[0].parameters(), lr=0.5)
    message = (
        r"^\w+: 2\.weight and 0\.weight share one budget, .*0\.weight is in another optimizer \(\w+\).*one optimizer"
    )
    with pytest.raises(ValueError, match=message):
        symopt.AdamW([{"params": net[4].parameters()}, {"params": net[2].parameters()}], lr=0.5)
    second = optimizer(net[4].parameters(), lr=0.5)  # no part of the budget
    assert first is not second


@cases(constraint=SHARED.values())
def test_a_part_alone_is_refused_in_the_first_step(constraint: symopt.Constraint) -> None:
    net = shared(constraint)
    net[2].requires_grad_(False)
    opt = symopt.SGD([p for p in net.parameters() if p.requires_grad], lr=0.5)
    net.eval()
    before = copy.deepcopy(net.state_dict())
    for _ in range(2):
        with pytest.raises(ValueError, match=r"2\.weight share one budget.*2\.weight is in no optimizer"):
            take_step(net, opt)
    assert all(torch.equal(p, before[name]) for name, p in net.state_dict().items())
    opt.add_param_group({"params": list(net[2].parameters())})
    take_step(net, opt)


def one_group(net: nn.Module) -> symopt.SGD:
    return symopt.SGD(net, lr=0.5)


def several_groups(net: nn.Module) -> symopt.SGD:
    return symopt.SGD(
        [{"params": layer.parameters(), "lr": 0.5} for layer in net.children() if list(layer.parameters())]
    )


def groups_by_constraint(net: nn.Module) -> symopt.SGD:
    return symopt.SGD(symopt.param_groups(net), lr=0.5)


def added_later(net: nn.Module) -> symopt.SGD:
    first, *others = [list(layer.parameters()) for layer in net.children() if list(layer.parameters())]
    opt = symopt.SGD(first, lr=0.5)
    for params in others:
        opt.add_param_group({"params": params})
    return opt


@cases(
    constraint=SHARED.values(),
    build=[one_group, several_groups, groups_by_constraint, added_later],
)
def test_all_in_one_optimizer_is_right(constraint: symopt.Constraint, build: Callable[[nn.Module], symopt.SGD]) -> None:
    net = shared(constraint)
    take_step(net, build(net))


def separate(constraint: symopt.Constraint) -> Iterator[nn.Module]:
    yield shared(constraint)
    yield shared(constraint)
    yield copy.deepcopy(shared(constraint))


@cases(constraint=SHARED.values())
def test_other_networks_with_equal_constraints_are_others(constraint: symopt.Constraint) -> None:
    nets = list(separate(constraint))
    opts = [symopt.SGD(net, lr=0.5) for net in nets]
    for net, opt in zip(nets, opts, strict=True):
        take_step(net, opt)
        symopt.report(net, opt)


@cases(constraint=SHARED.values())
def test_budgets_of_calls_of_their_own_on_parts_are_not_mixed_up(constraint: symopt.Constraint) -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    for k in (0, 2):
        symopt.constrain(net[k], {"weight": constraint})
    opts = [symopt.SGD(net[k].parameters(), lr=0.5) for k in (0, 2)]
    take_step(net, *opts)
    with pytest.raises(ValueError, match="share one budget"):
        symopt.report(net)  # as one network they share it


def test_two_calls_on_one_network_share_and_different_budgets_do_not() -> None:
    net = network()
    for name in ("0.weight", "2.weight"):
        symopt.constrain(net, {name: SHARED["rows"]})
    symopt.constrain(net, {"4.weight": symopt.GroupSparse("out", keep=2, scope="global")})
    opts = [symopt.SGD(net[4].parameters(), lr=0.5), symopt.SGD(net[0].parameters(), lr=0.5)]
    with pytest.raises(ValueError, match=r"2\.weight and 0\.weight share one budget"):
        symopt.SGD(net[2].parameters(), lr=0.5)
    assert len(opts) == 2


@cases(constraint=[symopt.Sparse(density=0.3), symopt.GroupSparse("out", keep=2), symopt.Sparse(strength=0.1)])
def test_a_budget_per_tensor_may_be_anywhere(constraint: symopt.Constraint) -> None:
    net = shared(constraint)
    opts = [symopt.SGD(net[k].parameters(), lr=0.5) for k in (0, 2)]
    take_step(net, *opts)


def test_released_parts_are_no_part() -> None:
    net = shared(SHARED["rows"])
    first = symopt.SGD(net[0].parameters(), lr=0.5)
    symopt.release(net[2])
    second = symopt.SGD(net[2].parameters(), lr=0.5)
    take_step(net, first, second)
