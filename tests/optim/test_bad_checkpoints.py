"""Files that are truncated, another optimizer's or hostile: a named error, and nothing has been touched."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import nn

import symopt
from support.cases import cases
from symopt.budgets.state import BudgetState

Spoil = Callable[[dict[str, Any]], Any]


def trained(cls: Any = symopt.AdamW, **options: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    symopt.constrain(net, {"0.weight": symopt.GroupSparse(torch.tensor([0, 1, 0])), "1.weight": symopt.Sparse()})
    opt = cls(net, lr=0.01, **options)
    for _ in range(3):
        opt.zero_grad()
        net(torch.ones(5, 4)).square().mean().backward()
        opt.step()
    return net, opt


def state(index: int, **values: Any) -> Spoil:
    return lambda d: d["state"][index].update(values)


def option(**values: Any) -> Spoil:
    return lambda d: d["param_groups"][0].update(values)


BAD: dict[str, tuple[Spoil, str]] = {
    "a list": (lambda d: [d], "expected the dict that state_dict.. returns, got list"),
    "the module's": (lambda d: {"0.weight": torch.ones(3, 4)}, "no mapping 'state'; is it an optimizer's state"),
    "nothing": (lambda d: {}, "no mapping 'state'"),
    "no groups": (lambda d: {"state": d["state"]}, "no list 'param_groups'"),
    "a wrapped one": (lambda d: {"optimizer": d}, "It has 'optimizer'"),
    "group is no dict": (lambda d: {**d, "param_groups": [3]}, r"param_groups\[0\] has no list 'params'"),
    "params is no list": (option(params="0123"), r"param_groups\[0\] has no list 'params'"),
    "state is no dict": (lambda d: d["state"].update({1: 3}), "state of parameter 1 is a int"),
    "lr is text": (option(lr="1e-3"), "lr is '1e-3', which cannot stand for 0.01"),
    "lr is None": (option(lr=None), "lr is None"),
    "betas too long": (option(betas=(0.9, 0.9, 0.9)), "betas is"),
    "betas is a number": (option(betas=0.9), "betas is 0.9"),
    "amsgrad is text": (option(amsgrad="no"), "amsgrad is 'no'"),
    "strength is text": (option(strength="much"), "strength must be a number"),
    "strength is negative": (option(strength=-1.0), "strength must be finite and >= 0"),
    "unknown backend": (option(backend="gpu"), "backend must be None or one of"),
    "unknown time scale": (option(time_scale="slow"), "time_scale must be"),
    "moment is a list": (state(0, exp_avg=[0.0]), "state of parameter 0: exp_avg is a list, must be a tensor"),
    "moment too small": (state(0, exp_avg=torch.ones(2)), r"exp_avg is torch.float32 of shape \(2,\).*\(3, 4\)"),
    "moment too large": (state(1, exp_avg=torch.ones(9)), r"parameter 1: exp_avg is .*\(9,\).*\(3,\)"),
    "moment transposed": (state(0, exp_avg_sq=torch.ones(4, 3)), r"exp_avg_sq .*\(4, 3\)"),
    "moment complex": (state(0, exp_avg=torch.ones(3, 4, dtype=torch.complex64)), "exp_avg is torch.complex64"),
    "moment sparse": (state(0, exp_avg=torch.ones(3, 4).to_sparse()), "exp_avg .* does not fit"),
    "step is text": (state(0, step="3"), "step is a str"),
    "step is negative": (state(0, step=torch.tensor(-1.0)), "step is -1, must be >= 0"),
    "steps": (state(0, step=torch.ones(3, 4)), "step .* does not fit"),
    "imbalance is negative": (state(2, imbalance=torch.tensor(-1.0)), "imbalance is -1, must be >= 0"),
    "metric_scale is zero": (state(2, metric_scale=torch.tensor(0.0)), "metric_scale is 0, must be > 0"),
    "map too small": (state(0, group_index=torch.zeros(2, dtype=torch.int64)), "group_index .* does not fit"),
    "map out of bounds": (state(0, group_index=torch.full((3, 4), 2**40)), "group_index must number the groups"),
    "map below zero": (state(0, group_index=torch.full((3, 4), -1)), "group_index must number the groups"),
    "map is truth": (state(0, group_index=torch.zeros(3, 4, dtype=torch.bool)), "group_index is torch.bool, must hold"),
    "map is broken": (state(0, group_index=torch.full((3, 4), 0.5)), "group_index holds 0.5, must hold integers"),
    "budget too short": (state(2, budget=torch.ones(2)), "budget .* does not fit"),
}


def number(index: int, key: str, value: float, *, whole: bool = False) -> Spoil:
    """One number of a tensor, or the ``whole`` entry as a plain number, becomes ``value``."""

    def spoil(d: dict[str, Any]) -> None:
        entry = d["state"][index]
        if whole:
            entry[key] = value
        else:
            entry[key] = entry[key].clone()
            entry[key].flatten()[-1] = value

    return spoil


NAN, INF = math.nan, math.inf
NUMBERS: dict[str, tuple[Any, Spoil, str]] = {}
for key, places, bad in (
    ("step", (0, 1, 2), (NAN, INF, -1.0)),
    ("imbalance", (0, 2), (NAN, INF, -1e-3)),
    ("metric_scale", (0, 2), (NAN, INF, -INF, -1.0, 0.0)),
    ("exp_avg", (0, 1, 2), (NAN, INF, -INF)),
    ("exp_avg_sq", (0, 1, 2), (NAN, -INF, -1e-8)),
    ("max_exp_avg_sq", (0, 1, 2), (NAN, -INF, -1.0)),
):
    for i in places:
        for value in bad:
            must = "finite" if not math.isfinite(value) else "> 0" if key == "metric_scale" else ">= 0"
            message = (
                rf"state of parameter {i}: {key} (?:is|holds) {value:g}, must be {must}.*drop this parameter's entry"
            )
            NUMBERS[f"{key} {value} of {i}"] = ((symopt.AdamW, {"amsgrad": True}), number(i, key, value), message)
            if key in ("step", "imbalance", "metric_scale"):
                NUMBERS[f"{key} {value} of {i}, no tensor"] = (
                    *NUMBERS[f"{key} {value} of {i}"][:1],
                    number(i, key, value, whole=True),
                    message,
                )
NUMBERS["exp_avg_sq inf of a group, which would become NaN"] = (
    (symopt.AdamW, {}),
    number(0, "exp_avg_sq", INF),
    "state of parameter 0: exp_avg_sq holds inf, must be finite and >= 0",
)
for value in (NAN, INF):
    for cls, key in ((symopt.SGD, "momentum_buffer"), (symopt.Lion, "exp_avg")):
        options = {"momentum": 0.9} if cls is symopt.SGD else {}
        for i in (0, 1, 2):
            NUMBERS[f"{cls.__name__}'s {key} {value} of {i}"] = ((cls, options), number(i, key, value), f"{i}: {key} ")


def unchanged(before: tuple[nn.Module, Any], after: tuple[nn.Module, Any]) -> None:
    for one, two in zip(before[0].parameters(), after[0].parameters(), strict=True):
        assert torch.equal(one, two)
    want, have = before[1].state_dict(), after[1].state_dict()
    assert want["param_groups"] == have["param_groups"] and want["state"].keys() == have["state"].keys()
    for i, entry in want["state"].items():
        assert entry.keys() == have["state"][i].keys()
        assert all(torch.equal(value, have["state"][i][key]) for key, value in entry.items())


@pytest.mark.parametrize(("spoil", "message"), BAD.values(), ids=BAD.keys())
def test_bad_states_are_refused_and_nothing_is_touched(spoil: Spoil, message: str) -> None:
    pair = trained()
    before, packed = copy.deepcopy(pair), copy.deepcopy(pair[1].state_dict())
    for entry in packed["state"].values():  # what would be seen if any of it were loaded
        entry["step"] += 10
    packed["param_groups"][0]["eps"] = 77.0
    spoiled = spoil(packed)
    with pytest.raises((ValueError, TypeError), match=rf"AdamW\.load_state_dict: .*{message}"):
        pair[1].load_state_dict(packed if spoiled is None else spoiled)
    unchanged(before, pair)
    assert not pair[1]._optimizer_load_state_dict_pre_hooks


@pytest.mark.parametrize(("made", "spoil", "message"), NUMBERS.values(), ids=NUMBERS.keys())
def test_numbers_out_of_range_are_refused_and_nothing_is_touched(made: Any, spoil: Spoil, message: str) -> None:
    cls, options = made
    pair = trained(cls, **options)
    before, packed = copy.deepcopy(pair), copy.deepcopy(pair[1].state_dict())
    spoil(packed)
    with pytest.raises(ValueError, match=rf"{cls.__name__}\.load_state_dict: .*{message}"):
        pair[1].load_state_dict(packed)
    unchanged(before, pair)


def carrying(constraint: symopt.Constraint) -> tuple[nn.Module, Any]:
    """A weight whose state has factors, a budget, or an automatic strength."""
    torch.manual_seed(0)
    net = symopt.constrain(nn.Linear(4, 4, bias=False), {"weight": constraint})
    opt = symopt.Adam(net, lr=1.0, total_steps=None if constraint.budget is None else 200)
    for _ in range(3):
        opt.zero_grad()
        (net(torch.eye(4)) - 1).square().mean().backward()
        opt.step()
    return net, opt


FREE, MATRIX, PLANE = symopt.Sparse(gauge="free"), symopt.LowRank(), symopt.Symmetric()
BUDGETS = [symopt.Sparse(density=0.5), symopt.GroupSparse("out", keep=2), symopt.Sparse(pattern="2:4")]


@pytest.mark.parametrize(
    ("constraint", "key", "value"),
    [
        *((FREE, key, value) for key in ("factor_0", "factor_1") for value in (NAN, INF)),
        *(
            (MATRIX, key, value)
            for key in ("factor_u", "factor_v", "factor_v_exp_avg", "factor_age")
            for value in (NAN, INF)
        ),
        *((MATRIX, key, -1.0) for key in ("factor_u_exp_avg_sq", "factor_age", "step")),
        *((PLANE, "critical", value) for value in (NAN, INF, -1.0)),
        *((budget, "budget", NAN) for budget in BUDGETS),
        *((BUDGETS[1], "progress", value) for value in (NAN, INF, -1.0)),
    ],
)
def test_factors_and_budgets_out_of_range_are_refused(constraint: symopt.Constraint, key: str, value: float) -> None:
    pair = carrying(constraint)
    before, packed = copy.deepcopy(pair), copy.deepcopy(pair[1].state_dict())
    number(0, key, value)(packed)
    with pytest.raises(ValueError, match=rf"Adam\.load_state_dict: state of parameter 0: {key}.* {value:g}, must be"):
        pair[1].load_state_dict(packed)
    unchanged(before, pair)


@cases(field=range(len(fields(BudgetState))), value=[NAN, INF, -1.0])
def test_only_bounds_of_a_budget_may_be_infinite_and_its_threshold_negative(field: int, value: float) -> None:
    pair = carrying(BUDGETS[0])
    packed = copy.deepcopy(pair[1].state_dict())
    packed["state"][0]["budget"][field] = value
    name = [f.name for f in fields(BudgetState)][field]
    if (value == INF and name in ("threshold", "largest_decay")) or (value == -1.0 and name == "threshold"):
        pair[1].load_state_dict(packed)
        assert float(pair[1].state[pair[0].weight]["budget"][field]) == value
        return
    with pytest.raises(ValueError, match=rf"parameter 0: budget \({name}\) is {value:g}, must be"):
        pair[1].load_state_dict(packed)


@pytest.mark.parametrize("constraint", [None, FREE, MATRIX, PLANE, *BUDGETS], ids=str)
def test_what_training_leaves_is_never_refused(constraint: symopt.Constraint | None) -> None:
    pair = trained() if constraint is None else carrying(constraint)
    packed = copy.deepcopy(pair[1].state_dict())
    pair[1].load_state_dict(packed)
    as_numbers = {i: entry | {"step": int(entry["step"])} for i, entry in packed["state"].items()}
    pair[1].load_state_dict({**packed, "state": as_numbers})  # as old checkpoints have it


@cases(index=[1, 2])
def test_a_square_that_overflowed_is_loaded_and_its_weight_stands_still(index: int) -> None:
    """As torch.optim leaves it after a gradient of 1e20."""
    net, opt = trained(backend="reference")
    packed = copy.deepcopy(opt.state_dict())
    packed["state"][index]["exp_avg_sq"].fill_(INF)
    opt.load_state_dict(packed)
    p = list(net.parameters())[index]
    before = p.detach().clone()
    p.grad = torch.ones_like(p)
    for group in opt.param_groups:
        group.update(weight_decay=0.0, strength=0.0)
    opt.step()
    torch.testing.assert_close(p.detach(), before, rtol=1e-6, atol=0)


@cases(cls=[symopt.SGD, symopt.Adam, symopt.AdamW, symopt.Lion, symopt.Muon])
def test_a_state_with_a_wrappers_tensors_is_loaded(cls: Any) -> None:
    """An average of the weights beside the moments, also of a parameter that has had no gradient yet."""
    nets = [symopt.constrain(nn.Linear(4, 3, bias=False), {"weight": symopt.GroupSparse("out")}) for _ in range(2)]
    for net in nets:
        net.register_parameter("unused", nn.Parameter(torch.ones(5)) if cls is not symopt.Muon else None)
        net.register_parameter("spare", nn.Parameter(torch.ones(2, 2)))
    first, second = (cls(net, lr=0.01) for net in nets)
    for p in nets[0].parameters():
        first.state[p]["average"] = p.detach().clone()
    nets[0](torch.eye(4)).square().mean().backward()
    first.step()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(first.state[p]["average"], second.state[q]["average"])


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (torch.optim.RMSprop, symopt.AdamW),
        (torch.optim.Adagrad, symopt.Adam),
        (torch.optim.AdamW, symopt.SGD),
        (lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9), symopt.Adam),
    ],
    ids=["RMSprop to AdamW", "Adagrad to Adam", "AdamW to SGD", "SGD to Adam"],
)
def test_another_optimizers_state_is_refused(source: Any, target: Any) -> None:
    plain = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    foreign = source(plain.parameters(), lr=0.01)
    plain(torch.ones(5, 4)).square().mean().backward()
    foreign.step()
    pair = trained(target)
    before = copy.deepcopy(pair)
    with pytest.raises(ValueError, match=r"parameter 0 holds .* and nothing that \w+ remembers"):
        pair[1].load_state_dict(foreign.state_dict())
    unchanged(before, pair)


def test_an_option_that_is_none_by_default_may_be_text() -> None:
    net = nn.Linear(4, 3, bias=False)
    saved = symopt.Muon(net, adjust_lr_fn="match_rms_adamw", backend="reference").state_dict()
    opt = symopt.Muon(net)
    opt.load_state_dict(saved)
    assert [opt.param_groups[0][key] for key in ("adjust_lr_fn", "backend")] == ["match_rms_adamw", "reference"]


@cases(source=[torch.optim.AdamW, symopt.AdamW])
def test_adam_does_not_become_adamw_by_loading(source: Any) -> None:
    net, pair = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), trained(symopt.Adam)
    before, foreign = copy.deepcopy(pair), source(net.parameters(), lr=0.01)
    with pytest.raises(ValueError, match=r"is AdamW's.*set its decoupled_weight_decay to False"):
        pair[1].load_state_dict(foreign.state_dict())
    unchanged(before, pair)
    other = trained(symopt.AdamW)[1]
    other.load_state_dict(pair[1].state_dict())  # Adam's moments serve AdamW, which stays what it is
    assert other.direction.decoupled(other.param_groups[0]) and other.param_groups[0]["decoupled_weight_decay"]


def test_a_truncated_file_is_refused_before_there_is_anything_to_load() -> None:
    pair, file = trained(), io.BytesIO()
    before = copy.deepcopy(pair)
    torch.save(pair[1].state_dict(), file)
    whole = file.getvalue()
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        with pytest.raises((RuntimeError, ValueError, EOFError, pickle.UnpicklingError)):
            pair[1].load_state_dict(torch.load(io.BytesIO(whole[:length]), weights_only=True))
    unchanged(before, pair)


def test_a_state_is_saved_and_reported_between_loading_and_the_first_step() -> None:
    """Shared second moments are per weight in a file; a resumed run may be saved again before it goes on."""
    for cls in (symopt.Adam, symopt.AdamW):
        pair = trained(cls)
        first = copy.deepcopy(pair[1].state_dict())
        net, opt = trained(cls)
        net.load_state_dict(pair[0].state_dict())
        opt.load_state_dict(first)
        again = opt.state_dict()
        for i, entry in first["state"].items():
            assert all(torch.equal(value, again["state"][i][key]) for key, value in entry.items())
        assert str(symopt.report(net, opt)) == str(symopt.report(*pair))


@cases(cls=[symopt.SGD, symopt.Adam, symopt.AdamW])
def test_a_state_is_saved_and_loaded_before_the_first_step(cls: Any) -> None:
    """As Accelerate does at once."""
    ends = []
    for load in (False, True):
        torch.manual_seed(0)
        net = symopt.constrain(nn.Linear(4, 3), {"weight": symopt.Sparse(density=0.5)})
        opt = cls(net, lr=0.1, total_steps=100)
        if load:
            opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        for _ in range(100):
            opt.zero_grad()
            (net(torch.eye(4)) - 1).square().mean().backward()
            opt.step()
        assert int((net.weight == 0).sum()) == 6
        ends.append(net.weight.detach())
    assert torch.equal(*ends)
