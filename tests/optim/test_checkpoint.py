"""Checkpoints: stopping, saving, loading, copying and converting change no bit of what training would have done."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import symopt
from support.cases import cases, pairs
from support.table import ANY_SHAPE, CONSTRAINTS, ConstraintRow, OptimizerRow, constrained_parameter
from support.tolerances import tolerance

HALF = 100
SOME = [row for row in ANY_SHAPE if row.id in ("sgd-momentum", "adam-amsgrad", "adamw")]
FEW = [
    *(row for row in CONSTRAINTS if row.id in ("sparse", "group-head-packed", "group-index")),
    ConstraintRow("free", lambda k: symopt.Sparse(strength=k, gauge="free"), (6, 5)),
    ConstraintRow("deep", lambda k: symopt.GroupSparse("out", strength=k, depth=3), (6, 5)),
]
ENDS = [row for row in FEW if row.id in ("group-index", "free")]

# That 200 steps are few for some of the rows is not the point here.
few_steps = pytest.mark.filterwarnings("ignore:.*too few")

Pair = tuple[nn.Module, Any]


def build(bound: ConstraintRow, *, seed: int = 0, dtype: torch.dtype = torch.float32, plain: bool = True) -> nn.Module:
    module = constrained_parameter(bound, seed=seed, dtype=dtype)
    if plain:
        module.bias = nn.Parameter(torch.randn(4, generator=torch.Generator().manual_seed(seed)).to(dtype))
    return module


def optimizer(row: OptimizerRow, module: nn.Module, cls: Any = None, **options: Any) -> Any:
    return (cls or row.cls)(module.parameters(), **{"lr": row.lr, **row.options, **options})


def steps(pair: Pair, first: int, last: int) -> None:
    module, opt = pair
    for t in range(first, last):
        for k, p in enumerate(module.parameters()):
            w = p.detach()
            p.grad = torch.sin(w * (k + 2) + t) + 0.2 * w
        opt.step()


def saved(*objects: Any) -> list[Any]:
    file = io.BytesIO()
    torch.save([x.state_dict() for x in objects], file)
    file.seek(0)
    return list(torch.load(file, weights_only=True))


def load(objects: Iterable[Any], states: list[Any]) -> None:
    for obj, state in zip(objects, states, strict=True):
        obj.load_state_dict(state)


def assert_same(one: Sequence[Any], two: Sequence[Any]) -> None:
    for (name, p), q in zip(one[0].named_parameters(), two[0].parameters(), strict=True):
        assert p.dtype == q.dtype and torch.equal(p, q), name
        assert_same_state(one[1].state.get(p, {}), two[1].state.get(q, {}), name)


def assert_same_state(one: dict[str, Tensor], two: dict[str, Tensor], name: str = "") -> None:
    assert one.keys() == two.keys(), name
    for key, value in one.items():
        assert value.dtype == two[key].dtype and torch.equal(value, two[key]), (name, key)


# -------------------------------------------------------------------------------------------------------- resuming


@few_steps
@pytest.mark.parametrize(
    ("bound", "scheduled"),
    [(bound, True) for bound in FEW] + [(FEW[0], False)],
    ids=[f"{bound.id}-scheduled" for bound in FEW] + [FEW[0].id],
)
@pairs(row=ANY_SHAPE)
def test_saving_and_loading_half_way_changes_no_bit(row: OptimizerRow, bound: ConstraintRow, scheduled: bool) -> None:
    def fresh(seed: int) -> list[Any]:
        module = build(bound, seed=seed)
        # What the schedule is comes with the state, unless it is given anew.
        length = {"total_steps": 2 * HALF, "commit": 0.7} if scheduled and not seed else {}
        return [module, optimizer(row, module, **length)]

    through, resumed = fresh(0), fresh(1)
    steps((through[0], through[1]), 0, HALF)
    file, half = saved(*through), through[0].weight.detach().clone()
    steps((through[0], through[1]), HALF, 2 * HALF)
    assert half.any() and not torch.equal(half, through[0].weight)
    load(resumed, file)
    steps((resumed[0], resumed[1]), HALF, 2 * HALF)
    assert_same(through[:2], resumed[:2])
    assert through[1].state_dict()["param_groups"] == resumed[1].state_dict()["param_groups"]


@cases(
    row=SOME,
    bound=FEW,
    copied=[copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))],
)
def test_a_copy_of_module_and_optimizer_goes_on_like_the_original(
    row: OptimizerRow, bound: ConstraintRow, copied: Callable[[Pair], Pair]
) -> None:
    pair = (module := build(bound), optimizer(row, module))
    steps(pair, 0, 20)
    twin = copied(pair)
    assert twin[0].weight is not module.weight and twin[1].param_groups[0]["params"][0] is twin[0].weight
    assert symopt.constraints(twin[0]) == symopt.constraints(module)
    steps(pair, 20, 40)
    untouched = copied(twin)
    steps(twin, 20, 40)
    assert_same(pair, twin)
    assert not torch.equal(untouched[0].weight, twin[0].weight)


@cases(row=ANY_SHAPE, copied=[copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_an_optimizer_copied_without_its_module_keeps_the_constraint(
    row: OptimizerRow, copied: Callable[[Any], Any]
) -> None:
    pair = (module := build(FEW[0]), optimizer(row, module))
    steps(pair, 0, 5)
    alone = copied(pair[1])
    assert [c for _, _, _, c in alone.constrained()] == list(symopt.constraints(module).values())
    steps(pair, 5, 20)
    params = alone.param_groups[0]["params"]
    for t in range(5, 20):
        for k, p in enumerate(params):
            p.grad = torch.sin(p.detach() * (k + 2) + t) + 0.2 * p.detach()
        alone.step()
    assert torch.equal(params[0], module.weight)


@cases(row=ANY_SHAPE, bound=ENDS)
def test_a_deepcopy_of_the_module_alone_is_constrained(row: OptimizerRow, bound: ConstraintRow) -> None:
    module = build(bound)
    twin = copy.deepcopy(module)
    pairs = [(m, optimizer(row, m)) for m in (module, twin)]
    for pair in pairs:
        steps(pair, 0, 20)
    assert_same(*pairs)
    assert len(list(pairs[1][1].constrained())) == 1


@cases(row=SOME, bound=FEW, low=[torch.bfloat16, torch.float16])
def test_fp32_state_of_low_precision_weights_keeps_every_bit(
    row: OptimizerRow, bound: ConstraintRow, low: torch.dtype
) -> None:
    pair = (module := build(bound, dtype=low), optimizer(row, module))
    steps(pair, 0, 20)
    state = pair[1].state[module.weight]
    assert {v.dtype for k, v in state.items() if k not in ("step", "progress", "group_index")} == {torch.float32}
    # What weights are stepped in has bits the weights themselves cannot hold.
    exact = state["master"] if "master" in state else state["factor_0"] * state["factor_1"]
    assert torch.equal(exact.to(low), module.weight) and not torch.equal(exact, module.weight)
    resumed = (other := build(bound, seed=1, dtype=low), optimizer(row, other))
    load(resumed, saved(*pair))
    steps(pair, 20, 40)
    steps(resumed, 20, 40)
    assert_same(pair, resumed)


@cases(row=ANY_SHAPE)
def test_loading_copies(row: OptimizerRow) -> None:
    pair = (module := build(FEW[1]), optimizer(row, module))
    steps(pair, 0, 5)
    snapshot = copy.deepcopy(pair[1].state_dict()["state"][0])
    other = (twin := copy.deepcopy(module), optimizer(row, twin))
    other[1].load_state_dict(pair[1].state_dict())
    steps(other, 5, 10)
    assert_same_state(pair[1].state_dict()["state"][0], snapshot)


# ------------------------------------------------------------------------------------------------- to and from torch


@cases(
    row=ANY_SHAPE,
    bound=ENDS,
    dtype=[torch.float32, torch.bfloat16, torch.float64],
)
def test_a_torch_checkpoint_loads(row: OptimizerRow, bound: ConstraintRow, dtype: torch.dtype) -> None:
    plain = symopt.release(build(bound, dtype=dtype))
    theirs = (plain, optimizer(row, plain, row.plain_cls))
    steps(theirs, 0, 10)
    module = build(bound, seed=1, dtype=dtype)
    ours = (module, optimizer(row, module))
    load(ours, saved(*theirs))
    before = module.weight.detach().clone()
    want = theirs[1].state.get(plain.weight, {})
    have = ours[1].state.get(module.weight, {})
    assert all(torch.equal(value, have[key]) for key, value in want.items())
    steps(theirs, 10, 11)
    steps(ours, 10, 11)
    assert torch.equal(plain.bias, module.bias)  # what is free goes on as it would have
    assert not torch.equal(before, module.weight)
    state, groups = ours[1].state[module.weight], ours[1].binding(module.weight).groups(ours[1].state[module.weight])
    for key, value in theirs[1].state.get(plain.weight, {}).items():
        if key == "step":
            assert state[key] == value
        elif dtype == torch.float64 and key not in row.moments("peak"):
            if key in row.moments("second") and groups is not None:
                value = groups.sum(value) / groups.size(value)  # linear: the shared moment is the mean of the group's
            assert (state[key] - value).abs().max() <= tolerance("identity") * value.abs().max(), key
    steps(ours, 11, 20)
    assert torch.isfinite(module.weight).all()


@cases(row=ANY_SHAPE, bound=FEW)
def test_torch_goes_on_from_a_symopt_checkpoint(row: OptimizerRow, bound: ConstraintRow) -> None:
    ours = (module := build(bound), optimizer(row, module))
    steps(ours, 0, 10)
    plain = symopt.release(build(bound, seed=1))
    theirs = (plain, optimizer(row, plain, row.torch_cls))
    load(theirs, saved(*ours))
    loaded = theirs[1].state.get(plain.weight, {})
    for key in row.moments("first") | row.moments("second") | row.moments("peak"):
        assert (key in loaded) == (key in ours[1].state[module.weight])
        if key in loaded:
            assert loaded[key].shape == plain.weight.shape
    groups = ours[1].binding(module.weight).groups(ours[1].state[module.weight])
    for key in row.moments("second") if groups is not None else ():
        shared = ours[1].state[module.weight][key]
        assert shared.shape == (groups.count,)
        assert torch.equal(groups.first(loaded[key]), shared)
    steps(theirs, 10, 20)
    steps(ours, 10, 20)
    assert torch.equal(plain.bias, module.bias) and not torch.equal(plain.weight, module.weight)


@cases(row=ANY_SHAPE, bound=FEW)
def test_symopt_to_torch_and_back_is_stable_to_the_bit(row: OptimizerRow, bound: ConstraintRow) -> None:
    ours = (module := build(bound), optimizer(row, module))
    steps(ours, 0, 10)
    plain = symopt.release(build(bound, seed=1))
    back = (twin := build(bound, seed=2), optimizer(row, twin))
    chain = [ours, (plain, optimizer(row, plain, row.torch_cls)), back]
    for source, target in pairwise(chain):
        load(target, saved(*source))
    steps(ours, 10, 30)
    steps(back, 10, 30)
    assert_same(ours, back)


@cases(row=ANY_SHAPE)
def test_a_torch_checkpoint_does_not_reset_what_torch_knows_nothing_of(row: OptimizerRow) -> None:
    module = build(FEW[0])
    theirs = optimizer(row, module, row.torch_cls)
    ours = row.cls(
        [{"params": module.parameters(), "strength": 0.7, "time_scale": "none", "imbalance": 0.5}],
        lr=row.lr,
        **row.options,
    )
    ours.load_state_dict(theirs.state_dict())
    group = ours.param_groups[0]
    assert (group["strength"], group["time_scale"], group["imbalance"]) == (0.7, "none", 0.5)


@cases(row=ANY_SHAPE, missing=["imbalance", "metric_scale", "both", "moments", "all but momentum"])
def test_partial_state_is_completed(row: OptimizerRow, missing: str) -> None:
    pair = (module := build(FEW[1]), optimizer(row, module))
    steps(pair, 0, 10)
    loaded = pair[1].state_dict()
    own = {"imbalance", "metric_scale"}
    drop = {
        "both": own,
        "moments": row.moments("first") | row.moments("second") | row.moments("peak"),
        "all but momentum": set(loaded["state"][0]) - row.moments("first"),
    }.get(missing, {missing})
    loaded["state"][0] = {k: v for k, v in loaded["state"][0].items() if k not in drop}
    twin = copy.deepcopy(module)
    resumed = (twin, optimizer(row, twin))
    resumed[1].load_state_dict(loaded)
    steps(resumed, 10, 20)
    state = resumed[1].state[twin.weight]
    assert own <= state.keys() and torch.isfinite(twin.weight).all()
    assert (state["imbalance"] > 0).all() and pair[1].state[module.weight].keys() == state.keys()


# --------------------------------------------------------------------------------- weights changed from the outside


@cases(row=SOME, bound=FEW, low=[torch.float64, torch.bfloat16, torch.float16])
def test_converting_the_module_in_mid_training(row: OptimizerRow, bound: ConstraintRow, low: torch.dtype) -> None:
    pair = (module := build(bound, plain=False), optimizer(row, module))  # torch itself cannot convert moments
    steps(pair, 0, 10)
    loaded = saved(*pair)
    weight = module.weight
    module.to(low)
    assert module.weight is weight
    # Oracle: everything rebuilt in the new dtype and loaded.
    fresh = (other := build(bound, seed=1, dtype=low, plain=False), optimizer(row, other))
    load(fresh, loaded)
    steps(pair, 10, 20)
    steps(fresh, 10, 20)
    assert_same(pair, fresh)
    own = {v.dtype for k, v in pair[1].state[weight].items() if k not in ("step", "progress", "group_index")}
    assert own == {torch.float64 if low == torch.float64 else torch.float32}
    module.to(torch.float32)
    steps(pair, 20, 25)
    assert module.weight.dtype == torch.float32 and "master" not in pair[1].state[weight]
    assert torch.isfinite(module.weight).all()


def _load(module: nn.Module, value: Tensor) -> None:
    module.load_state_dict({**module.state_dict(), "weight": value})


def _data_copy(module: nn.Module, value: Tensor) -> None:
    module.weight.data.copy_(value)


def _data_set(module: nn.Module, value: Tensor) -> None:
    module.weight.data = value.clone()


def _no_grad(module: nn.Module, value: Tensor) -> None:
    with torch.no_grad():
        module.weight.copy_(value)


@cases(
    row=SOME,
    change=[_load, _data_copy, _data_set, _no_grad],
    dtype=[torch.float32, torch.bfloat16, torch.float16],
)
def test_a_weight_changed_from_outside_is_the_weight(
    row: OptimizerRow, change: Callable[[nn.Module, Tensor], None], dtype: torch.dtype
) -> None:
    pair = (module := build(FEW[0], dtype=dtype), optimizer(row, module))
    steps(pair, 0, 10)
    new = module.weight.detach().flip(0).clone()
    new[0] = 0
    new[1] = module.weight.detach()[1]  # unchanged ones go on from where they were, to the last bit of the fp32 copy
    start = pair[1].state[module.weight].get("master", module.weight).detach().clone()
    change(module, new)
    twin = copy.deepcopy(pair)
    for group in twin[1].param_groups:
        group["lr"] = 0.0
    steps(twin, 10, 11)
    assert torch.equal(twin[0].weight, new)
    master = twin[1].state[twin[0].weight].get("master", twin[0].weight)
    assert torch.equal(master[1], start[1]) and torch.equal(master[2:].to(dtype), new[2:])
    steps(pair, 10, 20)
    assert not torch.equal(module.weight, new)


# ---------------------------------------------------------------------------------------------------- other savers


@few_steps
@pairs(
    row=ANY_SHAPE,
    bound=ENDS,
    scheduled=[False, True],
    flat=[False, True],
)
def test_distributed_checkpoint_functions(row: OptimizerRow, bound: ConstraintRow, scheduled: bool, flat: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    length = {"total_steps": 2 * HALF} if scheduled else {}
    pair = (module := build(bound), optimizer(row, module, **length))
    steps(pair, 0, 10)
    loaded = copy.deepcopy(get_optimizer_state_dict(*pair, options=options))  # it holds the tensors themselves
    other = build(bound, seed=1)
    other.load_state_dict(module.state_dict())
    resumed = (other, optimizer(row, other, **length))
    # Both functions make state by a step with lr 0 and zero gradients.
    get_optimizer_state_dict(*resumed, options=options)
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), other.parameters(), strict=True))
    set_optimizer_state_dict(*resumed, loaded, options=options)
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), other.parameters(), strict=True))
    steps(pair, 10, 30)
    steps(resumed, 10, 30)
    assert_same(pair, resumed)


@cases(kind=["swa", "ema", "ema with buffers"])
def test_an_averaged_copy_is_never_silently_plain(kind: str) -> None:
    net = symopt.constrain(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), {"*.weight": symopt.Sparse(strength=2.0)})
    opt = symopt.AdamW(net, lr=1e-2)
    options: dict[str, Any] = {} if kind == "swa" else {"multi_avg_fn": get_ema_multi_avg_fn(0.5)}
    average = AveragedModel(net, use_buffers=kind.endswith("buffers"), **options)
    for _ in range(3):
        net(torch.ones(2, 4)).square().sum().backward()
        opt.step()
        average.update_parameters(net)
    assert symopt.constraints(average.module) == symopt.constraints(net)
    average.eval()(torch.ones(2, 4))  # evaluation is what averages are for: no warning (the suite makes one an error)
    with pytest.warns(UserWarning, match=r"0\.weight.*1\.weight"):
        average.train()(torch.ones(2, 4))
    assert len(list(symopt.AdamW(average.parameters()).constrained())) == 2


# ------------------------------------------------------------------------------------------------ refusals and hooks


def _extra_group(d: dict[str, Any]) -> None:
    d["param_groups"].append({**d["param_groups"][0], "params": []})


def _short_group(d: dict[str, Any]) -> None:
    d["param_groups"][0]["params"] = d["param_groups"][0]["params"][:1]


@cases(row=ANY_SHAPE, spoil=[_extra_group, _short_group])
def test_mismatching_groups_raise_and_leave_everything_untouched(
    row: OptimizerRow, spoil: Callable[[dict[str, Any]], None]
) -> None:
    pair = (module := build(FEW[1]), optimizer(row, module))
    steps(pair, 0, 5)
    before = copy.deepcopy(pair)
    bad = copy.deepcopy(pair[1].state_dict())
    for state in bad["state"].values():
        state.update({k: v + 1 for k, v in state.items()})
    bad["param_groups"][0]["lr"] = 77.0
    spoil(bad)
    with pytest.raises(ValueError, match="parameter group"):
        pair[1].load_state_dict(bad)
    assert_same(pair, before)
    assert pair[1].state_dict()["param_groups"] == before[1].state_dict()["param_groups"]
    assert not pair[1]._optimizer_load_state_dict_pre_hooks  # none of ours left behind
    steps(pair, 5, 15)
    steps(before, 5, 15)
    assert_same(pair, before)


@cases(row=ANY_SHAPE, in_place=[False, True])
def test_what_a_users_pre_hook_leaves_is_what_gets_loaded(row: OptimizerRow, in_place: bool) -> None:
    pair = (module := build(FEW[1]), optimizer(row, module, lr=row.lr))
    steps(pair, 0, 5)
    calls: list[str] = []

    def hook(opt: Any, d: dict[str, Any]) -> dict[str, Any] | None:
        calls.append("pre")
        state = {i: {k: v * 0 + 2 if k != "group_index" else v for k, v in s.items()} for i, s in d["state"].items()}
        if in_place:
            d["state"] = state
            return None
        return {**d, "state": state}

    other = (twin := copy.deepcopy(module), optimizer(row, twin))
    other[1].register_load_state_dict_pre_hook(hook)
    other[1].register_load_state_dict_post_hook(lambda opt: calls.append("post"))
    other[1].load_state_dict(pair[1].state_dict())
    assert calls == ["pre", "post"]
    assert other[1].state[twin.weight] and all((v == 2).all() for s in other[1].state.values() for v in s.values())


@cases(row=ANY_SHAPE)
def test_a_users_load_post_hook_has_the_last_word(row: OptimizerRow) -> None:
    pair = (module := build(FEW[1]), optimizer(row, module))
    steps(pair, 0, 5)

    def hook(opt: Any) -> None:
        for state in opt.state.values():
            for key in state:
                state[key] = torch.full_like(state[key], 3)

    other = (twin := copy.deepcopy(module), optimizer(row, twin))
    other[1].register_load_state_dict_post_hook(hook)
    other[1].load_state_dict(pair[1].state_dict())
    assert other[1].state[twin.weight] and all((v == 3).all() for s in other[1].state.values() for v in s.values())


@cases(row=ANY_SHAPE)
def test_a_users_state_dict_hooks_see_and_change_what_is_saved(row: OptimizerRow) -> None:
    _, opt = pair = (module := build(FEW[1]), optimizer(row, module))
    steps(pair, 0, 5)
    seen: list[Any] = []
    opt.register_state_dict_pre_hook(lambda o: seen.append("pre"))
    handle = opt.register_state_dict_post_hook(lambda o, d: seen.append(copy.deepcopy(d)))
    plain = opt.state_dict()
    assert seen[0] == "pre" and len(seen) == 2
    assert_same_state(seen[1]["state"][0], plain["state"][0])
    handle.remove()
    opt.register_state_dict_post_hook(lambda o, d: {"state": {}, "param_groups": d["param_groups"]})
    assert opt.state_dict()["state"] == {}


def test_the_state_is_flat_and_primitive() -> None:
    # Nested or object state breaks torch.load(weights_only=True), FSDP and distributed checkpoints.
    for row in ANY_SHAPE:
        for bound in CONSTRAINTS:
            pair = (module := build(bound), optimizer(row, module))
            steps(pair, 0, 2)
            packed = pair[1].state_dict()
            assert all(isinstance(v, Tensor) for s in packed["state"].values() for v in s.values())
            kinds = {type(v) for group in packed["param_groups"] for v in group.values()}
            assert kinds <= {int, float, bool, str, type(None), tuple, list}, (row.id, bound.id)
