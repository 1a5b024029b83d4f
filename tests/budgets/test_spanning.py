"""A budget of units that span several parameters: one decision per unit for all of its slices, met to the unit."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import symopt
from support import table
from support.cases import cases, pairs
from support.table import EVERY_OPTIMIZER, UNITS, OptimizerRow, taken
from support.tolerances import tolerance

TAKEN = [row for row in EVERY_OPTIMIZER if taken(UNITS[0], row) and "maximize" not in row.options]
SOME = [row for row in TAKEN if row.id in ("sgd-momentum", "adam", "adamw")]
BACKENDS = ["reference", "native"]
CHANNELS = 8
BOUND = ("0.weight", "0.bias", "1.weight", "1.bias", "3.weight")
FACTOR = {"1.weight": 0.5, "1.bias": 0.5}

pytestmark = pytest.mark.filterwarnings("ignore:.* steps at lr .* are too few to ramp (its|their) budget in")

Run = tuple[nn.Module, Any]


def available(opt_row: OptimizerRow, backend: str, **_: Any) -> bool:
    return table.available(UNITS[0], opt_row, backend)


def run(keep: float, opt_row: OptimizerRow, backend: str, steps: int, **options: Any) -> Run:
    """A convolution and its norm write channels; of the next one that reads them, two inputs are in no unit."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, CHANNELS, 3), nn.BatchNorm2d(CHANNELS), nn.ReLU(), nn.Conv2d(CHANNELS, 3, 2), nn.Flatten()
    ).double()
    groups = {"0.*": (0, None), "1.*": (0, None), "3.weight": (1, [*range(CHANNELS - 2), -1, -1])}
    symopt.constrain(net, {"*": symopt.GroupSparse(groups, keep=keep, factors={"1.*": 0.5})})
    opt = opt_row.cls(net, backend=backend, **{"lr": opt_row.lr, **opt_row.options, **options})
    opt.reschedule(steps)
    return net, opt


def data() -> tuple[Tensor, Tensor]:
    x = torch.randn(16, 2, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x, (x[:, 0, :2, :2] * x[:, 1, 2:4, 2:4]).flatten(1).repeat(1, 3)


def train(pieces: Run, first: int, last: int) -> None:
    (net, opt), (x, y) = pieces, data()
    for _ in range(first, last):
        opt.zero_grad()
        (net(x) - y).square().mean().backward()
        opt.step()


def slices(net: nn.Module) -> dict[str, Tensor]:
    """Per parameter the slice of every channel, flat."""
    found = {name: net.get_parameter(name).detach().reshape(CHANNELS, -1) for name in BOUND[:4]}
    return found | {"3.weight": net.get_parameter("3.weight").detach().movedim(1, 0).flatten(1)}


def live(net: nn.Module) -> Tensor:
    """Whether each channel lives; whole slices are zero or none of their weights, and alike in all parameters."""
    zero = {name: slices_ == 0 for name, slices_ in slices(net).items()}
    dead = zero["0.bias"][:, 0]
    for name, value in zero.items():
        bound = slice(CHANNELS - 2 if name == "3.weight" else CHANNELS)
        assert torch.equal(value[bound], dead[bound, None].expand_as(value[bound])), name
    assert not zero["3.weight"][-2:].any()  # what is in no unit is not pruned
    return ~dead


@pairs(available, opt_row=TAKEN, backend=BACKENDS, keep=[1, 3, 0.5, 8], steps=[1, 7, 150])
def test_it_is_met_to_the_unit(opt_row: OptimizerRow, backend: str, keep: float, steps: int) -> None:
    net, opt = run(keep, opt_row, backend, steps)
    train((net, opt), 0, steps)
    assert int(live(net).sum()) == (keep if isinstance(keep, int) else round(keep * CHANNELS))
    zero = [p == 0 for p in net.parameters()]
    train((net, opt), steps, steps + 20)  # and stays so
    assert all(torch.equal(z, p == 0) for z, p in zip(zero, net.parameters(), strict=True))
    assert symopt.fold(net, data()[:1]).fold_config["cut"] == {", ".join(BOUND): 0}


@cases(available, opt_row=SOME, backend=BACKENDS)
def test_the_largest_units_live_by_all_of_their_slices(opt_row: OptimizerRow, backend: str) -> None:
    """``(sum_t ||w_t||**2 / a_t**2)**(1/2)``: the scale of the norm decides here, over its factor."""
    net, opt = run(3, opt_row, backend, 40, lr=1e-12)
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([0.1, 5.0, 0.2, 0.3, 4.0, 0.4, 6.0, 0.5]))
    square = sum((s / FACTOR.get(name, 1.0)).square().sum(1) for name, s in slices(net).items() if name != "3.weight")
    square[:-2] += slices(net)["3.weight"][:-2].square().sum(1)
    expected = square.argsort(descending=True)[:3].sort().values
    train((net, opt), 0, 40)
    assert live(net).nonzero().flatten().tolist() == expected.tolist() == [1, 4, 6]


@cases(opt_row=SOME)
def test_both_backends_choose_alike(opt_row: OptimizerRow) -> None:
    nets = []
    for backend in BACKENDS:
        net, opt = run(3, opt_row, backend, 100)
        train((net, opt), 0, 100)
        nets.append(net)
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance("backends, fp32"), atol=tolerance("backends, fp32"))
        assert torch.equal(p == 0, q == 0)


@cases(available, opt_row=SOME, backend=BACKENDS, stop=[10, 70])
def test_a_run_that_is_resumed_changes_no_bit(opt_row: OptimizerRow, backend: str, stop: int) -> None:
    """Before the commit and after it."""
    one, other = (run(3, opt_row, backend, 100) for _ in range(2))
    train(one, 0, stop)
    file = io.BytesIO()
    torch.save([x.state_dict() for x in one], file)
    file.seek(0)
    for piece, state in zip(other, torch.load(file, weights_only=True), strict=True):
        piece.load_state_dict(state)
    for each in (one, other):
        train(each, stop, 100)
    assert all(torch.equal(p, q) for p, q in zip(one[0].parameters(), other[0].parameters(), strict=True))
    assert int(live(one[0]).sum()) == 3


def test_more_units_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match="keep=9 of 8 units; give at most 8"):
        run(9, SOME[0], "reference", 10)
