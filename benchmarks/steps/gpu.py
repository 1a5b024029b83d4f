"""The Triton step: what it must take by its bytes, and what it takes on the GPU that is here.

``python -m benchmarks.steps.gpu`` prints the roofline of four GPUs, computed, and, where torch has a GPU, measured
times of one optimizer step: alone, replayed from a CUDA graph, and as shares of a copy's and of the peak bandwidth,
beside ``torch.optim``'s fused AdamW.  Every case is compared with the reference before it is timed; a wrong one prints
no time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import symopt

PEAKS = {"A100 80GB SXM": 2.039, "H100 SXM": 3.35, "B200": 8.0, "MI300X": 5.3}
"""Bandwidth of the memory in TB/s, as their vendors' data sheets have it."""

GOAL = 0.9


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[], Any]
    read: int
    written: int
    dtype: torch.dtype = torch.float32
    copies: int = 1
    """Tensors under one constraint."""
    optimizer: Any = symopt.AdamW


# Bytes per weight that each step must read and write; test_triton.py finds the same in the machine code.
CASES = (
    Case("AdamW, Sparse", symopt.Sparse, 16, 12),
    Case("AdamW, Sparse, bf16 with fp32 master", symopt.Sparse, 16, 14,
         dtype=torch.bfloat16),
    Case('AdamW, Sparse(gauge="free")', lambda: symopt.Sparse(gauge="free"), 24, 20),
    # In one pass: weight, gradient, first moment; columns are summed first and moved then.
    Case('AdamW, GroupSparse("out")', lambda: symopt.GroupSparse("out"), 12, 8),
    Case('AdamW, GroupSparse("in")', lambda: symopt.GroupSparse("in"), 20, 8),
    # Summed first and moved then; weights share a second moment.
    Case("AdamW, Tied, two copies", symopt.Tied, 24, 10, copies=2),
    Case("AdamW, Tied by index, two copies", lambda: symopt.Tied(strength=0.3, mode="elementwise"), 14, 10, copies=2),
    Case("AdamW, ZeroMean", symopt.ZeroMean, 20, 8),
    Case("AdamW, GroupSparse, units of two tensors", lambda: symopt.GroupSparse({"*": (0, None)}), 20, 8, copies=2),
    Case("Lion, Sparse", symopt.Sparse, 12, 8, optimizer=symopt.Lion),
)  # fmt: skip


def roofline() -> None:
    """Times that a step of 2**24 weights takes at least, from bytes and peak bandwidth."""
    print("| step | bytes per weight | " + " | ".join(PEAKS) + " |\n|---|---|" + "---|" * len(PEAKS))
    for case in CASES:
        moved = case.read + case.written
        times = [f"{moved * 2**24 / (tb * 1e6):.0f} – {moved * 2**24 / (GOAL * tb * 1e6):.0f}" for tb in PEAKS.values()]
        print(f"| {case.name} | {case.read} + {case.written} | {' | '.join(times)} |")


def _optimizer(case: Case, side: int, count: int, backend: str) -> Any:
    torch.manual_seed(0)
    net = nn.ParameterList(torch.randn(side, side) / side**0.5 for _ in range(count * case.copies))
    net = net.to("cuda", case.dtype)
    bound = [tuple(str(i + j) for j in range(case.copies)) for i in range(0, len(net), case.copies)]
    symopt.constrain(net, dict.fromkeys(bound, case.make()))
    options = {} if case.optimizer is symopt.Lion else {"capturable": True}
    opt = case.optimizer(net, lr=1e-3, backend=backend, **options)
    for p in net:
        p.grad = torch.randn_like(p) * 1e-3
    return opt


def _wrong(case: Case) -> float:
    """Largest relative difference from the reference after three steps."""
    ends = []
    for backend in ("triton", "reference"):
        opt = _optimizer(case, 260, 2, backend)
        for _ in range(3):
            opt.step()
        ends.append(torch.cat([p.detach().double().flatten() for p in opt.params]))
    return float((ends[0] - ends[1]).abs().max() / ends[1].abs().max())


def measure() -> None:
    """Times on this GPU, in microseconds."""
    from triton.testing import do_bench

    n = 2**26
    source, target = (torch.empty(n, device="cuda") for _ in range(2))
    copy = 8 * n / (do_bench(lambda: target.copy_(source)) * 1e9)
    name = torch.cuda.get_device_name()
    peak = next((tb for gpu, tb in PEAKS.items() if gpu.split()[0] in name), None)
    print(f"\n{name}: a copy moves {copy:.2f} TB/s")
    print(
        "| step | tensors | us | from a graph | of a copy's bandwidth | of the peak | over torch fused |\n"
        + "|---" * 7
        + "|"
    )
    for case in CASES:
        if (error := _wrong(case)) > (1e-5 if case.dtype == torch.float32 else 1e-2):
            print(f"| {case.name} | | differs from the reference by {error:.1e} | | | | |")
            continue
        for side, count in ((4096, 1), (4096, 4), (128, 1000)):
            opt = _optimizer(case, side, count, "triton")
            plain = [nn.Parameter(p.detach().clone()) for p in opt.params]
            for p, q in zip(plain, opt.params, strict=True):
                p.grad = q.grad
            fused = torch.optim.AdamW(plain, lr=1e-3, fused=True)
            opt.step()
            alone, theirs = (1e3 * do_bench(o.step) for o in (opt, fused))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                opt.step()
            replayed = 1e3 * do_bench(graph.replay)
            rate = (case.read + case.written) * side * side * len(plain) / (replayed * 1e6)
            share = "" if peak is None else f"{rate / peak:.0%}"
            print(
                f"| {case.name} | {len(plain)} x {side}² | {alone:.0f} | {replayed:.0f} | {rate / copy:.0%} "
                f"| {share} | {alone / theirs:.2f} |"
            )


if __name__ == "__main__":
    roofline()
    if torch.cuda.is_available():
        measure()
    else:
        print("\nno GPU here: nothing was measured", file=sys.stderr)
