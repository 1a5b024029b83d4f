"""Explicit mode and the free gauge: the literal factors, which everything else is compared with.

What is expected is written out here: autograd through the plain product, torch's own modules and optimizers, and the
factor step itself.
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import symopt
from support.cases import cases
from support.table import CONSTRAINTS, ConstraintRow, ids
from support.tolerances import tolerance
from symopt.folding.fold import fold
from symopt.module.explicit import Explicit
from symopt.module.memory import ReusedMemory

S, G = symopt.Sparse, symopt.GroupSparse
ROWS = [
    *CONSTRAINTS,
    *(ConstraintRow(f"sparse-depth-{d}", lambda k, d=d: S(k, depth=d), (6, 5)) for d in (3, 4, 5)),
    ConstraintRow("group-out-depth-3", lambda k: G("out", k, depth=3), (6, 5)),
]
SMALL = [row for row in ROWS if row.id in ("sparse", "sparse-depth-3", "group-out", "group-index", "group-out-depth-3")]
KEEPS = ("imbalanced", "balanced", "gates", 1.0, 0.0)
small_rows = pytest.mark.parametrize("row", SMALL, ids=ids)


@pytest.fixture(params=["torch's memory", "reused memory"])
def memory(request, monkeypatch):
    """Tensors of the tests are too small for the pool, unless it is told otherwise."""
    if request.param == "reused memory":
        monkeypatch.setattr(ReusedMemory, "large", 0)


in_any_memory = pytest.mark.usefixtures("memory")


class Cell(nn.Module):
    """A weight of any shape and a bias, used in a way that tells all entries apart."""

    def __init__(self, shape: tuple[int, ...], seed: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(randn(shape, seed))
        self.bias = nn.Parameter(randn(shape[:1], seed + 1))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x).sin().sum() + self.bias.sum()


def randn(shape: Any, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def explicit(row: ConstraintRow, init: str | float = "imbalanced", seed: int = 0, strength: float | None = 0.3) -> Cell:
    return symopt.constrain(Cell(row.shape, seed), {"weight": row.make(strength)}, mode="explicit", init=init)


def factors(module: nn.Module, name: str = "weight") -> list[nn.Parameter]:
    return list(module.parametrizations[name].parameters())


def random_factors(row: ConstraintRow, seed: int = 7) -> tuple[Any, tuple[Tensor, ...]]:
    """The bound constraint, and factors in no gauge at all, one entry of each zero."""
    module = explicit(row)
    values = [randn(f.shape, seed + i) for i, f in enumerate(factors(module))]
    for i, value in enumerate(values):
        value.view(-1)[i] = 0
    return symopt.constraints(module)["weight"], tuple(v.requires_grad_() for v in values)


def close(a: Any, b: Any, kind: str = "identity") -> None:
    torch.testing.assert_close(a, b, rtol=tolerance(kind), atol=tolerance(kind))


def net() -> nn.Sequential:
    """Layers, a module inside a module, and buffers."""
    torch.manual_seed(3)
    head = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), head).double()


PATTERNS = {"0.weight": S(0.1), "3.0.weight": G("out", 0.2), "3.2.weight": S(0.1, depth=3)}


def explicit_net(init: str | float = "imbalanced") -> nn.Sequential:
    return symopt.constrain(net(), PATTERNS, mode="explicit", init=init)


def gradients(module: nn.Module, output: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(output, list(module.parameters())))


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


# -- state dicts -----------------------------------------------------------------------------------------------------


@cases(init=[*KEEPS, "independent", "matched"])
def test_a_plain_state_dict_loads_and_is_not_changed(init):
    module, other = explicit_net(init), net()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.3)
        other[0].weight[2] = 0
        other[1].running_mean.fill_(4.0)
    plain = other.state_dict()
    before = {k: v.clone() for k, v in plain.items()}
    ids_before = [id(p) for p in module.parameters()]
    assert str(module.load_state_dict(plain, strict=True)) == "<All keys matched successfully>"
    assert list(plain) == list(before) and all(torch.equal(plain[k], before[k]) for k in before)
    assert [id(p) for p in module.parameters()] == ids_before  # copied in place: optimizers keep hold of them
    for key, value in symopt.plain_state_dict(module).items():
        close(value, before[key])
    x = randn((4, 5), 1)
    close(module.eval()(x), other.eval()(x))


def test_loading_a_plain_state_dict_as_given_to_assign():
    with torch.device("meta"):
        module = symopt.constrain(net(), PATTERNS, mode="explicit")
    module.load_state_dict(net().state_dict(), assign=True)
    close(module.eval()(randn((4, 5), 1)), net().eval()(randn((4, 5), 1)))
    assert all(p.requires_grad and p.is_leaf for p in module.parameters())
    with pytest.raises(ValueError, match=r"symopt\.param_groups"):
        symopt.SGD([module[0].parametrizations.weight.original1], lr=0.1)


def test_loading_half_precision_rounds_no_more_than_the_plain_module_does():
    torch.manual_seed(0)
    half = nn.Linear(20, 10).bfloat16()
    module = symopt.constrain(nn.Linear(20, 10), {"weight": S()}, mode="explicit")
    module.load_state_dict(half.state_dict())
    torch.testing.assert_close(module.weight.detach(), half.weight.detach().float())  # to fp32


def test_strict_loading_still_sees_missing_unexpected_and_misshapen_keys():
    module, plain = explicit_net(), net().state_dict()
    del plain["3.0.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"3\.0\.parametrizations\.weight\.original0"'):
        module.load_state_dict(plain)
    assert module.load_state_dict(plain, strict=False).missing_keys == [
        "3.0.parametrizations.weight.original0",
        "3.0.parametrizations.weight.original1",
    ]
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"weight"'):
        module.load_state_dict({**net().state_dict(), "weight": torch.ones(6, 5)})
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.parametrizations\.weight\.original0"):
        module.load_state_dict({**net().state_dict(), "0.weight": torch.ones(6, 4)})


@cases(row=ROWS)
def test_its_own_state_dict_round_trips_bit_for_bit(row):
    module, other = explicit(row, "matched", seed=1), explicit(row, seed=2)
    assert not torch.equal(module.weight, other.weight)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(factors(module), factors(other), strict=True))
    assert torch.equal(module.weight, other.weight)


@cases(init=KEEPS)
def test_plain_state_dict_is_what_the_plain_module_saves(init):
    module, plain = explicit_net(init), net()
    state = symopt.plain_state_dict(module)
    assert set(state) == set(plain.state_dict())
    for key, value in plain.state_dict().items():
        close(state[key], value)
        assert not state[key].requires_grad and state[key].dtype == value.dtype
    fresh = net()
    nn.init.zeros_(fresh[0].weight)
    fresh.load_state_dict(state, strict=True)
    close(fresh[0].weight, plain[0].weight)
    assert set(symopt.plain_state_dict(plain)) == set(plain.state_dict())  # nothing explicit: torch's own
    with pytest.raises(TypeError, match=r"plain_state_dict: expected a torch\.nn\.Module, got dict"):
        symopt.plain_state_dict(state)


def test_names_that_begin_alike_are_told_apart():
    module = nn.Module()
    for name in ("weight", "weight2"):
        module.register_parameter(name, nn.Parameter(randn((3, 2), len(name))))
    values = {k: v.clone() for k, v in module.state_dict().items()}
    symopt.constrain(module, {"weight": S(), "weight2": G("out")}, mode="explicit")
    module.register_parameter("weight3", nn.Parameter(torch.ones(2)))
    parametrize.register_parametrization(module, "weight3", nn.Softplus(), unsafe=True)  # not ours: stays as in torch
    values["parametrizations.weight3.original"] = torch.ones(2)
    state = symopt.plain_state_dict(module)
    assert sorted(state) == ["parametrizations.weight3.original", "weight", "weight2"]
    close(state, values)
    module.load_state_dict({**values, "weight": values["weight2"], "weight2": values["weight"]})
    released = symopt.release(copy.deepcopy(module))
    assert [n for n, _ in released.named_parameters()][-1] == "parametrizations.weight3.original"
    close(module.weight, values["weight2"])
    close(module.weight2, values["weight"])


# -- release, fold, copies -------------------------------------------------------------------------------------------


def explicit_parts(module: nn.Module) -> list[str]:
    parts = [
        name for name, sub in module.named_modules() if "parametrizations" in name or parametrize.is_parametrized(sub)
    ]
    return parts + [
        n for n, sub in module.named_modules() if sub._load_state_dict_pre_hooks or "Param" in type(sub).__name__
    ]


@cases(undo=[symopt.release, fold])
def test_release_and_fold_give_back_plain_modules(undo):
    module, x = explicit_net("matched"), randn((4, 5), 1)
    module.eval()
    expected, state = module(x), symopt.plain_state_dict(module)
    assert explicit_parts(module)
    plain = undo(copy.deepcopy(module))
    assert explicit_parts(plain) == [] and symopt.constraints(plain) == {}
    assert [type(m) for m in plain.modules()] == [type(m) for m in net().modules()]
    assert set(plain.state_dict()) == set(net().state_dict())
    assert {n for n, _ in plain.named_parameters()} == {n for n, _ in net().named_parameters()}
    assert all(p.requires_grad and p.is_leaf for p in plain.parameters())
    assert all(torch.equal(value, state[key]) for key, value in plain.state_dict().items())
    assert torch.equal(plain(x), expected)
    plain.load_state_dict(net().state_dict())
    assert torch.equal(plain[0].weight, net()[0].weight)  # no hook is left that would split it
    assert torch.equal(module(x), expected)
    symopt.SGD(plain, lr=0.1)  # factors no longer
    symopt.constrain(plain, PATTERNS, mode="explicit")


@cases(frozen=[False, True], undo=[symopt.release, fold])
def test_release_and_fold_keep_parameters_parameters(undo, frozen):
    module = explicit_net()
    for p in module[0].parameters():
        p.requires_grad_(not frozen)
    with torch.set_grad_enabled(frozen):
        plain = undo(module)
    assert {n for n, _ in plain.named_parameters()} == {n for n, _ in net().named_parameters()}
    assert plain[0].weight.requires_grad is not frozen and plain[3][0].weight.requires_grad


@cases(first=["copy", "original"])
def test_releasing_a_copy_leaves_the_original_alone_and_vice_versa(first):
    original = symopt.constrain(nn.Linear(4, 3), {"weight": S(), "bias": S()}, mode="explicit")
    double, third = copy.deepcopy(original), copy.deepcopy(copy.deepcopy(original))
    released, kept = (double, original) if first == "copy" else (original, double)
    x, expected = torch.randn(2, 4), original(torch.ones(4))
    before, y = kept.weight.clone(), kept(x)
    assert type(symopt.release(released)) is nn.Linear
    for module in (kept, third):
        assert torch.equal(module.weight, before) and torch.equal(module(x), y)
        assert len(factors(module)) == 2 and list(symopt.constraints(module)) == ["weight", "bias"]
        module(x).sum().backward()
        assert all(f.grad is not None for f in module.parameters())
        module.load_state_dict(nn.Linear(4, 3).state_dict())
        assert not torch.equal(module.weight, before)
    assert torch.equal(released(torch.ones(4)), expected)
    assert type(symopt.release(kept)) is nn.Linear and len(factors(third)) == 2


def test_release_of_a_submodule_and_of_one_among_foreign_hooks():
    module = explicit_net()
    seen = []
    handle = module[0].register_load_state_dict_pre_hook(lambda *_: seen.append(1))
    symopt.release(module[0])
    assert list(symopt.constraints(module)) == ["3.0.weight", "3.2.weight"]
    module.load_state_dict(net().state_dict())
    assert seen == [1]
    handle.remove()
    assert not module[0]._load_state_dict_pre_hooks


@in_any_memory
def test_a_deepcopy_trains_by_itself():
    module, x = explicit_net(), randn((8, 5), 1)
    double = copy.deepcopy(module)
    assert not {id(p) for p in module.parameters()} & {id(p) for p in double.parameters()}
    before = {k: v.clone() for k, v in symopt.plain_state_dict(module).items()}
    for trained in (double, copy.deepcopy(module)):
        opt = torch.optim.SGD(symopt.param_groups(trained), lr=0.05)
        for _ in range(3):
            opt.zero_grad()
            trained(x).square().mean().backward()
            opt.step()
        moved = symopt.plain_state_dict(trained)
        assert all(not torch.equal(moved[k], before[k]) for k in ("0.weight", "3.0.weight", "3.2.weight"))
        state = symopt.plain_state_dict(module)
        assert all(torch.equal(state[k], before[k]) for k in before)
    assert torch.equal(trained[0].weight, double[0].weight)


# -- optimizers ------------------------------------------------------------------------------------------------------


@cases(cls=[torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_param_groups_put_the_strength_on_the_factors(cls):
    patterns = {"0.weight": S(0.1), "3.0.weight": G("out"), "3.2.weight": S(0.1)}
    module = symopt.constrain(net(), patterns, mode="explicit")
    groups = symopt.param_groups(module)
    listed = [p for group in groups for _, p in group["params"]]
    assert sorted(map(id, listed)) == sorted(map(id, module.parameters()))
    decay = {id(p): group.get("weight_decay", "absent") for group in groups for _, p in group["params"]}
    assert [decay[id(f)] for f in factors(module[0])] == [0.1, 0.1]
    assert [decay[id(f)] for f in factors(module[3][2])] == [0.1, 0.1]
    assert [decay[id(f)] for f in factors(module[3][0])] == [1e-4, 1e-4]  # the documented coupled default
    assert {decay[id(p)] for p in (module[0].bias, module[1].weight, module[3][2].bias)} == {"absent"}
    assert all(
        name == dict((id(p), n) for n, p in module.named_parameters())[id(p)] for g in groups for name, p in g["params"]
    )
    assert [group.get("strength", "absent") for group in groups] == [0.1, 1e-4, "absent"]
    opt = cls(groups, lr=0.01, weight_decay=0.7)
    assert opt.param_groups[-1]["weight_decay"] == 0.7 and opt.param_groups[0]["weight_decay"] == 0.1
    before = [p.detach().clone() for p in module.parameters()]
    module(randn((8, 5), 1)).square().mean().backward()
    opt.step()
    assert all(not torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))


@cases(row=ROWS)
def test_torchs_weight_decay_on_the_factors_is_the_strength(row):
    """With no gradient the weight shrinks by ``(1 - lr strength)**depth``."""
    module = explicit(row, strength=0.3)
    w = module.weight.detach().clone()
    opt = torch.optim.SGD(symopt.param_groups(module), lr=0.1)
    (0 * module.weight.sum()).backward()
    opt.step()
    close(module.weight, w * (1 - 0.1 * 0.3) ** row.make(0.3).depth)


def test_a_list_of_constraints_is_refused():
    # Its strength differs from weight to weight; a decay of the factors is one number.
    layer = nn.Linear(4, 3)
    with pytest.raises(ValueError, match=r"weight has a list of constraints.*use mode='optimizer'"):
        symopt.constrain(layer, {"weight": [S(0.01), G("out", 0.0)]}, mode="explicit")
    assert symopt.constraints(layer) == {} and sorted(layer.state_dict()) == ["bias", "weight"]


def test_memory_that_somebody_took_from_the_weight_is_not_reused(memory):
    layer = symopt.constrain(nn.Linear(6, 5), {"weight": S()}, mode="explicit")
    storage = layer.weight.untyped_storage()
    before = list(storage)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(1.0)
    assert layer.weight.numel() == 30 and list(storage) == before


FORMS: dict[str, Callable[[nn.Module], Any]] = {
    "module": lambda m: m,
    "parameters": lambda m: m.parameters(),
    "list": lambda m: list(m.parameters()),
    "named": lambda m: m.named_parameters(),
    "groups": lambda m: [{"params": list(m.parameters()), "lr": 0.1}],
    "named groups": lambda m: [{"params": list(m.named_parameters())}],
    "param_groups": symopt.param_groups,
    "one factor": lambda m: [m[3][0].parametrizations.weight.original1],
    "deepcopy": copy.deepcopy,
    "converted": lambda m: copy.deepcopy(m).float(),
    "inside another": lambda m: nn.ModuleList([m]).parameters(),
}
REFUSED = r"hold factors of an explicit constraint.*symopt\.param_groups\(model\).*mode='optimizer'"


@cases(form=FORMS, cls=[symopt.SGD, symopt.Adam, symopt.AdamW])
def test_symopts_optimizers_refuse_factors_in_every_form(cls, form):
    module = explicit_net()
    params = FORMS[form](module)
    with pytest.raises(ValueError, match=f"^{cls.__name__}: .*{REFUSED}"):
        cls(params, lr=0.1)


@cases(form=FORMS, cls=[symopt.SGD, symopt.Adam, symopt.AdamW])
def test_and_when_they_are_added_later(cls, form):
    module, other = explicit_net(), nn.Linear(2, 2)
    opt = cls(other.parameters(), lr=0.1)
    params = FORMS[form](module)  # what they belong to must stay alive, as it does in a user's hands
    listed = list(params.parameters() if isinstance(params, nn.Module) else params)
    groups = [group["params"] for group in listed] if isinstance(listed[0], dict) else [listed]
    with pytest.raises(ValueError, match=REFUSED):
        for group in groups:
            opt.add_param_group({"params": [p[1] if isinstance(p, tuple) else p for p in group]})
    assert len(opt.param_groups) == 1
    other(torch.ones(2)).sum().backward()
    before = other.weight.detach().clone()
    opt.step()  # what it had still works
    assert not torch.equal(other.weight, before)


def test_after_release_they_take_the_weights():
    module = symopt.release(explicit_net())
    assert len(symopt.SGD(module, lr=0.1).param_groups[0]["params"]) == len(list(net().parameters()))


# -- binding ---------------------------------------------------------------------------------------------------------


def test_constraints_lists_explicit_ones_beside_others():
    module = symopt.constrain(net(), {"0.weight": S(0.1)}, mode="explicit")
    symopt.constrain(module, {"3.0.weight": G("out")})
    assert symopt.constraints(module) == {"3.0.weight": G("out"), "0.weight": S(0.1)}
    assert symopt.constraints(copy.deepcopy(module)) == symopt.constraints(module)
    assert symopt.constraints(module[0]) == {"weight": S(0.1)}
    bound = symopt.constraints(explicit(next(row for row in ROWS if row.id == "group-callable")))["weight"]
    assert isinstance(bound.groups, Tensor)


@cases(pattern=["0.weight", "0.*"], second=["optimizer", "explicit"], first=["optimizer", "explicit"])
def test_a_second_constraint_is_refused(first, second, pattern):
    module = symopt.constrain(net(), {"0.weight": S()}, mode=first)
    keys = list(module.state_dict())
    with pytest.raises(ValueError, match="constrain: "):
        symopt.constrain(module, {pattern: S()}, mode=second)
    assert list(module.state_dict()) == keys and symopt.constraints(module) == {"0.weight": S()}


def test_shared_tensors_are_refused_before_anything_changes():
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    module[2].weight = module[1].weight
    with pytest.raises(ValueError, match=r"1\.weight and 2\.weight are one tensor.*use mode='optimizer'"):
        symopt.constrain(module, {"*.weight": S()}, mode="explicit")
    assert list(module.state_dict()) == [f"{i}.{n}" for i in range(3) for n in ("weight", "bias")]
    symopt.constrain(module, {"0.weight": S()}, mode="explicit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "factors"}, r"mode must be 'optimizer' or 'explicit', got 'factors'"),
        ({"mode": "explicit", "init": "gate"}, r"init must be .*'imbalanced'.*'gates'.*'matched', got 'gate'"),
        ({"mode": "explicit", "init": -0.5}, r"init must be finite and >= 0, got -0\.5"),
        ({"mode": "explicit", "init": math.inf}, r"init must be finite and >= 0, got inf"),
    ],
    ids=str,
)
def test_bad_modes_and_inits_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        symopt.constrain(net(), {"0.weight": S()}, **options)


def test_decorators():
    @symopt.constrain({"weight": S(0.2)}, mode="explicit", init="balanced")
    class Block(nn.Linear):
        pass

    @symopt.constrain({"*.weight": G("out", 0.3)}, mode="explicit", init=1.0)
    def build(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(width, 2), nn.Linear(2, 2))

    one, two = Block(3, 2), Block(3, 2)
    assert isinstance(one, Block) and symopt.constraints(one) == {"weight": S(0.2)}
    u, v = factors(one)
    torch.testing.assert_close(u.abs(), v.abs())
    assert symopt.release(two).weight.shape == (2, 3) and type(two) is Block and len(factors(one)) == 2
    module = build(4)
    assert symopt.constraints(module) == {f"{i}.weight": G("out", 0.3) for i in (0, 1)}
    s, d = factors(module[0])
    torch.testing.assert_close(s**2 - d.square().sum(1), torch.ones(2))


# -- what else touches a module ----------------------------------------------------------------------------------------


@in_any_memory
@cases(row=SMALL)
def test_autocast(row):
    torch.manual_seed(0)
    module = symopt.constrain(nn.Linear(row.shape[1], row.shape[0]), {"weight": row.make(0.3)}, mode="explicit")
    plain, x = symopt.release(copy.deepcopy(module)), torch.randn(3, row.shape[1])
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = module(x), plain(x)
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)
    out.float().square().sum().backward()
    expected.float().square().sum().backward()
    wanted = torch.autograd.grad(
        symopt.constraints(module)["weight"].compose(tuple(factors(module))), factors(module), plain.weight.grad
    )
    for f, g in zip(factors(module), wanted, strict=True):
        assert f.grad.dtype == torch.float32
        torch.testing.assert_close(f.grad, g)


@cases(row=SMALL, backend=["eager", "aot_eager"])
def test_compile_without_graph_breaks(row, backend):
    torch._dynamo.reset()
    module, x = explicit(row), randn(row.shape, 5)
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    close(compiled(x), module(x))
    close(gradients(module, compiled(x)), gradients(module, module(x)))


@in_any_memory
@cases(row=SMALL)
def test_activation_checkpointing(row):
    module, x = explicit(row), randn(row.shape, 5).requires_grad_()
    out = checkpoint(module, x, use_reentrant=False)
    assert torch.equal(out, module(x))
    assert all(map(torch.equal, gradients(module, out), gradients(module, module(x))))


@in_any_memory
@cases(row=ROWS)
def test_functional_call_grad_and_vmap(row):
    module, x = explicit(row), randn(row.shape, 5)
    constraint = symopt.constraints(module)["weight"]
    names = [f"parametrizations.weight.original{i}" for i in range(constraint.depth)]
    assert [n for n, _ in module.named_parameters() if n != "bias"] == names
    values = {n: randn(p.shape, 30 + i) for i, (n, p) in enumerate(module.named_parameters())}
    plain = {"bias": values["bias"], "weight": constraint.compose(tuple(values[n] for n in names))}
    close(functional_call(module, values, x), functional_call(Cell(row.shape), plain, x))

    def through(v: dict[str, Tensor]) -> Tensor:
        return functional_call(module, v, x)

    def by_hand(v: dict[str, Tensor]) -> Tensor:
        return (constraint.compose(tuple(v[n] for n in names)) * x).sin().sum() + v["bias"].sum()

    leaves = {n: v.clone().requires_grad_() for n, v in values.items()}
    expected = dict(zip(leaves, torch.autograd.grad(by_hand(leaves), list(leaves.values())), strict=True))
    close(grad(through)(values), expected)

    batch = {n: torch.stack([v, 2 * v, -v]) for n, v in values.items()}
    each = [grad(through)({n: v[i] for n, v in batch.items()}) for i in range(3)]
    close(vmap(grad(through))(batch), {n: torch.stack([e[n] for e in each]) for n in values})
    some = {**{n: v for n, v in values.items()}, names[0]: batch[names[0]]}
    dims = {n: 0 if n == names[0] else None for n in values}
    close(vmap(through, (dims,))(some), torch.stack([through({**values, names[0]: b}) for b in batch[names[0]]]))


@in_any_memory
def test_attention_convolution_embedding_and_several_weights_of_one_module():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).double()
    x = randn((2, 3, 8), 1)
    expected, mode_eval = attention(x, x, x)[0], copy.deepcopy(attention).eval()(x, x, x)[0]
    patterns = {"in_proj_weight": G("head:2"), "out_proj.weight": S(depth=3), "in_proj_bias": S()}
    symopt.constrain(attention, patterns, mode="explicit")
    assert set(symopt.constraints(attention)) == set(patterns)
    assert factors(attention, "in_proj_weight")[0].shape == (2,)
    close(attention(x, x, x)[0], expected)
    attention(x, x, x)[0].square().sum().backward()
    assert all(p.grad is not None for p in attention.parameters())
    assert all(bool(f.grad.any()) for name in ("in_proj_weight",) for f in factors(attention, name))
    with torch.no_grad():
        close(attention.eval()(x, x, x)[0], mode_eval)
    fresh = nn.MultiheadAttention(8, 2, batch_first=True).double()
    fresh.load_state_dict(symopt.plain_state_dict(attention))
    close(fresh(x, x, x)[0], expected)

    conv, image = nn.Conv2d(3, 4, 3).double(), randn((2, 3, 6, 6), 2)
    expected = conv(image)
    close(symopt.constrain(conv, {"weight": G("in"), "bias": S()}, mode="explicit", init=0.5)(image), expected)
    conv(image).sum().backward()
    assert [bool(p.grad.any()) for p in conv.parameters()] == [True] * 4

    embedding, tokens = nn.Embedding(7, 4, padding_idx=0).double(), torch.tensor([[1, 2, 0], [6, 6, 1]])
    expected = embedding(tokens)
    close(symopt.constrain(embedding, {"weight": G("out")}, mode="explicit")(tokens), expected)
    embedding(tokens).square().sum().backward()
    gate, rows = factors(embedding)
    assert (gate.grad != 0).tolist() == [False, True, True, False, False, False, True]
    assert bool((rows.grad[[0, 3, 4, 5]] == 0).all()) and bool(rows.grad[6].all())


def test_assigning_the_weight_splits_it():
    module, value = explicit(ROWS[0]), randn((6, 5), 9)
    before = factors(module)
    module.weight = value
    close(module.weight, value)
    assert list(map(id, factors(module))) == list(map(id, before))


# -- free gauge ------------------------------------------------------------------------------------------------------

A = randn((40, 5), 11)
TARGET = A @ randn((5, 6), 12) + 0.1 * randn((40, 6), 13)
STEPS = 200


def loss(weight: Tensor) -> Tensor:
    return (A @ weight.T - TARGET).square().mean() * 3


def holder(scale: float = 0.7, dtype: torch.dtype = torch.float64) -> nn.Module:
    module = nn.Module()
    module.weight = nn.Parameter((scale * randn((6, 5), 0)).to(dtype))
    return module


def free(depth: int, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[nn.Module, symopt.SGD]:
    module = symopt.constrain(holder(dtype=dtype), {"weight": S(0.05, depth=depth, gauge="free")})
    return module, symopt.SGD(module, **{"lr": 0.01, "time_scale": "none", **options})


def state_factors(module: nn.Module, opt: symopt.SGD) -> list[Tensor]:
    state = opt.state[module.weight]
    return [state[f"factor_{i}"] for i in range(sum(key.startswith("factor_") for key in state))]


def train(module: nn.Module, opt: torch.optim.Optimizer, steps: int = STEPS) -> None:
    for _ in range(steps):
        opt.zero_grad()
        loss(module.weight.double()).backward()
        opt.step()


def oracle(depth: int, **options: Any) -> nn.Module:
    """Explicit mode under torch's SGD."""
    module = symopt.constrain(holder(), {"weight": S(0.05, depth=depth)}, mode="explicit", init="imbalanced")
    train(module, torch.optim.SGD(symopt.param_groups(module), lr=0.01, **options))
    return module


@cases(depth=[2, 3, 4, 5])
def test_the_free_gauge_is_explicit_mode_step_for_step(depth):
    module, opt = free(depth)
    start = module.weight.detach().clone()
    first = loss(module.weight)
    g = torch.autograd.grad(first, module.weight)[0] * start
    assert bool((g > 0).any()) and bool((g < 0).any())  # some weights are pulled out, some in
    train(module, opt)
    assert loss(module.weight) < 0.9 * first
    reference = oracle(depth)
    close(module.weight.detach(), reference.weight.detach(), "factor step")
    close(state_factors(module, opt), [f.detach() for f in factors(reference)], "factor step")
    assert bool((start.sign() != module.weight.sign()).any())  # some changed their sign on the way


@pytest.mark.parametrize(
    ("momentum", "dampening", "nesterov"), [(0.9, 0.0, False), (0.8, 0.3, False), (0.9, 0.0, True)]
)
@cases(depth=[2, 3])
def test_momentum_runs_on_the_effective_gradient(depth, momentum, dampening, nesterov):
    """Not on the factors: ``u' = rho u - delta rest``, delta from the buffer of the weight's gradient."""
    options = {"momentum": momentum, "dampening": dampening, "nesterov": nesterov}
    module, opt = free(depth, lr=0.002, **options)
    shadow = symopt.constrain(holder(), {"weight": S(depth=depth)}, mode="explicit", init="imbalanced")
    values, buffer = [f.detach().clone() for f in factors(shadow)], None
    train(module, opt, STEPS)
    for _ in range(STEPS):
        w = math.prod(values[1:], start=values[0]).requires_grad_()
        g = torch.autograd.grad(loss(w), w)[0]
        buffer = g if buffer is None else momentum * buffer + (1 - dampening) * g
        delta = 0.002 * (g + momentum * buffer if nesterov else buffer)
        rho = 1 - 0.002 * 0.05 * (1 - dampening) / (1 - momentum)
        rest = [math.prod((v for j, v in enumerate(values) if j != i), start=torch.ones(())) for i in range(depth)]
        values = [rho * u - delta * r for u, r in zip(values, rest, strict=True)]
    close(state_factors(module, opt), values, "factor step")
    close(module.weight.detach(), math.prod(values[1:], start=values[0]), "factor step")
    other = symopt.constrain(holder(), {"weight": S(0.05, depth=depth)}, mode="explicit", init="imbalanced")
    train(other, torch.optim.SGD(symopt.param_groups(other), lr=0.002, **options))
    assert (other.weight - module.weight).abs().max() > 0.01


def by_copy(module: nn.Module, value: Tensor) -> None:
    with torch.no_grad():
        module.weight.copy_(value)


def by_load(module: nn.Module, value: Tensor) -> None:
    module.load_state_dict({"weight": value})


def by_data(module: nn.Module, value: Tensor) -> None:
    module.weight.data = value.clone()


@cases(dtype=[torch.float64, torch.bfloat16], depth=[2, 3], change=[by_copy, by_load, by_data])
def test_entries_changed_from_outside_are_split_anew_and_no_others(change, depth, dtype):
    module, opt = free(depth, dtype)
    train(module, opt, 20)
    before = [f.clone() for f in state_factors(module, opt)]
    value = module.weight.detach().clone()
    changed = torch.zeros_like(value, dtype=torch.bool)
    changed[1, 2:] = changed[4, 0] = True
    value[changed] = torch.tensor([2.0, -0.5, 0.0, 3.0], dtype=dtype)
    change(module, value)
    opt.param_groups[0]["lr"] = 0.0  # a step that derives the factors and moves nothing
    train(module, opt, 1)
    after = state_factors(module, opt)
    assert torch.equal(module.weight, value)
    assert all(torch.equal(a[~changed], b[~changed]) for a, b in zip(after, before, strict=True))
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    c = opt.state[module.weight]["imbalance"]
    expected = S(depth=depth).split(value.to(state_dtype), c)
    for a, e in zip(after, expected, strict=True):
        assert a.dtype == state_dtype and torch.equal(a[changed], e[changed])
    opt.param_groups[0]["lr"] = 0.01
    train(module, opt, 1)
    assert not torch.equal(module.weight, value)


@cases(depth=[2, 3])
def test_bf16_weights_keep_fp32_factors(depth):
    """Steps too small for bf16 add up in the factors."""
    module, opt = free(depth, torch.bfloat16, lr=1e-5)
    start = module.weight.detach().clone()
    train(module, opt, 1)
    first = [f.clone() for f in state_factors(module, opt)]
    assert {f.dtype for f in first} == {torch.float32} and torch.equal(module.weight, start)
    train(module, opt, 300)
    last = state_factors(module, opt)
    assert all(not torch.equal(a, b) for a, b in zip(first, last, strict=True))
    assert torch.equal(module.weight, math.prod(last[1:], start=last[0]).bfloat16())
    assert module.weight.dtype == torch.bfloat16 and not torch.equal(module.weight, start)


@cases(depth=[2, 4], momentum=[0.0, 0.9], dtype=[torch.float64, torch.bfloat16])
def test_a_checkpoint_in_the_free_gauge_continues_bit_for_bit(depth, momentum, dtype):
    module, opt = free(depth, dtype, lr=0.002, momentum=momentum)
    train(module, opt, 20)
    file = io.BytesIO()
    torch.save({"model": module.state_dict(), "opt": opt.state_dict()}, file)
    file.seek(0)
    saved_state = torch.load(file, weights_only=True)
    train(module, opt, 20)
    other, other_opt = free(depth, dtype, lr=0.5)
    other.load_state_dict(saved_state["model"])
    other_opt.load_state_dict(saved_state["opt"])
    assert not torch.equal(other.weight, module.weight)
    train(other, other_opt, 20)
    assert torch.equal(other.weight, module.weight)
    assert all(map(torch.equal, state_factors(other, other_opt), state_factors(module, opt)))
