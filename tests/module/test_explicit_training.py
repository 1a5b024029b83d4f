"""Explicit modules under optimizers and torch's tools, and what must not be bound twice."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

import symopt
from support.cases import cases
from support.explicit import (
    ROWS,
    SMALL,
    Cell,
    G,
    S,
    close,
    explicit,
    explicit_net,
    factors,
    gradients,
    in_any_memory,
    net,
    randn,
)

# -- optimizers ------------------------------------------------------------------------------------------------------


@cases(cls=[torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_param_groups_put_the_strength_on_the_factors(cls):
    patterns = {"0.weight": S(strength=0.1), "3.0.weight": G("out"), "3.2.weight": S(strength=0.1)}
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
        symopt.constrain(layer, {"weight": [S(strength=0.01), G("out", strength=0.0)]}, mode="explicit")
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
    module = symopt.constrain(net(), {"0.weight": S(strength=0.1)}, mode="explicit")
    symopt.constrain(module, {"3.0.weight": G("out")})
    assert symopt.constraints(module) == {"3.0.weight": G("out"), "0.weight": S(strength=0.1)}
    assert symopt.constraints(copy.deepcopy(module)) == symopt.constraints(module)
    assert symopt.constraints(module[0]) == {"weight": S(strength=0.1)}
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
    @symopt.constrain({"weight": S(strength=0.2)}, mode="explicit", init="balanced")
    class Block(nn.Linear):
        pass

    @symopt.constrain({("0.weight", "1.weight"): G("out", strength=0.3)}, mode="explicit", init=1.0)
    def build(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(width, 2), nn.Linear(2, 2))

    one, two = Block(3, 2), Block(3, 2)
    assert isinstance(one, Block) and symopt.constraints(one) == {"weight": S(strength=0.2)}
    u, v = factors(one)
    torch.testing.assert_close(u.abs(), v.abs())
    assert symopt.release(two).weight.shape == (2, 3) and type(two) is Block and len(factors(one)) == 2
    module = build(4)
    assert symopt.constraints(module) == {f"{i}.weight": G("out", strength=0.3) for i in (0, 1)}
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
