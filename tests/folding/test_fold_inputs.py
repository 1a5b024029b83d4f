"""fold: hooks that compute weights, keyword and dict inputs, tensors without values, tensors left in attributes."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm

import symopt
from support.cases import cases
from support.tolerances import tolerance
from symopt.folding.fold import fold

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).double()


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double()


def close(one, two):
    torch.testing.assert_close(one, two, rtol=tolerance("folded"), atol=tolerance("folded"))


def old_weight_norm(layer):
    with pytest.warns(FutureWarning, match="deprecated"):
        nn.utils.weight_norm(layer)


def pruned(layer):
    prune.ln_structured(layer, "weight", 2, n=2, dim=0)


def pruned_twice(layer):
    pruned(layer)
    prune.l1_unstructured(layer, "weight", 0.5)


HOOKS = {
    "prune": pruned,
    "prune twice": pruned_twice,
    "weight_norm": old_weight_norm,
    "spectral_norm": spectral_norm,
}
LATER = HOOKS | {
    "parametrized weight_norm": parametrizations.weight_norm,
    "parametrized spectral_norm": parametrizations.spectral_norm,
    "parametrized orthogonal": parametrizations.orthogonal,
}


@cases(hook=HOOKS, constrained=[False, True])
def test_weights_that_hooks_compute_become_plain(hook, constrained):
    net = mlp()
    HOOKS[hook](net[0])
    if constrained:  # what the hook computes from
        source = next(name for name, p in net[0].named_parameters() if p.dim() == 2)
        symopt.constrain(net, {f"0.{source}": symopt.Sparse()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no symopt optimizer trains it
        net(X).sum().backward()  # the computed weight now has a graph
    net.eval()
    small = fold(net, X)
    close(small(X), net(X))
    assert sorted(dict(small.named_parameters())) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    assert not small[0]._forward_pre_hooks and list(small[0]._buffers) == []
    assert small[0].out_features == (6 if "norm" in hook else 4)
    assert all(p.requires_grad for p in small.parameters())
    copy.deepcopy(small)
    small.train()(X).sum().backward()
    assert net[0]._forward_pre_hooks  # the original is as it was


@cases(hook=LATER)
def test_a_constraint_holds_where_its_weight_was_computed_later(hook):
    net = symopt.constrain(mlp(), {"0.weight": symopt.GroupSparse("out", keep=3)})
    LATER[hook](net[0])
    net.eval()
    with pytest.warns(UserWarning, match=r"0\.weight: \d units live, the budget is 3"):
        small = fold(net, X)
    assert small[0].out_features == 3 and small[0].weight.requires_grad
    with pytest.raises(ValueError, match=r"0\.weight is computed from other parameters now"):
        symopt.report(net)


def test_frozen_weights_stay_frozen():
    net = mlp()
    net[0].weight.requires_grad_(False)
    pruned(net[0])
    assert not fold(net, X)[0].weight.requires_grad


def test_a_constrained_parameter_that_is_gone_is_named():
    net = symopt.constrain(mlp(), {"*.weight": symopt.Sparse()})
    del net[2].weight
    net[2].weight = torch.zeros(2, 6).double()
    with pytest.raises(
        ValueError, match=r"fold: 2\.weight is constrained, but Linear has no parameter 'weight'.*release"
    ):
        fold(net, X)


def test_what_forward_leaves_in_attributes_does_not_matter():
    class Remembers(nn.Sequential):
        def forward(self, x):
            self.seen = {"last": [super().forward(x)]}
            return self.seen["last"][0]

    net = Remembers(*mlp())
    net(X)
    with torch.no_grad():
        net[0].weight[1] = 0
    close(fold(net)(X), net(X))
    assert symopt.report(net, example_inputs=X).flops == 2 * (4 * 6 + 6 * 2)


# -- arguments of forward --------------------------------------------------------------------------------------------


class Branches(nn.Module):
    """Two inputs, of which one is optional, and switches."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(4, 2)
        with torch.no_grad():
            self.a.weight[1] = 0

    def forward(self, x, other=None, *, scale=1.0, mode="sum"):
        y = self.b(torch.relu(self.a(x)))
        if other is not None:
            y = y + self.c(other)
        return y * scale if mode == "sum" else {"y": y}


CALLS = {
    "tensor": (X, None),
    "tuple": ((X,), None),
    "two": ((X, X), None),
    "keywords": ((), {"x": X, "other": X}),
    "both": ((X,), {"other": X, "scale": 2.0}),
    "a tensor and keywords": (X, {"other": X}),
    "a switch": (X, {"mode": "dict"}),
    "a dict of keywords": ({"x": X, "other": X}, None),
    "two dicts": ({"x": X}, {"other": X}),
}


@cases(call=CALLS)
def test_arguments_of_every_kind(call):
    net = Branches().double()
    inputs, keywords = CALLS[call]
    args = () if isinstance(inputs, dict) else inputs if isinstance(inputs, tuple) else (inputs,)
    named = (keywords or {}) | (inputs if isinstance(inputs, dict) else {})
    small = fold(net, inputs, keywords)
    assert small.a.out_features == 5
    close(small(*args, **named), net(*args, **named))
    found = symopt.report(net, None, inputs, keywords)
    assert found.parameters_folded == sum(p.numel() for p in small.parameters()) < found.parameters
    assert found.flops > found.flops_folded > 0


class Batch(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()
        with torch.no_grad():
            self.net[0].weight[1] = 0

    def forward(self, batch):
        return {"y": self.net(batch["x"]) * batch["scale"], "seen": batch["x"]}


@pytest.mark.parametrize("inputs", [{"x": X, "scale": X[:, :1]}, ({"x": X, "scale": X[:, :1]},)])
def test_a_dict_can_be_the_argument_itself(inputs):
    net = Batch()
    small = fold(net, inputs)
    assert small.net[0].out_features == 5
    batch = inputs if isinstance(inputs, dict) else inputs[0]
    close(small(batch), net(batch))


def test_bad_arguments_are_named():
    net = Branches().double()
    for error, match, inputs, keywords in [
        (TypeError, "example_inputs must be a tensor or a tuple .* or a dict, got list", [X], None),
        (TypeError, "example_kwargs must be a dict of the keyword arguments of forward, got list", X, [X]),
        (TypeError, "example_kwargs must be a dict", X, {1: X}),
        (ValueError, r"model\(\*example_inputs, \*\*example_kwargs\) failed: .*'none'; give the arg", X, {"none": X}),
        (ValueError, r"model\(\*example_inputs\) failed", {"none": X}, None),
    ]:
        for call in (
            lambda i=inputs, k=keywords: fold(net, i, k),
            lambda i=inputs, k=keywords: symopt.report(net, None, i, k),
        ):
            with pytest.raises(error, match=match):
                call()


# -- tensors without values ------------------------------------------------------------------------------------------


@cases(constraint=["density", "keep", "rank", "max_rank"])
def test_budgets_need_values(constraint):
    made = {
        "density": lambda: symopt.Sparse(density=0.5),
        "keep": lambda: symopt.GroupSparse("out", keep=2),
        "rank": lambda: symopt.LowRank(rank=1),
        "max_rank": lambda: symopt.LowRank(max_rank=1),
    }[constraint]()
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    symopt.constrain(net, {"0.weight": made})
    with pytest.raises(ValueError, match=r"fold: 0\.weight is on the meta device.*assign=True.*symopt\.resize"):
        fold(net)
    assert symopt.report(net).notes == ("0.weight: on the meta device, so it has no values",)


@cases(example=[False, True], bound=[False, True])
def test_other_tensors_without_values_stay_as_they_are(example, bound):
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, affine=False), nn.Linear(6, 2))
    if bound:
        symopt.constrain(net, {("0.weight", "2.weight"): symopt.GroupSparse("out")})
    small = fold(net.eval(), torch.randn(5, 4, device="meta") if example else ())
    assert all(p.is_meta for p in small.parameters()) and small[0].out_features == 6
    assert ("model: outputs are on the meta device, so they were not compared" in small.fold_config["kept"]) == example


def test_a_part_without_values_is_kept_or_named():
    net = mlp()
    net.insert(1, nn.BatchNorm1d(6, affine=False, device="meta"))
    symopt.constrain(net, {"0.weight": symopt.GroupSparse("out")})
    with torch.no_grad():
        net[0].weight[1] = 0
    assert fold(net)[0].out_features == 6
    with pytest.raises(ValueError, match=r"1\.running_mean is on the meta device: load its values"):
        fold(net, X)


def test_a_forward_that_cannot_be_run_on_its_trace_is_copied_in_silence(capfd):
    class Scaled(Branches):
        def forward(self, x, **options):
            return super().forward(x) * options.get("scale", 1.0)

    net = Scaled().double()
    for keywords in (None, {"scale": 2.0}):
        small = fold(net, X, keywords)
        assert small.a.out_features == 6 and "nothing removed" in small.fold_config["kept"][0]
        assert len(small.fold_config["kept"][0]) < 250
    assert capfd.readouterr().err == ""


def test_what_is_fixed_in_a_fold_is_what_the_examples_fix():
    net = Branches().double()
    assert fold(net, X, {"other": None, "scale": 3.0}).a.out_features == 5
    assert fold(net, (X, None)).a.out_features == 5


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_script_module_is_copied():
    net = torch.jit.script(mlp())
    small = fold(net, X)
    assert small.fold_config["kept"] == ["model: a ScriptModule cannot be traced, nothing removed"]
    assert symopt.report(net).rows == ()
