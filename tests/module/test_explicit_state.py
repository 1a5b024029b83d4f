"""State dicts, release, fold and copies of explicit modules: a plain module goes in, and a plain module comes out."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import symopt
from support.cases import cases
from support.explicit import (
    KEEPS,
    PATTERNS,
    ROWS,
    G,
    S,
    close,
    explicit,
    explicit_net,
    factors,
    in_any_memory,
    net,
    randn,
)
from symopt.folding.fold import fold

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
