"""Networks with tied and equivariant weights: bit for bit on the plane, saved, folded, released; what is refused."""

import copy
import io

import pytest
import torch

import symopt
from support.cases import cases
from support.planes import KEYS, Pair, fit, pair, randn
from support.table import ANY_SHAPE, PLANES, ids

every_plane = pytest.mark.parametrize("row", PLANES, ids=ids)


# -- bits ------------------------------------------------------------------------------------------------------------


def test_equivariant_weights_are_on_the_plane_bit_for_bit():
    shift = [(torch.arange(8).roll(1), torch.arange(12).roll(3))]
    net = torch.nn.Linear(12, 8)
    symopt.constrain(net, {("weight", "bias"): symopt.Equivariant(shift)})
    opt = symopt.AdamW(net, lr=2e-2)
    x, y = randn((40, 12)).float(), randn((40, 8), 2).float()
    for _ in range(30):
        opt.zero_grad()
        (net(x) - y).square().mean().backward()
        opt.step()
    folded = symopt.fold(net)
    for layer, exact in ((net, False), (folded, True)):
        rolled = layer.weight.roll(1, 0).roll(3, 1)
        assert torch.equal(rolled, layer.weight) == exact and torch.equal(layer.bias.roll(1), layer.bias) == exact
    for _ in range(500):
        opt.zero_grad()
        (net(x) - y).square().mean().backward()
        opt.step()
    assert torch.equal(net.weight.roll(1, 0).roll(3, 1), net.weight) and torch.equal(net.bias.roll(1), net.bias)


@cases(opt_row=ANY_SHAPE)
def test_a_tied_network_goes_on_from_a_checkpoint(opt_row):
    lr = opt_row.lr * (0.01 if opt_row.options.get("maximize") else 1)  # a square has no maximum
    build = lambda net: opt_row.cls(net, lr=lr, **opt_row.options)  # noqa: E731
    net = pair()
    opt = build(net)
    fit(net, opt, 8)
    memory = io.BytesIO()
    torch.save({"net": net.state_dict(), "opt": opt.state_dict()}, memory)
    memory.seek(0)
    saved = torch.load(memory, weights_only=True)
    again = pair()
    other = build(again)
    again.load_state_dict(saved["net"])
    other.load_state_dict(saved["opt"])
    clone, third = copy.deepcopy((net, opt))
    for module, optimizer in ((net, opt), (again, other), (clone, third)):
        fit(module, optimizer, 8)
    for p, q, r in zip(net.parameters(), again.parameters(), clone.parameters(), strict=True):
        assert torch.equal(p, q) and torch.equal(p, r)
    plain = opt_row.torch_cls(Pair().parameters(), lr=opt_row.lr, **opt_row.options)
    plain.load_state_dict(saved["opt"])
    back = build(again)
    back.load_state_dict(plain.state_dict())
    fit(again, back, 2)
    assert all(bool(p.isfinite().all()) for p in again.parameters())


def test_fold_makes_tied_weights_one_parameter():
    net = pair()
    opt = symopt.AdamW(net, lr=2e-2)
    fit(net, opt, 20)
    assert not torch.equal(net.a.weight, net.b.weight)
    small = symopt.fold(net, randn((3, 10)).float())
    assert small.a.weight is small.b.weight and small.a.bias is small.b.bias
    assert small.fold_config["parameters"] == {"before": 53, "after": 29}
    fit(net, opt, 700)
    assert torch.equal(net.a.weight, net.b.weight) and torch.equal(net.a.bias, net.b.bias)
    x = randn((9, 10)).float()
    assert torch.equal(symopt.fold(net)(x), net(x))
    rows = {row.name: row for row in symopt.report(net, opt).rows}
    assert rows["a.weight"].violation == 0 and rows["a.weight"].strength > 0 and rows["b.bias"].live == 0


def test_tied_weights_that_start_equal_stay_equal():
    net = Pair()
    net.b.load_state_dict(net.a.state_dict())
    symopt.constrain(net, KEYS)
    opt = symopt.Adam(net, lr=1e-2)
    for _ in range(20):
        fit(net, opt, 1)
        assert torch.equal(net.a.weight, net.b.weight) and torch.equal(net.a.bias, net.b.bias)


def test_a_member_without_a_gradient_moves_with_the_others():
    net = pair()
    opt = symopt.SGD(net, lr=0.1, strength=1.0)
    net.b.requires_grad_(False)
    before = net.b.weight.clone()
    fit(net, opt, 1)
    assert not torch.equal(net.b.weight, before)


def test_half_precision_reaches_the_plane():
    net = symopt.constrain(Pair().bfloat16(), KEYS)
    opt = symopt.AdamW(net, lr=2e-2)
    x = randn((30, 10), 7).bfloat16()
    for _ in range(600):
        opt.zero_grad()
        (net(x) - 1).square().mean().backward()
        opt.step()
    assert torch.equal(net.a.weight, net.b.weight)
    assert opt.state[net.a.weight]["exp_avg"].dtype == torch.float32
    assert torch.equal(opt.state[net.a.weight]["master"], opt.state[net.b.weight]["master"])


def test_released_members_train_apart():
    net = pair()
    opt = symopt.AdamW(net, lr=1e-2)
    fit(net, opt, 5)
    symopt.release(net)
    fit(net, opt, 3)
    states = [opt.state[p] for p in net.parameters()]
    assert all(float(state["step"]) == 8 for state in states)
    assert all(state["exp_avg_sq"].shape == p.shape for state, p in zip(states, net.parameters(), strict=True))
    assert not torch.equal(net.a.weight, net.b.weight)


# -- errors ----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_tied_says_so():
    def bind(module, key, constraint, **options):
        return symopt.constrain(module, {key: constraint}, **options)

    linear = torch.nn.Linear
    both = torch.nn.Sequential(linear(3, 4), linear(4, 3))
    one = ("0.weight", "1.weight")
    for error, match, call in [
        (ValueError, r"views=\[None, 'T'\]", lambda: bind(both, one, symopt.Tied())),
        (ValueError, "two or more", lambda: bind(both, "0.weight", symopt.Tied())),
        (ValueError, "overlap", lambda: bind(both, "0.weight", symopt.Tied(views=[slice(0, 2), slice(1, 3)]))),
        (ValueError, "3 views for 2", lambda: bind(both, one, symopt.Tied(views=[None, "T", None]))),
        (
            TypeError,
            "must return a view",
            lambda: bind(both, "0.weight", symopt.Tied(views=[lambda w: 2 * w + 40, None])),
        ),
        (TypeError, "must return a view", lambda: bind(both, "0.weight", symopt.Tied(views=[lambda w: w / 2, None]))),
        (ValueError, "empty", lambda: bind(both, "0.weight", symopt.Tied(views=[slice(0), slice(0)]))),
        (TypeError, "a view must be", lambda: symopt.Tied(views=["t", None])),
        (TypeError, "must be a list", lambda: symopt.Tied(views="T")),
        (ValueError, "'joint' or 'elementwise'", lambda: symopt.Tied(mode="pairs")),
        (ValueError, "square", lambda: bind(both, "0.weight", symopt.Symmetric())),
        (ValueError, "square", lambda: bind(both, "0.bias", symopt.Circulant())),
        (ValueError, "no dimension", lambda: bind(both, "0.weight", symopt.ZeroMean(dim=2))),
        (TypeError, "dim must be", lambda: symopt.ZeroMean(dim="out")),
        (ValueError, "no permutation", lambda: symopt.Equivariant([[0, 2]])),
        (TypeError, "integers", lambda: symopt.Equivariant([[0.5, 1.0]])),
        (TypeError, "list of generators", lambda: symopt.Equivariant("flip")),
        (ValueError, "empty", lambda: symopt.Equivariant([])),
        (ValueError, "pair", lambda: symopt.Equivariant([([0], [0], [0])])),
        (ValueError, "does not fit dimension 1", lambda: bind(both, "0.weight", symopt.Equivariant([[0, 1, 2, 3]]))),
        (ValueError, "leave it out", lambda: bind(both, "0.bias", symopt.Equivariant([(None, [1, 0])]))),
        (TypeError, "either project", lambda: symopt.Mirror()),
        (TypeError, "basis=", lambda: symopt.Mirror(torch.eye(3))),
        (ValueError, "needs coordinates", lambda: symopt.Mirror(abs, form="coordinates")),
        (ValueError, "'gate' or 'coordinates'", lambda: symopt.Mirror(abs, form="pairs")),
        (TypeError, "floating-point", lambda: symopt.Mirror(basis=torch.eye(3).long())),
        (ValueError, r"\(weights, k\)", lambda: symopt.Mirror(basis=torch.ones(3))),
        (ValueError, "qr", lambda: symopt.Mirror(basis=torch.ones(3, 1))),
        (ValueError, "3 rows, the weights are 12", lambda: bind(both, "0.weight", symopt.Mirror(basis=torch.eye(3)))),
        (ValueError, "not linear", lambda: bind(both, "0.weight", symopt.Mirror(lambda w: w.abs()))),
        (ValueError, "no projection", lambda: bind(both, "0.weight", symopt.Mirror(lambda w: w / 2))),
        (ValueError, "not orthogonal", lambda: bind(both, "0.bias", symopt.Mirror(lambda b: b[0] * torch.ones(4)))),
        (ValueError, "nothing to constrain", lambda: bind(both, "0.weight", symopt.Mirror(lambda w: w))),
        (ValueError, "shapes", lambda: bind(both, "0.weight", symopt.Mirror(lambda w: w.T))),
        (TypeError, "return a tensor", lambda: bind(both, "0.weight", symopt.Mirror(lambda w: None))),
        (ValueError, "automatic", lambda: bind(linear(3, 3), "weight", symopt.Symmetric(), mode="explicit")),
        (
            ValueError,
            "no gauge",
            lambda: bind(linear(3, 3), "weight", symopt.Symmetric(strength=1.0), mode="explicit", init="gates"),
        ),
        (ValueError, "give .* a strength", lambda: symopt.constrain(Pair(), KEYS, mode="explicit")),
    ]:
        with pytest.raises(error, match=match):
            call()
    assert symopt.constraints(both) == {}
    shared = torch.nn.Sequential(linear(3, 3), linear(3, 3))
    shared[1].weight = shared[0].weight
    with pytest.raises(ValueError, match="same tensor already"):
        bind(shared, "*.weight", symopt.Tied())
    mixed = torch.nn.Sequential(linear(3, 3), linear(3, 3).double())
    with pytest.raises(ValueError, match="needs one of each"):
        bind(mixed, "*.weight", symopt.Tied())


def test_members_belong_together():
    net = pair()
    with pytest.raises(ValueError, match=r"a.weight shares a constraint with b.weight.*param_groups"):
        symopt.AdamW([net.a.weight, net.out.weight])
    with pytest.raises(ValueError, match="not in its param group"):
        symopt.AdamW([{"params": list(net.a.parameters())}, {"params": list(net.b.parameters())}])
    with pytest.raises(ValueError, match="release the module that holds both"):
        symopt.release(net.a)
    with pytest.raises(ValueError, match="outside of this module"):
        symopt.fold(net.a)
    with pytest.raises(ValueError, match="shares a constraint"):
        symopt.AdamW(copy.deepcopy(net.a))
    assert len(symopt.param_groups(net)) == 3
    opt = symopt.AdamW(symopt.param_groups(net), lr=1e-2)
    fit(net, opt, 2)
