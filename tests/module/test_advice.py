"""What wildcards leave alone, and what is refused or warned of because of what a parameter is."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import symopt
from support.cases import cases

G, B, S = symopt.GroupSparse, symopt.GroupBridge, symopt.Sparse


def tree(**children: nn.Module) -> nn.Module:
    """A module with these children; a dot in a name is written as two underscores."""
    root = nn.Module()
    for name, child in children.items():
        *parents, last = name.split("__")
        at = root
        for parent in parents:
            if not hasattr(at, parent):
                at.add_module(parent, nn.Module())
            at = getattr(at, parent)
        at.add_module(last, child)
    return root


class Conv1D(nn.Module):
    """As Hugging Face's: the weight is (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))


class Generator(nn.Module):
    """Says which layer is its output, as Hugging Face's models do; it is not the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.logits, self.body = nn.Linear(8, 16), nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))

    def get_output_embeddings(self) -> nn.Module:
        return self.logits


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 30), nn.ReLU(), nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 10))


def convnet() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 12, 3), nn.Flatten(), nn.Linear(48, 10))


def language_model(*, tied: bool = False) -> nn.Module:
    net = tree(
        word=nn.Embedding(50, 8),
        position=nn.Embedding(16, 8),
        layers__0__mlp__up=nn.Linear(8, 32),
        layers__0__mlp__down=nn.Linear(32, 8),
        norm=nn.LayerNorm(8),
        lm_head=nn.Linear(8, 50, bias=False),
    )
    if tied:
        net.lm_head.weight = net.word.weight
    return net


def segmentation() -> nn.Module:
    """Two outputs: one is defined before the other."""
    return tree(
        stem=nn.Conv2d(3, 16, 3),
        body=nn.Conv2d(16, 32, 3),
        main__0=nn.Conv2d(32, 8, 3),
        main__1=nn.Conv2d(8, 21, 1),
        auxiliary__0=nn.Conv2d(32, 8, 3),
        auxiliary__1=nn.Conv2d(8, 21, 1),
    )


def bags() -> nn.Module:
    return tree(table=nn.EmbeddingBag(40, 6), hidden=nn.Linear(6, 9), out=nn.Linear(9, 2))


OUTPUTS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "mlp": (mlp, {"4.weight"}),
    "convolutions": (convnet, {"4.weight"}),
    "a network that ends in a convolution": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.Conv1d(4, 5, 1)),
        {"1.weight"},
    ),
    "equal widths": (lambda: nn.Sequential(*(nn.Linear(6, 6) for _ in range(3))), {"2.weight"}),
    "language model": (language_model, {"word.weight", "position.weight", "lm_head.weight"}),
    "tied": (lambda: language_model(tied=True), {"word.weight", "position.weight", "lm_head.weight"}),
    "two outputs": (segmentation, {"main.1.weight", "auxiliary.1.weight"}),
    "output embeddings": (Generator, {"logits.weight", "body.1.weight"}),
    "bags": (bags, {"table.weight", "out.weight"}),
    "recurrent": (
        lambda: tree(e=nn.Embedding(9, 4), r=nn.GRU(4, 6), mid=nn.Linear(6, 5), out=nn.Linear(5, 9)),
        {"e.weight", "out.weight"},
    ),
}

BY_UNITS: dict[str, Any] = {
    "share": lambda: G("out", keep=0.5),
    "strength": lambda: G("out", strength=0.1),
    "global": lambda: G("out", keep=0.5, scope="global"),
    "bridge": lambda: B("out"),
    "list": lambda: [S(), G("out")],
    "deep": lambda: G("out", depth=3),
}


@cases(model=OUTPUTS, how=BY_UNITS, key=["*.weight", "*t"])
def test_a_wildcard_makes_no_units_of_outputs_and_words(model: str, how: str, key: str) -> None:
    make, left = OUTPUTS[model]
    net = make()
    with pytest.warns(UserWarning) as caught:
        symopt.constrain(net, {"r.*": None, key: BY_UNITS[how]()} if model == "recurrent" else {key: BY_UNITS[how]()})
    assert len(caught) == 1 and caught[0].filename == __file__
    bound = set(symopt.constraints(net))
    matrices = {n for n, p in net.named_parameters(remove_duplicate=False) if p.dim() > 1 and not n.startswith("r.")}
    assert bound == matrices - left
    for name in left:
        assert name in str(caught[0].message)
    assert "None" in str(caught[0].message) and "in full" in str(caught[0].message)


@cases(model=OUTPUTS)
def test_what_is_named_in_full_is_bound_and_said_to_be_free_is_free(model: str) -> None:
    make, left = OUTPUTS[model]
    for value in (G("out", keep=0.5), None):
        net = make()
        symopt.constrain(
            net,
            {tuple(sorted(left)): value, "r.*": None, "*.weight": G("out")}
            if model == "recurrent"
            else {tuple(sorted(left)): value, "*.weight": G("out")},
        )
        assert (left <= set(symopt.constraints(net))) == (value is not None)
        assert value is not None or not left & set(symopt.constraints(net))


@cases(
    model=OUTPUTS,
    constraint=[S(), S(density=0.5), S(pattern="1:2"), symopt.LowRank(), G("block:1x1"), symopt.ZeroMean()],
)
def test_wildcards_bind_everything_where_no_unit_is_an_output_or_a_word(model: str, constraint: Any) -> None:
    if isinstance(constraint, S) and constraint.pattern and model not in ("mlp", "equal widths"):
        return  # odd numbers of inputs do not split into pairs
    net = OUTPUTS[model][0]()
    symopt.constrain(net, {"r.*": None, "*.weight": constraint} if model == "recurrent" else {"*.weight": constraint})
    assert OUTPUTS[model][1] <= set(symopt.constraints(net))


def test_inputs_of_outputs_and_coordinates_of_words_are_units() -> None:
    net = symopt.constrain(language_model(), {"*.weight": G("in", keep=0.5)})
    assert {"word.weight", "lm_head.weight"} <= set(symopt.constraints(net))


def test_a_later_pattern_may_bind_what_an_earlier_wildcard_leaves() -> None:
    net = symopt.constrain(mlp(), {"*.weight": G("out"), "*": S()})
    assert symopt.constraints(net) == {"0.weight": G("out"), "2.weight": G("out"), "4.weight": S()}
    net = symopt.constrain(mlp(), {"*.weight": G("out"), "4.weight": G("out", keep=3)})
    assert symopt.constraints(net)["4.weight"] == G("out", keep=3)


def test_a_wildcard_that_fits_nothing_else_is_refused() -> None:
    for make, key, name in (
        (lambda: nn.Linear(4, 3), "*", "weight"),
        (lambda: nn.Sequential(nn.Linear(4, 3)), "*.weight", "0.weight"),
        (language_model, "lm_*", "lm_head.weight"),
        (language_model, "w*", "word.weight"),
    ):
        with pytest.raises(ValueError, match=rf"{re.escape(repr(key))} binds nothing: {name} .*in full, {{'{name}'"):
            symopt.constrain(make(), {key: G("out")})


def test_classes_and_factories_warn_where_they_are_called() -> None:
    @symopt.constrain({"*.weight": G("out")})
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    @symopt.constrain({"*.weight": G("out")})
    def build() -> nn.Module:
        return mlp()

    for made in (Net, build):
        with pytest.warns(UserWarning, match=r"b\.weight|4\.weight") as caught:
            made()
        assert [w.filename for w in caught] == [__file__]


# ----------------------------------------------------------------------------------------------------------- layouts


def gpt2(depth: int = 2) -> nn.Module:
    layers = {
        f"h__{i}__{name}": Conv1D(out, inputs)
        for i in range(depth)
        for name, inputs, out in (("attn__c_attn", 8, 24), ("attn__c_proj", 8, 8), ("mlp__c_fc", 8, 32))
    }
    return tree(wte=nn.Embedding(50, 8), **layers, lm_head=nn.Linear(8, 50))


@cases(groups=["out", "in", "head:2", "block:2x2"], cls=[G, B])
def test_named_groups_of_conv1d_by_a_wildcard_are_refused(groups: str, cls: Any) -> None:
    net = gpt2()
    with pytest.raises(ValueError, match=r"h\.0\.attn\.c_attn\.weight .*\(in, out\).*in full.*None"):
        symopt.constrain(net, {"*.weight": cls(groups)})
    assert symopt.constraints(net) == {}
    symopt.constrain(net, {"h.1.mlp.c_fc.weight": cls(groups)})  # named in full
    assert list(symopt.constraints(net)) == ["h.1.mlp.c_fc.weight"]
    symopt.constrain(net, {"h.0.*.weight": G(lambda w: torch.arange(w.shape[1]).expand(w.shape))})
    given = symopt.constraints(net)["h.0.mlp.c_fc.weight"]
    assert given.size(net.get_parameter("h.0.mlp.c_fc.weight")).shape == (32,)
    symopt.constrain(gpt2(), {"h.*.weight": S()})


@cases(cls=[G, B], kind=[nn.ConvTranspose1d, nn.ConvTranspose2d], key=["*.weight", "0.weight"])
def test_named_groups_of_transposed_convolutions_are_refused(cls: Any, kind: Any, key: str) -> None:
    with pytest.raises(ValueError, match=r"0\.weight belongs to a transposed convolution.*index tensor"):
        symopt.constrain(nn.Sequential(kind(4, 6, 3), nn.Linear(6, 2)), {key: cls("out")})


@cases(key=["*.weight", "attention.query_key_value.weight"], heads=[2, 4], cls=[G, B])
def test_heads_packed_head_by_head_are_refused_with_the_right_index(key: str, heads: int, cls: Any) -> None:
    net = tree(attention__query_key_value=nn.Linear(8, 24), attention__dense=nn.Linear(8, 8), out=nn.Linear(8, 3))
    with pytest.raises(ValueError, match=r"attention\.query_key_value\.weight packs .*\(heads, 3, d\)") as caught:
        symopt.constrain(net, {key: cls(f"head:{heads}")})
    fix = re.search(r"row, GroupSparse\((.*)\)$", str(caught.value))
    assert fix is not None
    index = eval(fix[1], {"torch": torch})
    symopt.constrain(net, {"attention.query_key_value.weight": G(index)})
    assert torch.equal(index.reshape(heads, 3, -1), torch.arange(heads)[:, None, None].expand(heads, 3, 8 // heads))


def test_heads_packed_as_torch_packs_them_are_not() -> None:
    for name in ("qkv", "c_attn", "in_proj"):
        symopt.constrain(tree(**{f"attn__{name}": nn.Linear(8, 24)}), {f"attn.{name}.weight": G("head:4")})


@cases(key=["*.weight", "word.weight"], keep=[0.1, 0.9], groups=["out", "in"])
def test_multiply_adds_of_lookups_are_refused(key: str, keep: float, groups: str) -> None:
    net = language_model()
    with pytest.raises(ValueError, match=r"word\.weight belongs to an embedding.*'word\.weight': None"):
        symopt.constrain(net, {key: G(groups, keep=keep, scope="flops")})
    assert symopt.constraints(net) == {}
    free: Any = {("word.weight", "position.weight", "lm_head.weight"): None}
    assert symopt.constraints(symopt.constrain(net, {**free, "*.weight": G(groups, keep=keep, scope="flops")}))


# ------------------------------------------------------------------------------------------------------------- heads


def attention(prefix: str, names: tuple[str, ...], heads: int = 4, kv: int = 2) -> dict[str, nn.Module]:
    q, k, v = names
    return {
        f"{prefix}__{q}": nn.Linear(16, 4 * heads),
        f"{prefix}__{k}": nn.Linear(16, 4 * kv),
        f"{prefix}__{v}": nn.Linear(16, 4 * kv),
    }


NAMES = [
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("to_q", "to_k", "to_v"),
    ("q", "k", "v"),
]


@cases(names=NAMES, kv=[2, 4], literal=[True, False])
def test_heads_that_are_chosen_apart_are_warned_of_with_what_binds_them(
    names: tuple[str, ...], kv: int, literal: bool
) -> None:
    def make() -> nn.Module:
        return tree(**attention("layers__0__attn", names, kv=kv), out=nn.Linear(16, 16))

    net, before = make(), "layers.0.attn." if literal else "layers.*.attn."
    with pytest.warns(UserWarning, match="independently") as caught:
        symopt.constrain(
            net, {f"{before}{name}.weight": G(f"head:{n}") for name, n in zip(names, (4, kv, kv), strict=True)}
        )
    assert len(caught) == 1
    text = str(caught[0].message)
    assert all(f"layers.0.attn.{name}.weight" in text for name in names)
    fix = re.search(r"bind those of a layer as one, (\{.*\})$", text)
    assert fix is not None
    bound = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        symopt.constrain(bound, eval(fix[1], {"torch": torch, "GroupSparse": G}))
    units = {c.spanning_units.count for c in symopt.constraints(bound).values()}
    assert units == {kv}


def test_heads_of_one_projection_or_of_other_layers_are_not_warned_of() -> None:
    symopt.constrain(tree(**attention("attn", NAMES[0])), {"attn.v_proj.weight": G("head:2")})
    symopt.constrain(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), {("0.weight", "1.weight"): G("head:2")})
    net = tree(**attention("a", NAMES[0]), **attention("b", NAMES[0]))
    symopt.constrain(net, {("a.v_proj.weight", "b.v_proj.weight"): G("head:2")})


# ----------------------------------------------------------------------------------------------------- other names

MISSED: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...], tuple[str, ...]]] = {
    "attention": (
        lambda: tree(attn=nn.MultiheadAttention(8, 2), out=nn.Linear(8, 3)),
        ("attn.in_proj_weight",),
        ("'*.in_proj_weight'",),
    ),
    "separate projections": (
        lambda: tree(attn=nn.MultiheadAttention(8, 2, kdim=4, vdim=6), out=nn.Linear(8, 3)),
        ("attn.q_proj_weight", "attn.k_proj_weight", "attn.v_proj_weight"),
        ("'*.q_proj_weight'", "'*.k_proj_weight'", "'*.v_proj_weight'"),
    ),
    "lstm": (
        lambda: tree(rnn=nn.LSTM(4, 6), out=nn.Linear(6, 3)),
        ("rnn.weight_ih_l0", "rnn.weight_hh_l0"),
        ("'*.weight_ih_l0'", "'*.weight_hh_l0'"),
    ),
    "cell": (
        lambda: tree(cell=nn.GRUCell(4, 6), out=nn.Linear(6, 3)),
        ("cell.weight_ih", "cell.weight_hh"),
        ("'*.weight_ih'", "'*.weight_hh'"),
    ),
    "encoder": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16), nn.Linear(8, 3)),
        ("0.self_attn.in_proj_weight",),
        ("'*.in_proj_weight'",),
    ),
}


@cases(model=MISSED, constraint=[S(), S(density=0.1), G("in"), symopt.LowRank()])
def test_matrices_that_are_not_called_weight_are_named_with_the_key_to_add(model: str, constraint: Any) -> None:
    make, missed, keys = MISSED[model]
    net = make()
    with pytest.warns(UserWarning, match=r"'\*\.weight' misses") as caught:
        symopt.constrain(net, {"*.weight": constraint})
    assert len(caught) == 1
    assert all(word in str(caught[0].message) for word in (*missed, *keys))
    assert not set(missed) & set(symopt.constraints(net)) and symopt.constraints(net)
    added = tuple(key.strip("'") for key in keys)
    assert set(missed) <= set(symopt.constraints(symopt.constrain(make(), {("*.weight", *added): constraint})))
    assert not set(missed) & set(symopt.constraints(symopt.constrain(make(), {added: None, "*.weight": constraint})))


def test_only_keys_that_end_in_weight_miss_something_and_only_below_themselves() -> None:
    net = tree(a__rnn=nn.LSTM(4, 6), a__out=nn.Linear(6, 3), b__rnn=nn.LSTM(4, 6), b__out=nn.Linear(6, 3))
    symopt.constrain(net, {"a.out.*": S()})
    with pytest.warns(UserWarning, match=r"misses .*b\.rnn\.weight_ih_l0.*'b\.\*\.weight_ih_l0'") as caught:
        symopt.constrain(net, {"b.*.weight": S()})
    assert "a.rnn" not in str(caught[0].message)


def test_all_that_is_to_be_said_is_one_warning() -> None:
    net = tree(word=nn.Embedding(20, 8), rnn=nn.LSTM(8, 6), attn=nn.MultiheadAttention(6, 2), out=nn.Linear(6, 20))
    with pytest.warns(UserWarning) as caught:
        symopt.constrain(net, {"*.weight": G("out", keep=0.5)})
    assert len(caught) == 1
    for name in ("word.weight", "out.weight", "rnn.weight_ih_l0", "attn.in_proj_weight"):
        assert name in str(caught[0].message)
    assert list(symopt.constraints(net)) == ["attn.out_proj.weight"]


def test_rows_that_make_no_hidden_unit_or_head_removable_are_warned_of() -> None:
    net = tree(rnn=nn.LSTM(4, 6), attn=nn.MultiheadAttention(6, 2), out=nn.Linear(6, 3))
    with pytest.warns(UserWarning) as caught:
        symopt.constrain(net, {"out.weight": None, "*weight*": G("out")})
    text = str(caught[0].message)
    assert len(caught) == 1 and "rnn.weight_ih_l0" in text and "gates" in text
    assert "{'attn.in_proj_weight': GroupSparse('head:2')}" in text


def test_a_large_model_is_looked_at_once() -> None:
    """Names in a warning are few, and the time grows with the number of layers, not with its square."""
    net = nn.Sequential(*(nn.Embedding(4, 2) for _ in range(50)), nn.Linear(2, 3), nn.Linear(3, 2))
    with pytest.warns(UserWarning, match="0.weight .* and 43 more"):
        symopt.constrain(net, {"*.weight": G("out")})
