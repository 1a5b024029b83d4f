"""What eval mode, the statistics of a batch and ``fold`` make of dead filters in front of a BatchNorm.

    python -m benchmarks.studies.running_means        some minutes on one core; the table in docs/folding.md

Two convolutions with biases, each before a BatchNorm, on MNIST-5k; GroupSparse("out", keep=0.5) kills half of their
filters under AdamW, whose biases move on.  Accuracy on 1 000 images: of the same weights by running statistics, by
those of a batch of all images, and folded, by running statistics.
"""

from __future__ import annotations

import copy
import statistics

import torch
from torch import nn

import symopt
from benchmarks.studies import program
from benchmarks.studies.tasks import _mnist

KEEP, LR, STEPS = 0.5, 1e-2, 900


def network(affine: bool) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 5, stride=2), nn.BatchNorm2d(16, affine=affine), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2), nn.BatchNorm2d(32, affine=affine), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 25, 10)),
    )


def accuracy(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    with torch.no_grad():
        return 100 * float((net(x).argmax(1) == y).float().mean())


def run(seed: int, affine: bool) -> tuple[float, ...]:
    """Dead filters, and the three accuracies."""
    torch.manual_seed(seed)
    data, net = _mnist(seed, image=True), network(affine)
    symopt.constrain(net, {("0.weight", "3.weight"): symopt.GroupSparse("out", keep=KEEP)})
    opt = symopt.AdamW(net, lr=LR, total_steps=STEPS)
    for (x, y), _ in zip(data.batches(), range(STEPS), strict=False):
        opt.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        opt.step()
    x, y = data.test[0]
    dead = sum(int((~net.get_parameter(f"{i}.weight").flatten(1).any(1)).sum()) for i in (0, 3))
    small = symopt.fold(net, x[:64])
    by_batch, by_running = copy.deepcopy(net).train(), copy.deepcopy(net).eval()
    return dead, accuracy(by_running, x, y), accuracy(by_batch, x, y), accuracy(small.eval(), x, y)


def main() -> None:
    parser = program(__spec__, __doc__)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| | dead of 48 filters | eval mode | statistics of a batch | folded |\n|---|---|---|---|---|")
    for affine in (True, False):
        rows = [run(seed, affine) for seed in range(arguments.seeds)]
        cells = [f"{statistics.mean(x):.1f} ({min(x):.1f} to {max(x):.1f})" for x in zip(*rows, strict=True)]
        print(f"| affine={affine} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
