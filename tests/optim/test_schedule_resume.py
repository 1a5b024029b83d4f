"""A training that is interrupted goes on to the bit, whatever is built or loaded first; another budget begins anew."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import symopt
from support.cases import pairs
from support.courses import FEW, FEW_KINDS, KINDS, STEPS, Kind, Run, begun, network, optimizer, same, train

pytestmark = pytest.mark.filterwarnings("ignore:.* are too few to ramp (its|their) budget in")

Make = Callable[[], symopt.Constraint]
Saved = list[dict[str, Any]]
STOPS = [0, 1, 33, 60, 75]
END = 82


def saved(run: Run) -> Saved:
    file = io.BytesIO()
    torch.save([part.state_dict() for part in run], file)
    file.seek(0)
    found: Saved = torch.load(file, weights_only=True)
    return found


def built_first(kind: Kind, name: str, state: Saved) -> Run:
    """Constrain, construct, load."""
    run = begun(kind, name, seed=1)
    run[0].load_state_dict(state[0])
    run[1].load_state_dict(state[1])
    return run


def optimizer_first(kind: Kind, name: str, state: Saved) -> Run:
    run = begun(kind, name, seed=1)
    run[1].load_state_dict(state[1])
    run[0].load_state_dict(state[0])
    return run


def weights_first(kind: Kind, name: str, state: Saved) -> Run:
    """Load weights, constrain, construct, load state."""
    net = network(seed=1)
    net.load_state_dict(state[0])
    symopt.constrain(net, {kind.names: kind.make()})
    opt = optimizer(name, net, total_steps=STEPS)
    opt.load_state_dict(state[1])
    return net, opt


def constrained_last(kind: Kind, name: str, state: Saved) -> Run:
    """The optimizer is built and loaded before anything is constrained."""
    net = network(seed=1)
    opt = optimizer(name, net, total_steps=STEPS)
    opt.load_state_dict(state[1])
    symopt.constrain(net, {kind.names: kind.make()})
    net.load_state_dict(state[0])
    return net, opt


def stepped_before(kind: Kind, name: str, state: Saved) -> Run:
    """Loaded into a run that is under way."""
    run = begun(kind, name, 27, seed=1)
    run[1].load_state_dict(state[1])
    run[0].load_state_dict(state[0])
    return run


def without_length(kind: Kind, name: str, state: Saved) -> Run:
    """The checkpoint brings the length."""
    run = begun(kind, name, seed=1, total_steps=None)
    run[0].load_state_dict(state[0])
    run[1].load_state_dict(state[1])
    return run


def rescheduled(kind: Kind, name: str, state: Saved) -> Run:
    run = begun(kind, name, seed=1, total_steps=7)
    run[0].load_state_dict(state[0])
    run[1].load_state_dict(state[1])
    run[1].reschedule(total_steps=STEPS)
    return run


ORDERS = [built_first, optimizer_first, weights_first, constrained_last, stepped_before, without_length, rescheduled]


@pairs(kind=FEW_KINDS, name=FEW, order=ORDERS, stop=STOPS)
def test_an_interrupted_training_goes_on_to_the_bit(
    kind: Kind, name: str, order: Callable[..., Run], stop: int
) -> None:
    run = begun(kind, name, stop)
    other = order(kind, name, saved(run))
    for one in (run, other):
        train(one, range(stop, END))
    same(run, other)
    assert kind.live(run[0]) == kind.left


def pickled(run: Run) -> Run:
    copied: Run = pickle.loads(pickle.dumps(run))
    return copied


@pairs(kind=FEW_KINDS, name=FEW, how=[copy.deepcopy, pickled], stop=STOPS)
def test_a_copy_of_network_and_optimizer_goes_on_to_the_bit(
    kind: Kind, name: str, how: Callable[[Run], Run], stop: int
) -> None:
    run = begun(kind, name, stop)
    other = how(run)
    for one in (other, run):
        train(one, range(stop, END))
    same(run, other)


def weights(net: nn.Module) -> int:
    return int(net.get_parameter("0.weight").count_nonzero())


def rows(net: nn.Module) -> int:
    return int(net.get_parameter("0.weight").any(1).sum())


PAIRS: dict[str, tuple[Callable[[nn.Module], int], tuple[Make, Make], tuple[int, int]]] = {
    "density": (weights, (lambda: symopt.Sparse(density=0.4), lambda: symopt.Sparse(density=0.1)), (256, 64)),
    "rows": (rows, (lambda: symopt.GroupSparse("out", keep=16), lambda: symopt.GroupSparse("out", keep=4)), (16, 4)),
    "rank": (KINDS[-1].live, (lambda: symopt.LowRank(rank=8), lambda: symopt.LowRank(rank=2)), (8, 2)),
    "pattern": (weights, (lambda: symopt.Sparse(pattern="2:4"), lambda: symopt.Sparse(pattern="1:4")), (320, 160)),
    "kind": (weights, (lambda: symopt.Sparse(pattern="2:4"), lambda: symopt.Sparse(density=0.1)), (320, 64)),
    "scope": (
        weights,
        (lambda: symopt.Sparse(density=0.4), lambda: symopt.Sparse(density=0.1, scope="global")),
        (256, 64),
    ),
}
"""Two budgets, the larger first, and what they leave."""


@pairs(pair=list(PAIRS), name=FEW, larger=[False, True])
def test_another_budget_on_a_loaded_state_starts_anew(pair: str, name: str, larger: bool) -> None:
    live, makes, left = PAIRS[pair]
    first, second = (1, 0) if larger else (0, 1)
    run = begun(Kind(pair, makes[first], left[first]), name, STEPS)
    assert live(run[0]) == left[first]
    run = built_first(Kind(pair, makes[second], left[second]), name, saved(run))
    with pytest.warns(UserWarning) as caught:
        train(run, range(70))
    told = [str(warning.message) for warning in caught]
    assert ["another budget" in text for text in told].count(True) == 1
    assert any("fewer live at the commit" in text for text in told) == (live(run[0]) < left[second])
    if larger:  # a row of a neuron that no input reaches stays zero, and so does a singular value
        assert left[first] <= live(run[0]) <= left[second]
    else:
        assert live(run[0]) == left[second]
