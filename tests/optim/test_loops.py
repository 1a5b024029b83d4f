"""How people call the step: accumulated gradients, inside backward, in threads and hooks, with NaN in the data."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import symopt
from support.cases import cases
from support.table import (
    ANY_SHAPE,
    CONSTRAINTS,
    MATRICES,
    PLANES,
    OptimizerRow,
    PlaneRow,
    available,
    constrained_parameter,
    plane_module,
)

ROWS = [row for row in CONSTRAINTS if row.id in ("sparse", "group-in", "group-index")]
CLASSES = [row for row in ANY_SHAPE if not row.options]
STEPS = 12


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
    return symopt.constrain(net, {"0.weight": symopt.GroupSparse("in"), "2.weight": symopt.Sparse()})


def batch(t: int) -> Tensor:
    return torch.sin(torch.arange(48.0).reshape(8, 6) * (t + 1))


def train(net: nn.Module, opt: Any, steps: int = STEPS) -> None:
    for t in range(steps):
        opt.zero_grad()
        net(batch(t)).square().mean().backward()
        opt.step()


def same(one: nn.Module, two: nn.Module) -> None:
    """And both have been trained."""
    assert not any(torch.equal(p, q) for p, q in zip(one.parameters(), network().parameters(), strict=True))
    for (name, p), q in zip(one.named_parameters(), two.named_parameters(), strict=True):
        assert torch.equal(p, q[1]), name


@cases(row=CLASSES)
def test_accumulated_gradients_are_one_gradient(row: OptimizerRow) -> None:
    whole, parts = network(), network()
    opts = [row.cls(net, lr=row.lr) for net in (whole, parts)]
    for t in range(STEPS):
        halves = [torch.autograd.grad(whole(x).square().mean(), list(whole.parameters())) for x in batch(t).chunk(2)]
        for p, *grads in zip(whole.parameters(), *halves, strict=True):
            p.grad = grads[0] + grads[1]
        opts[1].zero_grad()
        for x in batch(t).chunk(2):
            parts(x).square().mean().backward()
        for opt in opts:
            opt.step()
    same(whole, parts)


@cases(row=CLASSES)
def test_the_step_may_be_taken_inside_backward(row: OptimizerRow) -> None:
    """An optimizer a parameter, stepped as soon as its gradient is there, so that gradients never pile up."""
    net, inside = network(), network()
    train(net, row.cls(net, lr=row.lr))
    own = {p: row.cls([p], lr=row.lr) for p in inside.parameters()}

    def hook(p: Tensor) -> None:
        own[p].step()
        own[p].zero_grad()

    for p in inside.parameters():
        p.register_post_accumulate_grad_hook(hook)
    for t in range(STEPS):
        inside(batch(t)).square().mean().backward()
        assert all(p.grad is None for p in inside.parameters())
    same(net, inside)


@cases(row=CLASSES)
def test_runs_are_the_same_to_the_bit(row: OptimizerRow) -> None:
    nets = [network() for _ in range(2)]
    for net in nets:
        train(net, row.cls(net, lr=row.lr))
    same(*nets)


@cases(row=CLASSES)
def test_threads_do_not_disturb_each_other(row: OptimizerRow) -> None:
    alone, nets = network(), [network() for _ in range(4)]
    train(alone, row.cls(alone, lr=row.lr))
    opts = [row.cls(net, lr=row.lr) for net in nets]
    threads = [threading.Thread(target=train, args=pair) for pair in zip(nets, opts, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for net in nets:
        same(alone, net)


@cases(row=CLASSES)
def test_a_step_hook_may_step_another_optimizer(row: OptimizerRow) -> None:
    alone, nets = network(), [network() for _ in range(2)]
    train(alone, row.cls(alone, lr=row.lr))
    outer, inner = (row.cls(net, lr=row.lr) for net in nets)
    outer.register_step_post_hook(lambda *_: inner.step())
    for t in range(STEPS):
        for net, opt in zip(nets, (outer, inner), strict=True):
            opt.zero_grad()
            net(batch(t)).square().mean().backward()
        outer.step()
    for net in nets:
        same(alone, net)


def steps_on(row: OptimizerRow, bound: Any, backend: str, **_: Any) -> bool:
    return available(bound, row, backend)


@cases(
    steps_on,
    row=CLASSES,
    bound=ROWS,
    backend=["native", "reference"],
    bad=[float("nan"), float("inf"), -float("inf")],
)
def test_a_gradient_that_is_not_finite_spoils_what_it_reaches_as_in_torch(
    row: OptimizerRow, bound: Any, backend: str, bad: float
) -> None:
    """No skipping, no raising, no silent zero: a weight whose gradient is NaN or Inf is not finite afterwards."""
    module = constrained_parameter(bound, dtype=torch.float32)
    opt = row.cls(module, lr=row.lr, backend=backend)
    module.weight.grad = torch.ones_like(module.weight)
    opt.step()
    module.weight.grad.view(-1)[0] = bad
    before = copy.deepcopy(module.weight)
    opt.step()
    plain = torch.nn.Parameter(before.detach().clone())
    theirs = row.torch_cls([plain], lr=row.lr)
    plain.grad = torch.ones_like(plain)
    theirs.step()
    plain.grad.view(-1)[0] = bad
    theirs.step()
    assert not plain.view(-1)[0].isfinite()
    assert not module.weight.view(-1)[0].isfinite()


@cases(row=CLASSES, bound=[*ROWS, *MATRICES, *PLANES])
def test_a_run_that_was_spoilt_goes_on_and_can_be_saved_and_looked_at(row: OptimizerRow, bound: Any) -> None:
    """As in torch: only the numbers say so.  A loss that is checked once an epoch must not be an error before."""
    module = plane_module(bound) if isinstance(bound, PlaneRow) else constrained_parameter(bound)
    first, opt = next(module.parameters()), row.cls(module, lr=row.lr)
    for t in range(45):  # longer than a period of LowRank's alignment
        for p in module.parameters():
            p.grad = torch.full_like(p, 0.1)
        if t == 3:
            first.grad.view(-1)[0] = torch.nan
        opt.step()
    other = row.cls(module, lr=row.lr)
    other.load_state_dict(opt.state_dict())
    other.step()
    assert "nan" in str(symopt.report(module, other))
    assert not first.view(-1)[0].isfinite()


@cases(row=CLASSES)
def test_clipping_may_refuse_what_is_not_finite(row: OptimizerRow) -> None:
    net = network()
    opt = row.cls(net, lr=row.lr)
    train(net, opt, 2)
    net[0].weight.grad[0, 0] = torch.inf
    before = copy.deepcopy((net.state_dict(), opt.state_dict()["state"]))
    with pytest.raises(RuntimeError, match="non-finite"):
        nn.utils.clip_grad_norm_(net.parameters(), 1.0, error_if_nonfinite=True)
    after = (net.state_dict(), opt.state_dict()["state"])
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    nn.utils.clip_grad_value_(net.parameters(), 1.0)  # makes the infinity a number
    opt.step()
    assert all(p.isfinite().all() for p in net.parameters())


@cases(steps_on, row=CLASSES, bound=ROWS, backend=["native", "reference"])
def test_no_lr_and_no_strength_is_too_large(row: OptimizerRow, bound: Any, backend: str) -> None:
    """Their product, times what the direction makes of it, has to be a number of the weight's precision."""
    for lr, strength in ((1e30, 1e-3), (1e30, 1e6), (1e3, 1e30), (1e-3, 1e38)):
        module = constrained_parameter(bound, strength=strength, dtype=torch.float32)
        opt = row.cls(module, lr=lr, backend=backend)
        for sign in (1, -1, 1, 1):
            module.weight.grad = torch.full_like(module.weight, 0.3 * sign)
            opt.step()
        assert module.weight.isfinite().all(), (lr, strength)


@cases(steps_on, row=CLASSES, bound=ROWS, backend=["native", "reference"])
def test_denormal_weights_are_numbers(row: OptimizerRow, bound: Any, backend: str) -> None:
    module = constrained_parameter(bound, dtype=torch.float32)
    with torch.no_grad():
        module.weight.mul_(1e-42)
    opt = row.cls(module, lr=row.lr, backend=backend)
    for _ in range(3):
        module.weight.grad = torch.full_like(module.weight, -0.3)
        opt.step()
    assert (module.weight > 1e-12).all()  # they have begun to grow


@cases(steps_on, row=CLASSES, bound=ROWS, backend=["native", "reference"])
def test_extreme_but_finite_numbers_stay_finite(row: OptimizerRow, bound: Any, backend: str) -> None:
    for scale in (1e-42, 1e-20, 1e15):  # the first is a denormal; squares of the last still fit
        for strength in (0.0, 1e-30, 1e6):
            module = constrained_parameter(bound, strength=strength, dtype=torch.float32)
            with torch.no_grad():
                module.weight.mul_(1e-3)
            opt = row.cls(module, lr=1e-12 if row.torch_cls is torch.optim.SGD else 1e-3, backend=backend)
            for sign in (1, -1, 1):
                module.weight.grad = torch.full_like(module.weight, sign * scale)
                opt.step()
            assert module.weight.isfinite().all(), (scale, strength)
