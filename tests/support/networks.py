"""Networks to fold, what must hold whenever one is folded, and the oracle.

The oracle for *which* units remain is numerical and knows nothing of graphs: at the input of the next layer, a unit is
alive iff the output has a gradient there and the value varies (or is a nonzero constant that zero padding spoils).
"""

import copy
import json
import random

import torch
from torch import nn

from support.tolerances import tolerance
from symopt.folding.fold import fold

_seeded = torch.Generator().manual_seed(0)
LINE, LINES, IMAGE = (torch.randn(*shape, generator=_seeded).double() for shape in [(5, 4), (5, 7, 4), (5, 1, 6, 6)])


def kill(net, rows=(), cols=()):
    """Zero whole rows (incoming weights) or columns (outgoing weights) of ``name: [index, ...]``."""
    with torch.no_grad():
        for name, index in dict(rows).items():
            net.get_parameter(f"{name}.weight")[index] = 0
        for name, index in dict(cols).items():
            net.get_parameter(f"{name}.weight")[:, index] = 0
    return net


def chain(*layers, rows=(), cols=()):
    """A Sequential in float64 with lived-in BatchNorm statistics."""
    net = nn.Sequential(*layers).double()
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None:
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
            if m.weight is not None:
                nn.init.normal_(m.weight)
                nn.init.normal_(m.bias)
    return kill(net, rows, cols)


def widths(net):
    return {
        n: tuple(m.weight.shape[:2])
        for n, m in net.named_modules()
        if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))
    }


def outputs(net, *inputs):
    with torch.no_grad():
        return copy.deepcopy(net).eval()(*(x.clone() for x in inputs))


def folded(net, *inputs, example=False):
    """Fold, and check all that must hold always."""
    before = {key: t.clone() for key, t in net.state_dict().items()}
    small = fold(net, inputs if example else None)
    torch.testing.assert_close(
        outputs(small, *inputs), outputs(net, *inputs), rtol=tolerance("folded"), atol=tolerance("folded")
    )
    assert all(torch.equal(t, before[key]) for key, t in net.state_dict().items())
    assert [m.training for m in small.modules()] == [m.training for m in net.modules()]
    again = fold(small, inputs if example else None)
    assert widths(again) == widths(small)
    assert all(torch.equal(t, small.state_dict()[key]) for key, t in again.state_dict().items())
    assert not hasattr(net, "fold_config") and json.loads(json.dumps(small.fold_config)) == small.fold_config
    return small


SMOOTH = [nn.Sigmoid, nn.Tanh, nn.Softplus, nn.GELU, nn.SiLU, nn.Identity]  # a gradient of zero is then structural


def random_chain(seed, activations):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    width = lambda: rng.randint(2, 6)  # noqa: E731
    conv, layers, c = rng.random() < 0.6, [], 3
    rank = rng.choice([1, 2, 3]) if conv else 0
    norm, drop = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d], [nn.Dropout1d, nn.Dropout2d, nn.Dropout3d]
    for _ in range(rng.randint(1, 2) if conv else 0):
        out, padding = width(), rng.choice([0, 0, 1])
        kind, mode = [nn.Conv1d, nn.Conv2d, nn.Conv3d][rank - 1], rng.choice(["zeros", "circular"])
        layers.append(kind(c, out, 3, padding=padding, padding_mode=mode, bias=rng.random() < 0.7))
        layers += [norm[rank - 1](out)] * (rng.random() < 0.4)
        layers += [rng.choice(activations)(), drop[rank - 1]()]
        c = out
    if conv:
        pool = rng.choice(["AdaptiveAvgPool", "AdaptiveMaxPool"])
        layers += [getattr(nn, f"{pool}{rank}d")(2), nn.Flatten()]
        c *= 2**rank
    for _ in range(rng.randint(1, 3)):
        out = width()
        layers.append(nn.Linear(c, out, bias=rng.random() < 0.7))
        layers += [nn.BatchNorm1d(out)] * (rng.random() < 0.3)
        layers += [rng.choice(activations)(), nn.Dropout()]
        c = out
    net = chain(*layers, nn.Linear(c, 2, bias=rng.random() < 0.5))
    with torch.no_grad():
        for m in net:
            if hasattr(m, "weight"):
                m.weight[torch.rand(len(m.weight)) < 0.25] = 0
                if m.weight.dim() > 1:
                    m.weight[:, torch.rand(m.weight.shape[1]) < 0.2] = 0
                    m.weight[torch.rand(m.weight.shape) < 0.3] = 0
                if getattr(m, "bias", None) is not None:
                    m.bias[torch.rand(len(m.bias)) < 0.3] = 0
    return net, torch.randn(24, 3, *[8] * rank).double()


def expected_units(net, x):
    """Units each layer must keep, from values and gradients at the input of the layer that reads it."""
    value, layers, reads = x.requires_grad_(), [], []
    for m in copy.deepcopy(net).eval():
        if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd)):
            value.retain_grad()
            layers.append(m)
            reads.append(value)
        value = m(value)
    (value * torch.randn_like(value)).sum().backward()
    keep = []
    for before, m, value in zip(layers, layers[1:], reads[1:], strict=False):
        dims = [d for d in range(value.dim()) if d != 1]
        varies = value.amax(dims) - value.amin(dims) > 1e-12
        padded = any(getattr(m, "padding", ())) and m.padding_mode == "zeros"
        spoiled = padded & (value.abs().amax(dims) > 0)
        alive = (value.grad.abs().amax(dims) > 0) & (varies | spoiled)
        keep.append(max(1, int(alive.view(len(before.weight), -1).any(1).sum())))
    return [*keep, 2]
