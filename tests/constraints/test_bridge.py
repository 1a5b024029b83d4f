"""GroupBridge: steps are those of a gate and two factors per weight, and training ends at stationary points."""

from __future__ import annotations

import pytest
import torch

import symopt
from support.cases import cases
from support.runs import gradient
from support.table import OWN_FACTORS, constrained_parameter
from support.tolerances import tolerance
from symopt.constraints.group_bridge import GroupBridge
from symopt_kernels.reference.gauge import SNAP

STRENGTH, LR = 0.3, 0.01

BRIDGES = [row for row in OWN_FACTORS if isinstance(row.make(None), GroupBridge)]


def explicit_step(constraint, w, grad):
    """Gradient descent with weight decay on gate and factors from the balanced gauge; a factor's sign is locked."""
    factors = tuple(f.clone().requires_grad_() for f in constraint.split(w))
    (constraint.compose(factors) * grad).sum().backward()
    moved = []
    for f in factors:
        new = f.detach() - LR * (f.grad + STRENGTH * f.detach())
        moved.append(torch.where(new * f.detach() > 0, new, 0.0))
    return constraint.compose(tuple(moved))


def follow(row, size, steps=12):
    module = constrained_parameter(row, strength=STRENGTH)
    constraint, p = row.make(STRENGTH), module.weight
    opt = symopt.SGD(module, lr=LR, time_scale="none")
    want = p.detach().clone()
    for t in range(steps):
        p.grad = size * gradient(want, t)
        want = explicit_step(constraint, want, p.grad)
        opt.step()
        # An attracting zero is set before the factors get there.
        want = torch.where((p.detach() == 0) & (want.abs() <= SNAP), 0.0, want)
        torch.testing.assert_close(p.detach(), want, rtol=tolerance("factor step"), atol=tolerance("factor step"))
    return want


@cases(row=BRIDGES, size=[1.0, 30.0])
def test_a_step_of_gradient_descent_is_that_of_explicit_factors(row, size):
    """The larger gradients kill weights."""
    end = follow(row, size)
    assert (end == 0).any() == (size > 1)


def test_the_oracle_notices_a_wrong_step(monkeypatch):
    right = GroupBridge.retract
    monkeypatch.setattr(GroupBridge, "retract", lambda *args, **kwargs: right(*args, **kwargs) * (1 + 1e-9))
    with pytest.raises(AssertionError, match="not close"):
        follow(BRIDGES[0], 1.0)


@cases(row=BRIDGES)
def test_training_ends_where_loss_and_group_bridge_balance(row):
    """1/2 |w - y|^2 + kappa 3/2 sum_g (sum_i |w_i|)^(2/3): on every live weight w - y + kappa sgn(w) S_g^(-1/3) = 0.

    A dead weight of a live group is pulled less than kappa S_g^(-1/3), the l1 threshold inside its group.
    """
    kappa = 0.9
    module = constrained_parameter(row, strength=kappa)
    constraint, p = row.make(kappa), module.weight
    target = p.detach().clone()
    opt = symopt.SGD(module, lr=2.0)
    for _ in range(12000):
        p.grad = p.detach() - target
        opt.step()
    w = p.detach().clone().requires_grad_()
    (0.5 * (w - target).square().sum() + kappa * constraint.penalty(w)).backward()
    live = p.detach() != 0
    groups = constraint.partition(p.detach())
    sizes = groups.expand(constraint.size(p.detach())).reshape(p.shape)
    dead = ~live & (sizes > 0)
    assert live.any() and dead.any()
    assert w.grad[live].abs().max() <= tolerance("stationary"), w.grad[live]
    assert torch.equal(p.detach()[live].sign(), target[live].sign())
    assert (target[dead].abs() <= kappa * sizes[dead] ** (-1 / 3)).all()
