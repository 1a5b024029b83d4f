"""One step of every constraint under every optimizer, against explicit factors written out here.

The oracle shares no code with the library: units are found by a loop over indices, sums run through a 0/1 matrix,
directions are torch's formulas, and the step is the plain simultaneous gradient step on a gate and a direction,

    s' = rho s - <delta, d>,        d' = rho d - delta s,        w' = s' d',

in the gauge ``s**2 - ||d||**2 = c``.  A single weight is a group of one: ``s = u``, ``d = v``.
"""

import math

import pytest
import torch

import symopt
from support.cases import cases, pairs
from support.oracles import SNAP, STRENGTH, labels
from support.runs import follow, gradients, optimizer
from support.table import (
    CONSTRAINTS,
    CPU_BACKENDS,
    EVERY_OPTIMIZER,
    OPTIMIZERS,
    available,
    constrained_parameter,
    taken,
)
from support.tolerances import tolerance

# -- the oracle ------------------------------------------------------------------------------------------------------


# -- the step is the factor step -------------------------------------------------------------------------------------


@pairs(
    available,
    row=CONSTRAINTS,
    opt_row=EVERY_OPTIMIZER,
    time_scale=["none", "saturated"],
    imbalance=[1.0, 0.2, 0.0],
    backend=CPU_BACKENDS,
)
def test_steps_are_those_of_explicit_factors(row, opt_row, time_scale, imbalance, backend):
    follow(row, opt_row, time_scale, imbalance, backend=backend)


@cases(taken, row=CONSTRAINTS, opt_row=EVERY_OPTIMIZER)
def test_moments_are_torchs(row, opt_row):
    """The state a checkpoint carries is the one torch.optim makes of the same gradients."""
    p = (module := constrained_parameter(row)).weight
    q = torch.nn.Parameter(p.detach().clone())
    opt = optimizer(module, opt_row)
    theirs = opt_row.torch_cls([q], lr=opt_row.lr, **opt_row.options)
    for g in gradients(row.shape, 6):
        p.grad, q.grad = g, g.clone()
        opt.step()
        theirs.step()
    member = torch.nn.functional.one_hot(labels(row)).double()
    tol = tolerance("factor step")
    for key, value in theirs.state[q].items():
        if value is None:  # SGD without momentum
            assert key not in opt.state[p]
        elif key in opt_row.moments("second"):  # one number per unit: the mean
            mean = (value.flatten() @ member) / member.sum(0)
            torch.testing.assert_close(opt.state[p][key].flatten(), mean, rtol=tol, atol=tol)
        elif key in opt_row.moments("peak") and member.shape[1] < len(member):
            continue  # a maximum of means is not a mean of maxima; the explicit factors above cover it
        else:
            torch.testing.assert_close(opt.state[p][key], value, rtol=tol, atol=tol)


@cases(row=CONSTRAINTS, decoupled=[True, False])
def test_the_strength_is_amplified_like_the_gradient(row, decoupled):
    """A step at zero gradient multiplies by (1 - lr kappa gain)**2, gain: SGD's amplification, AdamW's root size."""
    label = labels(row)
    lr, momentum, dampening = 0.01, 0.8, 0.3
    p = (module := constrained_parameter(row, strength=STRENGTH)).weight
    before = p.detach().clone().flatten()
    if decoupled:
        opt = symopt.AdamW(module, lr=lr, time_scale="none")
        gain = torch.bincount(label).double().sqrt()[label]
    else:
        opt = symopt.SGD(module, lr=lr, momentum=momentum, dampening=dampening, time_scale="none")
        gain = (1 - dampening) / (1 - momentum)
    p.grad = torch.zeros_like(p)
    opt.step()
    expected = before * (1 - lr * STRENGTH * gain) ** 2
    torch.testing.assert_close(p.detach().flatten(), expected, rtol=tolerance("factor step"), atol=0)


# -- rho stays >= 0 --------------------------------------------------------------------------------------------------


@pairs(taken, row=CONSTRAINTS, opt_row=EVERY_OPTIMIZER, time_scale=["none", "saturated"])
def test_a_huge_strength_never_turns_a_weight_over(row, opt_row, time_scale):
    p = (module := constrained_parameter(row)).weight
    opt = optimizer(module, opt_row, time_scale=time_scale, strength=1e7)
    size = row.make(None).size
    for g in gradients(row.shape, 5):
        before = p.detach().clone()
        p.grad = g
        opt.step()
        assert bool((size(p.detach()) <= size(before)).all())  # rho < 0 multiplies by rho**2 > 1
    p.grad = torch.zeros_like(p)
    for key in opt_row.moments("first") & set(opt.state[p]):  # so that nothing but decay is left
        opt.state[p][key].zero_()
    opt.step()
    assert int(p.count_nonzero()) == 0


@pairs(row=CONSTRAINTS, options=[{}, {"amsgrad": True}], time_scale=["none", "saturated"])
def test_units_without_any_gradient_stay_finite_under_adam(row, options, time_scale):
    """Their preconditioner is 1 / eps, which multiplies the strength: unbounded, rho would be about -lr kappa / eps."""
    p = (module := constrained_parameter(row)).weight
    opt = symopt.Adam(module, lr=1e-3, strength=1e-3, time_scale=time_scale, **options)
    label = labels(row)
    dead = (label % 2 == 1).reshape(row.shape)
    start = p.detach().clone()
    for g in gradients(row.shape, 20):
        p.grad = torch.where(dead, 0.0, g)
        opt.step()
        assert bool((p.abs() <= start.abs().max() + 1).all())  # also false for NaN
    assert int(p[dead].count_nonzero()) == 0
    assert bool((p[~dead] != 0).all())


# -- snapping --------------------------------------------------------------------------------------------------------

LOW, HIGH = 1 - 1e-3, 1 + 1e-3


def snap(row, *, size, pull, decay, saturated, imbalance=0.0, scale=2.0):
    """Retract units of norm ``size`` that are pushed outwards by ``pull``; also returns the units of norm 1."""
    constraint = row.make(None)
    w = torch.randn(row.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    member = torch.nn.functional.one_hot(labels(row)).double()
    unit = (w.flatten() / (member @ (w.flatten() ** 2 @ member).sqrt())).reshape(row.shape)
    c, scale = (torch.tensor(x, dtype=torch.float64) for x in (imbalance, scale))
    new = constraint.retract(size * unit, -pull * unit, decay, c, scale, constraint.partition(w), saturated=saturated)
    return new, unit


@cases(row=CONSTRAINTS, saturated=[True, False])
def test_attracted_units_below_the_threshold_become_zero(row, saturated):
    decay, scale = 1e-2, 2.0
    t = 1 / scale if saturated else 1.0
    rho = 1 - decay * t
    for pull in (0.0, 0.5 * decay, -0.5 * decay, LOW * decay, -LOW * decay):
        edge = SNAP * scale / (rho + pull * t) ** 2  # ends exactly at the threshold: w' = (rho + pull)**2 w at c = 0
        new, _ = snap(row, size=LOW * edge, pull=pull, decay=decay, saturated=saturated)
        assert int(new.count_nonzero()) == 0
        new, unit = snap(row, size=HIGH * edge, pull=pull, decay=decay, saturated=saturated)
        torch.testing.assert_close(new, HIGH * SNAP * scale * unit, rtol=tolerance("factor step"), atol=0)


@cases(row=CONSTRAINTS, saturated=[True, False])
def test_units_that_are_not_attracted_never_snap(row, saturated):
    decay, scale, size = 1e-2, 2.0, 1e-7
    t = 1 / scale if saturated else 1.0
    for pull, strength in ((HIGH * decay, decay), (-HIGH * decay, decay), (0.0, 0.0), (-decay, 0.0), (decay, 0.0)):
        new, unit = snap(row, size=size, pull=pull, decay=strength, saturated=saturated)
        expected = (1 - strength * t + pull * t) ** 2 * size * unit
        torch.testing.assert_close(new, expected, rtol=tolerance("factor step"), atol=0)
        assert pull or strength or torch.equal(new, size * unit)  # no force: not one ulp


@cases(row=CONSTRAINTS)
def test_a_zero_can_revive_while_there_is_imbalance_only(row):
    for imbalance in (0.5, 0.0):
        new, unit = snap(row, size=0.0, pull=0.1, decay=0.01, saturated=True, imbalance=imbalance)
        assert bool((new * unit > 0).all() if imbalance else (new == 0).all())


@cases(row=CONSTRAINTS, decay=[None, 1 - 1e-9])
def test_an_imbalance_below_the_threshold_becomes_zero(row, decay):
    for factor in (LOW, HIGH):
        p = (module := constrained_parameter(row)).weight
        opt = symopt.SGD(module, lr=1e-9)
        opt.param_groups[0]["imbalance_factor"] = decay
        p.grad = torch.zeros_like(p)
        opt.step()
        state = opt.state[p]
        state["imbalance"].copy_(factor * SNAP * state["metric_scale"])
        opt.step()
        assert bool(state["imbalance"] == 0) == (factor == LOW)


# -- the time scale --------------------------------------------------------------------------------------------------


@cases(row=CONSTRAINTS)
def test_units_above_the_metric_scale_move_as_under_the_plain_optimizer(row):
    """Along the weight by delta, across it (a gate's direction) by half of it, up to delta**2 / |w|; sgn(w) for one."""
    p = (module := constrained_parameter(row, strength=0.0)).weight
    opt = symopt.SGD(module, lr=1e-3)
    p.grad = torch.zeros_like(p)
    opt.step()  # fixes metric_scale
    p.data *= 1e5
    w = p.detach().clone().flatten()
    member = torch.nn.functional.one_hot(labels(row)).double()
    for lr in (1e-3, 1e-2):
        p.data.copy_(w.reshape(row.shape))
        opt.param_groups[0]["lr"] = lr
        p.grad = gradients(row.shape, 1)[0]
        opt.step()
        delta = lr * p.grad.flatten()
        square = w * w @ member
        radial = (member @ ((delta * w @ member) / square)) * w
        first_order = w - (radial + delta) / 2
        second_order = (delta * delta @ member) / square.sqrt()
        # imbalance / (2 |w|) is the other small number: s**2 is not quite |w|
        bound = second_order + (delta * delta @ member).sqrt() * opt.state[p]["imbalance"] / square.sqrt()
        error = (((p.detach().flatten() - first_order) ** 2) @ member).sqrt()
        assert bool((error <= bound).all())
        assert float((bound / (delta * delta @ member).sqrt()).max()) < 0.01  # the bound says something


# -- where there is nothing to start from ----------------------------------------------------------------------------


@cases(taken, row=CONSTRAINTS, opt_row=EVERY_OPTIMIZER)
def test_an_all_zero_tensor_can_train(row, opt_row):
    p = (module := constrained_parameter(row, strength=1e-3)).weight
    p.data.zero_()
    opt = optimizer(module, opt_row)
    sign = -1.0 if opt_row.options.get("maximize") else 1.0
    target = torch.randn(row.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    fan_in = max(1, math.prod(row.shape[1:]))
    units = labels(row).max() + 1
    start = None
    for _ in range(30):
        p.grad = sign * (p.detach() - target)
        opt.step()
        start = opt.state[p]["metric_scale"].item() if start is None else start
    # c0 is 1 / sqrt(fan_in) per weight, so its root size for a group, and M is c at w = 0
    assert start == pytest.approx(math.sqrt(math.prod(row.shape) / int(units) / fan_in), rel=tolerance("identity"))
    assert bool((p != 0).all())
    assert bool((p - target).norm() < 0.99 * target.norm())


@cases(taken, row=CONSTRAINTS, opt_row=EVERY_OPTIMIZER)
def test_an_all_zero_tensor_without_imbalance_is_refused(row, opt_row):
    p = (module := constrained_parameter(row)).weight
    p.data.zero_()
    opt = optimizer(module, opt_row, imbalance=0.0)
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="weight is zero everywhere"):
        opt.step()


# -- half precision --------------------------------------------------------------------------------------------------

RATE = 2e-4  # relative change per step; half an ulp below 1 is 2.4e-4 in fp16 and eight times that in bf16


def half(row, opt_row, dtype):
    # A large imbalance lifts the snapping threshold to 0.8 of a weight, which shortens the wait; without time
    # scale or gradient it does nothing else.
    module = constrained_parameter(row, strength=0.2, dtype=dtype)
    module.weight.data = torch.where(module.weight.data < 0, -1.0, 1.0).to(dtype)
    p = module.weight
    p.grad = torch.zeros_like(p)
    label = labels(row)
    gain = math.sqrt(int(torch.bincount(label).max())) if opt_row.torch_cls is torch.optim.AdamW else 1.0
    opt = optimizer(module, opt_row, lr=RATE / (2 * 0.2 * gain), time_scale="none", imbalance=8e5)
    return p, opt


HALF_CONSTRAINTS = [row for row in CONSTRAINTS if row.id in ("sparse", "group-out", "group-callable")]
HALF_OPTIMIZERS = [row for row in OPTIMIZERS if row.id in ("sgd", "adamw")]


@cases(row=HALF_CONSTRAINTS, opt_row=HALF_OPTIMIZERS, dtype=[torch.bfloat16, torch.float16])
def test_half_precision_weights_collapse_below_their_own_rounding(row, opt_row, dtype):
    p, opt = half(row, opt_row, dtype)
    # Without an fp32 copy the first step, and so every step, would be lost.
    assert float(torch.tensor((1 - RATE / 2) ** 2).to(dtype)) == 1.0
    for _ in range(1150):  # ln(1 / 0.8) / RATE = 1116
        opt.step()
    assert opt.state[p]["master"].dtype == torch.float32 and p.dtype == dtype
    assert int(p.count_nonzero()) == 0 == int(opt.state[p]["master"].count_nonzero())


@cases(row=HALF_CONSTRAINTS, opt_row=HALF_OPTIMIZERS, dtype=[torch.bfloat16, torch.float16])
def test_entries_changed_from_outside_win_over_the_copy(row, opt_row, dtype):
    p, opt = half(row, opt_row, dtype)
    for _ in range(3):
        opt.step()
    master = opt.state[p]["master"].clone()
    assert not torch.equal(master, p.float())  # the copy knows more than the weight
    p.data[0] = 3.0  # may change a group in part
    expected = master.clone()
    expected[0] = 3.0
    opt.step()
    rho = 1 - RATE / 2
    torch.testing.assert_close(opt.state[p]["master"], rho**2 * expected, rtol=tolerance("fp32"), atol=0)
    assert torch.equal(p, opt.state[p]["master"].to(dtype))
