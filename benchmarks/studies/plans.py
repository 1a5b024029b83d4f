"""How to impose a budget: accuracy for one change of symopt's at a time, and of pruning.

    python -m benchmarks.studies.plans        a quarter of an hour on two idle cores; the table in docs/budgets.md
    python -m benchmarks.studies.plans --cases lenet-300-100/2% lenet-300-100/1% --seeds 8
    python -m benchmarks.studies.plans --cases lenet-300-100/50% --only "kept at least" --seeds 28

Seeds that benchmarks/studies/frontier.py does not use; the score is the accuracy on all 1 500 images held out, in
brackets less the default plan's, seed by seed, with a 95 % interval.
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
import warnings
from typing import Any

import torch
from torch import Tensor

import symopt.budgets.selection
from benchmarks.studies import program
from benchmarks.studies.methods import Budget, run
from benchmarks.studies.runs import cell
from benchmarks.studies.tasks import TASKS
from symopt.constraints.budget import BudgetPlan

CASES = (
    *(("lenet-300-100", budget) for budget in ("5%", "0.5%", "neurons 25%")),
    *(("lenet-5", budget) for budget in ("0.5%", "2:4")),
    ("resnet", "0.5%"),
)
FIRST_SEED = 205
PRUNING = ((3e-3, 0.1, 0.6), (6e-3, 0.1, 0.6))
CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"strength_pruned": 10.0, "plasticity": 2.0},
    {"strength_pruned": 10.0},
    *({"plasticity": x} for x in (2.0, 8.0)),
    *({"strength_kept": x} for x in (0.0, 0.03, 0.04)),
    *({"kept at least": x} for x in (0.06, 0.09)),
    *({"ramp": ramp, "commit": commit} for ramp, commit in ((0.3, 0.45), (0.6, 0.8))),
    *({"lr": x} for x in (7e-3, 1.4e-2)),
    {"between tensors": "by size"},
    {"time_scale": "none"},
    {"imbalance": 0.0},
)


def _by_size(counts: list[Tensor], keep: int) -> Tensor:
    """Instead of the layer-adaptive score of ``symopt.budgets.selection``; everywhere at least one lives."""
    table = torch.stack(counts)
    above = table.sum(0).flip(0).cumsum(0).flip(0)
    lowest = int((above >= keep).nonzero().max())
    live = table[:, lowest + 1 :].sum(1)
    spare = keep - int(live.sum())
    for i, many in enumerate(table[:, lowest].tolist()):
        live[i] += min(many, spare)
        spare -= min(many, spare)
    return live.clamp(min=1)


def _score(job: tuple[str, str, dict[str, Any], str, int]) -> float:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # a plan that is too short is what is being tried
    task, method, setting, budget, seed = job
    if "plan" in setting:
        plan = dict(setting["plan"])
        if plan.pop("between tensors", None) == "by size":
            symopt.budgets.selection._shares = _by_size
        if (least := plan.pop("kept at least", None)) is not None:  # as a strength, for large budgets
            plan["strength_kept"] = max(BudgetPlan.strength_kept, least / math.log(1 / Budget(budget).share))
        others = {key: plan.pop(key) for key in ("time_scale", "imbalance") if key in plan}
        setting = {**setting, "plan": BudgetPlan(**plan), **others}
    found = run(method, TASKS[task], seed, Budget(budget), **setting)
    return float(found["validation"] + 2 * found["test"]) / 3  # 500 and 1 000 images


def main() -> None:
    parser = program(__spec__, __doc__)
    parser.add_argument("--cases", nargs="+", default=["/".join(case) for case in CASES], metavar="TASK/BUDGET")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="a part of a row's name; the default plan stays")
    arguments = parser.parse_args()
    cases = [case.split("/") for case in arguments.cases]
    seeds = range(FIRST_SEED, FIRST_SEED + arguments.seeds)
    rows: list[tuple[str, str, dict[str, Any]]] = []
    for change in CHANGES:
        plan = dict(change)
        name = ", ".join(f"{key} {value}" for key, value in change.items()) or "default plan"
        rows.append((name, "symopt AdamW", {"lr": plan.pop("lr", 1e-2), "plan": plan}))
    rows += [
        (f"pruning, lr {lr:g}, {a:.0%} to {b:.0%}", "gradual pruning", {"lr": lr, "begin": a, "end": b})
        for lr, a, b in PRUNING
    ]
    rows = [row for i, row in enumerate(rows) if i == 0 or arguments.only in row[0]]
    jobs = [(task, method, setting, b, seed) for _, method, setting in rows for task, b in cases for seed in seeds]
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=1) as pool:
        found = pool.imap(_score, jobs)
        print("| | " + " | ".join(map(" ".join, cases)) + " |\n|---|" + "---|" * len(cases))
        default: list[list[float]] = []
        for name, _, _ in rows:
            scores = [[next(found) for _ in seeds] for _ in cases]
            default = default or scores
            cells = [f"{statistics.mean(x):.2f}" for x in scores]
            if scores is not default:
                gaps = [[a - b for a, b in zip(x, y, strict=True)] for x, y in zip(scores, default, strict=True)]
                cells = [f"{mean} ({cell(gap, 2, '+')})" for mean, gap in zip(cells, gaps, strict=True)]
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
