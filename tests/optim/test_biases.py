"""Biases of dead rows: they go with them, so that a BatchNorm behind them evaluates what it has trained."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import symopt
from support.cases import cases, some

STEPS = 400

pytestmark = pytest.mark.filterwarnings("ignore:.* are too few to", "ignore:.* weights have become zero")

Make = Callable[[], symopt.Constraint]
MAKES: dict[str, Make] = {
    "keep": lambda: symopt.GroupSparse("out", keep=0.5),
    "heads": lambda: symopt.GroupSparse("head:4", keep=0.5),
    "strength": lambda: symopt.GroupSparse("out", strength=0.3),
}
OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda net: symopt.AdamW(net, lr=1e-2, total_steps=STEPS),
    "adamw-native": lambda net: symopt.AdamW(net, lr=1e-2, total_steps=STEPS, backend="native"),
    "sgd": lambda net: symopt.SGD(net, lr=0.1, momentum=0.9, total_steps=STEPS),
    "lion": lambda net: symopt.Lion(net, lr=1e-3, total_steps=STEPS),
}


def task(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images of three kinds of stripes, and which kind."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (512,), generator=generator)
    at = torch.arange(8)
    waves = torch.stack([(at[:, None] * a + at * b).float().sin() for a, b in ((1, 0), (0, 1), (1, 1))])
    return waves[y][:, None] + 0.7 * torch.randn(512, 1, 8, 8, generator=generator), y


def network(make: Make, *, affine: bool, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16, affine=affine), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
    )
    net.append(nn.Linear(64, 3))
    return symopt.constrain(net, {"0.weight": make()})


def train(net: nn.Module, opt: Any, first: int, last: int) -> None:
    x, y = task()
    for t in range(first, last):
        rows = torch.randint(512, (64,), generator=torch.Generator().manual_seed(t))
        opt.zero_grad()
        nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
        opt.step()


def accuracies(net: nn.Module) -> tuple[float, float]:
    """In eval mode, and by the statistics of the batch; in percent, on new data."""
    x, y = task(1)
    found = []
    for mode in (False, True):
        each = copy.deepcopy(net).train(mode)
        with torch.no_grad():
            found.append(100 * float((each(x).argmax(1) == y).float().mean()))
    return found[0], found[1]


@some(make=["keep", "heads"], optimizer=OPTIMIZERS, affine=[True, False])
def test_from_the_commit_on_evaluation_is_what_was_trained(make: str, optimizer: str, affine: bool) -> None:
    net = network(MAKES[make], affine=affine)
    opt = OPTIMIZERS[optimizer](net)
    for first, last in ((0, 260), (260, 320), (320, STEPS)):  # the commit is at 240
        train(net, opt, first, last)
        evaluated, trained = accuracies(net)
        assert abs(evaluated - trained) <= 1 and trained > 90
        dead = ~net[0].weight.flatten(1).any(1)
        assert int(dead.sum()) == 8 and not net[0].bias[dead].any()
        for value in opt.state[net[0].bias].values():
            if value.shape == dead.shape:
                assert not value[dead].any()


@cases(make=["strength"], affine=[True, False])
def test_a_bias_on_which_nothing_depends_does_not_wander(make: str, affine: bool) -> None:
    """In front of a BatchNorm its gradient is rounding, which Adam makes steps of lr of."""
    net = network(MAKES[make], affine=affine)
    opt = OPTIMIZERS["adamw"](net)
    train(net, opt, 0, STEPS)
    evaluated, trained = accuracies(net)
    assert abs(evaluated - trained) <= 1 and trained > 90
    assert float(net[0].bias.detach().abs().max()) < 1e-2


def rows_die(**options: Any) -> tuple[nn.Linear, Any]:
    """Two of four rows see no gradient and are far too small; the commit has passed."""
    torch.manual_seed(0)
    net = symopt.constrain(nn.Linear(6, 4), {"weight": symopt.GroupSparse("out", keep=2)})
    with torch.no_grad():
        net.weight[:2] *= 1e-3
    opt = symopt.AdamW(net, lr=1e-2, total_steps=40, **options)
    for _ in range(40):
        step(net, opt)
    return net, opt


def step(net: nn.Linear, opt: Any) -> None:
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
    opt.zero_grad()
    (net(x)[:, 2:] - x[:, :2]).square().mean().backward()
    if net.bias.grad is not None:
        net.bias.grad[:2] = 1.0
    opt.step()


def test_it_stays_zero_whatever_its_gradient_and_comes_back_with_its_row() -> None:
    net, opt = rows_die()
    assert not net.weight[:2].any() and not net.bias[:2].any() and bool(net.bias[2:].all())
    for _ in range(50):
        step(net, opt)
        assert not net.bias[:2].any()
    opt = symopt.AdamW(symopt.constrain(symopt.release(net), {"weight": symopt.Sparse(strength=0.0)}), lr=1e-2)
    with torch.no_grad():
        net.weight[:2] = 0.5
    for _ in range(3):
        step(net, opt)
    assert bool(net.bias[:2].all())


def test_others_are_left_alone() -> None:
    """A bias that is frozen, of another optimizer, constrained itself, or of a weight of which nothing dies."""
    frozen = symopt.constrain(nn.Linear(6, 4), {"weight": symopt.GroupSparse("out", keep=2)})
    frozen.bias.requires_grad_(False)
    before = frozen.bias.detach().clone()
    opt = symopt.AdamW([frozen.weight], lr=1e-2, total_steps=40)
    for _ in range(60):
        step(frozen, opt)
    assert torch.equal(frozen.bias, before)

    torch.manual_seed(0)
    plain, bound = nn.Linear(6, 4), nn.Linear(6, 4)
    bound.load_state_dict(plain.state_dict())
    symopt.constrain(bound, {"weight": symopt.Sparse(strength=0.0)})
    pairs = [(plain, torch.optim.AdamW(plain.parameters(), lr=1e-2)), (bound, symopt.AdamW(bound, lr=1e-2))]
    gradients = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    for g in gradients:
        for net, each in pairs:
            net.weight.grad, net.bias.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)), g.clone()
            each.step()
    assert torch.equal(plain.bias, bound.bias)

    both = symopt.constrain(
        nn.Linear(6, 4), {"*": symopt.GroupSparse({"weight": (0, None), "bias": (0, None)}, keep=2)}
    )
    opt = symopt.AdamW(both, lr=1e-2, total_steps=40)
    for _ in range(60):
        step(both, opt)
    assert int(both.bias.count_nonzero()) == 2 == int(both.weight.any(1).sum())
