"""Certificates against closed forms: the verdict, the critical strength, its interval."""

import json

import pytest
import torch

import symopt
from support.cases import cases
from support.tolerances import tolerance

TARGET = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
CRITICAL = 2**0.5  # || (T - T^t) / 2 ||


def symmetric(strength=None):
    net = torch.nn.Linear(3, 3, bias=False, dtype=torch.float64)
    torch.nn.init.normal_(net.weight, generator=torch.Generator().manual_seed(0))
    return symopt.constrain(net, {"weight": symopt.Symmetric(strength=strength)})


def loss_of(net, noise=0.0, generator=None):
    def loss():
        shift = noise * torch.randn(3, 3, generator=generator, dtype=torch.float64) if noise else 0.0
        return (net.weight - TARGET - shift).square().sum() / 2

    return loss


def train(net, opt, steps, loss=None):
    loss = loss or loss_of(net)
    for _ in range(steps):
        opt.zero_grad()
        loss().backward()
        opt.step()


def test_verdicts_along_training():
    net = symmetric(2.0)
    opt = symopt.SGD(net, lr=0.02, imbalance=0.0)
    train(net, opt, 1)
    (row,) = symopt.certify(net, opt, loss_of(net)).rows
    assert row.verdict == "attracting" and row.critical == pytest.approx(CRITICAL) and row.strength == 2.0
    predicted, taken = row.steps, 0
    while not torch.equal(net.weight, net.weight.T):
        train(net, opt, 1)
        taken += 1
    assert 0.2 * predicted < taken < 2 * predicted
    train(net, opt, 400)
    (row,) = symopt.certify(net, opt, loss_of(net)).rows
    assert (row.verdict, row.residual, row.steps, row.balance) == ("exact", 0.0, 0.0, 0.0)
    assert row.kkt < 1e-6 and row.interval is None
    opt.param_groups[0]["strength"] = 1.4
    found = symopt.certify(net, opt, loss_of(net))
    assert found.rows[0].verdict == "not reached" and "it is exact, but the strength 1.4" in str(found)
    json.dumps(found.to_dict())


def test_nothing_is_changed():
    net = symmetric()
    opt = symopt.AdamW(net, lr=1e-2)
    before = net.weight.detach().clone()
    assert "unknown before the first step" in str(symopt.certify(net, opt, loss_of(net)))
    train(net, opt, 3)
    before, grad = net.weight.detach().clone(), net.weight.grad.clone()
    symopt.certify(net, opt, loss_of(net), samples=3)
    symopt.critical_strength(net, loss_of(net), steps=5)
    assert torch.equal(net.weight, before) and torch.equal(net.weight.grad, grad)


def test_units_over_several_parameters_of_different_scale():
    """The critical strength of a dead unit is ``(||g_weight||**2 + a**2 g_bias**2)**(1/2)``; live ones rest."""
    net = torch.nn.Linear(3, 2, dtype=torch.float64)
    torch.manual_seed(0)
    torch.nn.init.normal_(net.weight)
    groups = {"weight": (0, None), "bias": (0, None)}
    symopt.constrain(net, {"*": symopt.GroupSparse(groups, strength=1.0, factors={"bias": 2.0})})
    weight = torch.tensor([[0.2, 0.0, 0.0], [3.0, 1.0, 0.0]], dtype=torch.float64)
    bias = torch.tensor([0.1, 2.0], dtype=torch.float64)

    def loss():
        return ((net.weight - weight).square().sum() + (net.bias - bias).square().sum()) / 2

    opt = symopt.SGD(net, lr=0.1, imbalance=0.0)
    train(net, opt, 500, loss)
    (row,) = symopt.certify(net, opt, loss).rows
    assert row.verdict == "exact" and not net.weight[0].any() and net.bias[0] == 0 and net.bias[1] != 0
    assert row.critical == pytest.approx((0.2**2 + 2**2 * 0.1**2) ** 0.5)
    assert row.kkt < 1e-7  # the root of a difference that rounds to some 1e-16


@pytest.mark.parametrize("samples", [8, 40])
def test_the_interval_of_minibatches_covers_the_truth(samples):
    """Nine of ten at least: the norm's bias is removed, and the noise here is as large as the signal."""
    covered = 0
    for seed in range(40):
        net = symmetric(2.0)
        opt = symopt.SGD(net, lr=0.1)
        with torch.no_grad():
            net.weight.copy_((TARGET + TARGET.T) / 2)
        generator = torch.Generator().manual_seed(seed)
        (row,) = symopt.certify(net, opt, loss_of(net, 1.0, generator), samples=samples).rows
        low, high = row.interval
        covered += low <= CRITICAL <= high
    assert covered >= 36


def test_adamw_counts_per_coordinate():
    net = symmetric()
    opt = symopt.AdamW(net, lr=3e-2)
    train(net, opt, 1500)
    (row,) = symopt.certify(net, opt, loss_of(net)).rows
    second = opt.state[net.weight]["exp_avg_sq"]
    groups = symopt.Symmetric().partition(net.weight.detach())
    p = 1 / ((second / (1 - 0.999**1500)).sqrt() + 1e-8)
    g = (net.weight - TARGET).detach()
    seen = groups.expand(p) * (g - g.T) / 2
    assert row.critical == pytest.approx(
        float(seen.norm()) / 3**0.5, rel=tolerance("fp32 mean")
    )  # the step count is fp32, so beta2 is
    assert row.verdict == "exact"


def test_sparse_is_certified_by_its_zeros():
    net = torch.nn.Linear(3, 1, bias=False, dtype=torch.float64)
    symopt.constrain(net, {"weight": symopt.Sparse(strength=0.5)})
    target = torch.tensor([[2.0, 0.3, -1.0]], dtype=torch.float64)
    loss = lambda: (net.weight - target).square().sum() / 2  # noqa: E731
    opt = symopt.SGD(net, lr=0.1)
    train(net, opt, 1500, loss)
    (row,) = symopt.certify(net, opt, loss).rows
    assert row.verdict == "exact" and row.critical == pytest.approx(0.3) and row.kkt < 1e-9  # the soft threshold
    opt.param_groups[0]["strength"] = 0.2
    (row,) = symopt.certify(net, opt, loss).rows
    assert row.verdict == "not reached" and row.kkt == pytest.approx((0.1**2 + 2 * 0.3**2) ** 0.5)


def test_critical_strength_at_the_minimum_on_the_plane():
    pair = torch.nn.ModuleDict({k: torch.nn.Linear(4, 1, bias=False, dtype=torch.float64) for k in "ab"})
    symopt.constrain(pair, {("a.weight", "b.weight"): symopt.Tied()})
    x = torch.randn(2, 30, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = x[0, :, :1] * 2 - x[1, :, 1:2]

    def loss():
        return (pair["a"](x[0]) + pair["b"](x[1]) - y).square().mean() / 2

    best = torch.linalg.lstsq(x.sum(0), y).solution
    residual = x.sum(0) @ best - y
    gap = ((x[0] - x[1]).T @ residual / len(y)).norm() / 2**0.5
    found = symopt.critical_strength(pair, loss, steps=60)
    near = pytest.approx(float(gap), rel=tolerance("critical strength"))
    assert found == {"a.weight": near, "b.weight": near}


def test_errors():
    net = symmetric()
    opt = symopt.Adam(net)
    loss = loss_of(net)

    def backward():
        value = loss()
        value.backward()
        return value

    sparse = symopt.constrain(torch.nn.Linear(2, 2), {"weight": symopt.Sparse()})
    lowrank = symopt.constrain(torch.nn.Linear(2, 2), {"weight": symopt.LowRank()})
    explicit = symopt.constrain(torch.nn.Linear(2, 2), {"weight": symopt.Symmetric(strength=1.0)}, mode="explicit")
    for error, match, call in [
        (TypeError, "opt must be a symopt optimizer", lambda: symopt.certify(net, None, loss)),
        (TypeError, "model must be", lambda: symopt.certify(None, opt, loss)),
        (TypeError, "return the loss as a tensor", lambda: symopt.certify(net, opt, lambda: 1.0)),
        (ValueError, "scalar", lambda: symopt.certify(net, opt, lambda: net.weight)),
        (ValueError, "scalar", lambda: symopt.certify(net, opt, lambda: net.weight.detach().sum())),
        (ValueError, "without calling backward", lambda: symopt.certify(net, opt, backward)),
        (ValueError, "samples must be >= 1", lambda: symopt.certify(net, opt, loss, samples=0)),
        (TypeError, "samples must be an integer", lambda: symopt.certify(net, opt, loss, samples=2.0)),
        (ValueError, "no group of opt", lambda: symopt.certify(sparse, opt, loss)),
        (ValueError, "explicit mode", lambda: symopt.certify(explicit, opt, loss)),
        (
            ValueError,
            "weight is bound by LowRank.*pass a submodule",
            lambda: symopt.certify(lowrank, symopt.SGD(lowrank), loss),
        ),
        (ValueError, "no fixed plane", lambda: symopt.critical_strength(sparse, loss)),
    ]:
        with pytest.raises(error, match=match):
            call()


@cases(
    made=[
        lambda: symopt.Sparse(strength=0.5),
        lambda: symopt.GroupSparse("out", strength=0.5),
        lambda: symopt.GroupBridge("in", strength=0.5),
    ]
)
def test_where_nothing_is_zero_there_is_no_critical_strength(made):
    net = torch.nn.Linear(3, 3, bias=False, dtype=torch.float64)
    symopt.constrain(net, {"weight": made()})
    with torch.no_grad():
        net.weight.copy_(torch.eye(3) + 0.5)
    opt = symopt.SGD(net, lr=0.1)
    train(net, opt, 1)
    (row,) = symopt.certify(net, opt, loss_of(net)).rows
    assert row.verdict == "not reached" and row.critical is row.interval is None and 0 < row.steps < 1e4
    assert "no unit is zero yet" in row.words and "above" not in row.words
    json.dumps(symopt.certify(net, opt, loss_of(net), samples=3).to_dict())
    opt.param_groups[0]["strength"] = 0.0
    assert "its strength is 0" in str(symopt.certify(net, opt, loss_of(net)))


def test_what_no_gradient_pulls_at_stays_without_a_critical_strength():
    net = torch.nn.Linear(3, 2, bias=False, dtype=torch.float64)
    symopt.constrain(net, {"weight": symopt.Sparse(strength=0.5)})
    with torch.no_grad():
        net.weight[:, 0] = 0
    x = torch.ones(1, 3, dtype=torch.float64)
    x[:, 0] = 0  # an input that is never seen
    opt = symopt.SGD(net, lr=0.1)
    (row,) = symopt.certify(net, opt, lambda: net(x).sum()).rows
    assert row.critical == 0 and row.verdict == "exact" and row.words.startswith("no gradient pulls")
