"""Counts of units: no more can live than there are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import symopt
from support.cases import cases
from support.table import ANY_SHAPE, OptimizerRow

NAMES = ("0.weight", "1.weight", "2.weight")


def three() -> nn.Sequential:
    """36 rows in all."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 18), nn.Linear(18, 12), nn.Linear(12, 6))


def stepped(row: OptimizerRow, keep: int) -> nn.Sequential:
    net = symopt.constrain(three(), {NAMES: symopt.GroupSparse("out", keep=keep, scope="global")})
    opt = row.cls(net, lr=0.5, total_steps=1000, **row.options)
    net(torch.ones(5, 6)).square().mean().backward()
    opt.step()
    return net


@cases(row=ANY_SHAPE, keep=[37, 100])
def test_a_shared_count_of_more_units_than_there_are_is_refused_by_name(row: OptimizerRow, keep: int) -> None:
    with pytest.raises(ValueError, match=r"36 in all; give at most 36") as caught:
        stepped(row, keep)
    assert all(part in str(caught.value) for part in (*NAMES, f"keep={keep}", "scope='global'", f"{keep} units"))


@cases(row=ANY_SHAPE)
def test_one_of_all_units_is_not_refused(row: OptimizerRow) -> None:
    net = stepped(row, 36)
    assert all(bool((net.get_parameter(name) != 0).any(1).all()) for name in NAMES)


def test_a_part_of_a_module_with_a_shared_count_can_be_folded() -> None:
    net = symopt.constrain(three(), {NAMES[:2]: symopt.GroupSparse("out", keep=20, scope="global")})
    assert symopt.fold(net[1:2])[0].weight.shape == (12, 18)
    with pytest.warns(UserWarning, match="2 budgets were not met"):
        assert int((symopt.fold(net[:2])[0].weight != 0).any(1).sum()) <= 20


@cases(constraint=[symopt.GroupSparse("out", keep=100), symopt.LowRank(rank=100)])
def test_a_count_of_one_tensor_is_refused_where_it_is_bound(constraint: symopt.Constraint) -> None:
    with pytest.raises(ValueError, match=r"on 0\.weight.*100.*at most|100.*on 0\.weight.*at most"):
        symopt.constrain(three(), {"0.weight": constraint})
