"""Trainings of known length: one small network, every kind of budget, and what must be left of it in the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import symopt

__all__ = [
    "BOTH",
    "FEW",
    "FEW_KINDS",
    "KINDS",
    "MAKE",
    "STEPS",
    "Kind",
    "Run",
    "backward",
    "batch",
    "begun",
    "bits",
    "network",
    "optimizer",
    "same",
    "train",
]

STEPS = 100
INPUTS, HIDDEN, OUTPUTS = 20, 32, 4


@dataclass(frozen=True)
class Kind:
    """A budget on the network, and how much of it is left after the commit."""

    id: str
    make: Callable[[], symopt.Constraint]
    left: int
    names: tuple[str, ...] = ("0.weight",)

    def live(self, net: nn.Module) -> int:
        """Units that live: weights, rows, or singular values."""
        weights = [net.get_parameter(name).detach() for name in self.names]
        if self.id.startswith("rank"):
            return sum(int((torch.linalg.svdvals(w.double()) > 1e-4 * w.norm()).sum()) for w in weights)
        if self.id.startswith("rows"):
            return sum(int(w.any(1).sum()) for w in weights)
        return sum(int(w.count_nonzero()) for w in weights)


BOTH = ("0.weight", "2.weight")
KINDS = [
    Kind("density", lambda: symopt.Sparse(density=0.1), 64),
    Kind("2:4", lambda: symopt.Sparse(pattern="2:4"), 320),
    Kind("rows", lambda: symopt.GroupSparse("out", keep=4), 4),
    Kind("global", lambda: symopt.Sparse(density=0.1, scope="global"), 77, BOTH),
    Kind("rows-global", lambda: symopt.GroupSparse("out", keep=9, scope="global"), 9, BOTH),
    Kind("rank", lambda: symopt.LowRank(rank=2), 2),
]

FEW_KINDS = [kind for kind in KINDS if kind.id in ("density", "rows", "global", "rank")]

MAKE: dict[str, Callable[..., Any]] = {
    "sgd": lambda net, **options: symopt.SGD(net, **{"lr": 0.3, **options}),
    "sgd-momentum": lambda net, **options: symopt.SGD(net, **{"lr": 0.1, "momentum": 0.9, **options}),
    "adam": lambda net, **options: symopt.Adam(net, **{"lr": 1e-2, **options}),
    "adamw": lambda net, **options: symopt.AdamW(net, **{"lr": 1e-2, **options}),
    "lion": lambda net, **options: symopt.Lion(net, **{"lr": 3e-3, **options}),
    "sgd-reference": lambda net, **options: symopt.SGD(net, **{"lr": 0.3, "backend": "reference", **options}),
    "adamw-reference": lambda net, **options: symopt.AdamW(net, **{"lr": 1e-2, "backend": "reference", **options}),
}
FEW = ["sgd-momentum", "adamw", "lion", "adamw-reference"]

Run = tuple[nn.Sequential, Any]


def network(kind: Kind | None = None, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Two layers, the first of 640 weights, under the budget."""
    torch.manual_seed(seed)
    first, last = (nn.Linear(n, m, dtype=torch.float32) for n, m in ((INPUTS, HIDDEN), (HIDDEN, OUTPUTS)))
    net = nn.Sequential(first, nn.ReLU(), last).to(dtype)
    return net if kind is None else symopt.constrain(net, {kind.names: kind.make()})


def optimizer(name: str, net: nn.Module, **options: Any) -> Any:
    return MAKE[name](net, **options)


def begun(kind: Kind, name: str, steps: int = 0, *, seed: int = 0, **options: Any) -> Run:
    """A run of ``STEPS`` after ``steps`` of them."""
    net = network(kind, seed=seed)
    run = net, optimizer(name, net, **{"total_steps": STEPS, **options})
    train(run, range(steps))
    return run


def batch(t: int) -> tuple[Tensor, Tensor]:
    """The same for the same step in every run."""
    x = torch.randn(32, INPUTS, generator=torch.Generator().manual_seed(t), dtype=torch.float32)
    return x, (x[:, 0] > 0).long() + 2 * (x[:, 1] * x[:, 2] > 0).long()


def backward(net: nn.Module, t: int, scale: Callable[[Tensor], Tensor] = lambda loss: loss) -> None:
    """Of the loss of step ``t``."""
    x, y = batch(t)
    scale(nn.functional.cross_entropy(net(x.to(next(net.parameters()).dtype)).float(), y)).backward()


def train(run: Run, steps: Iterable[int]) -> Run:
    """Take these steps."""
    net, opt = run
    for t in steps:
        opt.zero_grad()
        backward(net, t)
        opt.step()
    return run


def bits(run: Run) -> dict[str, Tensor]:
    """Every weight and every tensor of the state, by name."""
    net, opt = run
    found = {}
    for name, p in net.named_parameters():
        found[name] = p.detach().clone()
        found |= {f"{name}.{key}": v.detach().clone() for key, v in opt.state.get(p, {}).items() if torch.is_tensor(v)}
    return found


def same(run: Run | dict[str, Tensor], other: Run | dict[str, Tensor]) -> None:
    """To the bit, state included."""
    one, two = (x if isinstance(x, dict) else bits(x) for x in (run, other))
    assert one.keys() == two.keys(), one.keys() ^ two.keys()
    wrong = [key for key in one if one[key].dtype != two[key].dtype or not torch.equal(one[key], two[key])]
    assert not wrong, wrong
