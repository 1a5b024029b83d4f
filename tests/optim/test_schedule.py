"""The schedule inside the optimizer: what is counted, how long training is, and who may touch it."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

import symopt
from support.cases import cases, pairs
from support.courses import KINDS, MAKE, STEPS, Kind, Run, backward, begun, bits, network, optimizer, same, train
from support.table import EVERY, EVERY_OPTIMIZER, available, bound_module

few = pytest.mark.filterwarnings("ignore:.* are too few to (ramp|bring)")
pytestmark = few


def progress(run: Run) -> set[float]:
    net, opt = run
    return {float(state["progress"]) for state in opt.state.values() if "progress" in state}


@cases(kind=KINDS, name=MAKE)
def test_every_call_of_step_counts(kind: Kind, name: str) -> None:
    net, opt = begun(kind, name)
    for t in range(STEPS):
        opt.zero_grad()
        if t % 3:
            backward(net, t)
        opt.param_groups[0]["lr"] = 0.0 if t % 7 == 0 else opt.defaults["lr"]
        opt.step()
        assert progress((net, opt)) == {t + 1}
    assert kind.live(net) == kind.left


@pairs(kind=KINDS, name=MAKE, flat=[False, True], at=[0, 30])
def test_the_step_of_distributed_checkpoints_moves_nothing(kind: Kind, name: str, flat: bool, at: int) -> None:
    run, other = begun(kind, name, at), begun(kind, name, at)
    before = bits(run)
    get_optimizer_state_dict(*run, options=StateDictOptions(flatten_optimizer_state_dict=flat))
    if at:
        same(run, before)
    for key, value in before.items():
        assert torch.equal(dict(bits(run))[key], value), key
    assert progress(run) <= {at}
    if at or not name.startswith("adam"):  # they count that step for their bias correction, as torch's do
        for one in (run, other):
            train(one, range(at, STEPS))
        same(run, other)


@cases(kind=KINDS, name=MAKE)
def test_a_budget_without_a_length_is_an_error_before_anything_moves(kind: Kind, name: str) -> None:
    run = begun(kind, name, total_steps=None)
    before = bits(run)
    backward(run[0], 0)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"0\.weight.*total_steps"):
            run[1].step()
    same({k: v for k, v in bits(run).items() if k in before}, before)
    run[1].reschedule(total_steps=STEPS)
    train(run, range(STEPS))
    same(run, begun(kind, name, STEPS))


@cases(kind=KINDS, new=[30, 80, 200], at=[0, 10, 30, 70])
def test_rescheduling(kind: Kind, new: int, at: int) -> None:
    run = begun(kind, "adamw", at)
    run[1].reschedule(total_steps=new)
    train(run, range(at, max(new, at + 1)))
    assert kind.live(run[0]) == kind.left
    if at == 70 and kind.id != "rank":
        committed = begun(kind, "adamw", at)
        train(committed, range(at, max(new, at + 1)))
        same(run, committed)


def test_lengths_that_differ_within_a_shared_budget():
    for kind in (KINDS[3], KINDS[4]):
        net = network(kind)
        opt = symopt.AdamW(
            [{"params": net[0].parameters(), "total_steps": 100}, {"params": net[2].parameters(), "total_steps": 90}]
        )
        before = bits((net, opt))
        backward(net, 0)
        with pytest.raises(ValueError, match="share one budget"):
            opt.step()
        same({k: v for k, v in bits((net, opt)).items() if k in before}, before)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "make",
    [
        lambda: symopt.Sparse(density=0.1),
        lambda: symopt.Sparse(strength=0.3),
        lambda: symopt.LowRank(rank=2),
        lambda: symopt.GroupSparse("out", keep=3),
    ],
)
@pytest.mark.parametrize("name", MAKE)
def test_one_warning(make, name):
    def run(n, **options):
        torch.manual_seed(0)
        net = nn.Sequential(*[nn.Linear(8, 8) for _ in range(n)])
        symopt.constrain(net, {f"{i}.weight": make() for i in range(n)})
        opt = optimizer(name, net, **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for t in range(2):
                opt.zero_grad()
                net(torch.randn(4, 8, generator=torch.Generator().manual_seed(t))).square().sum().backward()
                opt.step()
        return [str(c.message) for c in caught if "too few" in str(c.message)]

    found = run(100, total_steps=3, lr=1e-4)
    assert len(found) == 1, found
    found = run(1, total_steps=30, lr=1e-4)
    import re

    lr = float(re.search(r"lr >= ([\d.e+-]+)", found[0])[1])
    steps = int(re.search(r"or (\d+) steps", found[0])[1])
    print(name, found, lr, steps)
    assert run(1, total_steps=steps, lr=1e-4) == [], run(1, total_steps=steps, lr=1e-4)
    if name != "sgd" or 1:
        assert run(1, total_steps=30, lr=lr) == [], run(1, total_steps=30, lr=lr)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pairs(available, row=EVERY, opt_row=EVERY_OPTIMIZER, backend=["native", "reference"], total=[None, 60])
def test_the_default_dtype_changes_no_bit(row, opt_row, backend, total, dtype):
    def run(default):
        module = bound_module(row, dtype=torch.float32)
        torch.set_default_dtype(default)
        try:
            opt = opt_row.cls(module, lr=opt_row.lr, backend=backend, total_steps=total, **opt_row.options)
            for t in range(40):
                for i, p in enumerate(module.parameters()):
                    p.grad = torch.randn(
                        p.shape, generator=torch.Generator().manual_seed(100 * t + i), dtype=torch.float32
                    )
                opt.step()
            return {k: v for k, v in bits((module, opt)).items() if not k.endswith(".step")}
        finally:
            torch.set_default_dtype(torch.float32)

    same(run(torch.float32), run(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@cases(kind=KINDS, name=MAKE, backend=[None, "reference"])
def test_the_default_dtype_changes_no_bit_of_a_budget(kind, name, backend, dtype):
    def run(default):
        net = network(kind)
        torch.set_default_dtype(default)
        try:
            opt = optimizer(name, net, backend=backend, total_steps=STEPS)
            train((net, opt), range(STEPS))
            return {k: v for k, v in bits((net, opt)).items() if not k.endswith(".step")}
        finally:
            torch.set_default_dtype(torch.float32)

    same(run(torch.float32), run(dtype))
