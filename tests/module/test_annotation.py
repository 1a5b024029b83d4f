"""A constrained weight never silently becomes a plain one, whatever is done to its module."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import symopt
from support.cases import cases
from support.table import ANY_SHAPE, CONSTRAINTS, ConstraintRow, OptimizerRow, constrained_parameter

SPARSE, GROUP = symopt.Sparse(strength=0.3), symopt.GroupSparse("out", strength=0.3)
LOOSE = "belong to no symopt optimizer"


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def bound_mlp(seed: int = 0) -> nn.Sequential:
    return symopt.constrain(mlp(seed), {"0.weight": GROUP, "2.weight": SPARSE})


def train(module: nn.Module, opt: Any, first: int = 0, last: int = 12) -> dict[str, Tensor]:
    """Steps without a forward pass, so that no guard is involved; returns copies of the weights."""
    for t in range(first, last):
        for k, p in enumerate(module.parameters()):
            w = p.detach()
            p.grad = torch.sin(w * (k + 2) + t) + 0.2 * w
        opt.step()
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(p, two[name]) for name, p in one.items())


def bound_by(opt: Any) -> list[symopt.Constraint]:
    return [constraint for *_, constraint in opt.constrained()]


# ---------------------------------------------------------------------------------- constrain changes nothing you see


@cases(bound=CONSTRAINTS)
def test_module_keys_weights_and_forward_stay_as_they_are(bound: ConstraintRow) -> None:
    torch.manual_seed(0)
    module = nn.Linear(4, 4)
    module.weight = nn.Parameter(torch.randn(bound.shape))
    module.forward = lambda x: (x * module.weight).sum() + module.bias  # type: ignore[method-assign]
    x = torch.randn(bound.shape)
    keys, out, text = list(module.state_dict()), module(x), repr(module)
    weight, before, attributes = module.weight, module.weight.detach().clone(), set(dir(module.weight))
    assert symopt.constrain(module, {"weight": bound.make(0.1)}) is module
    assert module.weight is weight and torch.equal(weight, before) and set(dir(weight)) == attributes
    opt = symopt.AdamW(module)
    assert torch.equal(module(x), out) and list(module.state_dict()) == keys and repr(module) == text
    assert [name for name, _ in module.named_parameters()] == keys and not list(module.named_buffers())
    assert len(bound_by(opt)) == 1


# --------------------------------------------------------------------------------------------------------- three forms


@symopt.constrain({"weight": GROUP})
class Block(nn.Linear):
    """A layer."""


class Child(Block):
    def __init__(self, n: int) -> None:
        super().__init__(n, n)
        self.extra = nn.Parameter(torch.ones(n, n))
        self.weight = nn.Parameter(torch.eye(n))


@symopt.constrain({"extra": SPARSE})
class Grandchild(Child):
    pass


@symopt.constrain({"*.weight": SPARSE})
def make(width: int = 3) -> nn.Sequential:
    """Builds."""
    return nn.Sequential(nn.Linear(2, width), nn.Linear(width, 2))


def test_class_decorator() -> None:
    assert isinstance(Block, type) and Block.__name__ == "Block" and Block.__doc__ == "A layer."
    assert list(inspect.signature(Block).parameters)[:2] == ["in_features", "out_features"]
    one, two = Block(3, 2), Block(in_features=2, out_features=4, bias=False)
    assert symopt.constraints(one) == symopt.constraints(two) == {"weight": GROUP}
    assert isinstance(one, nn.Linear) and not symopt.constraints(nn.Linear(3, 2))
    net = nn.Sequential(one, two)
    assert symopt.constraints(net) == {"0.weight": GROUP, "1.weight": GROUP}
    assert bound_by(symopt.SGD(net.parameters())) == [GROUP, GROUP]


def test_subclass_of_a_decorated_class() -> None:
    child = Child(3)
    assert symopt.constraints(child) == {"weight": GROUP}
    assert [p for _, p, _, _ in symopt.SGD(child).constrained()] == [child.weight]
    assert symopt.constraints(Grandchild(3)) == {"weight": GROUP, "extra": SPARSE}
    assert symopt.constraints(Child(3)) == {"weight": GROUP}


def test_factory_decorator() -> None:
    assert make.__name__ == "make" and make.__doc__ == "Builds."
    assert list(inspect.signature(make).parameters) == ["width"]
    assert symopt.constraints(make(5)) == {"0.weight": SPARSE, "1.weight": SPARSE}
    lazily = symopt.constrain({"*.weight": SPARSE})(lambda: make.__wrapped__())
    assert symopt.constraints(lazily()) == symopt.constraints(make())


@cases(build=[lambda: Block(3, 3), lambda: Grandchild(3), make])
def test_decorated_modules_survive_copying(build: Callable[[], nn.Module]) -> None:
    module = build()
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert symopt.constraints(copied) == symopt.constraints(module) != {}
        assert len(bound_by(symopt.SGD(copied))) > 0


@cases(bound=CONSTRAINTS)
def test_every_constraint_can_be_pickled_and_compared(bound: ConstraintRow) -> None:
    module = constrained_parameter(bound)
    opt = symopt.AdamW(module)
    for twin, other in (copy.deepcopy((module, opt)), pickle.loads(pickle.dumps((module, opt)))):
        assert symopt.constraints(twin) == symopt.constraints(module)
        assert bound_by(other) == bound_by(opt)


def test_a_callable_for_groups_is_called_once() -> None:
    calls: list[torch.Size] = []

    def rows(w: Tensor) -> Tensor:
        calls.append(w.shape)
        return torch.tensor([7, 7, -2])

    net = symopt.constrain(nn.Linear(4, 3), {"weight": symopt.GroupSparse(rows, strength=0.3)})
    indexed = symopt.constrain(nn.Linear(4, 3), {"weight": symopt.GroupSparse(torch.tensor([1, 1, 0]), strength=0.3)})
    indexed.load_state_dict(net.state_dict())
    assert same(train(net, symopt.AdamW(net)), train(indexed, symopt.AdamW(indexed)))
    assert calls == [(3, 4)]


# -------------------------------------------------------------------------------------------------------- matching


def test_the_first_match_wins_none_leaves_free_and_tuples_are_alternatives() -> None:
    net = nn.Sequential(*(nn.Linear(3, 3) for _ in range(5)))
    symopt.constrain(net, {"3.*": None, ("0.weight", "1.w*"): GROUP, "*.weight": SPARSE})
    assert symopt.constraints(net) == {"0.weight": GROUP, "1.weight": GROUP, "2.weight": SPARSE, "4.weight": SPARSE}


def test_a_wildcard_leaves_vectors_free_and_a_full_name_binds_them() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    symopt.constrain(net, {"1.weight": GROUP, "*": SPARSE})
    assert symopt.constraints(net) == {"0.weight": SPARSE, "1.weight": GROUP}


def test_patterns_are_case_sensitive_and_match_whole_names() -> None:
    net = nn.Module()
    net.Weight, net.weight, net.weight2 = (nn.Parameter(torch.ones(2, 2)) for _ in range(3))
    assert list(symopt.constraints(symopt.constrain(net, {"weight": SPARSE}))) == ["weight"]
    assert list(symopt.constraints(symopt.constrain(net, {"W*": SPARSE}))) == ["weight", "Weight"]


def test_param_groups_has_one_group_per_constraint_and_the_rest_last() -> None:
    net = symopt.constrain(nn.Sequential(*(nn.Linear(3, 3) for _ in range(3))), {"1.weight": GROUP, "*.weight": SPARSE})
    groups = symopt.param_groups(net)
    assert [[name for name, _ in g["params"]] for g in groups] == [
        ["0.weight", "2.weight"],
        ["1.weight"],
        ["0.bias", "1.bias", "2.bias"],
    ]
    assert [g["strength"] for g in groups] == [0.3, 0.3, None]


@cases(row=ANY_SHAPE, pattern=["a.weight", "b.weight", ("a.weight", "b.weight")])
def test_tied_weights_are_one_constrained_tensor(row: OptimizerRow, pattern: str | tuple[str, ...]) -> None:
    def tied() -> nn.Module:
        torch.manual_seed(0)
        net = nn.Module()
        net.a, net.b = nn.Linear(3, 3), nn.Linear(3, 3)
        net.b.weight = net.a.weight
        return net

    net, alone = symopt.constrain(tied(), {pattern: GROUP}), symopt.constrain(tied().a, {"weight": GROUP})
    assert set(symopt.constraints(net)) == (set(pattern) if isinstance(pattern, tuple) else {pattern})
    ends = []
    for module, params in ((net, symopt.param_groups(net)), (alone, alone.parameters())):
        opt = row.cls(params, lr=row.lr, **row.options)
        assert [p for _, p, _, _ in opt.constrained()] == [next(module.parameters())]
        ends.append(next(iter(train(module, opt).values())))
    assert torch.equal(*ends)


# ------------------------------------------------------------------------------------- what may happen to the module


def _to_empty(module: nn.Module) -> nn.Module:
    weights = copy.deepcopy(module.state_dict())
    module.to("meta").to_empty(device="cpu").load_state_dict(weights)
    return module


def _meta(module: nn.Module) -> nn.Module:
    with torch.device("meta"):
        fresh = symopt.constrain(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), symopt.constraints(module))
    fresh.to_empty(device="cpu").load_state_dict(module.state_dict())
    return fresh


def _assign(module: nn.Module) -> nn.Module:
    module.load_state_dict({k: v.clone() for k, v in module.state_dict().items()}, assign=True)
    return module


def _overwrite(module: nn.Module) -> nn.Module:
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        return module.to(torch.float64).to(torch.float32)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def _replace(module: nn.Module) -> nn.Module:
    for sub in (module[0], module[2]):  # type: ignore[index]
        sub.weight = nn.Parameter(sub.weight.detach().clone())
    return module


def _saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def _children(module: nn.Module) -> nn.Module:
    return nn.Sequential(*module.children())


MOVES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": _saved,
    "to and back": lambda m: m.to(torch.float64).to(torch.float32),
    "half and back": lambda m: m.double().float(),
    "to_empty": _to_empty,
    "built on meta": _meta,
    "assign": _assign,
    "params overwritten": _overwrite,
    "params replaced": _replace,
    "rebuilt around the same children": _children,
    "apply": lambda m: m.apply(lambda x: None).requires_grad_(True).train(),
    "share_memory": lambda m: m.share_memory(),
}


@cases(move=MOVES.values())
def test_the_constraint_moves_with_the_module(move: Callable[[nn.Module], nn.Module]) -> None:
    want = train(net := bound_mlp(), symopt.AdamW(net, lr=0.01))
    moved = move(bound_mlp())
    assert symopt.constraints(moved) == {"0.weight": GROUP, "2.weight": SPARSE}
    with pytest.warns(UserWarning, match=LOOSE):
        moved(torch.ones(2, 4))
    opt = symopt.AdamW(moved.parameters(), lr=0.01)
    assert [p for _, p, _, _ in opt.constrained()] == [moved[0].weight, moved[2].weight]  # type: ignore[index]
    assert same(train(moved, opt), want)


@cases(row=ANY_SHAPE)
def test_parameters_swapped_under_the_optimizer(row: OptimizerRow) -> None:
    # FSDP2 and Accelerate: new Parameter objects in the module, put into the groups of an optimizer built before.
    want = train(net := bound_mlp(), row.cls(net, lr=row.lr, **row.options))
    net = bound_mlp()
    opt = row.cls(net, lr=row.lr, **row.options)
    old = [weakref.ref(p) for p in net.parameters()]
    new = {id(p): nn.Parameter(p.detach().clone()) for p in net.parameters()}
    for sub in (net[0], net[2]):
        sub.weight, sub.bias = new[id(sub.weight)], new[id(sub.bias)]
    for group in opt.param_groups:
        group["params"] = [new[id(p)] for p in group["params"]]
    assert same(train(net, opt), want)
    assert bound_by(opt) == [GROUP, SPARSE]
    new.clear()
    gc.collect()
    assert not any(ref() is not None for ref in old)


@cases(row=ANY_SHAPE)
def test_swapped_tensors(row: OptimizerRow) -> None:
    want = train(net := bound_mlp(), row.cls(net, lr=row.lr, **row.options))
    net = bound_mlp()
    opt = row.cls(net, lr=row.lr, **row.options)
    for p in net.parameters():
        torch.utils.swap_tensors(p, nn.Parameter(p.detach().clone()))
    assert same(train(net, opt), want)


@cases(row=ANY_SHAPE, steps=[0, 5])
def test_constraining_after_the_optimizer_was_built(row: OptimizerRow, steps: int) -> None:
    ends = []
    for late in (False, True):
        net = mlp()
        opt = row.cls(net.parameters(), lr=row.lr, **row.options)
        train(net, opt, 0, steps)
        if not late:  # a fresh optimizer, with the state of the one before
            packed = copy.deepcopy(opt.state_dict())
            opt = row.cls(symopt.constrain(net, {"0.weight": GROUP}), lr=row.lr, **row.options)
            opt.load_state_dict(packed)
        else:
            symopt.constrain(net, {"0.weight": GROUP})
        ends.append(train(net, opt, steps, 20))
        assert bound_by(opt) == [GROUP]
    assert same(*ends)
    plain = train(net := mlp(), row.torch_cls(net.parameters(), lr=row.lr, **row.options), 0, 20)
    assert not torch.equal(plain["0.weight"], ends[0]["0.weight"])


@cases(
    row=ANY_SHAPE,
    bound=[r for r in CONSTRAINTS if r.id in ("sparse", "group-out", "group-index")],
    dtype=[torch.float32, torch.bfloat16],
)
def test_a_released_weight_follows_torch(row: OptimizerRow, bound: ConstraintRow, dtype: torch.dtype) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        module = nn.Module()
        module.weight, module.bias = nn.Parameter(torch.randn(bound.shape)), nn.Parameter(torch.randn(3))
        return module.to(dtype)

    net, plain = symopt.constrain(build(), {"weight": bound.make(0.3)}), build()
    opt = row.cls(net, lr=row.lr, **row.options)
    train(net, opt, 0, 6)
    theirs = row.plain_cls(plain.parameters(), lr=row.lr, **row.options)
    packed = copy.deepcopy(opt.state_dict())
    plain.load_state_dict(net.state_dict())
    theirs.load_state_dict(packed)
    assert symopt.release(net) is net
    assert not symopt.constraints(net) and not bound_by(opt)
    assert same(train(net, opt, 6, 16), train(plain, theirs, 6, 16))
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        for key in {"step"}.union(*map(row.moments, ("first", "second", "peak"))):
            assert (key in opt.state[p]) == (key in theirs.state[q])
            assert key not in opt.state[p] or torch.equal(opt.state[p][key], theirs.state[q][key]), key
    assert not {"imbalance", "metric_scale", "master", "group_index"} & opt.state[net.weight].keys()
    row.plain_cls(plain.parameters(), lr=row.lr, **row.options).load_state_dict(opt.state_dict())


def test_release_is_complete_local_and_repeatable() -> None:
    net = nn.Sequential(bound_mlp(0), bound_mlp(1))
    opt = symopt.AdamW(net)
    symopt.release(net[0])
    assert set(symopt.constraints(net)) == {"1.0.weight", "1.2.weight"} and len(bound_by(opt)) == 2
    symopt.release(symopt.release(net))
    assert not symopt.constraints(net) and not bound_by(opt)
    copy.deepcopy(net)[0](torch.ones(1, 4))  # no guard is left to warn
    symopt.constrain(net, {"0.0.weight": SPARSE})
    assert bound_by(opt) == [SPARSE]


def test_weights_taken_away_from_the_module_are_not_forgotten() -> None:
    # The weight of the module is no Parameter any more: nothing imposes the constraint, and that is said.
    for take in (parametrizations.weight_norm, lambda m: prune.l1_unstructured(m, "weight", 0.5)):
        layer = symopt.constrain(nn.Linear(4, 3), {"weight": SPARSE})
        take(layer)
        with pytest.warns(UserWarning, match=f"{LOOSE}.*weight"):
            layer(torch.ones(1, 4))
        with pytest.raises(ValueError, match=r"^weight is computed from other parameters now.*key 'weight'.*release"):
            symopt.SGD(layer)


@cases(given=[lambda n: n, lambda n: n.named_parameters(), lambda n: n.parameters()])
def test_an_optimizer_speaks_of_weights_by_their_qualified_names(given: Callable[[nn.Module], Any]) -> None:
    net = bound_mlp()
    opt = symopt.SGD(given(net), lr=0.1)
    assert [name for _, _, name, _ in opt.constrained()] == ["0.weight", "2.weight"]
    index = torch.tensor([[0]])
    net[2].weight.grad = torch.sparse_coo_tensor(index, torch.ones(1, 6), (3, 6), check_invariants=True)
    with pytest.raises(RuntimeError, match=r"^2\.weight: sparse"):
        opt.step()


# ------------------------------------------------------------------------------------------------------- the guard


def caught(run: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in seen]


def test_plain_torch_optimizers_are_warned_about_exactly_once_with_the_names() -> None:
    net = bound_mlp()
    opt = torch.optim.SGD(net.parameters(), lr=0.1)

    def epoch() -> None:
        for _ in range(3):
            opt.zero_grad()
            net(torch.ones(2, 4)).sum().backward()
            opt.step()

    (message,) = caught(epoch)
    assert LOOSE in message and "0.weight, 2.weight" in message and "0.bias" not in message
    assert "symopt.SGD" in message and "symopt.release" in message
    assert not caught(epoch)
    (message,) = caught(lambda: copy.deepcopy(net)(torch.ones(2, 4)))  # a copy is another model
    assert "0.weight, 2.weight" in message


def test_the_warning_points_to_the_users_line() -> None:
    net = bound_mlp()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        net(torch.ones(2, 4))
    assert len(seen) == 1 and seen[0].filename == __file__


@cases(inner=[lambda n: n[0], lambda n: nn.Sequential(n), lambda n: nn.Sequential(n[0], n[1])])
def test_the_guard_watches_parts_and_wholes(inner: Callable[[nn.Sequential], nn.Module]) -> None:
    (message,) = caught(lambda: inner(bound_mlp())(torch.ones(2, 4)))
    assert LOOSE in message and "weight" in message


def test_functional_use_is_seen_from_the_root() -> None:
    # MultiheadAttention reads out_proj.weight without ever calling out_proj.
    attention = symopt.constrain(nn.MultiheadAttention(4, 2), {"out_proj.weight": GROUP, "in_proj_weight": GROUP})
    x = torch.ones(3, 1, 4)
    (message,) = caught(lambda: attention(x, x, x))
    assert "in_proj_weight, out_proj.weight" in message
    attention = symopt.constrain(nn.MultiheadAttention(4, 2), {"out_proj.weight": GROUP})
    symopt.AdamW(attention)
    net = nn.Sequential(symopt.constrain(nn.TransformerEncoderLayer(4, 2, 8), {"*.out_proj.weight": GROUP}))
    (message,) = caught(lambda: net(x))
    assert "out_proj.weight" in message


def test_no_warning_where_nothing_is_wrong() -> None:
    x = torch.ones(2, 4)
    net = bound_mlp()
    with torch.no_grad():
        net(x)
    with torch.inference_mode():
        net(x)
    net.eval()(x)
    net.train()
    opt = symopt.SGD(net)
    for _ in range(2):
        net(x).sum().backward()
        opt.step()
    parts = bound_mlp()
    owners = [symopt.SGD(parts[0]), symopt.AdamW(parts[2])]  # several optimizers may share a model
    parts(x)
    assert len(owners) == 2


def test_only_the_weights_without_an_owner_are_named() -> None:
    net = bound_mlp()
    opt = symopt.SGD(net[0].parameters())
    (message,) = caught(lambda: net(torch.ones(2, 4)))
    assert "2.weight" in message and "0.weight" not in message and opt is not None


def test_ownership_can_be_lost() -> None:
    net = bound_mlp()
    opt = symopt.SGD(net)
    net(torch.ones(2, 4))
    del opt
    gc.collect()
    torch.optim.SGD(net.parameters())
    (message,) = caught(lambda: [net(torch.ones(2, 4)) for _ in range(3)])
    assert "0.weight, 2.weight" in message


def test_another_copys_optimizer_owns_nothing_here() -> None:
    net = bound_mlp()
    twin = copy.deepcopy(net)
    opt = symopt.SGD(net)
    net(torch.ones(2, 4))
    assert len(caught(lambda: twin(torch.ones(2, 4)))) == 1 and opt is not None


# ------------------------------------------------------------------------------------------------ compile and export


@pytest.fixture
def dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("dynamo")
@cases(in_place=[False, True], backend=["eager", "aot_eager"])
def test_compiled_modules(backend: str, in_place: bool) -> None:
    ends = []
    for compiled in (False, True):
        net = bound_mlp()
        opt = symopt.AdamW(net, lr=0.01)
        run: Any = net
        if compiled and in_place:
            net.compile(backend=backend, fullgraph=True)
        elif compiled:
            run = torch.compile(net, backend=backend, fullgraph=True)
        assert symopt.constraints(run) and len(bound_by(symopt.SGD(run.parameters()))) == 2
        torch.manual_seed(0)
        for _ in range(4):
            opt.zero_grad()
            run(torch.randn(5, 4)).square().mean().backward()
            opt.step()
        ends.append({k: v.clone() for k, v in net.state_dict().items()})
    assert same(*ends)


@pytest.mark.usefixtures("dynamo")
def test_exported_programs() -> None:
    net, x = bound_mlp(), torch.ones(2, 4)
    for module in (net, net.eval()):
        program = torch.export.export(module, (x,))
        assert torch.equal(program.module()(x), module(x))
        assert set(program.state_dict) == set(net.state_dict())
    assert symopt.constraints(net)


# ------------------------------------------------------------------------------------------------- lives and deaths


def used(row: OptimizerRow) -> list[Any]:
    net = bound_mlp()
    opt = row.cls(net, lr=row.lr, **row.options)
    net(torch.ones(2, 4)).sum().backward()
    opt.step()
    opt.zero_grad()
    other = copy.deepcopy(net)
    symopt.release(other)
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    packed = pickle.loads(pickle.dumps((net, opt)))
    return [net, opt, other, *packed, *net.parameters(), *other.parameters()]


@cases(row=ANY_SHAPE)
def test_nothing_is_kept_alive(row: OptimizerRow) -> None:
    refs = [weakref.ref(x) for x in used(row)]
    gc.collect()
    assert not [type(ref()) for ref in refs if ref() is not None]


def test_an_optimizer_keeps_no_module_and_a_module_no_optimizer() -> None:
    net = bound_mlp()
    opt = symopt.SGD(net)
    ref = weakref.ref(opt)
    del opt
    gc.collect()
    assert ref() is None
    opt = symopt.SGD(net)
    ref = weakref.ref(net)  # type: ignore[arg-type]
    del net
    gc.collect()
    assert ref() is None
    # Those weights are still constrained: the optimizer remembers what their module said.
    assert bound_by(opt) == [GROUP, SPARSE]
    symopt.constrain(mlp(), {"0.weight": SPARSE})  # a change elsewhere makes it look again
    assert bound_by(opt) == [GROUP, SPARSE]


def test_the_ids_of_dead_weights_bind_nothing() -> None:
    for _ in range(50):
        net = bound_mlp()
        symopt.SGD(net)
        del net
        gc.collect(0)
        assert not bound_by(symopt.SGD(mlp()))


@cases(row=ANY_SHAPE)
def test_two_models_do_not_mix(row: OptimizerRow) -> None:
    def alone(patterns: dict[str, symopt.Constraint], seed: int) -> dict[str, Tensor]:
        net = symopt.constrain(mlp(seed), patterns)
        return train(net, row.cls(net, lr=row.lr, **row.options))

    patterns = [{"0.weight": GROUP}, {"0.weight": SPARSE, "2.weight": SPARSE}]
    want = [alone(p, seed) for seed, p in enumerate(patterns)]
    nets = [symopt.constrain(mlp(seed), p) for seed, p in enumerate(patterns)]
    opts = [row.cls(net, lr=row.lr, **row.options) for net in nets]
    for t in range(12):
        for net, opt in zip(nets, opts, strict=True):
            train(net, opt, t, t + 1)
        if t == 6:
            symopt.release(symopt.constrain(mlp(), {"*.weight": SPARSE}))
    assert [bound_by(opt) for opt in opts] == [list(p.values()) for p in patterns]
    assert all(same(dict(net.named_parameters()), w) for net, w in zip(nets, want, strict=True))
