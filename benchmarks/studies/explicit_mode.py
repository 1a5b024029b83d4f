"""What explicit mode costs: a training step of Linear 4096 x 4096, batch 8, fused SGD, against the unconstrained layer.

    python -m benchmarks.studies.explicit_mode [--size 4096] [--repeats 15]

Every round times each variant once, so ratios are of the same moment; printed are the median ratio and its quartiles.
Memory: tensors of the weight's size that explicit mode still holds after backward, beyond factors and gradients; during
the forward pass it is one more, the composed weight.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import symopt
from benchmarks.studies import program


class Product(nn.Module):
    """The same parametrization as anyone would write it."""

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        return u * v

    def right_inverse(self, w: Tensor) -> tuple[Tensor, Tensor]:
        u = w.abs().sqrt()
        return u, w.sign() * u


class Variant:
    def __init__(self, name: str, size: int, x: Tensor) -> None:
        torch.manual_seed(0)
        self.name, self.x, self.net = name, x, nn.Linear(size, size, bias=False)
        if name == "parametrize":
            parametrize.register_parametrization(self.net, "weight", Product())
        elif name != "unconstrained":
            kind = {
                "explicit Sparse": symopt.Sparse(strength=1e-4),
                "explicit GroupSparse": symopt.GroupSparse("out", strength=1e-4),
            }
            symopt.constrain(self.net, {"weight": kind[name]}, mode="explicit", init="balanced")
        self.opt = torch.optim.SGD(symopt.param_groups(self.net), lr=1e-4, fused=True)

    def step(self) -> float:
        start = time.perf_counter()
        self.opt.zero_grad()
        self.net(self.x).square().mean().backward()
        self.opt.step()
        return time.perf_counter() - start


def check(size: int = 1100) -> None:
    """Nothing is timed unless explicit mode and the hand-written parametrization train alike."""
    x = torch.randn(4, size)
    a, b = Variant("parametrize", size, x), Variant("explicit Sparse", size, x)
    b.opt.param_groups[0]["weight_decay"] = 0.0
    for _ in range(5):
        a.step(), b.step()
    torch.testing.assert_close(a.net.weight, b.net.weight)


def extra(variant: Variant) -> float:
    """Tensors of the weight's size kept by explicit mode between steps, beyond factors and their gradients."""
    variant.opt.zero_grad()
    variant.net(variant.x).square().mean().backward()
    n = variant.x.shape[1] ** 2 * 4
    held = {p.untyped_storage().data_ptr() for p in variant.net.parameters()}
    held |= {p.grad.untyped_storage().data_ptr() for p in variant.net.parameters() if p.grad is not None}
    pools = [m._memory for m in variant.net.modules() if hasattr(m, "_memory")]
    return sum(s.nbytes() / n for pool in pools for s in pool.storages if s.data_ptr() not in held)


def main() -> None:
    parser = program(__spec__, __doc__)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    check()
    x = torch.randn(8, args.size)
    names = ("unconstrained", "explicit Sparse", "explicit GroupSparse", "parametrize")
    variants = [Variant(name, args.size, x) for name in names]
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(args.repeats + 2):
        for v in variants:
            seconds = v.step()
            if i >= 2:
                times[v.name].append(seconds)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, Linear {args.size}, batch 8, SGD fused\n")
    print("| step | ms | ratio (quartiles) | extra tensors |\n|---|---|---|---|")
    for v in variants:
        ratios = [t / base for t, base in zip(times[v.name], times["unconstrained"], strict=True)]
        low, mid, high = statistics.quantiles(ratios, n=4)
        kept = f"{extra(v):.2f}" if v.name.startswith("explicit") else "-"
        print(
            f"| {v.name} | {1e3 * statistics.median(times[v.name]):.1f} | {mid:.2f} ({low:.2f}-{high:.2f}) | {kept} |"
        )


if __name__ == "__main__":
    main()
