"""A constraint whose module was replaced binds the new one; else it is named, with what to write."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.ao import quantization
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize

import symopt
from support.cases import cases, some

SPARSE, GROUP = symopt.Sparse(strength=0.3), symopt.GroupSparse("in", strength=0.3)


class Net(nn.Module):
    """Convolution, normalisation, and layers in a module of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.head = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.bn(self.conv(x))).mean((2, 3)))


NAMES = ["conv.weight", "bn.weight", "head.0.weight", "head.2.weight"]


def bound() -> Net:
    torch.manual_seed(0)
    return symopt.constrain(Net(), {"bn.weight": SPARSE, "head.*": GROUP, "*.weight": SPARSE})


def stepped(opt: Any) -> dict[str, symopt.Constraint]:
    return {name: constraint for _, _, name, constraint in opt.constrained()}


def backward(net: nn.Module) -> None:
    net(torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(0))).square().mean().backward()


# ----------------------------------------------------------------------------------------------- modules are swapped


def _prepare_qat(fuse: bool, inplace: bool) -> Callable[[Net], nn.Module]:
    def move(net: Net) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that it is to go
            net.qconfig = quantization.get_default_qat_qconfig("fbgemm")
            if fuse:
                layers = [["conv", "bn", "relu"], ["head.0", "head.1"]]
                net = quantization.fuse_modules_qat(net, layers, inplace=inplace)
            moved: nn.Module = quantization.prepare_qat(net, inplace=inplace)
        return moved

    return move


def _new_layers(net: Net) -> nn.Module:
    net.conv, net.head[2] = nn.Conv2d(2, 4, 3), nn.Linear(4, 3)
    return net


def _new_submodule(net: Net) -> nn.Module:
    net.head = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    return net


def _new_parameter(net: Net) -> nn.Module:
    net.conv.weight = nn.Parameter(torch.randn(4, 2, 3, 3))
    return net


def _subclass_of_a_layer(net: Net) -> nn.Module:
    class Mine(nn.Linear):
        pass

    net.head[0] = Mine(4, 4)
    return net


def _saved_after_a_swap(net: Net) -> nn.Module:
    file = io.BytesIO()
    torch.save(_new_layers(net), file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def _inserted(net: Net) -> nn.Module:
    net.head.insert(0, nn.Dropout(0.0))
    net.head[1] = nn.Linear(4, 4)
    return net


def _copied_layer(net: Net) -> nn.Module:
    net.head[2] = copy.deepcopy(net.head[2])
    symopt.constraints(net)
    return net


def _merged(net: Net) -> nn.Module:
    net.eval()
    net.conv, net.bn = nn.utils.fusion.fuse_conv_bn_eval(net.conv, net.bn), nn.Identity()
    return net.train()


MOVES: dict[str, Callable[[Net], nn.Module]] = {
    "prepare_qat": _prepare_qat(fuse=False, inplace=True),
    "prepare_qat of a copy": _prepare_qat(fuse=False, inplace=False),
    "fused": _prepare_qat(fuse=True, inplace=True),
    "fused copy": _prepare_qat(fuse=True, inplace=False),
    "sync": nn.SyncBatchNorm.convert_sync_batchnorm,
    "layers": _new_layers,
    "submodule": _new_submodule,
    "parameter": _new_parameter,
    "subclass": _subclass_of_a_layer,
    "layers of a copy": lambda net: _new_layers(copy.deepcopy(net)),
    "copy after a swap": lambda net: copy.deepcopy(_new_layers(net)),
    "pickle after a swap": lambda net: pickle.loads(pickle.dumps(_new_submodule(net))),
    "saved after a swap": _saved_after_a_swap,
    "swapped twice": lambda net: _new_layers(_new_submodule(_new_layers(net))),  # type: ignore[arg-type]
    "layer copied": _copied_layer,
    "layer copied, then replaced": lambda net: _new_layers(_copied_layer(net)),  # type: ignore[arg-type]
    "half, then a swap": lambda net: _new_layers(net.half().float()),
}


@some(move=MOVES.values(), how=["optimizer", "constraints", "groups", "report"])
def test_what_takes_the_place_of_a_module_is_constrained(move: Callable[[Net], nn.Module], how: str) -> None:
    net = move(bound())
    gc.collect()
    expected = {name for name, _ in net.named_parameters() if name.endswith("weight")}
    assert len(expected) == 4
    if how == "constraints":
        assert symopt.constraints(net).keys() == expected
    if how == "report":
        assert {row.name for row in symopt.report(net).rows} == expected
    opt = symopt.AdamW(symopt.param_groups(net) if how == "groups" else net.parameters(), lr=0.01)
    now = dict(net.named_parameters())
    assert stepped(opt).keys() == expected
    assert all(any(p is q for q in now.values()) for _, p, _, _ in opt.constrained())
    assert set(stepped(opt).values()) == {SPARSE, GROUP}
    for _ in range(2):
        opt.zero_grad()
        backward(net)
        opt.step()
    assert stepped(opt).keys() == expected


@cases(fuse=[False, True], inplace=[False, True], ask_first=[False, True])
def test_a_layer_that_was_constrained_by_itself_is_found_after_quantisation(
    fuse: bool, inplace: bool, ask_first: bool
) -> None:
    net = Net()
    for layer in (net.conv, net.head[0]):
        symopt.constrain(layer, {"weight": SPARSE})
    moved = _prepare_qat(fuse, inplace)(net)
    del net, layer
    gc.collect()
    names = {"conv.weight", "head.0.weight"}
    if ask_first:
        assert symopt.constraints(moved).keys() == names
    opt = symopt.SGD(moved, lr=0.1)
    expected = {id(p) for name, p in moved.named_parameters() if name in names}
    assert {id(p) for _, p, _, _ in opt.constrained()} == expected
    backward(moved)
    opt.step()
    assert {row.name for row in symopt.report(moved, opt).rows} == names
    assert not symopt.constraints(symopt.release(moved)) and not stepped(opt)
    assert not stepped(symopt.SGD(moved))


def test_a_swapped_weight_is_trained_as_one_that_was_there_from_the_beginning() -> None:
    ends = []
    for late in (False, True):
        torch.manual_seed(1)
        new = nn.Linear(4, 3)
        net = bound() if late else Net()
        if not late:
            net.load_state_dict(bound().state_dict())
        net.head[2] = new
        if not late:
            symopt.constrain(net, {"bn.weight": SPARSE, "head.*": GROUP, "*.weight": SPARSE})
        opt = symopt.AdamW(net, lr=0.01)
        for _ in range(5):
            opt.zero_grad()
            backward(net)
            opt.step()
        ends.append(net.state_dict())
    assert all(torch.equal(w, ends[1][name]) for name, w in ends[0].items())


def test_the_module_that_was_replaced_keeps_its_constraint_elsewhere() -> None:
    net = bound()
    old = net.head[2]
    net.head[2] = nn.Linear(4, 3)
    opt = symopt.SGD(nn.ModuleList([net, old]), lr=0.1)
    assert len(stepped(opt)) == 4 and len(list(opt.constrained())) == 5


def test_units_over_several_layers_follow_all_of_them() -> None:
    groups = symopt.GroupSparse({"conv.weight": (0, None), "bn.weight": (0, None)}, strength=0.1)
    for swap in (lambda n: setattr(n, "bn", nn.BatchNorm2d(4)), nn.SyncBatchNorm.convert_sync_batchnorm):
        net = symopt.constrain(Net(), {("conv.weight", "bn.weight"): groups})
        swap(net)
        opt = symopt.SGD(net, lr=0.1)
        assert [p for _, p, _, _ in opt.constrained()] == [net.conv.weight, net.bn.weight]
        backward(net)
        opt.step()
        del net.bn
        net.bn = nn.Identity()
        with pytest.raises(
            ValueError, match=r"conv\.weight shares a constraint with bn\.weight, which is no parameter"
        ):
            symopt.SGD(net, lr=0.1)


# --------------------------------------------------------------------------------------------- what cannot be bound


def _wider(net: Net) -> None:
    net.head[2] = nn.Linear(4, 7)


def _wider_parameter(net: Net) -> None:
    net.head[2].weight = nn.Parameter(torch.randn(7, 4))


def _flat_shard(net: Net) -> None:
    net.head[2].weight = nn.Parameter(net.head[2].weight.detach().flatten())


@cases(change=[_wider, _wider_parameter, _flat_shard])
def test_another_shape_is_refused_by_name(change: Callable[[Net], None]) -> None:
    net = bound()
    change(net)
    message = r"^head\.2\.weight has shape \(.*now, but GroupSparse.*'head\.\*'.*\(3, 4\).*symopt\.constrain\(module"
    for ask in (symopt.SGD, symopt.report, symopt.fold, symopt.param_groups):
        with pytest.raises(ValueError, match=message):
            ask(net)


@cases(
    said=[
        ({"head.2.weight": SPARSE}, SPARSE),
        ({"head.2.weight": None}, None),
        ({"head.2.*": symopt.GroupSparse("in", strength=0.2)}, symopt.GroupSparse("in", strength=0.2)),
    ],
    swap=[_wider, lambda net: setattr(net.head, "2", nn.Linear(4, 3))],
)
def test_what_is_said_of_the_new_weight_counts(
    said: tuple[dict[str, symopt.Constraint | None], symopt.Constraint | None], swap: Callable[[Net], None]
) -> None:
    net = bound()
    swap(net)
    patterns, expected = said
    symopt.constrain(net, patterns)
    found = stepped(symopt.SGD(net))
    assert found.get("head.2.weight") == expected and len(found) == 3 + (expected is not None)
    symopt.report(net)


class InOut(nn.Module):
    """A layer whose weight is stored (in, out)."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n, n))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def test_a_square_weight_of_another_kind_of_layer_is_not_guessed() -> None:
    net = bound()
    net.head[0] = InOut(4)
    with pytest.raises(ValueError, match=r"^head\.0\.weight belongs to a InOut now, not to a Linear.*GroupSparse"):
        symopt.SGD(net)
    net = symopt.constrain(Net(), {"*.weight": SPARSE})
    net.head[0] = InOut(4)  # single weights have no rows
    assert "head.0.weight" in stepped(symopt.SGD(net))


def _removed(net: Net) -> None:
    net.head[2] = nn.Identity()


def _deleted(net: Net) -> None:
    del net.head[2]


@cases(remove=[_removed, _deleted], ask=[symopt.SGD, symopt.report, symopt.fold])
def test_a_constraint_that_has_nothing_to_bind_is_named(
    remove: Callable[[Net], None], ask: Callable[[nn.Module], Any]
) -> None:
    net = bound()
    remove(net)
    with pytest.warns(UserWarning, match=r"^head\.2\.weight: .*GroupSparse.*'head\.\*'.*binds nothing"):
        ask(net)
    if ask is not symopt.fold:  # which looks at a copy
        ask(net)  # once
        assert len(stepped(symopt.SGD(net))) == 3


def test_a_parameter_that_is_none_is_named() -> None:
    net = bound()
    net.head[2].weight = None
    with pytest.warns(UserWarning, match=r"^head\.2\.weight: .*binds nothing"):
        symopt.SGD(net)
    assert symopt.constraints(net).keys() == set(NAMES) - {"head.2.weight"}


def _appended(net: Net) -> str:
    net.head.append(nn.Linear(3, 2))
    return "head.3.weight"


def _attribute(net: Net) -> str:
    net.extra = nn.Linear(2, 2)
    return "extra.weight"


def _wrapped(net: Net) -> str:
    net.head[2] = nn.Sequential(net.head[2], nn.Linear(3, 3))
    return "head.2.1.weight"


def test_a_normalisation_that_a_convolution_took_in_is_named() -> None:
    net = bound()
    _merged(net)
    with pytest.warns(UserWarning, match=r"^bn\.weight: .*binds nothing"):
        opt = symopt.SGD(net)
    assert stepped(opt).keys() == set(NAMES) - {"bn.weight"}
    net.conv = nn.Conv2d(2, 4, 3)
    assert stepped(symopt.SGD(net)).keys() == set(NAMES) - {"bn.weight"}


@cases(add=[_appended, _attribute, _wrapped])
def test_a_weight_that_a_pattern_selects_but_was_added_later_is_named(add: Callable[[Net], str]) -> None:
    net = bound()
    name = add(net)
    for ask in (symopt.SGD, symopt.report):
        fresh = copy.deepcopy(net)
        with pytest.warns(UserWarning, match=f"^{name} matches the key '.*' .*added later.*'{name}': None") as seen:
            ask(fresh)
        assert len(seen) == 1 and seen[0].filename == __file__
        assert len(stepped(symopt.SGD(fresh))) == 4
    free, more = symopt.constrain(copy.deepcopy(net), {name: None}), symopt.constrain(net, {name: SPARSE})
    assert len(stepped(symopt.SGD(free))) == 4
    assert stepped(symopt.SGD(more))[name] == SPARSE


def test_new_weights_that_are_not_meant_are_not_named() -> None:
    net = symopt.constrain(Net(), {"head.0.*": None, "head.*": GROUP})
    net.extra, net.head[0] = nn.Linear(2, 2), nn.Linear(4, 4)
    net.head.append(nn.LayerNorm(3))  # a wildcard binds no vectors
    net.head.append(nn.Linear(3, 3).requires_grad_(False))
    opt = symopt.SGD(net)
    symopt.report(net, opt)
    net.head[4] = nn.Linear(3, 3)
    symopt.SGD(net.conv.parameters())  # which has nothing to do with it


# ------------------------------------------------------------------------------------------------ after construction


@cases(
    swap=[
        lambda net: setattr(net.head, "2", nn.Linear(4, 3)),
        lambda net: setattr(net.head[2], "weight", nn.Parameter(torch.randn(3, 4))),
        lambda net: setattr(net, "head", nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))),
    ],
)
def test_a_swap_between_the_optimizer_and_its_first_step_is_named(swap: Callable[[Net], None]) -> None:
    net = bound().eval()
    opt = symopt.AdamW(net, lr=0.01)
    swap(net)
    backward(net)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r"^AdamW: head\.\d\.weight was replaced after the optimizer was built"):
        opt.step()
    assert all(torch.equal(w, before[name]) for name, w in net.state_dict().items())
    opt = symopt.AdamW(net, lr=0.01)
    opt.step()
    assert stepped(opt).keys() == set(NAMES)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@cases(steps=[0, 2])
def test_a_parametrization_that_is_added_later_is_no_reason_to_warn(steps: int) -> None:
    net = bound()
    opt = symopt.SGD(net, lr=0.1)
    for t in range(4):
        if t == steps:
            weight = net.head[0].weight
            parametrize.register_parametrization(net.head[0], "weight", Doubled())
            assert net.head[0].parametrizations.weight.original is weight
        opt.zero_grad()
        backward(net)
        opt.step()
    assert stepped(opt).keys() == set(NAMES)
    for ask in (symopt.SGD, symopt.report):
        with pytest.raises(ValueError, match=r"^head\.0\.weight is computed from other parameters now.*remove_param"):
            ask(net)
    assert isinstance(symopt.fold(net).head[0].weight, nn.Parameter)
    parametrize.remove_parametrizations(net.head[0], "weight", leave_parametrized=False)
    assert stepped(symopt.SGD(net)).keys() == set(NAMES)


def test_a_computed_weight_of_a_plain_optimizer_is_warned_about() -> None:
    net = bound()
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    parametrize.register_parametrization(net.head[0], "weight", Doubled())
    with pytest.warns(UserWarning, match=r"belong to no symopt optimizer.*head\.0\.weight"):
        backward(net)
    assert opt is not None


def test_a_plain_optimizer_of_a_swapped_weight_is_warned_about() -> None:
    net = symopt.constrain(Net(), {"head.2.weight": SPARSE})
    net.head[2] = nn.Linear(4, 3)
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"belong to no symopt optimizer.*head\.2\.weight"):
        backward(net)
    assert opt is not None


def test_shards_that_are_gathered_for_the_forward_pass_are_owned() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        net = symopt.constrain(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), {"*.weight": SPARSE})
        for layer in (*net, net):
            fully_shard(layer, mesh=mesh)
        opt = symopt.SGD(net, lr=0.1)
        for _ in range(2):
            opt.zero_grad()
            net(torch.ones(2, 4)).sum().backward()
            opt.step()
        assert [p for _, p, _, _ in opt.constrained()] == [net[0].weight, net[1].weight]
        symopt.constrain(nn.Linear(2, 2), {"weight": SPARSE})  # the guards look again
        net(torch.ones(2, 4))
        symopt.fold(nn.Linear(2, 2))
    finally:
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------------------- ties


@cases(
    pair=[(SPARSE, GROUP), (SPARSE, symopt.Sparse(strength=0.1)), (GROUP, symopt.GroupSparse("out", strength=0.3))],
    ask=[symopt.SGD, symopt.report, symopt.fold, symopt.param_groups],
)
def test_two_constraints_on_a_tensor_that_was_tied_later_are_refused(
    pair: tuple[symopt.Constraint, symopt.Constraint], ask: Callable[[nn.Module], Any]
) -> None:
    net = symopt.constrain(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), {"0.weight": pair[0], "1.weight": pair[1]})
    net[1].weight = net[0].weight
    with pytest.raises(
        ValueError, match=r"[01]\.weight and [01]\.weight are one tensor now but have diff.*release"
    ) as e:
        ask(net)
    assert str(pair[0]) in str(e.value) and str(pair[1]) in str(e.value)
    symopt.SGD(nn.Linear(2, 2))  # of another network
    symopt.release(net[1])
    assert [c for *_, c in symopt.SGD(net).constrained()] == [pair[0]]


def test_a_tie_after_the_optimizer_was_built_is_refused_in_the_first_step() -> None:
    net = symopt.constrain(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), {"0.weight": SPARSE, "1.weight": GROUP})
    net.eval()
    opt = symopt.SGD(net, lr=0.1)
    net[1].weight = net[0].weight
    net(torch.ones(2, 3)).sum().backward()
    with pytest.raises(ValueError, match="one tensor now but have different constraints"):
        opt.step()


@cases(second=[SPARSE, None])
def test_ties_that_agree_are_right(second: symopt.Constraint | None) -> None:
    net = symopt.constrain(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), {"0.weight": SPARSE, "1.weight": second})
    net[1].weight = net[0].weight
    opt = symopt.SGD(net, lr=0.1)
    assert [p for _, p, _, _ in opt.constrained()] == [net[0].weight]
    net(torch.ones(2, 3)).sum().backward()
    opt.step()
    symopt.report(net, opt)


def test_what_one_constraint_ties_must_be_several_tensors() -> None:
    net = symopt.constrain(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), {("0.weight", "1.weight"): symopt.Tied()})
    net[1].weight = net[0].weight
    with pytest.raises(ValueError, match=r"0\.weight and 1\.weight, which Tied.* binds, are one tensor now"):
        symopt.SGD(net)


# -------------------------------------------------------------------------------- subclasses of decorated classes


@symopt.constrain({"fc.weight": GROUP})
class Base(nn.Module):
    def __init__(self, n: int = 3) -> None:
        super().__init__()
        self.fc = nn.Linear(n, n)

    def __init_subclass__(cls, mark: str = "none") -> None:
        super().__init_subclass__()
        cls.mark = mark  # type: ignore[attr-defined]


class SameSize(Base, mark="same"):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)


class OtherSize(SameSize):
    def __init__(self, n: int = 5) -> None:
        super().__init__()
        self.fc = nn.Linear(n, 2)


class Inherits(OtherSize):
    pass


class Widened(Base):
    def __init__(self) -> None:
        super().__init__(7)
        self.inner = OtherSize()


@symopt.constrain({"more.weight": SPARSE})
class Decorated(OtherSize):
    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Linear(2, 2)


class DecoratedChild(Decorated):
    def __init__(self) -> None:
        super().__init__()
        self.more, self.fc = nn.Linear(2, 4), nn.Linear(6, 1)


@dataclass(eq=False)
class Data(Base):
    n: int = 4

    def __post_init__(self) -> None:
        super().__init__(self.n)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)


class OfPlain(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)


symopt.constrain({"fc.weight": GROUP})(Plain)


@cases(
    case=[
        (Base, {"fc.weight": GROUP}),
        (SameSize, {"fc.weight": GROUP}),
        (OtherSize, {"fc.weight": GROUP}),
        (Inherits, {"fc.weight": GROUP}),
        (Widened, {"fc.weight": GROUP, "inner.fc.weight": GROUP}),
        (Decorated, {"fc.weight": GROUP, "more.weight": SPARSE}),
        (DecoratedChild, {"fc.weight": GROUP, "more.weight": SPARSE}),
        (Data, {"fc.weight": GROUP}),
        (OfPlain, {"fc.weight": GROUP}),
    ],
)
def test_subclasses_of_a_decorated_class_may_make_layers_anew(
    case: tuple[type[nn.Module], dict[str, symopt.Constraint]],
) -> None:
    cls, expected = case
    for net in (cls(), copy.deepcopy(cls()), pickle.loads(pickle.dumps(cls()))):
        assert symopt.constraints(net) == expected and not [k for k in vars(net) if "pending" in k]
        assert [p for _, p, _, _ in symopt.SGD(net).constrained()] == [
            p for name, p in net.named_parameters() if name in expected
        ]
    assert SameSize.mark == "same" and OtherSize.mark == "none"  # type: ignore[attr-defined]


def test_a_subclass_without_the_layer_is_refused_by_name() -> None:
    class Without(Base):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Identity()  # type: ignore[assignment]

    with pytest.raises(ValueError, match=r"'fc\.weight' matches no parameter"):
        Without()


# --------------------------------------------------------------------------------------------------- explicit mode


def test_explicit_constraints_that_go_with_their_layer_are_named() -> None:
    for ask in (symopt.param_groups, symopt.report, symopt.fold):
        net = symopt.constrain(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), {"*.weight": SPARSE}, mode="explicit")
        ask(net)
        ask(copy.deepcopy(net))
        net[1] = nn.Linear(3, 2)
        with pytest.warns(UserWarning, match=r"^1\.weight: the module has no factors of Sparse.*mode='explicit'"):
            ask(net)
        symopt.constrain(net, {"1.weight": SPARSE}, mode="explicit")
        ask(net)
        symopt.release(net[0])
        ask(net)
        assert len(symopt.constraints(net)) == 1


# ------------------------------------------------------------------------------------------------------- release


def test_released_weights_are_free_and_stay_so() -> None:
    net = bound()
    symopt.release(net.head[2])
    net.head[0] = nn.Linear(4, 4)
    symopt.release(net.bn)
    found = stepped(symopt.SGD(net))
    assert found.keys() == {"conv.weight", "head.0.weight"}
    net.head[2] = nn.Linear(4, 3)
    assert stepped(symopt.SGD(net)).keys() == found.keys()
    symopt.release(net)
    net.head[0], net.extra = nn.Linear(4, 9), nn.Linear(2, 2)
    assert not stepped(symopt.SGD(net)) and not symopt.report(net).rows
    assert not [key for sub in net.modules() for key in vars(sub) if key.startswith("_symopt")]
    assert len(stepped(symopt.SGD(symopt.constrain(net, {"*.weight": SPARSE})))) == 4


def test_a_folded_network_remembers_nothing() -> None:
    net = bound()
    _new_layers(net)
    small = symopt.fold(net)
    assert not [key for sub in small.modules() for key in vars(sub) if key.startswith("_symopt")]
    assert symopt.constraints(net).keys() == set(NAMES)


def test_many_rounds_leave_nothing_behind() -> None:
    def count() -> tuple[int, int]:
        gc.collect()
        live = gc.get_objects()
        return len(live), sum(issubclass(type(x), Tensor) for x in live)

    def rounds(n: int) -> list[weakref.ref[nn.Module]]:
        replaced = []
        for _ in range(n):
            symopt.constrain(net, {"bn.weight": SPARSE, "head.*": GROUP, "*.weight": SPARSE})
            replaced.append(weakref.ref(net.head[2]))
            net.head[2] = nn.Linear(4, 3)
            opt = symopt.SGD(net, lr=0.01)
            backward(net)
            opt.step()
            opt.zero_grad()
            symopt.release(net)
        return replaced

    net = Net()
    rounds(5)
    before = count()
    replaced = rounds(300)
    objects, tensors = count()
    assert tensors == before[1] and objects < before[0] + 600
    assert not [ref for ref in replaced if ref() is not None]
    assert not net._forward_pre_hooks and not vars(net).keys() - vars(Net()).keys()


def test_nothing_is_said_where_nothing_is_wrong() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = bound()
        opt = symopt.SGD(net, lr=0.1)
        net.to(torch.float64).to(torch.float32)
        backward(net)
        opt.step()
        symopt.report(net, opt)
        symopt.fold(net)
        wrapped = nn.ModuleDict({"net": net, "other": nn.Linear(2, 2)})
        symopt.SGD(wrapped)
