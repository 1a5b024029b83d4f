"""Accuracy against rank: ``LowRank(rank=)`` against truncated SVD with fine-tuning and factored layers from scratch.

    python -m benchmarks.studies.rank_frontier            the full grid; stop it and start it again as you like
    python -m benchmarks.studies.rank_frontier --quick    one seed, one pair of ranks (a minute)
    python -m benchmarks.studies.rank_frontier --ranks 5,5 --seeds 5

LeNet-300-100 on MNIST-5k, ranks of its two hidden layers.  All methods take initial weights, batches and the cosine
schedule from the same seed.  Each is first tuned per pair of ranks: all settings of its grid on two seeds that are not
used again, by *validation* score; symopt has no grid but its defaults.  Then the chosen setting is trained on fresh
seeds, which also draw the split, and the *test* score is what counts.  Runs are kept in a CSV and never repeated.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import symopt
from benchmarks.studies import program
from benchmarks.studies.runs import Job, Table, cell, grid, settings
from benchmarks.studies.tasks import TASKS

__all__ = ["main"]

TASK = TASKS["lenet-300-100"]
LAYERS = ("0", "2")
FIELDS = ("method", "ranks", "seed", "setting", "validation", "test", "found", "seconds")
RANKS = ("20,10", "10,8", "5,5")


# ------------------------------------------------------------------------------------------------------------ methods


def _net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return TASK.net()


def _cosine(opt: Any) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(opt, TASK.steps, eta_min=0.01 * opt.param_groups[0]["lr"])


def _train(net: nn.Module, opt: Any, batches: Any, steps: int, schedule: Any) -> None:
    for _ in range(steps):
        x, y = next(batches)
        opt.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        opt.step()
        schedule.step()


def _thin(net: nn.Module, ranks: tuple[int, ...], same_norm: bool = False) -> None:
    """Replace each layer by two of the best approximation of its rank, scaled to the norm it had if ``same_norm``."""
    for name, rank in zip(LAYERS, ranks, strict=True):
        layer = net.get_submodule(name)
        left, size, right = torch.linalg.svd(layer.get_parameter("weight").detach(), full_matrices=False)
        root = (size[:rank] * (size.norm() / size[:rank].norm() if same_norm else 1.0)).sqrt()
        rows, columns = left.shape[0], right.shape[1]
        pair = nn.Sequential(nn.Linear(columns, rank, bias=False), nn.Linear(rank, rows))
        with torch.no_grad():
            pair.get_parameter("0.weight").copy_(root[:, None] * right[:rank])
            pair.get_parameter("1.weight").copy_(left[:, :rank] * root)
            pair.get_parameter("1.bias").copy_(layer.get_parameter("bias"))
        net._modules[name] = pair


def truncated(seed: int, ranks: tuple[int, ...], *, lr: float, dense: float) -> nn.Module:
    """Dense for a share of training, then truncated SVDs, whose factors are trained as layers to the end."""
    net, batches = _net(seed), TASK.data(seed).batches()
    opt = torch.optim.AdamW(net.parameters(), lr=lr, fused=True)
    schedule, first = _cosine(opt), round(dense * TASK.steps)
    _train(net, opt, batches, first, schedule)
    now = opt.param_groups[0]["lr"]
    _thin(net, ranks)
    opt = torch.optim.AdamW(net.parameters(), lr=lr, fused=True)
    schedule = _cosine(opt)
    schedule.last_epoch += first  # the rest of the same cosine
    opt.param_groups[0]["lr"] = now
    _train(net, opt, batches, TASK.steps - first, schedule)
    return net


def factored(seed: int, ranks: tuple[int, ...], *, lr: float, same_norm: bool) -> nn.Module:
    """Two thin layers from the start, initialised with the truncated SVD of the layer (Khodak et al., ICLR 2021)."""
    net = _net(seed)
    _thin(net, ranks, same_norm)
    opt = torch.optim.AdamW(net.parameters(), lr=lr, fused=True)
    _train(net, opt, TASK.data(seed).batches(), TASK.steps, _cosine(opt))
    return net


def ours(seed: int, ranks: tuple[int, ...], *, lr: float) -> nn.Module:
    net = _net(seed)
    bound = {f"{name}.weight": symopt.LowRank(rank=rank) for name, rank in zip(LAYERS, ranks, strict=True)}
    opt = symopt.AdamW(symopt.constrain(net, bound), lr=lr, fused=True, total_steps=TASK.steps)
    _train(net, opt, TASK.data(seed).batches(), TASK.steps, _cosine(opt))
    return symopt.fold(net)


def dense(seed: int, ranks: tuple[int, ...], *, lr: float) -> nn.Module:
    net = _net(seed)
    opt = torch.optim.AdamW(net.parameters(), lr=lr, fused=True)
    _train(net, opt, TASK.data(seed).batches(), TASK.steps, _cosine(opt))
    return net


METHODS: dict[str, tuple[Callable[..., nn.Module], tuple[dict[str, Any], ...]]] = {
    "symopt AdamW": (ours, ({"lr": 5e-3},)),
    "truncated SVD": (truncated, grid(lr=(1.5e-3, 3e-3, 6e-3, 1.2e-2), dense=(0.05, 0.1, 0.2, 0.4))),
    "factored": (factored, grid(lr=(1.5e-3, 3e-3, 6e-3, 1.2e-2), same_norm=(False, True))),
    "dense": (dense, grid(lr=(1e-3, 3e-3))),
}


# --------------------------------------------------------------------------------------------------------------- runs


def _ranks(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _found(net: nn.Module) -> str:
    """Numerical ranks of the composed hidden layers."""
    with torch.no_grad():
        products: list[Tensor] = []
        for name in LAYERS:
            layer = net.get_submodule(name)
            parts = [p for key, p in layer.named_parameters() if key.endswith("weight")]
            products.append(parts[-1] @ parts[0] if len(parts) == 2 else parts[0])
        return ",".join(str(int(torch.linalg.matrix_rank(w.double(), rtol=1e-5))) for w in products)


def _work(job: Job) -> dict[str, Any]:
    torch.set_num_threads(1)
    method, ranks, seed, setting = job
    start = time.perf_counter()
    net = METHODS[method][0](seed, _ranks(ranks), **json.loads(setting))
    data = TASK.data(seed)
    row: dict[str, Any] = dict(zip(FIELDS, job, strict=False))
    row |= {"validation": TASK.score(net, data.validation), "test": TASK.score(net, data.test), "found": _found(net)}
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def _settings(method: str) -> list[str]:
    return settings(METHODS[method][1])


def _print(table: Table, methods: list[str], ranks: list[str], seeds: int) -> None:
    scores = {(m, r): table.scores((m, r), _settings(m), seeds) for m in methods for r in ranks}
    head = [" | ".join(["", *(f"({r})" for r in ranks), ""]).strip(), "|---" * (len(ranks) + 1) + "|"]
    print("\n".join(["", "| test accuracy, % " + head[0], head[1]]))
    for m in methods:
        print(f"| {m} | " + " | ".join(cell(scores[m, r], 2) for r in ranks) + " |")
    print("\n".join(["", f"| {methods[0]} minus, seed by seed " + head[0], head[1]]))
    for m in methods[1:]:
        gaps = [[a - b for a, b in zip(scores[methods[0], r], scores[m, r], strict=True)] for r in ranks]
        print(f"| {m} | " + " | ".join(cell(gap, 2, "+") for gap in gaps) + " |")
    print()
    for m in methods:
        print(f"{m}: " + "; ".join(f"({r}) {table.chosen((m, r), _settings(m))}" for r in ranks))
    low = [row for row in table.rows.values() if row["method"] != "dense"]
    print(f"ranks met exactly in {sum(row['found'] == row['ranks'] for row in low)} of {len(low)} runs")


def main(argv: list[str] | None = None) -> int:
    made = program(__spec__, __doc__)
    made.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    made.add_argument("--ranks", nargs="+", default=list(RANKS), metavar="A,B", help="of the two hidden layers")
    made.add_argument("--seeds", type=int, default=5)
    made.add_argument("--processes", type=int, default=2)
    made.add_argument("--csv", type=Path, default=Path("benchmarks/data/rank_frontier.csv"))
    made.add_argument("--quick", action="store_true")
    args = made.parse_args(argv)
    if args.quick:
        args.ranks, args.seeds, args.methods = ["5,5"], 1, ["symopt AdamW", "factored"]
        args.csv = Path("out/rank-frontier-quick.csv")
    table = Table(args.csv, FIELDS, _work)
    table.run({(m, r): _settings(m) for m in args.methods for r in args.ranks}, args.seeds, args.processes)
    _print(table, args.methods, args.ranks, args.seeds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
