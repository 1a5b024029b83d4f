"""Whole training steps, forward and backward included: what the constraint costs where users see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import symopt
from benchmarks import timing
from benchmarks.timing import Summary, summarize

__all__ = ["NETS", "TrainingResult", "run_training"]

LR = 1e-3
BATCHES = 8


class Layer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        packed = self.qkv(self.before_attention(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = packed.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        x = x + self.down(nn.functional.gelu(self.up(self.before_mlp(x))))
        return x


class Transformer(nn.Module):
    def __init__(self, vocabulary: int = 100, length: int = 128, width: int = 128, heads: int = 4) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.layers = nn.Sequential(Layer(width, heads), Layer(width, heads))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x) + self.places(torch.arange(x.shape[1]))
        logits: Tensor = self.head(self.norm(self.layers(x)))
        return logits.flatten(0, 1)


def mlp() -> nn.Module:
    """LeNet-300-100, the quickstart's network."""
    return nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))


@dataclass(frozen=True)
class Net:
    make: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], tuple[Tensor, Tensor]]
    block: int
    """Steps timed in a row before it is the other optimizer's turn."""


def _digits(n: int) -> Callable[[torch.Generator], tuple[Tensor, Tensor]]:
    return lambda g: (torch.rand(n, 784, generator=g), torch.randint(10, (n,), generator=g))


def _text(g: torch.Generator) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(100, (16, 129), generator=g)
    return tokens[:, :-1], tokens[:, 1:].flatten()


NETS: dict[str, Net] = {
    "MLP 784-300-100-10, batch 64": Net(mlp, _digits(64), 10),
    "MLP 784-300-100-10, batch 256": Net(mlp, _digits(256), 5),
    "transformer, 2 layers of 128, 16 x 128 tokens": Net(Transformer, _text, 2),
}

FLAGS: dict[str, dict[str, bool]] = {"fused=True": {"fused": True}, "default": {}}


@dataclass
class TrainingResult:
    net: str
    flags: str
    wrong: list[str]
    weights: int = 0
    constrained: int = 0
    ours_ms: Summary | None = None
    torch_ms: Summary | None = None
    ratio: Summary | None = None
    """symopt's time over torch's, block by block."""

    def to_dict(self) -> dict[str, Any]:
        if self.wrong:
            return {"net": self.net, "flags": self.flags, "failed": self.wrong}
        assert self.ours_ms and self.torch_ms and self.ratio
        return {
            "net": self.net,
            "flags": self.flags,
            "weights": self.weights,
            "constrained_weights": self.constrained,
            "symopt_ms": vars(self.ours_ms),
            "torch_ms": vars(self.torch_ms),
            "symopt_over_torch": vars(self.ratio),
        }


class Trainer:
    """A network, its optimizer and the batches it cycles through."""

    def __init__(self, kind: str, net: Net, flags: dict[str, bool]) -> None:
        """``kind``: symopt (backends as users get them), reference, or torch (nothing constrained)."""
        torch.manual_seed(0)
        self.net = net.make()
        generator = torch.Generator().manual_seed(1)
        self.batches = [net.batch(generator) for _ in range(BATCHES)]
        self.turn = 0
        self.opt: Any
        if kind == "torch":
            self.opt = torch.optim.AdamW(self.net.parameters(), lr=LR, fused=flags.get("fused"))
            return
        linear = [f"{name}.weight" for name, m in self.net.named_modules() if isinstance(m, nn.Linear)]
        symopt.constrain(self.net, {tuple(linear): symopt.Sparse()})
        backend = None if kind == "symopt" else kind
        self.opt = symopt.AdamW(self.net, lr=LR, backend=backend, fused=flags.get("fused"))

    def backward(self) -> None:
        x, y = self.batches[self.turn % BATCHES]
        self.turn += 1
        self.opt.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(self.net(x), y).backward()

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.backward()
            self.opt.step()


def check(net: Net, flags: dict[str, bool], steps: int = 3) -> list[str]:
    """Same start, unconstrained weights exactly torch's, constrained ones the reference's up to rounding."""
    ours, theirs, reference = (Trainer(kind, net, flags) for kind in ("symopt", "torch", "reference"))
    start = theirs.net.state_dict()
    if any(not torch.equal(value, start[key]) for key, value in ours.net.state_dict().items()):
        return ["the constrained network does not start as the unconstrained one"]
    chosen = {name: backend for name, backend, _ in ours.opt.backends()}
    if {chosen[name] for name in symopt.constraints(ours.net)} != {"native"}:
        return [f"not all constrained weights are stepped natively: {chosen}"]
    wrong = []
    for _ in range(steps):
        ours.backward()
        for other in (theirs, reference):
            for p, q in zip(ours.net.parameters(), other.net.parameters(), strict=True):
                q.grad = None if p.grad is None else p.grad.clone()
            other.opt.step()
        ours.opt.step()
    for (name, a), (_, b), (_, c) in zip(
        ours.net.named_parameters(), reference.net.named_parameters(), theirs.net.named_parameters(), strict=True
    ):
        if chosen[name] == "torch" and not torch.equal(a, c):
            wrong.append(f"{name} has no constraint and is not torch's to the bit")
        # As in checks.py: 64 roundings, of the weight and of its tensor's typical size.
        limit = 64 * 2.0**-24 * (b.detach().square().mean().sqrt() + b.detach().abs())
        if not bool(((a - b).detach().abs() <= limit).all()):
            wrong.append(f"{name} is not what the reference makes of the same gradients")
    return wrong


def run_training(name: str, flags: str, repeats: int, seconds: float) -> TrainingResult:
    net = NETS[name]
    if wrong := check(net, FLAGS[flags]):
        return TrainingResult(name, flags, wrong)
    ours, theirs = (Trainer(kind, net, FLAGS[flags]) for kind in ("symopt", "torch"))
    run = [(_nothing, lambda t=t: t.steps(net.block)) for t in (ours, theirs)]
    mine, other = timing.interleave(run[0], run[1], repeats, seconds, warm=3)
    bound = symopt.constraints(ours.net)
    return TrainingResult(
        name,
        flags,
        [],
        weights=sum(p.numel() for p in ours.net.parameters()),
        constrained=sum(p.numel() for n, p in ours.net.named_parameters() if n in bound),
        ours_ms=summarize([t / net.block for t in mine]),
        torch_ms=summarize([t / net.block for t in other]),
        ratio=summarize([a / b for a, b in zip(mine, other, strict=True)]),
    )


def _nothing() -> None:
    pass
