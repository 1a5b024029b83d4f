"""What a step leaves behind: the same bits in every process, nothing in memory, and a process that may be forked."""

from __future__ import annotations

import gc
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import symopt
from support.table import ANY_SHAPE, CONSTRAINTS, MATRICES, PLANES, constrained_parameter, plane_module
from symopt_kernels.native import binding as native

SOAK = os.environ.get("SYMOPT_SOAK")
LARGE = 400  # squared, more than one thread's share


FEW = "sparse group-in-conv group-index lowrank tied equivariant".split()
CLASSES = [row for row in ANY_SHAPE if not row.options]


def module(*, every: bool) -> nn.ModuleList:
    """Every row of the table and a weight that several threads share, or a few."""
    rows = [row for row in [*CONSTRAINTS, *MATRICES] if every or row.id in FEW]
    planes = [row for row in PLANES if every or row.id in FEW]
    torch.manual_seed(0)
    wide = nn.Linear(LARGE, LARGE) if every else nn.Linear(8, 8)
    free = symopt.constrain(wide, {"weight": symopt.Sparse(gauge="free")})
    return nn.ModuleList([*map(constrained_parameter, rows), *map(plane_module, planes), free])


def step(net: nn.Module, opt: Any, t: int) -> None:
    for k, p in enumerate(net.parameters()):
        p.grad = 0.1 * torch.sin(torch.arange(p.numel(), dtype=p.dtype).reshape(p.shape) * (k + 1) + t)
    opt.step()


def digest(net: nn.Module, opt: Any) -> str:
    found = hashlib.sha256()
    for p in net.parameters():
        state = opt.state[p]
        for value in (p.detach(), *(state[key] for key in sorted(state) if isinstance(state[key], Tensor))):
            found.update(value.contiguous().numpy().tobytes())
    return found.hexdigest()


def fifty_steps() -> None:
    torch.set_num_threads(2)
    for row in CLASSES:
        opt = row.cls(net := module(every=True), lr=row.lr)
        for t in range(50):
            step(net, opt, t)
        print(row.id, digest(net, opt))


def forked() -> None:
    """The child goes on with what the parent's threads began."""
    torch.set_num_threads(2)
    net = symopt.constrain(nn.Linear(LARGE, LARGE), {"weight": symopt.Sparse()})
    opt = symopt.AdamW(net, backend="native")
    step(net, opt, 0)
    read, write = os.pipe()
    child = os.fork()
    for _ in range(3):
        opt.step()
    if child == 0:
        os.write(write, f"{digest(net, opt)}\n{native.THREADS}".encode())
        os._exit(0)
    theirs, threads = os.read(read, 10_000).decode().split("\n")
    os.waitpid(child, 0)
    print(theirs == digest(net, opt), threads.startswith("one thread: this process was forked"), native.THREADS)


def run(name: str, **environment: str) -> str:
    """A function of this file in a new process, which must come to an end."""
    done = subprocess.run(
        [sys.executable, __file__, name],
        env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])},
        capture_output=True,
        text=True,
        timeout=100_000 if SOAK else 600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_processes_end_at_the_same_bits() -> None:
    first, second = run("fifty_steps", PYTHONHASHSEED="1"), run("fifty_steps", PYTHONHASHSEED="2")
    assert first == second
    assert len({line.split()[1] for line in first.splitlines()}) == len(CLASSES)


def test_a_forked_process_steps_alone_instead_of_waiting_for_threads_it_has_not() -> None:
    assert run("forked").split(" ", 2) == ["True", "True", native.THREADS + "\n"]


# ------------------------------------------------------------------------------------------------------------ memory


def resident() -> int:
    """Bytes of this process that are in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def grows(once: Callable[[int], None], steps: int, windows: int = 8) -> bool:
    """Whether memory grows in every window: a leak does, an allocator that settles does not."""
    seen = []
    for window in range(windows + 1):
        for t in range(window * steps // windows, (window + 1) * steps // windows):
            once(t)
        seen.append(resident())
    return all(after > before for before, after in pairwise(seen[1:]))


def memory() -> None:
    torch.set_num_threads(1)
    for row in CLASSES:
        net = module(every=False)
        opt = row.cls(net, lr=1e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 50)

        def once(t: int, net: Any = net, opt: Any = opt, schedule: Any = schedule) -> None:
            step(net, opt, t % 50)
            schedule.step()
            opt.zeros()
            if t % 100 == 0:
                opt.load_state_dict(opt.state_dict())
                type(opt)(module(every=False), lr=1e-4).step()

        print(row.id, grows(once, int(SOAK or 400)))
    kept: list[Tensor] = []
    print("leak", grows(lambda t: kept.append(torch.ones(128, dtype=torch.float64)), 80_000))


def test_memory_is_flat_and_a_leak_of_a_kilobyte_a_step_is_noticed() -> None:
    """In a process of its own: in one that has freed much a leak would go unseen for long."""
    found = dict(line.split() for line in run("memory").splitlines())
    assert found == {**{row.id: "False" for row in CLASSES}, "leak": "True"}


if __name__ == "__main__":
    {"fifty_steps": fifty_steps, "forked": forked, "memory": memory}[sys.argv[1]]()
