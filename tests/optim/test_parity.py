"""symopt's optimizers *are* torch's: whatever is unconstrained follows torch.optim to the last bit.

The oracle is always torch.optim itself, run on a twin of the plain parameters.  Gradients are functions of the weight
and the step, so that one wrong bit is amplified instead of forgotten.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.optim.swa_utils import AveragedModel, update_bn

import symopt
from support.cases import cases, pairs
from support.table import OPTIMIZERS, OptimizerRow
from support.tolerances import tolerance

STEPS = 12
PLAIN = {"plain0": (5, 3), "plain1": (7,), "scalar": (), "plain2": (2, 3, 2)}
BOUND = {"bound0": (4, 6), "bound1": (6, 5)}
PATTERNS = {"bound0": symopt.GroupSparse("out"), "bound1": symopt.Sparse()}
FIRST, SECOND = ("bound0", "plain0", "scalar"), ("plain1", "bound1", "plain2")  # two groups, both mixed

ADAMS = [row for row in OPTIMIZERS if "Adam" in row.cls.__name__]


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = PLAIN | BOUND
    made = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return {name: nn.Parameter(value.to(dtype)) for name, value in made.items()}


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    module = nn.Module()
    for name, p in tensors(dtype).items():
        module.register_parameter(name, p)
    return symopt.constrain(module, PATTERNS)


class Params(dict[str, nn.Parameter]):
    """The parameters of a module by name; keeps the module alive, because the constraint lives as long as that does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module.named_parameters())
        self.module = module


def gradient(p: Tensor, name: str, t: int) -> Tensor:
    phase = 1 + sum(map(ord, name)) % 7
    return torch.sin(p.detach() * phase + t) + 0.1 * p.detach()


def set_gradients(params: dict[str, nn.Parameter], t: int) -> None:
    for name, p in params.items():
        p.grad = gradient(p, name, t)


def grouped(params: dict[str, Any], lr: Any) -> list[dict[str, Any]]:
    pick = [[params[n] for n in names if n in params] for names in (FIRST, SECOND)]
    return [{"params": pick[0]}, {"params": pick[1], "lr": 3 * lr}]


def twins(
    row: OptimizerRow, *, dtype: torch.dtype = torch.float32, lr: Any = None, **options: Any
) -> tuple[torch.optim.Optimizer, dict[str, nn.Parameter], torch.optim.Optimizer, dict[str, nn.Parameter]]:
    """torch.optim on the plain parameters alone, and symopt on the same mixed with constrained ones."""
    theirs = {name: p for name, p in tensors(dtype).items() if name in PLAIN}
    ours = Params(network(dtype))
    made = []
    for cls, params in ((row.torch_cls, theirs), (row.cls, ours)):
        rate = copy.deepcopy(row.lr if lr is None else lr)
        made += [cls(grouped(params, rate), lr=rate, **{**row.options, **options}), params]
    return tuple(made)  # type: ignore[return-value]


def dense(x: Tensor) -> Tensor:
    return x.to_dense() if x.is_sparse else x


def assert_same_plain(
    torch_opt: torch.optim.Optimizer, theirs: dict[str, nn.Parameter], opt: Any, ours: dict[str, nn.Parameter]
) -> None:
    for name, p in theirs.items():
        assert torch.equal(p, ours[name]), name
        want, have = torch_opt.state.get(p, {}), opt.state.get(ours[name], {})
        assert want.keys() == have.keys(), name
        for key, value in want.items():
            if isinstance(value, Tensor):
                assert torch.equal(dense(value), dense(have[key])) and value.dtype == have[key].dtype, (name, key)
            else:
                assert value == have[key], (name, key)


def moved(params: dict[str, nn.Parameter]) -> bool:
    start = tensors()
    return all(not torch.equal(params[name].to(start[name]), start[name]) for name in params)


def run_twins(row: OptimizerRow, steps: int = 30, dtype: torch.dtype = torch.float32, **options: Any) -> None:
    torch_opt, theirs, opt, ours = twins(row, dtype=dtype, **options)
    for t in range(steps):
        set_gradients(theirs, t)
        set_gradients(ours, t)
        torch_opt.step()
        opt.step()
    assert moved(ours)
    assert_same_plain(torch_opt, theirs, opt, ours)


# ------------------------------------------------------------------------------------------------------- trajectories


@pairs(row=OPTIMIZERS, how=[{}, {"foreach": False}, {"foreach": True}, {"fused": True}], weight_decay=[0, 0.1])
def test_plain_parameters_follow_torch_bit_for_bit(row: OptimizerRow, how: dict[str, Any], weight_decay: float) -> None:
    run_twins(row, weight_decay=weight_decay, **how)


@cases(row=OPTIMIZERS, dtype=[torch.bfloat16, torch.float16, torch.float64])
def test_plain_parameters_follow_torch_in_every_dtype(row: OptimizerRow, dtype: torch.dtype) -> None:
    run_twins(row, dtype=dtype, weight_decay=0.1)


@cases(row=OPTIMIZERS, foreach=[None, False, True])
def test_complex_parameters_follow_torch(row: OptimizerRow, foreach: bool | None) -> None:
    start = torch.randn(4, 3, dtype=torch.complex64, generator=torch.Generator().manual_seed(1))
    module = network()
    theirs, ours = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    torch_opt = row.torch_cls([theirs], lr=row.lr, foreach=foreach, **row.options)
    opt = row.cls([module.bound0, ours, module.plain0], lr=row.lr, foreach=foreach, **row.options)
    for t in range(STEPS):
        for p in (theirs, ours, module.bound0, module.plain0):
            p.grad = torch.sin(p.detach() + t)
        torch_opt.step()
        opt.step()
    assert torch.equal(theirs, ours)
    assert all(torch.equal(v, opt.state[ours][k]) for k, v in torch_opt.state[theirs].items())


@cases(row=OPTIMIZERS)
def test_a_neighbour_in_the_group_changes_nothing_for_a_constrained_weight(row: OptimizerRow) -> None:
    _, _, mixed, ours = twins(row, weight_decay=0.3)
    alone = network()
    opt = row.cls([alone.bound0], lr=row.lr, **row.options)
    for t in range(STEPS):
        set_gradients(ours, t)
        set_gradients({"bound0": alone.bound0}, t)
        mixed.step()
        opt.step()
    assert torch.equal(ours["bound0"], alone.bound0)  # weight_decay is for unconstrained parameters only


@cases(row=OPTIMIZERS, how=[{}, {"foreach": False}, {"fused": True}])
def test_tensor_lr_may_change_in_place(row: OptimizerRow, how: dict[str, Any]) -> None:
    # In fp64 a tensor and a number are the same lr, so a third run with numbers is an oracle for the constrained ones.
    lr = torch.tensor(row.lr, dtype=torch.float64)
    torch_opt, theirs, opt, ours = twins(row, lr=lr, dtype=torch.float64, **how)
    numbers, params = twins(row, dtype=torch.float64, **how)[2:]
    for t in range(STEPS):
        for optimizer in (torch_opt, opt):
            optimizer.param_groups[0]["lr"].fill_(row.lr / (1 + t))
        numbers.param_groups[0]["lr"] = row.lr / (1 + t)
        for each in (theirs, ours, params):
            set_gradients(each, t)
        for optimizer in (torch_opt, opt, numbers):
            optimizer.step()
    assert_same_plain(torch_opt, theirs, opt, ours)
    assert all(torch.equal(ours[name], params[name]) for name in BOUND)


@cases(row=ADAMS)
def test_tensor_betas(row: OptimizerRow) -> None:
    run_twins(row, betas=(torch.tensor(0.85), torch.tensor(0.98)), foreach=False)


@cases(
    row=ADAMS,
    how=[{"foreach": False}, {"foreach": True}, {"fused": True}],
)
def test_capturable_is_allowed_on_cpu_exactly_where_torch_allows_it(row: OptimizerRow, how: dict[str, Any]) -> None:
    torch_opt, theirs, opt, ours = twins(row, capturable=True, **how)
    errors: list[str] = []
    for optimizer, params in ((torch_opt, theirs), (opt, ours)):
        for t in range(3):
            set_gradients(params, t)
            try:
                optimizer.step()
            except AssertionError as error:  # torch: only accelerators, unless fused
                errors.append(str(error))
    assert len(set(errors)) == (0 if how.get("fused") else 1)
    assert len(errors) == (0 if how.get("fused") else 6)
    if how.get("fused"):
        assert_same_plain(torch_opt, theirs, opt, ours)


# --------------------------------------------------------------------------------------------------------- schedulers


class Half(lr_scheduler.LRScheduler):
    """The least a user's own scheduler can be."""

    def get_lr(self) -> list[float]:
        return [base / 2 ** (self.last_epoch // 4) for base in self.base_lrs]


def cycles(optimizer: torch.optim.Optimizer) -> bool:
    return "betas" in optimizer.defaults or optimizer.defaults["momentum"] > 0


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LRScheduler": Half,
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 5, 0.3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [3, 8], 0.3),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.2, 7),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 12),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 100), lr_scheduler.ExponentialLR(o, 0.9)], [8]
    ),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 6), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, step_size_up=4, cycle_momentum=cycles(o)),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(
        o, max_lr=[0.02, 0.01], total_steps=STEPS + 1, cycle_momentum=cycles(o)
    ),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, STEPS),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=1e-3, anneal_epochs=10),
}


def test_every_torch_scheduler_is_here() -> None:
    assert set(lr_scheduler.__all__) <= SCHEDULERS.keys()


@cases(row=[r for r in OPTIMIZERS if r.id in ("sgd", "sgd-momentum", "adam", "adamw")], make=SCHEDULERS.values())
def test_schedulers_schedule_plain_and_constrained_alike(row: OptimizerRow, make: Callable[[Any], Any]) -> None:
    torch_opt, theirs, opt, ours = twins(row)
    by_hand, params = twins(row)[2:]
    schedulers = [make(torch_opt), make(opt)]
    seen: set[float] = set()
    for t in range(STEPS):
        for group, source in zip(by_hand.param_groups, torch_opt.param_groups, strict=True):
            group.update({k: source[k] for k in ("lr", "momentum", "betas") if k in source})
        seen.add(torch_opt.param_groups[0]["lr"])
        for each in (theirs, ours, params):
            set_gradients(each, t)
        for optimizer in (torch_opt, opt, by_hand):
            optimizer.step()
        for scheduler in schedulers:
            scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
    assert len(seen) > 1
    assert_same_plain(torch_opt, theirs, opt, ours)
    assert all(torch.equal(ours[name], params[name]) for name in BOUND)


@cases(row=OPTIMIZERS)
def test_a_constrained_weight_feels_a_change_of_lr(row: OptimizerRow) -> None:
    ends = []
    for factor in (1.0, 0.5, 0.0):
        _, _, opt, ours = twins(row)
        for t in range(6):
            if t == 3:
                kept = {name: ours[name].detach().clone() for name in BOUND}
                for group in opt.param_groups:
                    group["lr"] *= factor
            set_gradients(ours, t)
            opt.step()
        ends.append(ours["bound1"].detach().clone())
        if factor == 0:
            assert all(torch.equal(ours[name], kept[name]) for name in BOUND)  # lr = 0 moves nothing, by no ulp
    assert not torch.equal(ends[0], ends[1])


# -------------------------------------------------------------------------------------------- strength, a key like lr


@cases(row=OPTIMIZERS, value=[float, lambda k: torch.tensor(k, dtype=torch.float64)])
def test_the_groups_strength_overrides_the_constraints_own(row: OptimizerRow, value: Callable[[float], Any]) -> None:
    def run(own: float | None, group: Any, switch: Any = None) -> Tensor:
        module = nn.Module()
        module.weight = tensors(torch.float64)["bound1"]
        symopt.constrain(module, {"weight": symopt.Sparse(strength=own)})
        opt = row.cls([{"params": [module.weight], "strength": group}], lr=row.lr, **row.options)
        for t in range(12):
            if t == 6 and switch is not None:
                opt.param_groups[0]["strength"] = switch
            module.weight.grad = gradient(module.weight, "weight", t)
            opt.step()
        return module.weight.detach()

    assert torch.equal(run(None, value(0.7)), run(0.7, None))
    assert torch.equal(run(0.1, value(0.7)), run(0.7, None))
    assert not torch.equal(run(0.1, None), run(0.7, None))
    scheduled = run(0.1, None, value(0.7))
    assert not torch.equal(scheduled, run(0.1, None)) and not torch.equal(scheduled, run(0.7, None))
    assert torch.equal(scheduled, run(0.3, value(0.1), value(0.7)))


def test_strength_in_the_constructor_and_in_param_groups() -> None:
    net = symopt.constrain(nn.Linear(3, 2), {"weight": symopt.Sparse(strength=0.4)})
    assert [g["strength"] for g in symopt.AdamW(net, strength=0.2).param_groups] == [0.2]
    assert [g["strength"] for g in symopt.AdamW(symopt.param_groups(net), strength=0.2).param_groups] == [0.4, None]


# ----------------------------------------------------------------------------------------- the rest of the step's API


@cases(row=OPTIMIZERS)
def test_closure_is_called_once_with_grad_enabled_and_its_loss_returned(row: OptimizerRow) -> None:
    torch_opt, theirs, opt, ours = twins(row)
    calls: list[bool] = []

    def closure(params: dict[str, nn.Parameter]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            calls.append(torch.is_grad_enabled())
            for p in params.values():
                p.grad = None
            loss = torch.stack([p.square().sum() for p in params.values()]).sum()
            loss.backward()
            return loss

        return run

    with torch.no_grad():
        for _ in range(3):
            want = sum(float(p.square().sum()) for p in ours.values())
            torch_opt.step(closure(theirs))
            loss = opt.step(closure(ours))
            assert isinstance(loss, Tensor) and math.isclose(loss.item(), want, rel_tol=tolerance("fp32 mean"))
    assert calls == [True] * 6
    assert opt.step() is None
    torch_opt.step()
    assert_same_plain(torch_opt, theirs, opt, ours)


@pytest.fixture(params=["torch first", "symopt first", "symopt alone"])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    # torch wraps ``step`` once per class, at the first instance; undo that to see every order of first instances.
    for row in OPTIMIZERS:
        for cls in (row.cls, row.torch_cls):
            step = vars(cls).get("step")
            if getattr(step, "hooked", False) and cls is row.cls:
                monkeypatch.delattr(cls, "step")
            elif getattr(step, "hooked", False):
                monkeypatch.setattr(cls, "step", step.__wrapped__)
            assert not hasattr(cls.step, "hooked")
    return str(request.param)


@cases(row=OPTIMIZERS)
def test_step_hooks_fire_exactly_once(row: OptimizerRow, order: str) -> None:
    seen: list[str] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: seen.append("global post")),
    ]
    try:
        if order == "torch first":
            row.torch_cls(list(tensors().values()), lr=row.lr, **row.options)
        opt = row.cls(network(), lr=row.lr, **row.options)
        if order == "symopt first":
            row.torch_cls(list(tensors().values()), lr=row.lr, **row.options)
        opt.register_step_pre_hook(lambda *_: seen.append("pre"))
        opt.register_step_post_hook(lambda *_: seen.append("post"))
        opt.step()
        assert seen == ["global pre", "pre", "post", "global post"]
    finally:
        for handle in handles:
            handle.remove()


@cases(row=OPTIMIZERS)
def test_parameters_without_a_gradient_are_skipped(row: OptimizerRow) -> None:
    torch_opt, theirs, opt, ours = twins(row, weight_decay=0.1)
    for t in range(8):
        for each in (theirs, ours):
            set_gradients(each, t)
            for name in ("plain0", "plain1", "bound0", "bound1")[t % 2 :: 2] if t else ("plain0", "bound0"):
                if name in each:
                    each[name].grad = None
        before = {name: p.detach().clone() for name, p in ours.items()}
        torch_opt.step()
        opt.step()
        for name, p in ours.items():
            assert torch.equal(p, before[name]) == (p.grad is None), name
        if t == 0:
            assert set(opt.state[ours["bound0"]]) == {"progress"}
    assert_same_plain(torch_opt, theirs, opt, ours)


@cases(row=OPTIMIZERS, foreach=[False, True])
def test_zero_grad(row: OptimizerRow, foreach: bool) -> None:
    _, _, opt, ours = twins(row, foreach=foreach)
    set_gradients(ours, 0)
    opt.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in ours.values())
    opt.zero_grad()
    assert all(p.grad is None for p in ours.values())


def sparse_gradient(p: Tensor, t: int) -> Tensor:
    return torch.sparse_coo_tensor(
        torch.tensor([[0, 2]]), torch.sin(p.detach()[[0, 2]] + t), p.shape, check_invariants=True
    )


@cases(row=OPTIMIZERS)
def test_sparse_gradients_of_plain_parameters_as_in_torch(row: OptimizerRow) -> None:
    torch_opt, theirs, opt, ours = twins(row)
    raised: list[tuple[type, str]] = []
    for optimizer, params in ((torch_opt, theirs), (opt, ours)):
        for t in range(5):
            set_gradients(params, t)
            params["plain0"].grad = sparse_gradient(params["plain0"], t)
            try:
                optimizer.step()
            except Exception as error:
                raised.append((type(error), str(error)))
    if row.torch_cls is torch.optim.SGD and not row.options.get("maximize"):
        assert not raised
    assert raised[: len(raised) // 2] == raised[len(raised) // 2 :]
    assert_same_plain(torch_opt, theirs, opt, ours)


@cases(row=OPTIMIZERS)
def test_sparse_gradients_of_constrained_parameters_raise_and_name_them(row: OptimizerRow) -> None:
    opt = row.cls(module := network(), lr=row.lr, **row.options)
    module.bound1.grad = sparse_gradient(module.bound1, 0)
    before = module.bound1.detach().clone()
    with pytest.raises(RuntimeError, match=r"bound1: sparse gradients .* sparse=False"):
        opt.step()
    assert torch.equal(module.bound1, before)


@cases(row=OPTIMIZERS, how=[{}, {"fused": True}])
def test_gradscaler_skips_everything_on_inf(row: OptimizerRow, how: dict[str, Any]) -> None:
    torch_opt, theirs, opt, ours = twins(row, **how)
    unscaled_opt, unscaled = twins(row, **how)[2:]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    for t in range(12):
        bad = t in (0, 5, 6)
        scale = scaler.scale(torch.ones(())).item()
        for each in (theirs, ours, unscaled):
            set_gradients(each, t)
        for p in ours.values():
            p.grad *= scale
        if bad:
            ours["plain2"].grad.view(-1)[-1] = math.inf
        before = copy.deepcopy((list(ours.values()), opt.state_dict()["state"]))
        scaler.step(opt)
        scaler.update()
        if bad:
            assert all(torch.equal(a, b) for a, b in zip(before[0], ours.values(), strict=True))
            after = opt.state_dict()["state"]
            assert before[1].keys() == after.keys()
            assert all(torch.equal(before[1][i][k], v) for i in after for k, v in after[i].items())
        else:
            torch_opt.step()
            unscaled_opt.step()
    # Scales are powers of two, hence exact: all that is left of the bad steps is nothing.  (The oracle is torch.optim
    # without a scaler, because torch's fused SGD takes an uninitialised momentum from a first step that it skips.)
    assert_same_plain(torch_opt, theirs, opt, ours)
    assert all(torch.equal(ours[name], unscaled[name]) for name in BOUND)


def test_gradscaler_sees_the_inf_of_a_constrained_weight() -> None:
    opt = symopt.AdamW(module := network(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu")
    set_gradients(params := dict(module.named_parameters()), 0)
    module.bound1.grad[0, 0] = math.inf
    scaler.scale(torch.ones(()))
    scaler.step(opt)
    assert all(torch.equal(p, q) for p, q in zip(params.values(), tensors().values(), strict=True)) and not opt.state


@cases(row=OPTIMIZERS, clip=[nn.utils.clip_grad_norm_, nn.utils.clip_grad_value_])
def test_gradient_clipping(row: OptimizerRow, clip: Callable[..., Any]) -> None:
    # The norm includes the constrained weights' gradients, so here torch trains them too, and gradients do not depend
    # on the weights.
    theirs, ours = tensors(), Params(network())
    torch_opt = row.torch_cls(grouped(theirs, row.lr), lr=row.lr, **row.options)
    opt = row.cls(grouped(ours, row.lr), lr=row.lr, **row.options)
    for t in range(STEPS):
        for each, optimizer in ((theirs, torch_opt), (ours, opt)):
            for k, p in enumerate(each.values()):
                p.grad = 5 * torch.sin(torch.arange(p.numel(), dtype=p.dtype).reshape(p.shape) * k + t)
            clip(each.values(), 0.5)
            optimizer.step()
    assert_same_plain(torch_opt, {n: theirs[n] for n in PLAIN}, opt, ours)


@cases(row=OPTIMIZERS)
def test_swa_averages_and_batchnorm_updates_as_for_any_optimizer(row: OptimizerRow) -> None:
    def build() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))

    torch.manual_seed(1)
    data = [torch.randn(8, 4) for _ in range(6)]
    averages = []
    for cls in (row.torch_cls, row.cls):
        # With the whole first layer free in both, all of its trajectory but the gradients is independent.
        net = build()
        if cls is row.cls:
            symopt.constrain(net, {"2.weight": symopt.Sparse()})
        opt = cls(net.parameters(), lr=row.lr, **row.options)
        average = AveragedModel(net)
        for x in data:
            opt.zero_grad()
            net[1](net[0](x)).square().mean().backward()
            net[2].weight.grad = torch.ones_like(net[2].weight)
            opt.step()
            average.update_parameters(net)
        update_bn(data, average)
        averages.append(average.module)
    want, have = (a.state_dict() for a in averages)
    assert want.keys() == have.keys()
    assert all(torch.equal(want[k], have[k]) for k in want if k != "2.weight")
    assert not torch.equal(want["2.weight"], have["2.weight"])


# ------------------------------------------------------------------------------------------------------ construction


@cases(row=OPTIMIZERS)
def test_it_is_an_instance_of_torchs_class(row: OptimizerRow) -> None:
    opt = row.cls(network(), lr=row.lr, **row.options)
    assert isinstance(opt, row.torch_cls) and isinstance(opt, torch.optim.Optimizer)
    assert type(opt).__name__ == row.torch_cls.__name__


@cases(row=[r for r in OPTIMIZERS if r.id in ("sgd", "adam", "adamw")])
def test_defaults_are_torchs(row: OptimizerRow) -> None:
    want, have = row.torch_cls(list(tensors().values())).defaults, row.cls(network()).defaults
    assert want.items() <= have.items()
    assert have.keys() - want.keys() >= {"strength", "time_scale", "imbalance"}


@cases(row=[r for r in OPTIMIZERS if r.id in ("sgd", "adam", "adamw")])
def test_the_signature_shows_torchs_arguments(row: OptimizerRow) -> None:
    # Trainers look: nanoGPT for "fused" in inspect.signature(torch.optim.AdamW).parameters, jsonargparse for all.
    want, have = (inspect.signature(cls).parameters for cls in (row.torch_cls, row.cls))
    assert list(have)[: len(want)] == list(want)
    assert all((have[n].kind, have[n].default) == (p.kind, p.default) for n, p in want.items())
    assert list(have)[len(want) :] == ["strength", "time_scale", "imbalance", "backend", "total_steps", "commit"]
    assert all(have[n].kind is inspect.Parameter.KEYWORD_ONLY for n in list(have)[len(want) :])


POSITIONAL: dict[str, tuple[Any, ...]] = {
    "SGD": (0.3, 0.8, 0.0, 0.02, True),
    "Adam": (0.3, (0.8, 0.9), 1e-5, 0.02, True),
    "AdamW": (0.3, (0.8, 0.9), 1e-5, 0.02, True),
}


@cases(row=[r for r in OPTIMIZERS if r.id in ("sgd", "adam", "adamw")])
def test_positional_arguments_in_torchs_order(row: OptimizerRow) -> None:
    values = POSITIONAL[row.cls.__name__]
    positional = [p for p in inspect.signature(row.torch_cls).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert len(positional) == len(values) + 1
    want, have = row.torch_cls(list(tensors().values()), *values), row.cls(network(), *values)
    assert want.defaults.items() <= have.defaults.items()
    assert want.defaults != row.torch_cls(list(tensors().values())).defaults


def forms(module: nn.Module) -> dict[str, Callable[[], Any]]:
    def named() -> Iterator[tuple[str, nn.Parameter]]:
        return module.named_parameters()

    return {
        "module": lambda: module,
        "parameters": module.parameters,
        "list": lambda: list(module.parameters()),
        "named": named,
        "groups": lambda: [{"params": list(module.parameters())[:3]}, {"params": iter(list(module.parameters())[3:])}],
        "named groups": lambda: [{"params": list(named())[2:]}, {"params": list(named())[:2]}],
        "param_groups": lambda: symopt.param_groups(module),
        "one parameter per group": lambda: ({"params": p} for p in module.parameters()),
        "add_param_group": lambda: [module.plain0],
    }


@cases(row=OPTIMIZERS)
def test_every_form_of_construction_binds_the_constraints(row: OptimizerRow) -> None:
    want = None
    for form in forms(nn.Module()):
        module = network()
        opt = row.cls(forms(module)[form](), lr=row.lr, **row.options)
        if form == "add_param_group":
            opt.add_param_group({"params": module.bound1})
            opt.add_param_group({"params": [module.plain1, module.bound0, module.scalar, module.plain2]})
        assert {name: c for _, _, name, c in opt.constrained()} == symopt.constraints(module)
        for t in range(STEPS):
            set_gradients(dict(module.named_parameters()), t)
            opt.step()
        want = want or module.state_dict()
        assert all(torch.equal(value, want[key]) for key, value in module.state_dict().items()), form


@cases(row=OPTIMIZERS)
def test_add_param_group_in_mid_training(row: OptimizerRow) -> None:
    theirs, ours = tensors(), Params(network())
    torch_opt = row.torch_cls([theirs["plain0"]], lr=row.lr, **row.options)
    opt = row.cls([ours["plain0"], ours["bound0"]], lr=row.lr, **row.options)
    for t in range(STEPS):
        if t == 5:
            torch_opt.add_param_group({"params": [theirs["plain1"]], "lr": row.lr / 2})
            opt.add_param_group({"params": [ours["bound1"], ours["plain1"]], "lr": row.lr / 2, "strength": 0.4})
        set_gradients(theirs, t)
        set_gradients(ours, t)
        torch_opt.step()
        opt.step()
    assert_same_plain(torch_opt, {n: theirs[n] for n in ("plain0", "plain1")}, opt, ours)
    alone = network()
    late = row.cls([alone.bound1], lr=row.lr / 2, strength=0.4, **row.options)
    for t in range(5, STEPS):
        set_gradients({"bound1": alone.bound1}, t)
        late.step()
    assert torch.equal(alone.bound1, ours["bound1"])


# ----------------------------------------------------------------------------------------------------- differentiable


@cases(row=OPTIMIZERS)
def test_differentiable_plain_steps_as_in_torch(row: OptimizerRow) -> None:
    hyper = []
    for cls in (row.torch_cls, row.cls):
        start = torch.randn(4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
        p = start.clone()
        opt = cls([p], lr=row.lr, differentiable=True, **row.options)
        for t in range(1 if row.options.get("amsgrad") else 3):  # torch's own amsgrad cannot go back through two
            p.grad = torch.sin(start * (t + 1))
            opt.step()
        hyper.append(torch.autograd.grad(p.square().sum(), start)[0])
    assert hyper[0].abs().min() > 0 and torch.equal(hyper[0], hyper[1])


@cases(
    row=OPTIMIZERS,
    constraint=[symopt.Sparse(strength=0.3), symopt.GroupSparse("out", strength=0.3), symopt.LowRank(strength=0.3)],
)
def test_differentiable_constrained_steps(row: OptimizerRow, constraint: symopt.Constraint) -> None:
    # A differentiable step is in place on a non-leaf, so the module holds that.  c and metric_scale are constants here:
    # they are state from before.
    start = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def train(grad: Tensor) -> Tensor:
        module = nn.Linear(2, 3, bias=False, dtype=torch.float64)
        symopt.constrain(module, {"weight": constraint})
        w = start.clone() * torch.ones_like(grad)
        module._parameters["weight"] = w  # type: ignore[assignment]
        opt = row.cls([w], lr=row.lr, differentiable=True, **row.options)
        assert len(list(opt.constrained())) == 1
        for t in range(3):
            w.grad = grad * (1 + t)
            opt.step()
        return w

    grad = torch.randn(3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(train, grad)
