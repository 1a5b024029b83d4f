"""fold: a dead channel in front of a BatchNorm has in eval mode the value that batch statistics give it."""

import copy

import pytest
import torch
from torch import nn

import symopt
from support.cases import cases
from support.tolerances import tolerance
from symopt.folding.fold import fold

X = torch.randn(64, 2, 6, generator=torch.Generator().manual_seed(0)).double()


def made(affine=True, padding=0, kind="conv", **options):
    """A network whose channel 1 died long ago: its bias has moved since, and the running mean lags."""
    torch.manual_seed(0)
    first = nn.Conv1d(2, 4, 3) if kind == "conv" else nn.Linear(6, 4)
    norm = nn.BatchNorm1d(4, affine=affine, **options)
    last = nn.Conv1d(4, 3, 3, padding=padding) if kind == "conv" else nn.Linear(4, 3)
    net = nn.Sequential(first, norm, nn.Sigmoid(), last).double()
    symopt.constrain(net, {"0.weight": symopt.GroupSparse("out")})
    with torch.no_grad():
        first.weight[1] = 0
        for k in range(150):
            first.bias[1] = 0.01 * k
            norm(first(inputs(kind)))
    return net


def inputs(kind):
    return X if kind == "conv" else X[:, 0]


def by_batch(net, x):
    """In training mode, without a trace in the buffers."""
    with torch.no_grad():
        return copy.deepcopy(net).train()(x)


def close(one, two):
    torch.testing.assert_close(one, two, rtol=tolerance("folded"), atol=tolerance("folded"))


@cases(affine=[True, False], padding=[0, 1], kind=["conv", "linear"], example=[False, True])
def test_the_value_is_that_of_batch_statistics(affine, padding, kind, example):
    net, x = made(affine, padding, kind), inputs(kind)
    small = fold(net, x if example else ()).eval()
    channel = copy.deepcopy(net)
    with torch.no_grad():  # what the others are, by running statistics; the dead one by those of a batch
        value = channel[1].bias[1] if affine else torch.zeros(()).double()
        normed = channel.eval()[1](channel[0](x))
        assert float((normed[:, 1] - value).abs().max()) > 1  # the lag is worth correcting
        close(by_batch(net[:2], x)[:, 1], value.expand_as(normed[:, 1]))
        normed[:, 1] = value
        close(small(x), channel[3](channel[2](normed)))
    assert small.fold_config["running_mean"] == {"1": 1}
    assert small[0].weight.shape[0] == (4 if padding and kind == "conv" else 3)
    assert "running_mean" not in fold(small).fold_config


def test_both_modes_agree_afterwards():
    """With one long batch, whose statistics the running ones become (momentum 1)."""
    net = made(padding=1, momentum=1.0, affine=False)
    with torch.no_grad():
        net[0].bias[1] += 0.5  # as an optimizer's step after the forward pass
        n = net[1].running_var.numel()
        count = 64 * 4
        net[1].running_var[torch.arange(n) != 1] *= (count - 1) / count  # torch's running variance is unbiased
    small = fold(net, X).eval()
    close(small(X), by_batch(net, X))


@pytest.mark.parametrize("case", ["unconstrained", "frozen", "frozen scale", "alive", "no statistics"])
def test_what_is_not_touched(case):
    net = made(track_running_stats=case != "no statistics", padding=1)
    if case == "unconstrained":  # zeroed by hand after training: eval mode is what was meant
        symopt.release(net)
    elif case == "frozen":
        net[1].eval()
    elif case == "frozen scale":
        net[1].weight.requires_grad_(False)
    elif case == "alive":
        net[0].weight.data[1, 0, 0] = 1e-3
    small = fold(net, X)
    assert "running_mean" not in small.fold_config
    close(small.eval()(X), copy.deepcopy(net).eval()(X))


def test_a_norm_over_tokens_is_no_norm_over_channels():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 2), nn.BatchNorm1d(2), nn.Linear(2, 3)).double()
    symopt.constrain(net, {"0.weight": symopt.GroupSparse("out")})
    with torch.no_grad():
        net[0].weight[1] = 0
        net[1].running_mean.normal_()
    small = fold(net, X)
    assert "running_mean" not in small.fold_config
    close(small.eval()(X), net.eval()(X))
