"""What is changed, replaced or wrapped while a schedule runs: weights, state, groups, the optimizer and its caller."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import symopt
from support.cases import cases, pairs, some
from support.courses import (
    BOTH,
    FEW,
    FEW_KINDS,
    KINDS,
    MAKE,
    STEPS,
    Kind,
    Run,
    backward,
    batch,
    begun,
    bits,
    network,
    optimizer,
    same,
    train,
)

pytestmark = pytest.mark.filterwarnings("ignore:.* are too few to ramp (its|their) budget in")

OF_WEIGHTS = [kind for kind in KINDS if kind.id != "rank"]


def zeros(net: nn.Module, kind: Kind) -> list[Tensor]:
    return [net.get_parameter(name) == 0 for name in kind.names]


def kept(net: nn.Module, kind: Kind, before: list[Tensor]) -> bool:
    return all(map(torch.equal, before, zeros(net, kind)))


# ------------------------------------------------------------------------------------------------------------- weights


@pairs(kind=OF_WEIGHTS, name=FEW, replaced=[False, True], at=[60, 75])
def test_after_other_weights_were_loaded_the_count_is_restored(kind: Kind, name: str, replaced: bool, at: int) -> None:
    net, opt = begun(kind, name, at)
    for weight in map(net.get_parameter, kind.names):
        value = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
        if replaced:
            weight.data = value
        else:
            net.load_state_dict({n: value for n in kind.names if net.get_parameter(n) is weight}, strict=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train((net, opt), range(at, 82))
    assert kind.live(net) == kind.left
    assert ["more lives than the committed budget" in str(warning.message) for warning in caught] == [True]


@pairs(kind=FEW_KINDS, name=FEW, at=[1, 19, 30, 59, 60])
def test_a_cleared_state_begins_anew_where_training_is(kind: Kind, name: str, at: int) -> None:
    net, opt = begun(kind, name, at)
    opt.state.clear()
    train((net, opt), range(at, 62))
    assert kind.live(net) == kind.left
    assert {float(opt.state[net.get_parameter(name)]["progress"]) for name in kind.names} == {62.0}


@some(kind=OF_WEIGHTS, name=MAKE, fresh=[False, True])
def test_a_finished_support_is_final(kind: Kind, name: str, fresh: bool) -> None:
    """Far past the end, and under a new optimizer that knows of no length."""
    net, opt = begun(kind, name, 61)
    before = zeros(net, kind)
    train((net, optimizer(name, net) if fresh else opt), range(61, 150))
    assert kept(net, kind, before) and kind.live(net) == kind.left


def stopped(kind: Kind) -> nn.Module:
    return begun(kind, "adamw", 8)[0]


def averaged(kind: Kind, **options: Any) -> nn.Module:
    run = begun(kind, "adamw")
    average = torch.optim.swa_utils.AveragedModel(run[0], **options)
    for t in range(62):
        train(run, [t])
        average.update_parameters(run[0])
    return average.module


def smoothed(kind: Kind) -> nn.Module:
    return averaged(kind, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))


@cases(kind=KINDS, ended=[stopped, averaged, smoothed])
def test_fold_meets_what_was_not_and_says_so(kind: Kind, ended: Callable[[Kind], nn.Module]) -> None:
    net = ended(kind)
    with pytest.warns(UserWarning, match=r"(?s)^fold: .*0\.weight") as caught:
        small = symopt.fold(net)
    assert len(caught) == 1
    if kind.id == "rank":
        assert small.fold_config["ranks"]["0"] == 2  # type: ignore[index, union-attr]
    elif "rows" not in kind.id:
        assert sum(small.fold_config["cut"].values()) == kind.live(net) - kind.left  # type: ignore[union-attr]


@some(kind=OF_WEIGHTS, name=MAKE, low=[torch.bfloat16, torch.float16])
def test_budgets_of_weights_in_half_precision(kind: Kind, name: str, low: torch.dtype) -> None:
    net = network(kind).to(low)
    for key, p in net.named_parameters():
        p.requires_grad_(low == torch.bfloat16 or key in kind.names)  # torch's own moments underflow there
    train((net, optimizer(name, net, total_steps=STEPS)), range(62))
    assert kind.live(net) == kind.left


# --------------------------------------------------------------------------------------------- groups and other callers


@pytest.mark.filterwarnings("ignore:constrained weights are being trained but belong to no symopt optimizer")
@some(kind=KINDS, name=MAKE, at=[0, 30, 80])
def test_a_group_that_is_added_shares_the_course(kind: Kind, name: str, at: int) -> None:
    both = nn.ModuleDict({"a": network(), "b": nn.Linear(20, 32)})
    symopt.constrain(both, {tuple(f"a.{n}" for n in kind.names): kind.make(), "b.weight": symopt.Sparse(density=0.1)})
    opt = optimizer(name, both["a"], total_steps=STEPS)
    for t in range(max(62, at + 2)):
        if t == at:
            opt.add_param_group({"params": list(both["b"].named_parameters())})
        opt.zero_grad()
        backward(both["a"], t)
        both["b"](batch(t)[0]).square().mean().backward()
        opt.step()
    assert kind.live(both["a"]) == kind.left
    assert int(both["b"].weight.count_nonzero()) == 64


class Wrapped:
    """As trainers wrap one: param groups are copied now and then."""

    def __init__(self, opt: Any) -> None:
        self.opt = opt

    def step(self, closure: Any = None) -> None:
        self.opt.param_groups = [dict(group) for group in self.opt.param_groups]
        self.opt.step(closure)


def by_closure(net: nn.Module, opt: Any) -> Iterator[Callable[[int], object]]:
    def step(t: int) -> None:
        def closure() -> float:
            opt.zero_grad()
            backward(net, t)
            return 0.0

        opt.step(closure)

    yield step


def by_wrapper(net: nn.Module, opt: Any) -> Iterator[Callable[[int], object]]:
    wrapped = Wrapped(opt)

    def step(t: int) -> None:
        opt.zero_grad()
        backward(net, t)
        wrapped.step()

    yield step


def by_compiler(net: nn.Module, opt: Any) -> Iterator[Callable[[int], object]]:
    torch.compiler.reset()
    compiled = torch.compile(lambda: opt.step(), backend="eager")

    def step(t: int) -> None:
        opt.zero_grad()
        backward(net, t)
        compiled()

    yield step
    torch.compiler.reset()


@pairs(kind=FEW_KINDS, name=["sgd-momentum", "adamw"], caller=[by_closure, by_wrapper, by_compiler])
def test_it_does_not_matter_who_calls_step(kind: Kind, name: str, caller: Any) -> None:
    run = begun(kind, name)
    for step in caller(*run):
        for t in range(62):
            step(t)
    same(run, begun(kind, name, 62))


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_zero_redundancy_on_one_process(tmp_path: Any) -> None:
    from torch import distributed
    from torch.distributed.optim import ZeroRedundancyOptimizer

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        for kind in KINDS:
            net = network(kind)
            options: dict[str, Any] = {"lr": 1e-2, "total_steps": STEPS}
            opt = ZeroRedundancyOptimizer(net.parameters(), optimizer_class=symopt.AdamW, **options)
            train((net, opt), range(62))
            other = begun(kind, "adamw", 62)[0]
            assert all(map(torch.equal, net.parameters(), other.parameters()))
    finally:
        distributed.destroy_process_group()


@cases(name=MAKE)
def test_a_weight_that_two_layers_share_has_one_budget(name: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 4))
    net[2].weight = net[0].weight
    symopt.constrain(net, {"0.weight": symopt.Sparse(density=0.1)})
    train((net, optimizer(name, net, total_steps=STEPS)), range(62))
    assert net[2].weight is net[0].weight and int(net.get_parameter("0.weight").count_nonzero()) == 40


@cases(kind=OF_WEIGHTS, cls=[symopt.Adam, symopt.AdamW], backend=[None, "reference"])
def test_a_capturable_step_on_the_host(kind: Kind, cls: Any, backend: str | None) -> None:
    net = network(kind)
    for name, p in net.named_parameters():
        p.requires_grad_(name in kind.names)  # torch's own steps need a device
    weights = [net.get_parameter(name) for name in kind.names]
    opt = cls(weights, lr=torch.tensor(1e-2), capturable=True, backend=backend, total_steps=STEPS)
    train((net, opt), range(62))
    assert kind.live(net) == kind.left


def test_explicit_mode_has_no_schedule() -> None:
    net = symopt.constrain(network(), {BOTH: symopt.Sparse(strength=0.1)}, mode="explicit")
    run: Run = net, torch.optim.AdamW(symopt.param_groups(net), lr=1e-2)
    train(run, range(3))
    assert not any(key.endswith((".progress", ".budget")) for key in bits(run))
    with pytest.raises(ValueError, match="explicit"):
        symopt.AdamW(net, total_steps=STEPS)
