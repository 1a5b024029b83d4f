"""Explicit mode of units that span several parameters: one gate per unit for all, one direction per parameter.

The constraint is defined here, so that the mechanism alone is tested; what is expected is written out by autograd.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import final

import pytest
import torch
from torch import Tensor, nn

import symopt
from support.table import tolerance
from symopt.constraints.base import Constraint, Factors, Outs
from symopt_kernels.units import Part, Units

torch.set_num_threads(1)


@final
@dataclass(frozen=True, eq=False, repr=False)
class Channels(Constraint):
    """``w_t = a_t s_g d_t`` on the slices of unit g; other slices are a factor that does not decay."""

    retraction = "foreign"
    binds_many = True
    free_factors = 1

    groups: Mapping[str, tuple[int, Tensor]]
    strength: float | None = 0.1
    factors: Mapping[str, float] = field(default_factory=dict)
    bound: Units | None = None

    @property
    def spanning_units(self) -> Units | None:
        return self.bound

    def bind_all(self, names: tuple[str, ...], weights: tuple[Tensor, ...]) -> Constraint:
        found = []
        for name, w in zip(names, weights, strict=True):
            pattern = next(p for p in self.groups if fnmatchcase(name, p))
            dim, index = self.groups[pattern]
            found.append(Part(tuple(w.shape), dim, index, self.factors.get(pattern, 1.0)))
        return replace(self, bound=Units(1 + max(int(p.index.max()) for p in found), tuple(found)))

    def _coefficient(self, like: Tensor) -> tuple[Units, Tensor]:
        """a_t per weight, 0 where it is in no unit."""
        units = self.bound
        assert units is not None
        factors = torch.cat([torch.full(p.shape, p.factor, dtype=like.dtype).flatten() for p in units.parts])
        return units, units.flat(like.new_ones(units.count)) * factors

    def compose(self, factors: Factors, out: Tensor | None = None) -> Tensor:
        rest, gate, direction = factors
        units, a = self._coefficient(direction)
        return torch.where(a == 0, rest, a * units.flat(gate) * direction)

    def split(self, w: Tensor, imbalance: Tensor | float = 0.0) -> Factors:
        units, a = self._coefficient(w)
        light = torch.where(a == 0, 0.0, w / a.where(a != 0, torch.ones_like(a)))
        size = self.size(w)
        gate = ((imbalance + (imbalance**2 + 4 * size**2).sqrt()) / 2).sqrt()
        return torch.where(a == 0, w, 0.0), gate, torch.where(a == 0, 0.0, light / units.flat(gate, 1.0))

    def pullback(self, factors: Factors, grad: Tensor, out: Outs | None = None) -> Factors:
        _, gate, direction = factors
        units, a = self._coefficient(direction)
        return torch.where(a == 0, grad, 0.0), self._sum(a * grad * direction), a * units.flat(gate) * grad

    def mirror(self, factors: Factors) -> Factors:
        rest, gate, direction = factors
        return rest, -gate, -direction

    def retract(self, *args: object, **kwargs: object) -> Tensor:
        raise NotImplementedError

    def penalty(self, w: Tensor) -> Tensor:
        return self.size(w).sum()

    def size(self, w: Tensor, groups: object = None) -> Tensor:
        _, a = self._coefficient(w)
        return self._sum(torch.where(a == 0, 0.0, w / a.where(a != 0, torch.ones_like(a))) ** 2).sqrt()

    def _sum(self, x: Tensor) -> Tensor:
        units = self.bound
        assert units is not None
        pieces = x.split([torch.Size(p.shape).numel() for p in units.parts])
        return units.sum([piece.reshape(p.shape) for piece, p in zip(pieces, units.parts, strict=True)])

    def default_strength(self, *, decoupled: bool) -> float:
        return 0.1


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
    constraint = Channels(groups, factors={"first.*": 2.0, "norm.weight": 0.5})
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
    with pytest.raises(ValueError, match=r"pattern 'last\.\*' matches last.weight, last.bias, but groups lists none"):
        symopt.constrain(Net(), {"last.*": Channels({"first.*": (0, INDEX)})})


@pytest.mark.parametrize("init", ["imbalanced", "balanced", 0.5, 0.0])
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
