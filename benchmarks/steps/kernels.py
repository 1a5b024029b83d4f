"""One case from check to numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks import timing
from benchmarks.steps.cases import Case
from benchmarks.steps.checks import check
from benchmarks.steps.peers import PEERS, Ours, Variant
from benchmarks.timing import Summary, Timed, summarize

__all__ = ["KernelResult", "Pair", "run_case"]


@dataclass(frozen=True)
class Pair:
    """symopt and one peer, measured in turns.  ``ratio`` is the peer's time over symopt's, pair by pair."""

    ours_ms: Summary
    peer_ms: Summary
    ratio: Summary


@dataclass
class KernelResult:
    case: Case
    wrong: list[str] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    pairs: dict[str, Pair] = field(default_factory=dict)
    ours_ms: Summary | None = None
    bandwidth: dict[str, float] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Algorithmic bytes over time, as a share of the best bandwidth a simple loop reached."""
        assert self.ours_ms is not None
        moved = sum(self.case.traffic) * self.case.size.total
        return moved / (self.ours_ms.median * 1e6) / max(self.bandwidth.values())

    def to_floor(self) -> dict[str, float]:
        """Every method's time over fused torch.optim's: its ratio to symopt times symopt's to the floor."""
        if "torch-fused" not in self.pairs:
            return {}
        ours = 1 / self.pairs["torch-fused"].ratio.median
        rest = {n: p.ratio.median * ours for n, p in self.pairs.items() if n != "torch-fused"}
        return {"symopt": ours, **rest}

    def to_dict(self) -> dict[str, Any]:
        case = self.case
        result: dict[str, Any] = {
            "case": str(case),
            "optimizer": case.optimizer,
            "constraint": case.constraint,
            "size": case.size.text,
            "tensors": case.size.count,
            "shape": list(case.size.shape),
            "dtype": case.dtype,
            "threads": case.threads,
        }
        if self.wrong:
            return {**result, "failed": self.wrong}
        read, written = case.traffic
        return {
            **result,
            "bytes_per_weight": {"read": read, "written": written},
            "bytes_touched": case.touched,
            "symopt_ms": vars(self.ours_ms),
            "bandwidth_gb_s": self.bandwidth,
            "share_of_bandwidth": self.share,
            "peers": {
                name: {
                    "ms": vars(pair.peer_ms),
                    "symopt_ms": vars(pair.ours_ms),
                    "time_over_symopt": vars(pair.ratio),
                    "timed": "step and zero_grad" if name in _COMPOSED else "step",
                }
                for name, pair in self.pairs.items()
            },
            "absent": self.absent,
            "time_over_torch_fused": self.to_floor(),
        }


PLACES = 4
"""Times both are built anew: the same step takes up to twice as long on other pages of memory."""

_COMPOSED = ("parametrize", "compiled", "explicit")


def run_case(case: Case, peers: list[str], repeats: int, seconds: float) -> KernelResult:
    """Check, then time symopt against every peer.  A case whose check fails has no numbers."""
    torch.compiler.reset()
    with timing.threads(case.threads):
        wrong, absent = check(case, peers)
        result = KernelResult(case, wrong, absent)
        if wrong:
            return result
        result.bandwidth = timing.bandwidth(case.touched)
        alone: list[float] = []
        for name in peers:
            if name in absent:
                continue
            mine, other = [], []
            places = min(PLACES, repeats)
            for i in range(places):
                ours, peer = Ours(case), PEERS[name].build(case)
                share = repeats // places + (i < repeats % places)
                a, b = timing.interleave(_timed(ours, peer), _timed(peer, peer), share, seconds / places)
                mine, other, composed = mine + a, other + b, peer.composed
                del ours, peer
            ratio = summarize([b / a for a, b in zip(mine, other, strict=True)])
            result.pairs[name] = Pair(summarize(mine), summarize(other), ratio)
            if not composed:
                alone += mine
        if not alone:
            ours = Ours(case)
            alone, _ = timing.interleave(_timed(ours, ours), (_nothing, _nothing), repeats, seconds)
        result.ours_ms = summarize(alone)
    return result


def _timed(variant: Variant, peer: Variant) -> Timed:
    """The step; against factors, whose gradients are made and freed in every step, zero_grad as well, on both sides."""

    def both() -> None:
        variant.step()
        variant.clear()

    return variant.arm, both if peer.composed else variant.step


def _nothing() -> None:
    pass
