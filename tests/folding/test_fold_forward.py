"""fold: what it reads from a ``forward``, and where it must keep shapes and say why."""

import torch
import torch.nn.functional as F
from torch import nn

import symopt
from support.cases import cases
from support.networks import IMAGE, LINE, LINES, chain, folded, kill, outputs, widths
from support.tolerances import tolerance
from symopt.folding import rules
from symopt.folding.fold import fold

# -- what is read from forward ---------------------------------------------------------------------------------------


torch.manual_seed(0)  # for the layers in the tables below


class Net(nn.Module):
    """Layers by keyword; ``run(self, x)`` is the forward.  Unit 1 of layer ``a`` is dead, with a nonzero bias."""

    def __init__(self, run, **layers):
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return self.run(self, x)


def make(run, **layers):
    return kill(Net(run, **layers).double(), {"a": [1]})


def pooled(n, x):
    return F.max_pool2d(F.relu(n.a(x)), 2)


def batch_first(n, x):
    batch = x.shape[0]
    return n.b(pooled(n, x).reshape(batch, -1))


def augmented(n, x):
    h = n.a(x)
    h += 1
    h *= 2
    return n.b(torch.flatten(F.avg_pool2d(h, 2), 1))


def silu_by_hand(n, x):
    h = pooled(n, x)
    return n.b((h * torch.sigmoid(h)).flatten(1))


def in_place_method(n, x):
    return n.b(n.a(x).relu_().amax((2, 3)))


FORMS = {
    "flatten": (16, lambda n, x: n.b(torch.flatten(pooled(n, x), 1))),
    "flatten from the end": (16, lambda n, x: n.b(pooled(n, x).flatten(-3))),
    "flatten twice": (16, lambda n, x: n.b(pooled(n, x).flatten(2).flatten(1, 2))),
    "view of size": (16, lambda n, x: n.b((h := pooled(n, x)).view(h.size(0), -1))),
    "view of size()": (16, lambda n, x: n.b((h := pooled(n, x)).view(h.size()[0], -1))),
    "view of shape": (16, lambda n, x: n.b((h := pooled(n, x)).view((h.shape[0], -1)))),
    "reshape": (16, lambda n, x: n.b(torch.reshape(h := pooled(n, x), (h.shape[0], -1)))),
    "reshape by the input": (16, batch_first),
    "augmented": (16, augmented),
    "silu by hand": (16, silu_by_hand),
    "mean": (4, lambda n, x: n.b(n.a(x).tanh().mean((2, 3)))),
    "mean, keepdim": (4, lambda n, x: n.b(torch.mean(n.a(x), dim=(-1, -2), keepdim=True).flatten(1))),
    "in place": (4, in_place_method),
    "scalars": (4, lambda n, x: n.b(1 - 3 * F.gelu(F.adaptive_avg_pool2d(n.a(x), 1)).flatten(1) ** 2)),
    "threshold": (4, lambda n, x: n.b(F.adaptive_max_pool2d(F.threshold(n.a(x), 0.1, 0.3), 1).flatten(1))),
    "device of a weight": (4, lambda n, x: n.b(n.a(x.to(n.a.weight.device, n.b.weight.dtype)).amax((2, 3)))),
    "dropout": (4, lambda n, x: n.b(F.dropout(n.a(x), 0.5, n.training).mean((2, 3)))),
}


@cases(form=FORMS, example=[False, True])
def test_functional_forms(form, example):
    features, run = FORMS[form]
    small = folded(make(run, a=nn.Conv2d(1, 4, 3), b=nn.Linear(features, 2)), IMAGE, example=example)
    assert widths(small) == {"a": (3, 1), "b": (2, features * 3 // 4)}


def test_linear_on_the_last_of_three_dimensions():
    run = lambda n, x: x + n.b(F.gelu(n.a(n.norm(x))))  # noqa: E731
    layers = {"norm": nn.LayerNorm(4), "a": nn.Linear(4, 6), "b": nn.Linear(6, 4)}
    assert widths(folded(make(run, **layers), LINES)) == {"a": (5, 4), "b": (4, 5)}


def test_residual_blocks_shrink_inside():
    def block(n, x):
        skip = n.stem(x)
        out = n.relu(n.norm(n.a(skip)))
        out = n.b(n.relu(n.inner(out)))
        out += skip  # in place, but not on skip, which is read twice
        return n.relu(out)

    net = make(
        block,
        stem=nn.Conv2d(1, 4, 3),
        a=nn.Conv2d(4, 6, 1),
        norm=nn.BatchNorm2d(6),
        inner=nn.Conv2d(6, 5, 3, padding=1),
        b=nn.Conv2d(5, 4, 1, bias=False),
        relu=nn.ReLU(inplace=True),
    )
    net.a.bias.data[1] = -1
    small = folded(kill(net, {"stem": [0], "inner": [2]}, {"b": [0, 1]}), IMAGE)
    assert widths(small) == {"stem": (4, 1), "a": (5, 4), "inner": (2, 5), "b": (4, 2)}
    assert {"stem: output is used by `iadd`, shape kept", "b: output is used by `iadd`, shape kept"} == set(
        small.fold_config["kept"]
    )


def test_two_readers_of_one_layer():
    run = lambda n, x: (n.b(h := n.a(x).sigmoid()), n.c(h))  # noqa: E731
    net = make(run, a=nn.Linear(4, 6), b=nn.Linear(6, 2), c=nn.Linear(6, 3))
    kill(net, cols={"b": [3, 4], "c": [4, 5]})  # only unit 4 is read by neither
    small = fold(net)
    assert widths(small) == {"a": (4, 4), "b": (2, 4), "c": (3, 4)}
    for mine, theirs in zip(outputs(small, LINE), outputs(net, LINE), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance("factor step"), atol=tolerance("factor step"))


def test_a_subclass_that_only_adds_constraints_is_a_layer():
    @symopt.constrain({"weight": symopt.GroupSparse("out")})
    class Block(nn.Linear): ...

    assert widths(folded(chain(Block(4, 3), Block(3, 2), rows={"0": [0]}).eval(), LINE)) == {"0": (2, 4), "1": (2, 2)}


def test_a_new_operation_is_one_line_even_if_it_swallows_nan(monkeypatch):
    monkeypatch.setitem(rules.RULES, torch.nan_to_num, rules.RULES[torch.relu])
    net = make(lambda n, x: n.b(torch.nan_to_num(n.a(x))), a=nn.Linear(4, 3), b=nn.Linear(3, 2))
    assert widths(folded(net, LINE)) == {"a": (2, 4), "b": (2, 2)}


# -- where shapes are kept, and why ----------------------------------------------------------------------------------


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked(module):
    module.register_forward_hook(lambda m, args, out: out + 1)
    return module


def replaced(module):
    module.forward = lambda x, old=module.forward: old(x) + 1
    return module


def linear(out=4, **more):
    return {"a": nn.Linear(4, out), "b": nn.Linear(out, 2), **more}


def convs(*args, **kwargs):
    return {"a": nn.Conv2d(1, 4, 3), "b": nn.Conv2d(4, 4, *args, **kwargs)}


def residual(n, x):
    h = n.a(x)
    h += x
    return n.b(h)


plain_run = lambda n, x: n.b(n.a(x))  # noqa: E731
KEPT = {
    "output": (lambda n, x: n.a(x), {"a": nn.Linear(4, 4)}, "a: is the model's output"),
    "the whole model": (None, None, "model: is the model itself"),
    "also an output": (lambda n, x: n.b(h := n.a(x)).sum(1) + h.sum(1), linear(), "a: output is used by `sum_2`"),
    "not used": (lambda n, x: (n.a(x), n.b(x))[1], linear(), "a: output is not used"),
    "residual": (lambda n, x: n.b(n.a(x) + x), linear(), "a: output is used by `add`"),
    "residual in place": (residual, linear(), "a: output is used by `iadd`"),
    "gate": (lambda n, x: n.b(n.a(x) * n.c(x)), linear(c=nn.Linear(4, 4)), "a: output is used by `mul`"),
    "concatenation": (
        lambda n, x: n.b(torch.cat([n.a(x), x], 1)),
        linear() | {"b": nn.Linear(8, 2)},
        "a: output is used by `cat`",
    ),
    "indexing": (lambda n, x: n.b(n.a(x)[:, :3]), linear() | {"b": nn.Linear(3, 2)}, "a: output is used by `getitem`"),
    "called twice": (
        lambda n, x: n.c(n.b(n.b(n.a(x)))),
        linear() | {"b": nn.Linear(4, 4), "c": nn.Linear(4, 2)},
        "a: output is used by `b`, which is called more than once",
    ),
    "itself called twice": (lambda n, x: n.b(n.a(n.a(x))), linear(), "a: is called more than once"),
    "weight read": (
        lambda n, x: n.b(n.a(x)) + n.a.weight.sum(),
        linear(),
        "a: has parameters that forward reads directly",
    ),
    "functional": (lambda n, x: F.linear(n.a(x), n.b.weight), linear(), "a: output is used by `linear`"),
    "layer norm": (lambda n, x: n.b(n.c(n.a(x))), linear(c=nn.LayerNorm(4)), "a: output is used by `c`"),
    "softmax": (lambda n, x: n.b(F.softmax(n.a(x), -1)), linear(), "a: output is used by `softmax`"),
    "glu": (lambda n, x: n.b(F.glu(n.a(x))), linear() | {"b": nn.Linear(2, 2)}, "a: output is used by `glu`"),
    "attention": (
        lambda n, x: n.b(n.c(n.a(x), n.a(x), n.a(x))[0]),
        linear(c=nn.MultiheadAttention(4, 2)),
        "c: no rule for MultiheadAttention",
    ),
    "hook": (
        plain_run,
        linear() | {"b": hooked(nn.Linear(4, 2))},
        "a: output is used by `b`, which has hooks or a replaced forward",
    ),
    "hooked activation": (
        lambda n, x: n.b(n.c(n.a(x))),
        linear(c=hooked(nn.ReLU())),
        "c: has hooks or a replaced forward",
    ),
    "forward replaced": (plain_run, linear() | {"b": replaced(nn.Linear(4, 2))}, "b: has hooks or a replaced forward"),
    "parametrized": (
        plain_run,
        linear() | {"b": nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))},
        "a: output is used by `b`, which has parametrizations",
    ),
    "extra state": (plain_run, linear() | {"b": nn.Linear(4, 2)}, "b: has state of its own"),
    "own forward": (plain_run, linear() | {"b": Doubled(4, 2)}, "a: output is used by `linear`"),
    "pooling of units": (
        lambda n, x: n.b(F.max_pool1d(n.a(x), 2)),
        linear() | {"b": nn.Linear(2, 2)},
        "a: output is used by `max_pool1d`, along the same dimension",
    ),
    "size read": (
        lambda n, x: n.b(h := n.a(x)) / h.size(1),
        linear(),
        "a: output is used by `size`, which may read its size",
    ),
    "size of the layer read": (
        lambda n, x: n.b(n.a(x)) / n.a.out_features,
        linear(),
        "a: has a size that forward reads",
    ),
    "sizes of layers read together": (
        lambda n, x: n.b(n.a(x)) / max(n.a.out_features, n.b.in_features),
        linear(),
        "a: has a size that forward reads",
    ),
    "size of the layer made a tensor": (
        lambda n, x: n.b(n.a(x)) / torch.tensor(float(n.a.out_features)),
        linear(),
        "a: has a size that forward reads",
    ),
    "fixed view": (
        lambda n, x: n.b(pooled(n, x).view(-1, 16)),
        {"a": nn.Conv2d(1, 4, 3), "b": nn.Linear(16, 2)},
        "a: output is used by `view`, which may fix a size",
    ),
    "linear on pixels": (
        plain_run,
        {"a": nn.Conv2d(1, 4, 3), "b": nn.Linear(4, 2)},
        "a: output is used by `b`, along another dimension",
    ),
    "fixed view beside the batch": (
        lambda n, x: n.b((h := pooled(n, x)).view(h.size(0), 16)),
        {"a": nn.Conv2d(1, 4, 3), "b": nn.Linear(16, 2)},
        "a: output is used by `view`, which may fix a size",
    ),
    "flattened whole": (
        lambda n, x: n.b(pooled(n, x).flatten(0).view(-1, 16)),
        {"a": nn.Conv2d(1, 4, 3), "b": nn.Linear(16, 2)},
        "a: output is used by `flatten`",
    ),
    "flattened batch": (
        lambda n, x: n.b(n.a(x).flatten(0, 1).flatten(1)),
        {"a": nn.Conv2d(1, 4, 3), "b": nn.Linear(16, 2)},
        "a: output is used by `flatten`",
    ),
    "grouped": (
        plain_run,
        convs(3, groups=2),
        "a: output is used by `b`, which is a grouped convolution that is not depthwise",
    ),
    "transposed": (plain_run, convs(3) | {"b": nn.ConvTranspose2d(4, 2, 3)}, "b: no rule for ConvTranspose2d"),
}
KEPT["extra state"][1]["b"].register_buffer("mask", torch.ones(2, 4))


@cases(case=KEPT, example=[False, True])
def test_shapes_that_are_kept(case, example):
    run, layers, reason = KEPT[case]
    net = make(run, **layers) if run else nn.Linear(4, 4).double()
    x = IMAGE if layers and isinstance(net.a, nn.Conv2d) else LINE
    small = folded(net, x, example=example)
    assert widths(small) == widths(net)
    assert f"{reason}, shape kept" in small.fold_config["kept"]


def test_tied_weights_are_kept():
    net = make(plain_run, a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    net.b.weight = net.a.weight
    small = folded(net, LINE)
    assert widths(small) == {"a": (4, 4), "b": (4, 4)} and small.a.weight is small.b.weight
    assert small.fold_config["kept"] == [f"{n}: shares a parameter with another module, shape kept" for n in "ab"]


def branches(n, x):
    return n.b(n.a(x)) if x.sum() > 0 else x


def only_in_training(n, x):
    return n.b(n.a(x) * torch.rand_like(x)) if n.training else n.b(n.a(x))


def changes_what_is_read(n, x):
    h = n.a(x)
    h += 1
    return n.b(h) + n.b2(F.relu_(h.view(-1, 4)))


OPAQUE = {
    "control flow": (
        branches,
        "torch.fx cannot trace forward (symbolically traced variables cannot be used as inputs to control flow)",
    ),
    "training differs": (only_in_training, "forward differs between training and evaluation"),
    "in place, read elsewhere": (
        changes_what_is_read,
        "`relu_` works in place on a tensor that is also used elsewhere",
    ),
}


@cases(case=OPAQUE)
def test_what_cannot_be_analysed_is_copied(case):
    run, reason = OPAQUE[case]
    net = make(run, **linear(b2=nn.Linear(4, 2)))
    small = folded(net, LINE)
    assert small is not net and widths(small) == widths(net)
    assert small.fold_config["kept"] == [f"model: {reason}, nothing removed"]


def test_augmented_assignment_is_seen_to_change_the_old_name():
    def run(n, x):
        h = old = n.a(x)
        h += 1  # changes old as well, although torch.fx records h = h + 1
        return n.b(old) + h.sum()

    assert "works in place" in folded(make(run, **linear()), LINE).fold_config["kept"][0]


def test_weights_without_data_are_kept():
    with torch.device("meta"):
        small = fold(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    assert (
        small.fold_config["kept"][0]
        == "0: has a weight that is not a plain floating point Parameter with data, shape kept"
    )
    assert small[0].weight.is_meta


def test_other_layers_still_shrink_beside_a_kept_one():
    net = make(
        lambda n, x: n.d(F.relu(n.c(n.b(n.a(x)) / n.a.out_features))),
        **linear(),
        c=nn.Linear(2, 5),
        d=nn.Linear(5, 1),
    )
    small = folded(kill(net, {"c": [0]}), LINE)
    assert widths(small) == {"a": (4, 4), "b": (2, 4), "c": (4, 2), "d": (1, 4)}
