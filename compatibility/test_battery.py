"""What pytorch-optimizer asks of its own optimizers, asked of symopt's, and its wrappers around them."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_optimizer
import torch
from torch import nn

import symopt

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.table import OPTIMIZERS, OptimizerRow, ids

optimizers = pytest.mark.parametrize("row", [row for row in OPTIMIZERS if "maximize" not in row.options], ids=ids)
KINDS = {
    "free": lambda: {},
    "sparse": lambda: {"0.weight": symopt.Sparse(), "2.weight": symopt.Sparse()},
    "groups": lambda: {("0.weight", "2.weight"): symopt.GroupSparse("in")},
    "rank": lambda: {"0.weight": symopt.LowRank()},
    "plane": lambda: {"0.weight": symopt.ZeroMean()},
}
kinds = pytest.mark.parametrize("kind", KINDS)
X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > X[:, 1]).long()


def network(kind: str = "free", dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2)).to(dtype)
    return symopt.constrain(net, KINDS[kind]()) if KINDS[kind]() else net


def options(row: OptimizerRow) -> dict[str, Any]:
    return {"lr": 0.2 if row.cls is symopt.SGD else 0.02, **row.options}


def loss_of(net: nn.Module) -> torch.Tensor:
    return nn.functional.cross_entropy(net(X.to(net[0].weight.dtype)).float(), Y)


def train(net: nn.Module, opt: Any, steps: int = 60) -> tuple[float, float]:
    """The loss before and after; the closure is the way in that every wrapper has."""

    def closure() -> torch.Tensor:
        opt.zero_grad()
        loss = loss_of(net)
        loss.backward()
        return loss

    for _ in range(steps):
        closure()
        opt.step(closure)
    return loss_of(network(dtype=net[0].weight.dtype)).item(), loss_of(net).item()


def equal(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@kinds
@optimizers
def test_a_small_classifier_is_learnt(row: OptimizerRow, kind: str, dtype: torch.dtype) -> None:
    net = network(kind, dtype)
    before, after = train(net, row.cls(net, **options(row)))
    assert before > 1.5 * after


def pc_grad(opt: Any) -> Any:
    """Its gradient is that of several objectives, so its step takes no closure."""
    wrapped = pytorch_optimizer.PCGrad(opt)
    inner = wrapped.step
    wrapped.step = lambda closure: inner()
    return wrapped


WRAPPERS: dict[str, Callable[[type, nn.Module, dict[str, Any]], Any]] = {
    "lookahead": lambda cls, net, how: pytorch_optimizer.Lookahead(cls(net.parameters(), **how), k=3),
    "orthograd": lambda cls, net, how: pytorch_optimizer.OrthoGrad(cls(net.parameters(), **how)),
    "trac": lambda cls, net, how: pytorch_optimizer.TRAC(cls(net.parameters(), **how)),
    "pcgrad": lambda cls, net, how: pc_grad(cls(net.parameters(), **how)),
    "sam": lambda cls, net, how: pytorch_optimizer.SAM(net.parameters(), cls, **how),
    "adaptive sam": lambda cls, net, how: pytorch_optimizer.SAM(net.parameters(), cls, adaptive=True, **how),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@optimizers
def test_wrapped_without_constraints_it_is_torchs_to_the_bit(row: OptimizerRow, wrapper: str) -> None:
    nets = [network(), network()]
    for net, cls in zip(nets, (row.cls, row.torch_cls), strict=True):
        train(net, WRAPPERS[wrapper](cls, net, options(row)), 10)
    assert equal(*nets)
    assert not equal(nets[0], network())


@pytest.mark.parametrize("wrapper", [name for name in WRAPPERS if name != "trac"])  # which finds its own scale, slowly
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "free"])
def test_wrapped_with_constraints_it_learns(kind: str, wrapper: str) -> None:
    net = network(kind)
    before, after = train(net, WRAPPERS[wrapper](symopt.AdamW, net, {"lr": 0.02}))
    assert before > 1.5 * after


@pytest.mark.parametrize("wrapper", ["lookahead", "orthograd", "trac"])
@kinds
def test_wrapped_it_is_saved_and_goes_on(kind: str, wrapper: str) -> None:
    nets = [network(kind), network(kind)]
    opts = [WRAPPERS[wrapper](symopt.AdamW, net, {"lr": 0.02}) for net in nets]
    train(nets[0], opts[0], 6)
    nets[1].load_state_dict(nets[0].state_dict())
    opts[1].load_state_dict(copy.deepcopy(opts[0].state_dict()))
    if wrapper == "trac":  # keeps its scale out of its state_dict
        assert equal(*nets)
        return
    for net, opt in zip(nets, opts, strict=True):
        train(net, opt, 6)
    assert equal(*nets)


@kinds
@optimizers
def test_parameters_that_take_no_gradient_are_left_alone(row: OptimizerRow, kind: str) -> None:
    net = network(kind)
    net[0].requires_grad_(False)
    before = copy.deepcopy(net)
    groups = [{"params": net[0].parameters()}, {"params": [net[2].weight]}, {"params": [net[2].bias]}]
    opt = row.cls(groups, **options(row))
    loss_of(net).backward()
    opt.step()
    opt.zero_grad(set_to_none=False)
    assert equal(net[0], before[0]) and not equal(net[2], before[2])


@kinds
@optimizers
def test_without_state_it_is_a_new_optimizer(row: OptimizerRow, kind: str) -> None:
    net = network(kind)
    opt = row.cls(net, **options(row))
    train(net, opt, 5)
    other = copy.deepcopy(net)
    opt.state.clear()
    train(net, opt, 5)
    train(other, row.cls(other, **options(row)), 5)
    assert equal(net, other)


@pytest.mark.parametrize("how", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
@kinds
@optimizers
def test_the_way_it_is_computed_makes_no_difference_to_what_is_constrained(
    row: OptimizerRow, kind: str, how: dict[str, bool]
) -> None:
    nets = [network(kind), network(kind)]
    bound = set(symopt.constraints(nets[0]))
    opts = [row.cls(net, **options(row), **extra) for net, extra in zip(nets, ({}, how), strict=True)]
    for _ in range(4):
        for p, q in zip(*(net.parameters() for net in nets), strict=True):
            p.grad = torch.sin(torch.arange(p.numel(), dtype=p.dtype)).reshape(p.shape)
            q.grad = p.grad.clone()
        for opt in opts:
            opt.step()
    for (name, p), q in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(p, q) if name in bound else torch.allclose(p, q), name


@pytest.mark.parametrize(
    "wrong", [{"lr": -1e-2}, {"weight_decay": -1e-3}, {"eps": -1e-6}, {"betas": (-0.1, 0.1)}], ids=str
)
@optimizers
def test_settings_out_of_range_are_refused_in_torchs_words(row: OptimizerRow, wrong: dict[str, Any]) -> None:
    if row.cls is symopt.SGD and not wrong.keys() & {"lr", "weight_decay"}:
        wrong = {"momentum": -1e-3}
    said = []
    for cls in (row.cls, row.torch_cls):
        with pytest.raises(ValueError) as error:
            cls(network().parameters(), **wrong)
        said.append(str(error.value))
    assert said[0] == said[1]


@optimizers
def test_sparse_gradients_and_complex_weights_are_refused_by_name(row: OptimizerRow) -> None:
    net = network("sparse")
    opt = row.cls(net, **options(row))
    net[0].weight.grad = torch.eye(16, 6).to_sparse()
    with pytest.raises(RuntimeError, match=r"0\.weight: sparse gradients"):
        opt.step()
    module = nn.Module()
    module.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
    with pytest.raises((TypeError, ValueError), match="weight"):
        symopt.constrain(module, {"weight": symopt.Sparse()})
