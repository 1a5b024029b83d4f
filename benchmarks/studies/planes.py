"""Planes found by training, against the unconstrained network and the constraint built in, on few samples.

    python -m benchmarks.studies.planes            # both tasks, 5 seeds
    python -m benchmarks.studies.planes tied --seeds 2

``tied``: a denoising auto-encoder of handwritten digits (scikit-learn's, 8 x 8) from 30 of them, whose decoder is tied
to the transposed encoder by ``Tied``; mean squared error times 1000, lower is better.

``equivariant``: which digit is it, each turned by a random number of quarter turns, from 100 of them and a dense
network whose first layer is made equivariant under quarter turns and whose second one invariant by ``Equivariant``: a
group convolution that nobody wrote down; accuracy in %.

Every network has the same initial weights, order of batches, steps and AdamW; the learning rate of each method is the
best of five by its mean on validation data, then scores are on test data that neither has seen.
"""

from __future__ import annotations

import math
import statistics

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import symopt
from benchmarks.studies import program

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
HIDDEN = 32


class Denoise(nn.Module):
    """64 pixels to 64 hidden units and back."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.decode(self.encode(x).relu())
        return out

    def planes(self) -> dict[tuple[str, ...], symopt.Constraint]:
        return {("encode.weight", "decode.weight"): symopt.Tied(views=[None, "T"])}


class Turned(nn.Module):
    """64 pixels, 4 groups of HIDDEN units, 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(64, 4 * HIDDEN), nn.Linear(4 * HIDDEN, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.out(self.hidden(x).relu())
        return logits

    def planes(self) -> dict[tuple[str, ...], symopt.Constraint]:
        """A quarter turn of the image moves every unit on to the next group, and changes no class."""
        pixels = torch.arange(64).reshape(8, 8).rot90().flatten()
        units = torch.arange(4 * HIDDEN).roll(HIDDEN)
        return {
            ("hidden.weight", "hidden.bias"): symopt.Equivariant([(units, pixels)]),
            ("out.weight",): symopt.Equivariant([(None, units)]),
        }


def build_in(net: Denoise | Turned) -> None:
    """On the plane from the start, and so for ever: training of the shared weights alone."""
    symopt.constrain(net, net.planes())
    net.load_state_dict(symopt.fold(net).state_dict())


def data(task: str, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Training, validation and test sets; no digit is in two of them."""
    digits = load_digits()
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(digits.target), generator=g)
    x, y = torch.tensor(digits.data, dtype=torch.float32)[order] / 16, torch.tensor(digits.target)[order]
    parts = {"train": slice(0, 30 if task == "tied" else 100), "valid": slice(600, 1000), "test": slice(1000, None)}
    if task == "tied":
        return {k: (noisy(x[s], g), x[s]) for k, s in parts.items()}
    turns = torch.randint(4, (len(x),), generator=g).tolist()
    x = torch.stack([image.reshape(8, 8).rot90(turn).flatten() for image, turn in zip(x, turns, strict=True)])
    return {k: (x[s], y[s]) for k, s in parts.items()}


def noisy(x: Tensor, g: torch.Generator) -> Tensor:
    return x + 0.3 * torch.randn(x.shape, generator=g)


def score(task: str, net: nn.Module, part: tuple[Tensor, Tensor]) -> float:
    """Higher is better."""
    with torch.no_grad():
        if task == "tied":
            return -1000 * float((net(part[0]) - part[1]).square().mean())
        return 100 * float((net(part[0]).argmax(1) == part[1]).float().mean())


def fit(task: str, method: str, lr: float, seed: int, steps: int) -> tuple[float, float, float]:
    """Scores on validation and test data, and the largest relative distance from a plane, 0 once all are exact."""
    sets = data(task, seed)
    torch.manual_seed(seed)
    net = Denoise() if task == "tied" else Turned()
    opt: torch.optim.Optimizer
    if method == "found by training":
        symopt.constrain(net, net.planes())
        opt = symopt.AdamW(net, lr=lr)
    elif method == "built in":
        build_in(net)
        opt = symopt.AdamW(net, lr=lr)
    else:
        opt = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.1 if "decay" in method else 0.0)
    if isinstance(opt, symopt.AdamW):
        opt.param_groups[0]["weight_decay"] = 0.0
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    x, y = sets["train"]
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch = torch.randint(len(x), (64,), generator=g)
        opt.zero_grad()
        if task == "tied":
            loss = (net(noisy(y[batch], g)) - y[batch]).square().mean()
        else:
            loss = nn.functional.cross_entropy(net(x[batch]), y[batch])
        loss.backward()
        opt.step()
        schedule.step()
    away = max((row.violation for row in symopt.report(net).rows), default=float("nan"))
    small = symopt.fold(net)
    return score(task, small, sets["valid"]), score(task, small, sets["test"]), away


def main() -> None:
    parser = program(__spec__, __doc__)
    parser.add_argument("tasks", nargs="*", default=["tied", "equivariant"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=500)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| task | method | lr | test score | each seed | distance from the plane |")
    print("|---|---|---|---|---|---|")
    for task in given.tasks:
        for method in ("unconstrained", "unconstrained, weight decay 0.1", "found by training", "built in"):
            runs = {lr: [fit(task, method, lr, seed, given.steps) for seed in range(given.seeds)] for lr in RATES}
            lr, best = max(runs.items(), key=lambda item: statistics.mean(run[0] for run in item[1]))
            test = [abs(run[1]) for run in best]
            away = "" if math.isnan(best[0][2]) else f"{max(run[2] for run in best):.1g}"
            each = " ".join(f"{value:.1f}" for value in test)
            print(f"| {task} | {method} | {lr:g} | {statistics.mean(test):.1f} | {each} | {away} |", flush=True)


if __name__ == "__main__":
    main()
