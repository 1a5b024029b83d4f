"""The free gauge of the optimizers is explicit mode, step for step."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import symopt
from support.cases import cases
from support.explicit import S, close, factors, randn

A = randn((40, 5), 11)
TARGET = A @ randn((5, 6), 12) + 0.1 * randn((40, 6), 13)
STEPS = 200


def loss(weight: Tensor) -> Tensor:
    return (A @ weight.T - TARGET).square().mean() * 3


def holder(scale: float = 0.7, dtype: torch.dtype = torch.float64) -> nn.Module:
    module = nn.Module()
    module.weight = nn.Parameter((scale * randn((6, 5), 0)).to(dtype))
    return module


def free(depth: int, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[nn.Module, symopt.SGD]:
    module = symopt.constrain(holder(dtype=dtype), {"weight": S(strength=0.05, depth=depth, gauge="free")})
    return module, symopt.SGD(module, **{"lr": 0.01, "time_scale": "none", **options})


def state_factors(module: nn.Module, opt: symopt.SGD) -> list[Tensor]:
    state = opt.state[module.weight]
    return [state[f"factor_{i}"] for i in range(sum(key.startswith("factor_") for key in state))]


def train(module: nn.Module, opt: torch.optim.Optimizer, steps: int = STEPS) -> None:
    for _ in range(steps):
        opt.zero_grad()
        loss(module.weight.double()).backward()
        opt.step()


def oracle(depth: int, **options: Any) -> nn.Module:
    """Explicit mode under torch's SGD."""
    module = symopt.constrain(holder(), {"weight": S(strength=0.05, depth=depth)}, mode="explicit", init="imbalanced")
    train(module, torch.optim.SGD(symopt.param_groups(module), lr=0.01, **options))
    return module


@cases(depth=[2, 3, 4, 5])
def test_the_free_gauge_is_explicit_mode_step_for_step(depth):
    module, opt = free(depth)
    start = module.weight.detach().clone()
    first = loss(module.weight)
    g = torch.autograd.grad(first, module.weight)[0] * start
    assert bool((g > 0).any()) and bool((g < 0).any())  # some weights are pulled out, some in
    train(module, opt)
    assert loss(module.weight) < 0.9 * first
    reference = oracle(depth)
    close(module.weight.detach(), reference.weight.detach(), "factor step")
    close(state_factors(module, opt), [f.detach() for f in factors(reference)], "factor step")
    assert bool((start.sign() != module.weight.sign()).any())  # some changed their sign while they trained


@pytest.mark.parametrize(
    ("momentum", "dampening", "nesterov"), [(0.9, 0.0, False), (0.8, 0.3, False), (0.9, 0.0, True)]
)
@cases(depth=[2, 3])
def test_momentum_runs_on_the_effective_gradient(depth, momentum, dampening, nesterov):
    """Not on the factors: ``u' = rho u - delta rest``, delta from the buffer of the weight's gradient."""
    options = {"momentum": momentum, "dampening": dampening, "nesterov": nesterov}
    module, opt = free(depth, lr=0.002, **options)
    shadow = symopt.constrain(holder(), {"weight": S(depth=depth)}, mode="explicit", init="imbalanced")
    values, buffer = [f.detach().clone() for f in factors(shadow)], None
    train(module, opt, STEPS)
    for _ in range(STEPS):
        w = math.prod(values[1:], start=values[0]).requires_grad_()
        g = torch.autograd.grad(loss(w), w)[0]
        buffer = g if buffer is None else momentum * buffer + (1 - dampening) * g
        delta = 0.002 * (g + momentum * buffer if nesterov else buffer)
        rho = 1 - 0.002 * 0.05 * (1 - dampening) / (1 - momentum)
        rest = [math.prod((v for j, v in enumerate(values) if j != i), start=torch.ones(())) for i in range(depth)]
        values = [rho * u - delta * r for u, r in zip(values, rest, strict=True)]
    close(state_factors(module, opt), values, "factor step")
    close(module.weight.detach(), math.prod(values[1:], start=values[0]), "factor step")
    other = symopt.constrain(holder(), {"weight": S(strength=0.05, depth=depth)}, mode="explicit", init="imbalanced")
    train(other, torch.optim.SGD(symopt.param_groups(other), lr=0.002, **options))
    assert (other.weight - module.weight).abs().max() > 0.01


def by_copy(module: nn.Module, value: Tensor) -> None:
    with torch.no_grad():
        module.weight.copy_(value)


def by_load(module: nn.Module, value: Tensor) -> None:
    module.load_state_dict({"weight": value})


def by_data(module: nn.Module, value: Tensor) -> None:
    module.weight.data = value.clone()


@cases(dtype=[torch.float64, torch.bfloat16], depth=[2, 3], change=[by_copy, by_load, by_data])
def test_entries_changed_from_outside_are_split_anew_and_no_others(change, depth, dtype):
    module, opt = free(depth, dtype)
    train(module, opt, 20)
    before = [f.clone() for f in state_factors(module, opt)]
    value = module.weight.detach().clone()
    changed = torch.zeros_like(value, dtype=torch.bool)
    changed[1, 2:] = changed[4, 0] = True
    value[changed] = torch.tensor([2.0, -0.5, 0.0, 3.0], dtype=dtype)
    change(module, value)
    opt.param_groups[0]["lr"] = 0.0  # a step that derives the factors and moves nothing
    train(module, opt, 1)
    after = state_factors(module, opt)
    assert torch.equal(module.weight, value)
    assert all(torch.equal(a[~changed], b[~changed]) for a, b in zip(after, before, strict=True))
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    c = opt.state[module.weight]["imbalance"]
    expected = S(depth=depth).split(value.to(state_dtype), c)
    for a, e in zip(after, expected, strict=True):
        assert a.dtype == state_dtype and torch.equal(a[changed], e[changed])
    opt.param_groups[0]["lr"] = 0.01
    train(module, opt, 1)
    assert not torch.equal(module.weight, value)


@cases(depth=[2, 3])
def test_bf16_weights_keep_fp32_factors(depth):
    """Steps too small for bf16 add up in the factors."""
    module, opt = free(depth, torch.bfloat16, lr=1e-5)
    start = module.weight.detach().clone()
    train(module, opt, 1)
    first = [f.clone() for f in state_factors(module, opt)]
    assert {f.dtype for f in first} == {torch.float32} and torch.equal(module.weight, start)
    train(module, opt, 300)
    last = state_factors(module, opt)
    assert all(not torch.equal(a, b) for a, b in zip(first, last, strict=True))
    assert torch.equal(module.weight, math.prod(last[1:], start=last[0]).bfloat16())
    assert module.weight.dtype == torch.bfloat16 and not torch.equal(module.weight, start)


@cases(depth=[2, 4], momentum=[0.0, 0.9], dtype=[torch.float64, torch.bfloat16])
def test_a_checkpoint_in_the_free_gauge_continues_bit_for_bit(depth, momentum, dtype):
    module, opt = free(depth, dtype, lr=0.002, momentum=momentum)
    train(module, opt, 20)
    file = io.BytesIO()
    torch.save({"model": module.state_dict(), "opt": opt.state_dict()}, file)
    file.seek(0)
    saved_state = torch.load(file, weights_only=True)
    train(module, opt, 20)
    other, other_opt = free(depth, dtype, lr=0.5)
    other.load_state_dict(saved_state["model"])
    other_opt.load_state_dict(saved_state["opt"])
    assert not torch.equal(other.weight, module.weight)
    train(other, other_opt, 20)
    assert torch.equal(other.weight, module.weight)
    assert all(map(torch.equal, state_factors(other, other_opt), state_factors(module, opt)))
