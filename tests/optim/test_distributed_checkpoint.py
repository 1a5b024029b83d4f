"""Checkpoints of torch.distributed: a budget resumes in any number of processes, flattened or not, at any time."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

import symopt
from support.cases import cases, exhaustive, pairs

Run = tuple[nn.Module, Any]

STEPS = 60
KINDS = {
    "density": lambda: symopt.Sparse(density=0.1),
    "2:4": lambda: symopt.Sparse(pattern="2:4"),
    "keep": lambda: symopt.GroupSparse("in", keep=4),
    "global": lambda: symopt.Sparse(density=0.2, scope="global"),
    "rank": lambda: symopt.LowRank(rank=2),
    "max_rank": lambda: symopt.LowRank(strength=0.3, max_rank=6),
}
OPTIMIZERS = {
    "adamw": (symopt.AdamW, {"lr": 0.05}),
    "sgd": (symopt.SGD, {"lr": 0.1, "momentum": 0.9}),
    "adam": (symopt.Adam, {"lr": 0.02, "amsgrad": True}),
}

pytestmark = pytest.mark.filterwarnings("ignore:.* are too few to", "ignore:.* weights have become zero")


def run(kind: str, optimizer: str = "adamw", seed: int = 0) -> Run:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3))
    symopt.constrain(net, {("0.weight", "2.weight"): KINDS[kind]()})
    cls, options = OPTIMIZERS[optimizer]
    return net, cls(net, total_steps=STEPS, **options)


def train(net: nn.Module, opt: Any, first: int, last: int) -> None:
    for t in range(first, last):
        generator = torch.Generator().manual_seed(t)
        x, y = torch.randn(16, 8, generator=generator), torch.randint(3, (16,), generator=generator)
        opt.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        opt.step()


def tensors(tree: Any, prefix: str = "") -> dict[str, Tensor]:
    """Every tensor of nested dicts and lists by its path."""
    if isinstance(tree, Tensor):
        return {prefix: tree}
    rows = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return {path: x for key, value in rows for path, x in tensors(value, f"{prefix}/{key}").items()}


@pairs(kind=KINDS, optimizer=OPTIMIZERS, flat=[False, True], stop=[5, 30, 50])
def test_a_checkpoint_fits_into_the_tensors_of_a_new_optimizer(
    kind: str, optimizer: str, flat: bool, stop: int
) -> None:
    """Which is how it is loaded, before any order of calls could matter: 50 is past every commit and fall of rank."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    net, opt = run(kind, optimizer)
    train(net, opt, 0, stop)
    saved = copy.deepcopy(get_optimizer_state_dict(net, opt, options=options))
    other, other_opt = run(kind, optimizer, seed=1)
    other.load_state_dict(net.state_dict())
    target = get_optimizer_state_dict(other, other_opt, options=options)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))
    have, want = tensors(target), tensors(saved)
    assert {key: x.shape for key, x in have.items()} == {key: x.shape for key, x in want.items()}
    for key, x in want.items():
        have[key].copy_(x)
    set_optimizer_state_dict(other, other_opt, target, options=options)
    train(net, opt, stop, STEPS)
    train(other, other_opt, stop, STEPS)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))


@cases(kind=["density", "rank"], flat=[False, True])
def test_state_that_only_exists_is_no_progress(kind: str, flat: bool) -> None:
    """Both functions make state by a step with lr 0 and zero gradients."""
    (net, opt), (other, other_opt) = run(kind), run(kind)
    get_optimizer_state_dict(other, other_opt, options=StateDictOptions(flatten_optimizer_state_dict=flat))
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))
    assert float(other_opt.state[other[0].weight]["progress"]) == 0
    train(net, opt, 0, STEPS)
    train(other, other_opt, 0, STEPS)
    for module, each in ((net, opt), (other, other_opt)):
        assert float(each.state[module[0].weight]["progress"]) == STEPS
        assert symopt.fold(module, strict=True) is not None


def _work(rank: int, world: int, kind: str, folder: str, first: int, last: int, flat: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{world}-{first}", rank=rank, world_size=world)
    net, opt = run(kind, seed=first)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    wrapped = DistributedDataParallel(net)
    if first:
        module, optimizer = get_state_dict(wrapped, opt, options=options)
        state = {"module": module, "optimizer": optimizer}
        dcp.load(state, checkpoint_id=f"{folder}/checkpoint")
        set_state_dict(
            wrapped, opt, model_state_dict=state["module"], optim_state_dict=state["optimizer"], options=options
        )
    train(wrapped, opt, first, last)
    module, optimizer = get_state_dict(wrapped, opt, options=options)
    if not first:
        dcp.save({"module": module, "optimizer": optimizer}, checkpoint_id=f"{folder}/checkpoint")
    torch.save([p.detach() for p in net.parameters()], f"{folder}/end-{world}-{rank}")
    dist.barrier()
    os._exit(0)  # with gloo's threads left as they are: waiting for them sometimes takes for ever


@pytest.mark.parametrize(
    ("kind", "stop", "worlds", "flat"),
    [
        ("rank", 30, (2, 1), True),
        *exhaustive(("density", 30, (2, 4), False), ("keep", 50, (2, 1), True), ("rank", 5, (2, 4), False)),
    ],
)
def test_on_other_numbers_of_processes(
    tmp_path: Path, kind: str, stop: int, worlds: tuple[int, int], flat: bool
) -> None:
    """Every process sees the same examples, so that averages of gradients are exact and one process is the oracle."""
    net, opt = run(kind)
    train(net, opt, 0, STEPS)
    for world, first, last in ((worlds[0], 0, stop), (worlds[1], stop, STEPS)):
        paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
        arguments = [kind, str(tmp_path), str(first), str(last), str(int(flat))]
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, str(rank), str(world), *arguments], env={**os.environ, "PYTHONPATH": paths}
            )
            for rank in range(world)
        ]
        assert [process.wait(timeout=120) for process in processes] == [0] * world
    for rank in range(worlds[1]):
        for p, q in zip(net.parameters(), torch.load(tmp_path / f"end-{worlds[1]}-{rank}"), strict=True):
            assert torch.equal(p, q)


if __name__ == "__main__":
    _work(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:5], *map(int, sys.argv[5:7]), bool(int(sys.argv[7])))
