"""One process of compare.py: the cases, stepped by the symopt of one checkout.

It knows the public interface alone, for the checkouts may be laid out differently; where one has ``symopt.Anneal``, the
schedule is that object's and not the optimizer's.  ``symopt`` is imported when a case is built, so that compare.py can
list the cases without it.
"""

from __future__ import annotations

import gc
import itertools
import json
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["CASES", "Case"]

OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("AdamW", {"lr": 1e-3}),
    "adam": ("Adam", {"lr": 1e-3}),
    "sgd": ("SGD", {"lr": 0.1, "momentum": 0.9}),
}
STILL = 1e-7
"""The lr of timed steps of a fixed gradient, so that weights stay where they are."""


@dataclass(frozen=True)
class Case:
    """An optimizer and a network under constraints."""

    optimizer: str
    make: Callable[[], nn.Module]
    """The constrained network."""
    batch: Callable[[torch.Generator], tuple[Tensor, Tensor]] | None = None
    """Inputs and classes of a training; without it gradients are fixed."""
    scheduled: bool = False
    """Whether a schedule imposes a budget."""
    summed: bool = False
    """Whether the step needs sums over parameters, whose order may change."""
    backends: tuple[str, ...] = ("native",)
    """Those that are timed."""
    checked: tuple[str, ...] = ("reference", "native")
    """Those whose steps are compared."""


class Run:
    """A case being stepped: ``prepare`` gives gradients, ``step`` is what is timed."""

    def __init__(self, case: Case, backend: str, lr: float | None = None, total_steps: int = 100_000) -> None:
        import symopt

        torch.manual_seed(0)
        self.case, self.net = case, case.make()
        name, options = OPTIMIZERS[case.optimizer]
        given = options if lr is None else {**options, "lr": lr}
        make = getattr(symopt, "Anneal", None) if case.scheduled else None
        if case.scheduled and make is None:
            given = {**given, "total_steps": total_steps}
        self.opt = getattr(symopt, name)(self.net, **given, backend=backend)
        self.schedule = None if make is None else make(self.opt, total_steps=total_steps)
        self.generator = torch.Generator().manual_seed(1)
        self.gradients(0.01)

    def gradients(self, scale: float) -> None:
        """Fixed ones, drawn anew."""
        for p in self.net.parameters():
            p.grad = torch.randn(p.shape, generator=self.generator).mul_(scale)

    def prepare(self) -> None:
        if self.case.batch is not None:
            x, y = self.case.batch(self.generator)
            self.opt.zero_grad()
            nn.functional.cross_entropy(self.net(x), y).backward()

    def step(self) -> None:
        self.opt.step()
        if self.schedule is not None:
            self.schedule.step()

    def everything(self) -> dict[str, Tensor]:
        """Weights and state by name."""
        found = {}
        for name, p in self.net.named_parameters():
            found[f"weight {name}"] = p.detach().clone()
            for key, value in self.opt.state[p].items():
                if isinstance(value, Tensor):
                    found[f"{key} of {name}"] = value.clone()
        return found


# --------------------------------------------------------------------------------------------------------------- cases


def _bare(count: int, shape: tuple[int, int], constraint: Callable[[Any], Any], *, bound: int = 1) -> nn.Module:
    """``count`` weights, ``bound`` of them under each constraint."""
    import symopt

    net = nn.ParameterList(torch.randn(shape).mul_(0.05) for _ in range(count))
    names = [tuple(str(i + j) for j in range(bound)) for i in range(0, count, bound)]
    symopt.constrain(net, {key if bound > 1 else key[0]: constraint(symopt) for key in names})
    return net


def _found_tie() -> nn.Module:
    """After collapse: the copies are equal."""
    net = _bare(2, (1024, 1024), lambda s: s.Tied(), bound=2)
    with torch.no_grad():
        net.get_parameter("1").copy_(net.get_parameter("0"))
    return net


_HUNDRED = tuple(f"{i}.weight" for i in range(0, 200, 2))


def _mlp(*widths: int, constraints: Callable[[Any], dict[Any, Any]]) -> nn.Module:
    import symopt

    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    net = nn.Sequential(*layers[:-1])
    symopt.constrain(net, constraints(symopt))
    return net


def _digits(g: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.rand(64, 784, generator=g), torch.randint(10, (64,), generator=g)


def _small(g: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.rand(8, 32, generator=g), torch.randint(32, (8,), generator=g)


NATIVE, REFERENCE, BOTH = ("native",), ("reference",), ("reference", "native")
CONSTRAINTS: dict[str, Callable[[Any], Any]] = {
    "sparse": lambda s: s.Sparse(),
    "group-out": lambda s: s.GroupSparse("out"),
    "group-in": lambda s: s.GroupSparse("in"),
}
SIZES: dict[str, tuple[int, tuple[int, int], tuple[str, ...]]] = {
    "1x16M": (1, (4096, 4096), NATIVE),
    "1x1M": (1, (1024, 1024), BOTH),
    "200x1k": (200, (32, 32), BOTH),
}
_LENET = (784, 300, 100, 10)

CASES: dict[str, Case] = {
    f"{optimizer} {name} {size}": Case(
        optimizer,
        lambda n=n, shape=shape, make=make: _bare(n, shape, make),
        backends=backends,
        checked=backends,
    )
    for optimizer in OPTIMIZERS
    for name, make in CONSTRAINTS.items()
    for size, (n, shape, backends) in SIZES.items()
}
CASES |= {
    f"{optimizer} tied {size}": Case(
        optimizer,
        lambda n=n, shape=shape: _bare(2 * n, shape, lambda s: s.Tied(), bound=2),
        summed=True,
        backends=backends,
        checked=backends,
    )
    for optimizer in OPTIMIZERS
    for size, (n, shape, backends) in SIZES.items()
}
CASES |= {
    "adamw tied 1x1M, after collapse": Case("adamw", _found_tie, summed=True, backends=BOTH),
    "adamw tied 1x1M, one gate per index": Case(
        "adamw", lambda: _bare(2, (1024, 1024), lambda s: s.Tied(mode="elementwise"), bound=2), summed=True
    ),
    "adamw symmetric 1x1M": Case("adamw", lambda: _bare(1, (1024, 1024), lambda s: s.Symmetric()), summed=True),
    "adamw zero-mean 1x1M": Case("adamw", lambda: _bare(1, (1024, 1024), lambda s: s.ZeroMean()), summed=True),
    "adamw quickstart, sparse": Case(
        "adamw", lambda: _mlp(*_LENET, constraints=lambda s: {"*.weight": s.Sparse()}), _digits, backends=BOTH
    ),
    "adamw quickstart, few neurons": Case(
        "adamw",
        lambda: _mlp(*_LENET, constraints=lambda s: {("0.weight", "2.weight"): s.GroupSparse("out")}),
        _digits,
        backends=BOTH,
    ),
    "adamw quickstart, global budget": Case(
        "adamw",
        lambda: _mlp(*_LENET, constraints=lambda s: {"*.weight": s.Sparse(density=0.05, scope="global")}),
        _digits,
        scheduled=True,
    ),
    "adamw quickstart, 2:4": Case(
        "adamw",
        lambda: _mlp(*_LENET, constraints=lambda s: {("0.weight", "2.weight"): s.Sparse(pattern="2:4")}),
        _digits,
        scheduled=True,
    ),
    "adamw quickstart, low rank": Case(
        "adamw",
        lambda: _mlp(*_LENET, constraints=lambda s: {("0.weight", "2.weight"): s.LowRank(rank=10)}),
        _digits,
        scheduled=True,
        backends=REFERENCE,
        checked=REFERENCE,
    ),
    "adamw 100 layers of 32, sparse": Case(
        "adamw", lambda: _mlp(*[32] * 101, constraints=lambda s: {"*.weight": s.Sparse()}), _small, backends=BOTH
    ),
    "adamw 100 layers of 32, group-out": Case(
        "adamw",
        lambda: _mlp(*[32] * 101, constraints=lambda s: {_HUNDRED: s.GroupSparse("out")}),
        _small,
        backends=BOTH,
    ),
}


# ------------------------------------------------------------------------------------------------------------- process


def check(case: Case, backend: str, file: str) -> str:
    """Write what a few steps with different gradients end at; an error's first line instead of raising.

    On the reference, where rounding is no excuse, a budget is imposed to the end.
    """
    steps = 40 if case.scheduled and backend == "reference" else 3
    try:
        run = Run(case, backend, total_steps=40)
        for _ in range(steps):
            run.gradients(0.3)
            run.prepare()
            run.step()
        torch.save(run.everything(), file)
    except Exception as error:  # the other cases can still be compared
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return ""


def timed(run: Run, count: int) -> float:
    """Milliseconds per step."""
    total = 0
    gc.disable()
    for _ in range(count):
        run.prepare()
        start = time.perf_counter_ns()
        run.step()
        total += time.perf_counter_ns() - start
    gc.enable()
    return total / count / 1e6


def serve() -> None:
    """Answer the questions that come on stdin, one JSON line each."""
    run: Run | None = None
    for line in sys.stdin:
        job = json.loads(line)
        answer: Any = None
        if job["what"] == "check":
            answer = check(CASES[job["case"]], job["backend"], job["file"])
        elif job["what"] == "build":
            run = None  # its memory first
            gc.collect()
            case = CASES[job["case"]]
            run = Run(case, job["backend"], None if case.batch is not None else STILL)
        else:
            assert run is not None
            answer = timed(run, job["count"])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    links, threads = sys.argv[1:]
    sys.path[0] = links  # instead of this file's folder
    torch.set_num_threads(int(threads))
    warnings.simplefilter("ignore")  # trainings too short for their budgets
    import symopt as imported

    if Path(imported.__file__).resolve().parent != (Path(links) / "symopt").resolve():
        raise SystemExit(f"symopt comes from {imported.__file__}, not from the checkout to be compared")
    serve()
