"""The step of ``LowRank`` against torchao PAT's nuclear norm, at full rank and below.

    python -m benchmarks.studies.lowrank [--size 1024] [--ranks 1024 256 64] [--threads 1] [--seconds 20]

One square weight in fp32 and a fixed gradient.  PAT takes fused torch AdamW and then the proximal map of the nuclear
norm, by a singular value decomposition in every step; symopt takes AdamW with ``LowRank(max_rank=r)``.  Its time is the
mean over a whole period between two alignments, one of which it contains.  Before anything is timed, symopt's step is
compared with the same one in fp64, its weight with its factors, and PAT's singular values with soft-thresholded ones.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

import symopt
from benchmarks import timing
from benchmarks.steps.peers import load_pat
from benchmarks.studies import program
from symopt.optim.lowrank.step import period

__all__ = ["main"]

_LR, _STRENGTH, _REG = 1e-4, 1e-3, 1e-2


def _weight(size: int, rank: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    draws = (torch.randn(size, rank, generator=generator, dtype=torch.float64) for _ in range(2))
    left, right = (torch.linalg.qr(draw)[0] for draw in draws)
    net = nn.Module()
    net.w = nn.Parameter((left * torch.linspace(0.5, 1.5, rank, dtype=torch.float64) @ right.mT).to(dtype))
    net.w.grad = torch.randn(size, size, generator=generator, dtype=torch.float64).mul_(0.01).to(dtype)
    return net


def _ours(size: int, rank: int, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    net = _weight(size, rank, dtype)
    symopt.constrain(net, {"w": symopt.LowRank(strength=_STRENGTH, max_rank=rank)})
    return net, symopt.AdamW(net, lr=_LR)


def _pat(size: int, rank: int) -> tuple[nn.Module, Any]:
    net = _weight(size, rank)
    groups = [{"params": [net.w], "prox_type": "ProxNuclearNorm", "group_type": "SVDGrouper"}]
    base = torch.optim.AdamW(groups, lr=_LR, weight_decay=0.0, fused=True)
    return net, load_pat().PruneOptimizer(base, reg_lambda=_REG)


def _check(size: int, rank: int) -> None:
    """Raise unless both do what they are timed for."""
    (net, opt), (wide, exact) = _ours(size, rank), _ours(size, rank, torch.float64)
    for _ in range(2):
        opt.step()
        exact.step()
    w, state = net.w.detach(), opt.state[net.w]
    error = float((w - wide.w.detach()).norm() / wide.w.detach().norm())
    if state["factor_u"].shape != (size, rank) or not torch.equal(w, state["factor_u"] @ state["factor_v"].mT):
        raise AssertionError(f"rank {rank}: the weight is not the product of factors of that rank")
    if not error < 1e-4:
        raise AssertionError(f"rank {rank}: fp32 differs from fp64 by {error:.1e} of the weight")
    net, opt = _pat(size, rank)
    plain = _weight(size, rank)
    torch.optim.AdamW(plain.parameters(), lr=_LR, weight_decay=0.0).step()
    opt.step()
    before, after = (torch.linalg.svdvals(m.w.detach()) for m in (plain, net))
    shrunk = before - after
    if not (float(shrunk[0]) > 0 and torch.allclose(after, (before - shrunk[0]).clamp(min=0), atol=1e-3)):
        raise AssertionError("PAT does not soft-threshold the singular values")


def main(argv: list[str] | None = None) -> int:
    made = program(__spec__, __doc__)
    made.add_argument("--size", type=int, default=1024)
    made.add_argument("--ranks", type=int, nargs="+", default=[1024, 256, 64])
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--seconds", type=float, default=20.0)
    args = made.parse_args(argv)
    with timing.threads(args.threads):
        for rank in args.ranks:
            _check(args.size, rank)
        print(f"{args.size} x {args.size}, fp32, {args.threads} thread{'s' * (args.threads > 1)}\n")
        print("| rank | symopt, ms | PAT, ms | PAT / symopt |\n|---|---|---|---|")
        for rank in args.ranks:
            (net, opt), (_, pat) = _ours(args.size, rank), _pat(args.size, rank)
            whole = period(rank)

            def block(opt: Any = opt, whole: int = whole) -> None:
                for _ in range(whole):
                    opt.step()

            mine, theirs = timing.interleave((lambda: None, block), (lambda: None, pat.step), 50, args.seconds, warm=1)
            mine = [x / whole for x in mine]
            ratio = timing.summarize([b / a for a, b in zip(mine, theirs, strict=True)])
            assert _rank(opt.state[net.w]) == rank, "the rank fell while it was timed"
            a, b = timing.summarize(mine).median, timing.summarize(theirs).median
            print(f"| {rank} | {a:.1f} | {b:.0f} | {ratio.median:.1f} ({ratio.low:.1f}-{ratio.high:.1f}) |", flush=True)
    return 0


def _rank(state: dict[str, Tensor]) -> int:
    return state["factor_u"].shape[1]


if __name__ == "__main__":
    sys.exit(main())
