"""fold: the same outputs (float64, eval mode), exactly the units that must remain, a plain module, errors that help."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import symopt
from support.cases import cases
from support.networks import (
    IMAGE,
    LINE,
    LINES,
    SMOOTH,
    chain,
    expected_units,
    folded,
    kill,
    outputs,
    random_chain,
    widths,
)
from symopt.folding.fold import fold
from symopt.folding.resize import resize


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# -- random chains against the numerical oracle ----------------------------------------------------------------------


@cases(seed=range(24), example=[False, True])
def test_random_chains_keep_exactly_the_living_units(seed, example):
    net, x = random_chain(seed, SMOOTH)
    small = folded(net, x, example=example)
    assert [out for out, _ in widths(small).values()] == expected_units(net, x.clone())


@cases(seed=range(12))
def test_random_chains_of_kinked_activations(seed):
    kinked = [nn.ReLU, nn.LeakyReLU, nn.ReLU6, nn.Hardshrink, nn.PReLU, nn.ELU, nn.Hardswish]
    net, x = random_chain(1000 + seed, kinked)
    small = folded(net, x)
    # A unit that only the data silence must stay: never fewer than the oracle, which would count it as dead.
    assert all(n >= m for (n, _), m in zip(widths(small).values(), expected_units(net, x.clone()), strict=True))


# -- constants -------------------------------------------------------------------------------------------------------

CONV = {"kernel_size": 3, "padding": 1}


@pytest.mark.parametrize(
    ("settings", "activation", "left"),
    [
        (CONV, nn.Sigmoid, 4),  # sigmoid(bias) is not zero, so the border would change
        (CONV | {"padding": "same"}, nn.Sigmoid, 4),
        (CONV | {"padding": "valid"}, nn.Sigmoid, 3),
        (CONV | {"padding": "same", "kernel_size": 1}, nn.Sigmoid, 3),
        (CONV | {"padding_mode": "reflect"}, nn.Sigmoid, 3),
        (CONV, nn.Hardshrink, 3),  # hardshrink(bias) is zero
    ],
)
def test_zero_padding_and_constant_channels(settings, activation, left):
    net = chain(nn.Conv2d(1, 4, 3), activation(), nn.Conv2d(4, 2, **settings), rows={"0": [2]})
    small = folded(net, IMAGE)
    assert widths(small)["0"] == (left, 1)
    reason = "0: 1 constant channels kept, because `2` pads with zeros"
    assert (reason in small.fold_config["kept"]) == (left == 4)


@pytest.mark.parametrize(
    ("pool", "left"),
    [
        (nn.AvgPool2d(3, 2, padding=1), 4),
        (nn.AvgPool2d(3, 2, padding=1, count_include_pad=False), 3),
        (nn.AvgPool2d(3, 2, ceil_mode=True), 3),
        (nn.AvgPool2d(2, divisor_override=3), 4),
        (nn.MaxPool2d(3, 2, padding=1), 3),
        (nn.MaxPool2d(3, 2, ceil_mode=True), 3),
    ],
)
def test_pools_that_keep_constants(pool, left):
    net = chain(nn.Conv2d(1, 4, 2), pool, nn.Conv2d(4, 2, 2), rows={"0": [2]})
    assert widths(folded(net, IMAGE))["0"] == (left, 1)


def test_dropout_that_is_always_on_spoils_constants_and_comparison():
    class Noisy(nn.Sequential):
        def forward(self, x):
            return self[1](F.dropout(self[0](x)))

    net = kill(Noisy(nn.Linear(4, 4), nn.Linear(4, 2)).double(), {"0": [1]}, {"1": [2]})
    small = fold(net, LINE)
    assert widths(small) == {"0": (3, 4), "1": (2, 3)}
    assert "model: outputs are random even in eval mode, so they were not compared" in small.fold_config["kept"]


@cases(multiplier=[1, 2])
def test_depthwise_convolutions_follow_their_channels(multiplier):
    depthwise = nn.Conv2d(4, 4 * multiplier, 3, groups=4, bias=False)
    layers = [nn.Conv2d(1, 4, 2), depthwise, nn.BatchNorm2d(4 * multiplier), nn.SiLU(), nn.Conv2d(4 * multiplier, 2, 2)]
    net = chain(*layers, rows={"0": [0], "1": slice(2 * multiplier, 3 * multiplier)})
    small = folded(net, IMAGE)
    assert widths(small) == {"0": (2, 1), "1": (2 * multiplier, 1), "4": (2, 2 * multiplier)}
    assert (small[1].groups, small[1].in_channels, small[1].out_channels) == (2, 2, 2 * multiplier)
    assert small[2].num_features == len(small[2].running_var) == 2 * multiplier


@cases(settings=[{}, {"track_running_stats": False}])
def test_zero_scales_of_batch_norm_remove_channels(settings):
    net = chain(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, **settings), nn.Tanh(), nn.Conv2d(4, 2, 3), rows={"0": [0]})
    with torch.no_grad():
        net[1].weight[1] = 0
    assert widths(folded(net, IMAGE)) == {"0": (2, 1), "3": (2, 2)}


def test_batch_norm_after_flatten_and_prelu_per_channel():
    layers = [nn.Conv2d(1, 4, 3), nn.PReLU(4), nn.Flatten(), nn.BatchNorm1d(64, affine=False), nn.Linear(64, 2)]
    small = folded(chain(*layers, rows={"0": [3]}), IMAGE)
    assert widths(small) == {"0": (3, 1), "4": (2, 48)} and small[3].num_features == 48
    assert small[1].num_parameters == len(small[1].weight) == 3


def test_shapes_decide_what_module_order_cannot():
    # As many positions as channels: without a batch dimension, flatten(1) leaves the channels alone.
    net = chain(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4, 2), rows={"0": [1]})
    small = folded(net, IMAGE[0, :, :4, :4], example=True)
    assert widths(small)["0"] == (4, 1)
    # As many tokens as features: BatchNorm1d normalises tokens.
    net = chain(nn.Linear(4, 7), nn.BatchNorm1d(7), nn.Linear(7, 2), rows={"0": [1]})
    small = folded(net, LINES, example=True)
    assert widths(small)["0"] == (7, 4)
    assert "0: output is used by `1`, along another dimension, shape kept" in small.fold_config["kept"]


def test_a_layer_of_dead_units_keeps_one():
    net = chain(nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 3), nn.Sigmoid(), nn.Linear(3, 2), rows={"2": [0, 1, 2]})
    small = folded(net, LINE)
    assert widths(small) == {"0": (1, 4), "2": (1, 1), "4": (2, 1)}
    reason = "every unit is dead, one kept because torch layers need a width of at least 1"
    assert {f"0: {reason}", f"2: {reason}"} < set(small.fold_config["kept"])


@pytest.mark.parametrize(("activation", "bias"), [(nn.Sigmoid, True), (nn.Tanh, False)])
def test_a_bias_is_made_only_for_a_constant_that_is_not_zero(activation, bias):
    net = chain(nn.Linear(4, 3, bias=False), activation(), nn.Linear(3, 2, bias=False), rows={"0": [1]})
    net[2].weight.requires_grad_(False)
    small = folded(net, LINE)
    assert (small[2].bias is not None) == bias == small.fold_config["layers"]["2"]["after"]["bias"]
    assert not bias or not small[2].bias.requires_grad


class Minus256(nn.Module):
    def forward(self, x):
        return x - 256


def test_constants_are_rounded_like_the_network_rounds_them():
    net = nn.Sequential(nn.Conv2d(1, 3, 1), nn.Conv2d(3, 3, 1), Minus256(), nn.Conv2d(3, 2, 3, padding=1))
    kill(net.bfloat16(), {"0": [1], "1": [2]})
    with torch.no_grad():
        net[0].bias[1], net[1].weight[2, 1], net[1].bias[2] = 0.5, 1, 256  # 256.5 is 256 in bfloat16
    small = fold(net, IMAGE.bfloat16())
    assert widths(small) == widths(fold(small)) == {"0": (2, 1), "1": (2, 2), "3": (2, 2)}


# -- the result ------------------------------------------------------------------------------------------------------


def lenet(dtype=torch.float64):
    layers = [nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Sigmoid(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24, 8)]
    layers += [nn.ReLU(), nn.Dropout(), nn.Linear(8, 3, bias=False)]
    return chain(*layers, rows={"0": [1, 4], "5": [0]}, cols={"8": [5]}).to(dtype)


LENET = {"0": (4, 1), "5": (6, 16), "8": (3, 6)}


def test_config_says_what_happened():
    config = fold(lenet()).fold_config
    assert config == {
        "layers": {
            "0": {
                "type": "Conv2d",
                "before": {"in_channels": 1, "out_channels": 6, "groups": 1, "bias": True},
                "after": {"in_channels": 1, "out_channels": 4, "groups": 1, "bias": True},
            },
            "1": {
                "type": "BatchNorm2d",
                "before": {"num_features": 6, "bias": True},
                "after": {"num_features": 4, "bias": True},
            },
            "5": {
                "type": "Linear",
                "before": {"in_features": 24, "out_features": 8, "bias": True},
                "after": {"in_features": 16, "out_features": 6, "bias": True},
            },
            "8": {
                "type": "Linear",
                "before": {"in_features": 8, "out_features": 3, "bias": False},
                "after": {"in_features": 6, "out_features": 3, "bias": True},
            },
        },
        "parameters": {"before": 60 + 12 + 200 + 24, "after": 40 + 8 + 102 + 21},
        "cut": {},
        "kept": ["8: is the model's output, shape kept"],
    }


@cases(dtype=[torch.float32, torch.bfloat16])
def test_dtype_training_mode_and_frozen_parameters_carry_over(dtype):
    net = lenet(dtype=dtype).train()
    net[1].eval()
    net[0].weight.requires_grad_(False)
    net[5].bias.requires_grad_(False)
    small = fold(net, IMAGE.to(dtype))
    assert widths(small) == LENET
    assert {t.dtype for t in small.state_dict().values()} == {dtype, torch.int64}
    assert [m.training for m in small.modules()] == [m.training for m in net.modules()]
    assert {n for n, p in small.named_parameters() if not p.requires_grad} == {"0.weight", "5.bias"}
    assert not {id(p) for p in net.parameters()} & {id(p) for p in small.parameters()}


def test_survivors_are_bitwise_and_zeros_stay():
    net = chain(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2), rows={"0": [1]})
    with torch.no_grad():
        net[0].weight[2, 3] = net[2].weight[1, 4] = 0
    small, rest = fold(net), [0, 2, 3, 4]
    assert torch.equal(small[0].weight, net[0].weight[rest]) and torch.equal(small[0].bias, net[0].bias[rest])
    assert torch.equal(small[2].weight, net[2].weight[:, rest])


def test_it_trains_on():
    small = fold(lenet().train())
    before = copy.deepcopy(small.state_dict())
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    small(IMAGE).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in small.parameters() if p is not small[0].bias)
    optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in small.named_parameters() if name != "0.bias")


def test_it_exports():
    small = fold(lenet()).eval()
    program = torch.export.export(small, (IMAGE,))
    assert torch.equal(program.module()(IMAGE), small(IMAGE))


def test_it_loads_where_symopt_is_not_installed(tmp_path):
    net = symopt.constrain(lenet(), {"8.weight": None, "*.weight": symopt.GroupSparse("out")})
    small = fold(net).eval()
    torch.save(small, tmp_path / "model.pt")
    torch.save((IMAGE, outputs(small, IMAGE)), tmp_path / "data.pt")
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(small))
    program = """
import pickle, sys
sys.modules["symopt"] = sys.modules["symopt_kernels"] = None  # importing them raises ImportError
import torch
x, y = torch.load("data.pt")
for net in torch.load("model.pt", weights_only=False), pickle.load(open("model.pickle", "rb")):
    torch.testing.assert_close(net(x), y, rtol=0, atol=0)
print("same")
"""
    ran = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ran.stdout == "same\n", ran.stderr


def test_constraints_are_enforced_and_removed():
    net = symopt.constrain(lenet().train(), {"8.weight": None, "*.weight": symopt.GroupSparse("out")})
    small = fold(net)
    assert widths(small) == LENET and symopt.constraints(small) == {} and len(symopt.constraints(net)) == 2
    small(IMAGE)  # a Guard left behind would warn


def test_the_fold_of_a_constraint_is_applied_to_the_copy(monkeypatch):
    class Rounds:
        budget, parameters_identical, is_matrix = None, False, False

        @staticmethod
        def fold(w):
            return torch.where(w.abs() < 0.2, 0, w)

        @staticmethod
        def partition(w):
            return None

    monkeypatch.setattr(sys.modules["symopt.folding.enforce"], "bindings", lambda model: [(("0.weight",), Rounds)])
    net = chain(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([0.1, 0.3, 1.0])[:, None])
    small = fold(net, LINE)
    assert widths(small) == {"0": (2, 4), "2": (2, 2)} and bool((net[0].weight[0] != 0).all())


def test_a_wrong_network_is_never_returned(monkeypatch):
    units = sys.modules["symopt.folding.units"]
    monkeypatch.setattr(units.Layer, "contribution", lambda self, positions: torch.zeros(self.units).double())
    with pytest.raises(RuntimeError, match=r"does not reproduce the outputs on example_inputs.*please report"):
        fold(lenet(), IMAGE)


# -- rebuilding ------------------------------------------------------------------------------------------------------


@cases(device=["cpu", "meta"])
def test_resize_and_a_state_dict_rebuild_the_network(device):
    small = fold(lenet()).eval()
    config = json.loads(json.dumps(small.fold_config))
    with torch.device(device):
        fresh = lenet() if device == "cpu" else nn.Sequential(*lenet())
    rebuilt = resize(symopt.constrain(fresh, {"0.weight": symopt.Sparse()}), config)
    rebuilt.load_state_dict(small.state_dict(), assign=True)
    assert rebuilt is fresh and str(rebuilt) == str(small) and rebuilt.fold_config == config
    assert symopt.constraints(rebuilt) == {}
    assert torch.equal(outputs(rebuilt, IMAGE), outputs(small, IMAGE))


@pytest.mark.parametrize(("dead", "left"), [(1, 4), (2, 2)])
def test_resize_of_depthwise_convolutions_and_of_a_network_folded_twice(dead, left):
    def build():
        return chain(nn.Conv2d(1, 4, 2), nn.Conv2d(4, 8, 3, groups=4), nn.ReLU(), nn.Conv2d(8, 2, 2))

    once = fold(kill(build(), {"0": [2]}))
    twice = fold(kill(once, cols={"3": slice(6 - 2 * dead, 6)}))
    assert widths(twice)["1"] == (left, 1) and twice.fold_config["layers"]["1"]["before"]["out_channels"] == 8
    if dead == 2:  # with one group left it is an ordinary convolution, whose own channels may go
        twice = fold(kill(twice, cols={"3": [1]}))
        assert widths(twice) == {"0": (1, 1), "1": (1, 1), "3": (2, 1)}
    rebuilt = resize(build(), twice.fold_config)
    assert str(rebuilt) == str(twice)
    rebuilt.load_state_dict(twice.state_dict())
    assert torch.equal(outputs(rebuilt, IMAGE), outputs(twice, IMAGE))


# -- bad input -------------------------------------------------------------------------------------------------------


def altered(**entries):
    config = copy.deepcopy(fold(lenet()).fold_config)
    config["layers"]["5"] |= entries
    return config


LARGER = {"in_features": 25, "out_features": 8, "bias": True}
BAD = {
    "lazy": (lambda: fold(nn.LazyLinear(2)), ValueError, "fold: model has parameters that are not initialised; run"),
    "model": (lambda: fold([1]), TypeError, "fold: model must be a torch.nn.Module, got list"),
    "inputs": (
        lambda: fold(lenet(), [IMAGE]),
        TypeError,
        "fold: example_inputs must be a tensor or .* got list",
    ),
    "run": (lambda: fold(lenet(), LINE), ValueError, r"fold: model\(\*example_inputs\) failed: .*4"),
    "module": (lambda: resize(None, {}), TypeError, "resize: module must be a torch.nn.Module, got NoneType"),
    "config": (lambda: resize(lenet(), "x"), TypeError, "resize: config must be the dict fold_config .* got str"),
    "layers": (lambda: resize(lenet(), {}), ValueError, "resize: config has no dict 'layers'; pass the attribute"),
    "name": (lambda: resize(lenet()[:5], altered()), ValueError, "resize: module lacks layer '5', which config names"),
    "entry": (lambda: resize(lenet(), altered(after=3)), ValueError, "'5'] must have 'type', 'before' and 'after'"),
    "type": (lambda: resize(lenet(), altered(type="GRU")), ValueError, "layer '5' is a Linear, in config it is a GRU"),
    "before": (
        lambda: resize(fold(lenet()), altered()),
        ValueError,
        "layer '0' has sizes .*: 4.* pass the arch",
    ),
    "after": (lambda: resize(lenet(), altered(after=LARGER)), ValueError, "shrinks layer '5' from .* impossible"),
}


@cases(case=BAD)
def test_bad_input(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


def test_a_failed_resize_changes_nothing():
    net = lenet()
    with pytest.raises(ValueError, match="impossible"):
        resize(net, altered(after=LARGER))
    assert str(net) == str(lenet())
