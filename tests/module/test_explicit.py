"""Explicit mode and the free gauge: the literal factors, which everything else is compared with.

What is expected is written out here: autograd through the plain product, torch's own modules and optimizers, and the
factor step itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import symopt
from support.cases import cases
from support.explicit import (
    KEEPS,
    ROWS,
    Cell,
    G,
    S,
    close,
    explicit,
    factors,
    in_any_memory,
    randn,
    random_factors,
    small_rows,
)
from support.tolerances import tolerance
from symopt.module.explicit import Explicit
from symopt.module.memory import ReusedMemory

# -- from weight to factors ------------------------------------------------------------------------------------------


@cases(init=KEEPS, row=ROWS)
def test_inits_that_keep_the_weight_keep_the_forward_pass(row, init):
    plain = Cell(row.shape)
    with torch.no_grad():
        plain.weight[0] = 0
    module = symopt.constrain(copy.deepcopy(plain), {"weight": row.make(0.3)}, mode="explicit", init=init)
    x = randn(row.shape, 5)
    assert not isinstance(module._parameters.get("weight"), nn.Parameter)
    assert len(factors(module)) == row.make(0.3).depth
    close(module.weight, plain.weight)
    close(module(x), plain(x))
    assert all(bool(f.isfinite().all()) and f.is_leaf and f.requires_grad for f in factors(module))
    assert bool((module.weight == 0).view(-1)[: plain.weight[0].numel()].all())


@cases(init=["imbalanced", "balanced", 1.0, 0.25], row=ROWS)
def test_factors_are_in_the_gauge_of_the_init(row, init):
    module, w = explicit(row, init), Cell(row.shape).weight.detach()
    constraint = symopt.constraints(module)["weight"]
    heavy, *others, light = (f.detach() for f in factors(module))
    size = constraint.size(w).reshape(heavy.shape)  # |w_i|, or the norm of each group
    c = {"imbalanced": size.square().mean().sqrt() ** (2 / constraint.depth), "balanced": 0.0}.get(init, init)
    light_size = constraint.size(light).reshape(heavy.shape)
    close(heavy.square() - light_size.square(), torch.as_tensor(c, dtype=torch.float64).expand(heavy.shape))
    close(heavy ** (constraint.depth - 1) * light_size, size)
    assert all(torch.equal(other, heavy) for other in others)
    assert len({f.data_ptr() for f in factors(module)}) == constraint.depth  # each a tensor of its own


@cases(row=ROWS)
def test_gates_are_one_and_the_weight_is_the_last_factor(row):
    *gates, last = factors(explicit(row, "gates"))
    assert all(bool((gate == 1).all()) for gate in gates)
    assert torch.equal(last, Cell(row.shape).weight)


BIG = (256, 256)


def redrawn(constraint: Any, weight: Tensor, init: str) -> tuple[Tensor, list[Tensor]]:
    """The new weight and its factors, after ``init``."""
    torch.manual_seed(0)
    module = nn.Module()
    module.weight = nn.Parameter(weight.clone())
    symopt.constrain(module, {"weight": constraint}, mode="explicit", init=init)
    return module.weight.detach(), [f.detach() for f in factors(module)]


@cases(depth=[2, 3, 4])
def test_independent_draws_gates_like_the_weight_and_keeps_it_as_the_last_factor(depth):
    old = 0.3 * randn(BIG, 1)
    new, (*gates, last) = redrawn(S(depth=depth), old, "independent")
    assert torch.equal(last, old) and len(gates) == depth - 1
    for i, gate in enumerate(gates):
        assert float(gate.std() / old.std()) == pytest.approx(1, abs=tolerance("threshold"))
        assert abs(gate.mean() / gate.std()) < tolerance("threshold")
        for other in (old, *gates[:i]):  # independent of all the others
            assert abs(torch.corrcoef(torch.stack([gate.flatten(), other.flatten()]))[0, 1]) < tolerance("threshold")
    assert float(new.std() / old.std() ** depth) == pytest.approx(1, abs=tolerance("law"))


@cases(kind=[S, lambda depth: G("block:2x2", depth=depth)], depth=[2, 3, 4])
def test_matched_keeps_the_variance_with_truncated_factors(kind, depth):
    old = 0.02 * randn((1024, 256), 1)
    new, drawn = redrawn(kind(depth=depth), old, "matched")
    assert len(drawn) == depth
    assert float(new.std() / old.std()) == pytest.approx(1, abs=tolerance("law"))
    assert abs(new.mean() / old.std()) < tolerance("threshold")
    # The standard deviation of a standard normal kept to .1 < |z| < 2, by the midpoint rule.
    z = torch.linspace(0.1, 2, 10001, dtype=torch.float64)
    z = (z[1:] + z[:-1]) / 2
    density = (-z * z / 2).exp()
    underlying = old.std() ** (1 / depth) / ((z * z * density).sum() / density.sum()).sqrt()
    for f in drawn:
        assert float(f.std() / old.std() ** (1 / depth)) == pytest.approx(1, abs=tolerance("threshold"))
        assert abs(f.mean() / f.std()) < tolerance("threshold")
        low, high = f.abs().aminmax()  # both bounds are kept, and come near on so many draws
        for bound, reached, sign in ((0.1, low, 1), (2.0, high, -1)):
            beyond = sign * float(reached / underlying / bound - 1)
            assert -tolerance("convex gap") <= beyond < tolerance("threshold")


@cases(init=["independent", "matched"])
def test_random_inits_of_a_single_weight_are_finite(init):
    module = symopt.constrain(nn.Linear(1, 1), {"weight": S()}, mode="explicit", init=init)
    assert bool(module.weight.isfinite().all())


# -- pull-back -------------------------------------------------------------------------------------------------------


@in_any_memory
@cases(row=ROWS)
def test_backward_is_autograd_of_the_plain_product(row):
    constraint, values = random_factors(row)
    cotangent = randn(row.shape, 20)
    ours, plain = Explicit(constraint)(*values), constraint.compose(values)
    assert torch.equal(ours, plain)
    assert type(ours.grad_fn).__name__ == "_ComposeBackward"
    close(torch.autograd.grad(ours, values, cotangent), torch.autograd.grad(plain, values, cotangent))


@in_any_memory
@cases(row=ROWS)
def test_gradcheck_and_double_backward(row):
    constraint, values = random_factors(row)
    assert gradcheck(Explicit(constraint), values, fast_mode=True)
    assert gradgradcheck(Explicit(constraint), values, fast_mode=True)
    seconds = []
    for compose in (Explicit(constraint), lambda *f: constraint.compose(f)):
        first = torch.autograd.grad(compose(*values).sin().sum(), values, create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in first), values))
    close(seconds[0], seconds[1])


def saved(function: Callable[[], Tensor]) -> list[Tensor]:
    seen: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        seen.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        function()
    return seen


@in_any_memory
@cases(row=ROWS)
def test_the_function_saves_the_factors_alone(row):
    constraint, values = random_factors(row)
    kept = saved(lambda: Explicit(constraint)(*values))
    assert [x.data_ptr() for x in kept] == [v.data_ptr() for v in values]
    if constraint.depth > 2:  # where plain autograd keeps partial products as well
        plain = saved(lambda: constraint.compose(values))
        assert {x.data_ptr() for x in plain} - {v.data_ptr() for v in values}


@in_any_memory
def test_gradients_only_where_asked_for():
    constraint, (u, v) = random_factors(ROWS[0])
    out = Explicit(constraint)(u.detach(), v)
    out.sum().backward()
    assert u.grad is None and torch.equal(v.grad, u.detach())
    with torch.no_grad():
        assert Explicit(constraint)(u, v).grad_fn is None


@small_rows
def test_reused_memory_leaves_alone_whatever_still_lives(row, monkeypatch):
    monkeypatch.setattr(ReusedMemory, "large", 0)
    module, x = explicit(row), randn(row.shape, 5)
    kept, expected, first = [], [], factors(module)[0]
    for i in range(8):
        with torch.no_grad():
            first.add_(0.1)
        constraint, now = symopt.constraints(module)["weight"], tuple(f.detach().clone() for f in factors(module))
        weight = module.weight
        grads = torch.autograd.grad((weight * x).sum() * (i + 1), factors(module))
        for part in (weight, weight.detach()[0], weight.detach().numpy(), *grads):
            kept.append(torch.as_tensor(part))
        wanted, rest = constraint.compose(now), constraint.pullback(now, x * (i + 1))
        expected += [wanted, wanted[0], wanted, *rest]
    close([h.detach() for h in kept], expected)
    out = [(module.weight * x).sum() for _ in range(3)]  # three graphs at once, backward in another order
    for i in (1, 0, 2):
        close(torch.autograd.grad(out[i], factors(module)), constraint.pullback(now, x))


def test_memory_is_reused_once_nothing_holds_it():
    module = symopt.constrain(nn.Linear(1024, 512, bias=False), {"weight": S()}, mode="explicit")
    seen = set()
    for _ in range(6):
        module.zero_grad()
        weight = module.weight
        weight.sum().backward()
        seen |= {weight.data_ptr(), *(f.grad.data_ptr() for f in factors(module))}
        del weight
    assert len(seen) == 3
    double = copy.deepcopy(module)
    assert double.weight.data_ptr() not in seen and torch.equal(double.weight, module.weight)
