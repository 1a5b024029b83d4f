"""Bad input: one table.  A message names the parameter (or argument), says what is wrong, and what to do instead."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import symopt
from support.cases import cases
from support.table import ANY_SHAPE, OptimizerRow
from symopt.folding.fold import fold
from symopt.folding.resize import resize
from symopt.report import report

S, G = symopt.Sparse, symopt.GroupSparse


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def bound() -> nn.Sequential:
    return symopt.constrain(net(), {"0.weight": S(), "2.weight": G("out")})


def holding(**parameters: Any) -> nn.Module:
    module = nn.Module()
    for name, value in parameters.items():
        module.register_parameter(name, value if isinstance(value, nn.Parameter) else nn.Parameter(value))
    return module


def spoiled(value: float) -> nn.Module:
    module = net()
    with torch.no_grad():
        module[2].weight[1, 1] = value
    return module


def frozen() -> nn.Module:
    module = net()
    module[0].weight.requires_grad_(False)
    return module


def tied() -> nn.Module:
    module = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    module["b"].weight = module["a"].weight  # type: ignore[assignment]
    return module


def tied_and_bound() -> nn.Module:
    return symopt.constrain(tied(), {"a.weight": S()})


def weight(*shape: int) -> Callable[[], nn.Module]:
    return lambda: holding(weight=torch.ones(shape))


def junk(value: Any) -> dict[str, Any]:
    return {"weight": G(lambda w: value)}


integers = nn.Parameter(torch.ones(2, 2, dtype=torch.int64), requires_grad=False)

# id, module, patterns, exception, parts of the message
CONSTRAIN: list[tuple[str, Callable[[], Any], Any, type[Exception], tuple[str, ...]]] = [
    ("unmatched", net, {"1.weight": S()}, ValueError, ("'1.weight'", "matches no parameter", "0.weight, 0.bias")),
    ("unmatched in a tuple", net, {("0.weight", "x*"): S()}, ValueError, ("'x*'", "matches no parameter", "0.bias")),
    ("unmatched none", net, {"x": None, "*.weight": S()}, ValueError, ("'x'", "matches no parameter", "0.weight")),
    ("no parameters", nn.ReLU, {"*": S()}, ValueError, ("'*'", "matches no parameter", "none")),
    ("shadowed", net, {"*.weight": S(), "0.weight": G("out")}, ValueError, ("'0.weight'", "earlier", "first")),
    ("shadowed by none", net, {"0.*": None, "0.w*": S()}, ValueError, ("'0.w*'", "earlier", "0.weight", "first")),
    ("shadowed in a tuple", net, {("*.weight", "0.weight"): S()}, ValueError, ("'0.weight'", "earlier")),
    ("wildcard on vectors", net, {"*.bias": S()}, ValueError, ("'*.bias'", "two dimensions", "0.bias", "in full")),
    ("empty", net, {}, ValueError, ("patterns", "empty")),
    ("not a mapping", net, [("0.weight", S())], TypeError, ("patterns", "mapping", "list")),
    ("a constraint", net, S(), TypeError, ("patterns", "mapping", "Sparse")),
    ("no patterns", net, None, TypeError, ("patterns", "constrain(module, {")),
    ("class", net, {"0.weight": S}, TypeError, ("'0.weight'", "class Sparse", "call it")),
    ("another class", net, {"0.weight": int}, TypeError, ("'0.weight'", "Constraint", "int")),
    ("string", net, {"0.weight": "sparse"}, TypeError, ("'0.weight'", "Constraint", "str")),
    ("number", net, {"0.weight": 0.1}, TypeError, ("'0.weight'", "Constraint", "float")),
    ("empty list", net, {"0.weight": []}, ValueError, ("two or more",)),
    ("list of one", net, {"0.weight": [S()]}, ValueError, ("two or more",)),
    ("junk in a list", net, {"0.weight": [S(), 3]}, TypeError, ("Sparse and GroupSparse", "3")),
    ("key", net, {0: S()}, TypeError, ("pattern", "string", "0")),
    ("key in a tuple", net, {("0.weight", 1): S()}, TypeError, ("pattern", "tuple of strings", "1")),
    ("empty tuple", net, {(): S()}, TypeError, ("pattern", "()")),
    ("second is bad", net, {"0.weight": S(), "2.weight": G("head:2")}, ValueError, ("2.weight", "3", "2 equal heads")),
    ("nan", lambda: spoiled(math.nan), {"*.weight": S()}, ValueError, ("2.weight", "NaN", "initialise")),
    ("inf", lambda: spoiled(math.inf), {"*.weight": S()}, ValueError, ("2.weight", "infinite", "initialise")),
    ("frozen", frozen, {"*.weight": S()}, ValueError, ("0.weight", "frozen", "'0.weight': None")),
    ("twice", bound, {"0.weight": G("out")}, ValueError, ("0.weight", "already constrained", "release")),
    ("twice by wildcard", bound, {"*": S()}, ValueError, ("0.weight", "already constrained", "release")),
    ("tied", tied, {"a.*": S(), "b.weight": G("out")}, ValueError, ("a.weight and b.weight", "same tensor", "one")),
    ("tied and free", tied, {"a.*": S(), "b.*": None}, ValueError, ("a.weight", "b.weight", "same tensor")),
    ("free and tied", tied, {"a.*": None, "b.*": S()}, ValueError, ("a.weight", "b.weight", "same tensor")),
    ("tied twice", tied_and_bound, {"b.weight": G("out")}, ValueError, ("b.weight", "already", "release")),
    ("integers", lambda: holding(w=integers), {"w": S()}, TypeError, ("w ", "int64", "floating-point")),
    ("complex", lambda: holding(w=torch.ones(2, 2) * 1j), {"w": S()}, TypeError, ("w ", "complex64", "real")),
    ("no elements", weight(3, 0), {"weight": S()}, ValueError, ("weight", "(3, 0)", "leave it out")),
    ("0-dim", weight(), {"weight": S()}, ValueError, ("weight", "()", "leave it out")),
    ("lazy", lambda: nn.LazyLinear(3), {"weight": S()}, ValueError, ("weight", "uninitialised", "once before")),
    ("lazy wildcard", lambda: nn.LazyLinear(3), {"*": S()}, ValueError, ("weight", "uninitialised", "once before")),
    ("heads", weight(7, 4), {"weight": G("head:2")}, ValueError, ("weight", "7 outputs", "2 equal heads")),
    ("packed heads", weight(12, 4), {"weight": G("head:3")}, ValueError, ("weight", "4 outputs", "3 equal heads")),
    ("block rows", weight(5, 6), {"weight": G("block:2x3")}, ValueError, ("weight", "(5, 6)", "2 x 3", "divisors")),
    ("block columns", weight(4, 5), {"weight": G("block:2x3")}, ValueError, ("weight", "(4, 5)", "2 x 3", "divisors")),
    ("block of a vector", weight(6), {"weight": G("block:2x3")}, ValueError, ("weight", "(6,)", "2 x 3")),
    ("in of a vector", weight(6), {"weight": G("in")}, ValueError, ("weight", "(6,)", "dimension 1", "'out'")),
    ("index shape", weight(6, 5), {"weight": G(torch.arange(5))}, ValueError, ("weight", "(5,)", "(6, 5)", "(6,)")),
    ("index transposed", weight(6, 5), {"weight": G(torch.ones(5, 6).long())}, ValueError, ("weight", "(5, 6)")),
    ("callable: list", weight(2, 2), junk([0, 1]), TypeError, ("weight", "callable", "integer tensor", "list")),
    ("callable: none", weight(2, 2), junk(None), TypeError, ("weight", "callable", "integer tensor", "NoneType")),
    ("callable: floats", weight(2, 2), junk(torch.ones(2)), TypeError, ("weight", "integer tensor", "float32")),
    ("callable: bools", weight(2, 2), junk(torch.ones(2) > 0), TypeError, ("weight", "integer tensor", "bool")),
    ("callable: shape", weight(2, 2), junk(torch.arange(3)), ValueError, ("weight", "(3,)", "(2, 2)", "(2,)")),
    *(
        (f"transposed {groups}", lambda: nn.ConvTranspose1d(4, 6, 2), {"weight": G(groups)}, ValueError,
         ("weight", "transposed convolution", repr(groups), "index tensor"))
        for groups in ("out", "in", "head:2", "block:2x2")
    ),
    ("transposed, composed", lambda: nn.ConvTranspose1d(4, 6, 2), {"weight": [S(), G("out")]}, ValueError,
     ("weight", "transposed convolution", "index tensor")),
]  # fmt: skip


def table(rows: list[Any]) -> Any:
    return {"argvalues": [row[1:] for row in rows], "ids": [row[0] for row in rows]}


@pytest.mark.parametrize(("build", "patterns", "error", "parts"), **table(CONSTRAIN))
def test_constrain_refuses_and_leaves_the_module_alone(
    build: Callable[[], nn.Module], patterns: Any, error: type[Exception], parts: tuple[str, ...]
) -> None:
    module = build()
    before, hooks = symopt.constraints(module), [dict(m._forward_pre_hooks) for m in module.modules()]
    attributes = [set(vars(m)) for m in module.modules()]
    with pytest.raises(error) as caught:
        symopt.constrain(module, patterns)
    message = str(caught.value)
    assert [part for part in parts if part not in message] == [], message
    assert type(caught.value) is error
    assert symopt.constraints(module) == before
    assert [set(vars(m)) for m in module.modules()] == attributes
    assert [dict(m._forward_pre_hooks) for m in module.modules()] == hooks


@pytest.mark.parametrize(
    ("options", "error", "parts"),
    [
        ({"mode": "implicit"}, ValueError, ("mode", "'optimizer' or 'explicit'", "'implicit'")),
        ({"mode": None}, ValueError, ("mode", "'optimizer' or 'explicit'", "None")),
        ({"mode": "explicit", "init": "zeros"}, ValueError, ("init", "'imbalanced'", "'zeros'")),
        ({"mode": "explicit", "init": -1.0}, ValueError, ("init", ">= 0", "-1")),
        ({"mode": "explicit", "init": math.nan}, ValueError, ("init", "finite", "nan")),
        ({"mode": "explicit", "init": True}, ValueError, ("init", "True")),
        ({"mode": "explicit", "init": None}, ValueError, ("init", "None")),
    ],
    ids=str,
)
def test_constrain_refuses_other_modes_and_inits(
    options: dict[str, Any], error: type[Exception], parts: tuple[str, ...]
) -> None:
    module = net()
    for arguments in ((module, {"*": S()}), ({"*": S()},)):
        with pytest.raises(error) as caught:
            symopt.constrain(*arguments, **options)
        assert [part for part in parts if part not in str(caught.value)] == [], str(caught.value)
    assert not symopt.constraints(module) and "parametrizations" not in module[0]._modules


@pytest.mark.parametrize(
    ("build", "patterns", "parts"),
    [
        (tied, {"*": S()}, (".weight", "several names", "mode='optimizer'")),
        (bound, {"0.weight": S()}, ("0.weight", "already constrained", "release")),
        (lambda: symopt.constrain(net(), {"0.weight": S()}, mode="explicit"), {"0.weight": S()}, ("'0.weight'",)),
        (lambda: spoiled(math.nan), {"2.weight": S()}, ("2.weight", "NaN", "initialise")),
    ],
    ids=["tied", "bound", "explicit already", "nan"],
)
def test_explicit_mode_refuses_and_leaves_the_module_alone(
    build: Callable[[], nn.Module], patterns: Any, parts: tuple[str, ...]
) -> None:
    module = build()
    keys, before = list(module.state_dict()), symopt.constraints(module)
    with pytest.raises(ValueError, match="constrain: ") as caught:
        symopt.constrain(module, patterns, mode="explicit")
    assert [part for part in parts if part not in str(caught.value)] == [], str(caught.value)
    assert list(module.state_dict()) == keys and symopt.constraints(module) == before


@cases(row=ANY_SHAPE)
def test_symopts_optimizers_refuse_explicit_modules(row: OptimizerRow) -> None:
    module = symopt.constrain(net(), {"0.weight": S()}, mode="explicit")
    fix = "explicit.*param_groups"
    for params in (module, module.parameters(), symopt.param_groups(module)):
        with pytest.raises(ValueError, match=fix):
            row.cls(params, lr=row.lr, **row.options)
    opt = row.cls(module[2].parameters(), lr=row.lr, **row.options)
    with pytest.raises(ValueError, match=fix):
        opt.add_param_group({"params": list(module[0].parameters())})
    assert len(opt.param_groups) == 1
    row.torch_cls(symopt.param_groups(module), lr=row.lr, **row.options)


class NotAModule:
    pass


def returns_none() -> None:
    return None


def with_group(**group: Any) -> Callable[[Any], Any]:
    return lambda cls: cls([{"params": bound().parameters(), **group}], lr=0.1)


def added(**group: Any) -> Callable[[Any], Any]:
    def call(cls: Any) -> Any:
        module = bound()
        opt = cls([module[0].bias], lr=0.1)
        try:
            opt.add_param_group({"params": [module[0].weight], **group})
        finally:
            assert len(opt.param_groups) == 1 and not list(opt.bindings())  # the optimizer is as it was

    return call


# id, call, exception, parts of the message
PUBLIC: list[tuple[str, Callable[[], Any], type[Exception], tuple[str, ...]]] = [
    *(
        (f"constrain({type(bad).__name__})", lambda bad=bad: symopt.constrain(bad, {"*": S()}), TypeError,
         ("constrain", "Module", type(bad).__name__))
        for bad in (None, "net", 3, [net()], net().parameters(), nn.Linear)
    ),
    ("constrain()", lambda: symopt.constrain(None), TypeError, ("constrain", "Module", "NoneType")),
    ("decorated instance", lambda: symopt.constrain({"*": S()})(net()), TypeError, ("Sequential", "constrain(module")),
    ("decorated class", lambda: symopt.constrain({"*": S()})(NotAModule), TypeError, ("Module subclass", "type")),
    ("decorated number", lambda: symopt.constrain({"*": S()})(3), TypeError, ("Module subclass", "int")),
    ("factory of none", lambda: symopt.constrain({"*": S()})(returns_none)(), TypeError, ("returns_none", "NoneType")),
    ("decorator, empty", lambda: symopt.constrain({}), ValueError, ("patterns", "empty")),
    ("decorator, value", lambda: symopt.constrain({"*": S}), TypeError, ("'*'", "class Sparse", "call it")),
    ("decorator, unmatched", lambda: symopt.constrain({"x": S()})(net)(), ValueError, ("'x'", "no parameter")),
    *(
        (f"{function.__name__}({type(bad).__name__})", lambda function=function, bad=bad: function(bad), TypeError,
         (function.__name__, "Module", type(bad).__name__))
        for function in (symopt.release, symopt.constraints, symopt.param_groups, symopt.plain_state_dict, report, fold)
        for bad in (None, 3, [net()], net().parameters())
    ),
    ("report, torch optimizer", lambda: report(net(), torch.optim.SGD(net().parameters())), TypeError,
     ("report", "symopt optimizer", "SGD")),
    ("report, swapped", lambda: report(symopt.SGD(net()), net()), TypeError, ("report", "Module", "SGD")),
    ("resize", lambda: resize(3, {}), TypeError, ("resize", "Module", "int")),
    ("resize, config", lambda: resize(net(), {}), ValueError, ("resize", "fold_config")),
    *(
        (f"GroupSparse({bad!r})", lambda bad=bad: G(bad), ValueError, ("GroupSparse", "'head:<n>'", repr(bad)))
        for bad in ("", "rows", "OUT", "head", "head:", "head:0", "head:-1", "head:2.0", "block:2", "block:0x2",
                    "block:2x", "block:2x0", "block:2X2", "out ")
    ),
    *(
        (f"GroupSparse({type(bad).__name__})", lambda bad=bad: G(bad), TypeError, ("GroupSparse", "groups", "callable"))
        for bad in (None, [0, 1], ("out",))
    ),
    *(
        (f"GroupSparse({bad.dtype})", lambda bad=bad: G(bad), TypeError, ("GroupSparse", "integers", str(bad.dtype)))
        for bad in (torch.ones(2), torch.ones(2) > 0, torch.ones(2) * 1j)
    ),
    ("GroupSparse()", lambda: G(), TypeError, ("groups",)),
    *(
        (f"{name}(strength={bad!r})", lambda make=make, bad=bad: make(bad), error, (name, "strength"))
        for name, make in (("Sparse", lambda k: S(strength=k)), ("GroupSparse", lambda k: G("out", strength=k)))
        for bad, error in ((-0.1, ValueError), (math.nan, ValueError), (math.inf, ValueError), (True, TypeError),
                           ("0.1", TypeError), (1j, TypeError), (torch.tensor(0.1), TypeError))
    ),
    *(
        (f"{name}(depth={bad!r})", lambda make=make, bad=bad: make(bad), error, (name, "depth", part))
        for name, make in (("Sparse", lambda d: S(depth=d)), ("GroupSparse", lambda d: G("out", depth=d)))
        for error, part, values in ((ValueError, ">= 2", (1, 0, -2)), (TypeError, "integer", (2.0, True, None, "2")))
        for bad in values
    ),
    *(
        (f"Sparse(gauge={bad!r})", lambda bad=bad: S(gauge=bad), ValueError, ("Sparse", "gauge", "'fixed' or 'free'"))
        for bad in ("frei", "", None, 1)
    ),
    *(
        (f"total_steps={bad!r}", lambda bad=bad: symopt.SGD(net(), total_steps=bad), error,
         ("SGD", "total_steps", shown))
        for bad, error, shown in ((0, ValueError, "0"), (-5, ValueError, "-5"), (10.0, TypeError, "float"),
                                  (True, TypeError, "bool"), ("10", TypeError, "str"))
    ),
    *(
        (f"commit={bad!r}", lambda bad=bad: symopt.AdamW(net(), total_steps=10, commit=bad), error,
         ("AdamW", "commit", str(bad)))
        for bad, error in ((0, ValueError), (1, ValueError), (-0.5, ValueError), (7, ValueError),
                           (math.nan, ValueError), ("half", TypeError))
    ),
    ("commit alone", lambda: symopt.AdamW(net(), commit=0.5), ValueError, ("AdamW", "commit", "total_steps")),
    *(
        (f"reschedule({bad!r})", lambda bad=bad: symopt.SGD(net()).reschedule(bad), error,
         ("SGD.reschedule", "total_steps", shown))
        for bad, error, shown in ((0, ValueError, "0"), (10.0, TypeError, "float"), (None, TypeError, "NoneType"))
    ),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "parts"), **table(PUBLIC))
def test_public_functions_refuse(call: Callable[[], Any], error: type[Exception], parts: tuple[str, ...]) -> None:
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert [part for part in parts if part not in message] == [], message
    assert type(caught.value) is error


# id, exception, parts of the message, keyword arguments: for the constructor, a group, and an added group alike
OPTIONS: list[tuple[str, type[Exception], tuple[str, ...], dict[str, Any]]] = [
    ("time_scale", ValueError, ("time_scale", "'saturated' or 'none'", "'fast'"), {"time_scale": "fast"}),
    ("time_scale none", ValueError, ("time_scale", "'saturated' or 'none'", "None"), {"time_scale": None}),
    ("imbalance < 0", ValueError, ("imbalance", ">= 0", "-1"), {"imbalance": -1}),
    ("imbalance nan", ValueError, ("imbalance", "finite", "nan"), {"imbalance": math.nan}),
    ("imbalance inf", ValueError, ("imbalance", "finite", "inf"), {"imbalance": math.inf}),
    ("imbalance bool", TypeError, ("imbalance", "number", "bool"), {"imbalance": True}),
    ("imbalance str", TypeError, ("imbalance", "number", "str"), {"imbalance": "1"}),
    ("imbalance none", TypeError, ("imbalance", "number", "NoneType"), {"imbalance": None}),
    ("strength < 0", ValueError, ("strength", ">= 0", "-0.1"), {"strength": -0.1}),
    ("strength nan", ValueError, ("strength", "finite", "nan"), {"strength": math.nan}),
    ("strength inf", ValueError, ("strength", "finite", "inf"), {"strength": math.inf}),
    ("strength bool", TypeError, ("strength", "number", "bool"), {"strength": True}),
    ("strength str", TypeError, ("strength", "number", "str"), {"strength": "1"}),
    ("strength list", TypeError, ("strength", "number", "list"), {"strength": [0.1]}),
    ("strength vector", ValueError, ("strength", "one element", "(2,)"), {"strength": torch.ones(2)}),
    ("strength tensor < 0", ValueError, ("strength", ">= 0", "-1"), {"strength": torch.tensor(-1.0)}),
    ("strength tensor nan", ValueError, ("strength", "finite", "nan"), {"strength": torch.tensor(math.nan)}),
    ("imbalance vector", (TypeError, ValueError), ("imbalance",), {"imbalance": torch.ones(2)}),  # type: ignore[list-item]
]


@pytest.mark.parametrize(("error", "parts", "options"), **table(OPTIONS))
@cases(row=[r for r in ANY_SHAPE if r.id in ("sgd", "adam", "adamw", "lion")], where=["constructor", "group", "added"])
def test_optimizers_refuse_their_own_options(
    row: OptimizerRow, error: type[Exception], parts: tuple[str, ...], options: dict[str, Any], where: str
) -> None:
    with pytest.raises(error) as caught:
        if where == "constructor":
            row.cls(bound(), lr=0.1, **options)
        else:
            (with_group if where == "group" else added)(**options)(row.cls)
    message = str(caught.value)
    assert [part for part in (row.cls.__name__, *parts) if part not in message] == [], message


@cases(momentum=[1, 1.0, 1.5])
def test_momentum_of_one_or_more_is_for_unconstrained_parameters_only(momentum: float) -> None:
    module = bound()
    groups = [{"params": [module[0].bias]}, {"params": [module[0].weight], "momentum": momentum}]
    for call in (
        lambda: symopt.SGD(module, lr=0.1, momentum=momentum),
        lambda: symopt.SGD(groups, lr=0.1),
        lambda: added(momentum=momentum)(symopt.SGD),
    ):
        with pytest.raises(ValueError, match=rf"0\.weight: momentum must be < 1 .*constrained.*{momentum}"):
            call()
    opt = symopt.SGD(net(), lr=0.1, momentum=momentum)  # as in torch
    assert opt.defaults["momentum"] == momentum


@cases(row=ANY_SHAPE, constraint=[S(), G("out")])
def test_a_zero_weight_without_imbalance_could_never_train(row: OptimizerRow, constraint: symopt.Constraint) -> None:
    module = symopt.constrain(nn.Sequential(nn.Linear(3, 2)), {"0.weight": constraint})
    nn.init.zeros_(module[0].weight)
    opt = row.cls(module, lr=row.lr, imbalance=0.0, **row.options)
    module[0].weight.grad = torch.ones_like(module[0].weight)
    with pytest.raises(ValueError, match=r"0\.weight is zero everywhere.*imbalance > 0 or initialise"):
        opt.step()
    assert not module[0].weight.any() and set(opt.state.get(module[0].weight, ())) <= {"progress", "bias_rows"}


# ------------------------------------------------------------------------------------- what torch refuses, and how


def grouped_twice(p: Any) -> Any:
    return [{"params": [p]}, {"params": [p]}]


TORCHS: list[tuple[str, Callable[[Any], Any]]] = [
    ("lr", lambda cls: cls(net().parameters(), lr=-1.0)),
    ("lr vector", lambda cls: cls(net().parameters(), lr=torch.ones(2))),
    ("weight_decay", lambda cls: cls(net().parameters(), weight_decay=-1.0)),
    ("momentum", lambda cls: cls(net().parameters(), momentum=-0.5)),
    ("nesterov", lambda cls: cls(net().parameters(), nesterov=True)),
    ("nesterov with dampening", lambda cls: cls(net().parameters(), momentum=0.9, dampening=0.1, nesterov=True)),
    ("beta1", lambda cls: cls(net().parameters(), betas=(1.0, 0.9))),
    ("beta2", lambda cls: cls(net().parameters(), betas=(0.9, 1.0))),
    ("betas mixed", lambda cls: cls(net().parameters(), betas=(0.9, torch.tensor(0.9)))),
    ("eps", lambda cls: cls(net().parameters(), eps=-1.0)),
    ("fused and foreach", lambda cls: cls(net().parameters(), fused=True, foreach=True)),
    ("fused and differentiable", lambda cls: cls(net().parameters(), fused=True, differentiable=True)),
    ("tensor lr and foreach", lambda cls: cls(net().parameters(), torch.tensor(0.1), foreach=True, capturable=False)),
    ("unknown argument", lambda cls: cls(net().parameters(), learning_rate=0.1)),
    ("too many arguments", lambda cls: cls(net().parameters(), *range(20))),
    ("no arguments", lambda cls: cls()),
    ("no parameters", lambda cls: cls([])),
    ("empty module", lambda cls: cls(nn.ReLU().parameters())),
    ("a tensor", lambda cls: cls(torch.ones(2))),
    ("a number", lambda cls: cls(3)),
    ("numbers", lambda cls: cls([3])),
    ("strings", lambda cls: cls(["weight"])),
    ("a set in a group", lambda cls: cls([{"params": set(net().parameters())}])),
    ("a group without params", lambda cls: cls([{"lr": 0.1}])),
    ("groups and tensors", lambda cls: cls([{"params": [nn.Parameter(torch.ones(2))]}, nn.Parameter(torch.ones(2))])),
    ("names and tensors", lambda cls: cls([("a", nn.Parameter(torch.ones(2))), nn.Parameter(torch.ones(2))])),
    ("not a leaf", lambda cls: cls([nn.Parameter(torch.ones(2)) * 2])),
    ("in two groups", lambda cls: cls(grouped_twice(nn.Parameter(torch.ones(2))))),
    ("add_param_group(list)", lambda cls: cls(net().parameters()).add_param_group([nn.Parameter(torch.ones(2))])),
    ("add_param_group(tensor)", lambda cls: cls(net().parameters()).add_param_group(nn.Parameter(torch.ones(2)))),
    ("add_param_group(None)", lambda cls: cls(net().parameters()).add_param_group(None)),
    ("add_param_group({})", lambda cls: cls(net().parameters()).add_param_group({})),
    ("loading no groups", lambda cls: cls(net().parameters()).load_state_dict({"state": {}, "param_groups": []})),
]


@pytest.mark.parametrize(("call",), **table(TORCHS))
@cases(row=[r for r in ANY_SHAPE if r.id in ("sgd", "adam", "adamw")])
def test_what_torch_refuses_is_refused_in_torchs_words(row: OptimizerRow, call: Callable[[Any], Any]) -> None:
    with pytest.raises(Exception) as want:
        call(row.torch_cls)
    with pytest.raises(type(want.value)) as have:
        call(row.cls)
    assert type(have.value) is type(want.value)
    # A constructor's own name may differ in front: "Adam.__init__() got ..." for torch's AdamW.
    assert str(have.value).split("() ")[-1] == str(want.value).split("() ")[-1]


def test_a_refused_optimizer_leaves_no_trace() -> None:
    module = bound()
    weights = copy.deepcopy(module.state_dict())
    for options in ({"lr": -1.0}, {"strength": -1.0}, {"momentum": 1.5}):
        with pytest.raises(ValueError, match=r"lr|learning rate|strength|momentum"):
            symopt.SGD(module, **options)
    with pytest.warns(UserWarning, match="0.weight, 2.weight"):  # nobody owns them
        module(torch.ones(1, 4))
    assert all(torch.equal(weights[k], v) for k, v in module.state_dict().items())
