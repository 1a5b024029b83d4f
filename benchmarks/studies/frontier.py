"""Accuracy against budget: symopt's budgets against pruning and what else leads to few weights.

    python -m benchmarks.studies.frontier            the full grid (hours); stop it and start it again as you like
    python -m benchmarks.studies.frontier --quick    one seed, two budgets, few methods (minutes)
    python -m benchmarks.studies.frontier --tasks characters --methods "symopt AdamW" dense --budgets 2% 0.5%

Every method is first tuned, per task and budget: all settings of its grid on two seeds that are not used again, by
*validation* score; symopt has no grid but its defaults.  Then the chosen setting is trained on fresh seeds, which also
draw the split, and the *test* score is what counts.  Runs are kept in a CSV and never repeated.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.studies import program
from benchmarks.studies.methods import METHODS, Budget, run
from benchmarks.studies.runs import Case, Job, Table, cell, interval, settings
from benchmarks.studies.tasks import TASKS, text_hash

__all__ = ["main"]

FIELDS = ("task", "method", "budget", "seed", "setting", "validation", "test", "alive", "allowed", "seconds")
BUDGETS = {
    "lenet-300-100": ["50%", "20%", "10%", "5%", "2%", "1%", "0.5%", "0.25%", "2:4"]
    + [f"neurons {n}%" for n in (50, 25, 10)],
    "lenet-5": ["10%", "2%", "0.5%", "2:4"],
    "resnet": ["10%", "2%", "0.5%", "2:4"],
    "characters": ["10%", "2%", "0.5%", "2:4"],
}


def _work(job: Job) -> dict[str, Any]:
    torch.set_num_threads(1)
    task, method, budget, seed, setting = job
    start = time.perf_counter()
    found = run(method, TASKS[task], seed, Budget(budget), **json.loads(setting))
    row = dict(zip(FIELDS, job, strict=False))
    row |= {key: round(found[key], 4) for key in ("validation", "test")}
    return row | {"alive": found["alive"], "allowed": found["budget"], "seconds": round(time.perf_counter() - start, 1)}


def _case(task: str, method: str, budget: str) -> Case:
    """What is run for a cell of the tables; dense training is the same for all budgets."""
    return (task, method, BUDGETS[task][0] if method == "dense" else budget)


def _scores(table: Table, task: str, method: str, budget: str, seeds: int) -> list[float]:
    """Empty where the method cannot meet such a budget."""
    if not METHODS[method].takes(Budget(budget)):
        return []
    return table.scores(_case(task, method, budget), settings(METHODS[method].grid), seeds)


def _gaps(first: list[float], other: list[float]) -> list[float]:
    """Seed by seed; empty where either cannot meet the budget."""
    return [x - y for x, y in zip(first, other, strict=True)] if first and other else []


def tables(table: Table, task: str, methods: list[str], budgets: list[str], seeds: int) -> list[str]:
    """Test scores per method and budget, then the first method minus each other one seed by seed, as Markdown."""
    digits, first = TASKS[task].decimals, methods[0]
    scores = {(m, b): _scores(table, task, m, b, seeds) for m in methods for b in budgets}
    rows = {m: [cell(scores[m, b], digits) for b in budgets] for m in methods}
    less = {m: [cell(_gaps(scores[first, b], scores[m, b]), digits, "+") for b in budgets] for m in methods[1:]}
    lines = []
    for title, corner, body in ((task, " method ", rows), (f"{task}: {first} minus", " ", less)):
        lines += [f"### {title}", "", f"|{corner}| " + " | ".join(budgets) + " |", "|---|" + "---|" * len(budgets)]
        lines += [f"| {method} | " + " | ".join(cells) + " |" for method, cells in body.items()]
        lines.append("")
    return lines


def plot(table: Table, cases: dict[str, tuple[list[str], list[str]]], seeds: int, path: Path) -> None:
    """One panel per task: the test score of every method against the share of weights, with 95 % intervals."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(cases), figsize=(5.5 * len(cases), 4.5), squeeze=False, layout="constrained")
    for axis, (task, (methods, budgets)) in zip(axes[0], cases.items(), strict=True):
        shares = [b for b in budgets if not (Budget(b).pattern or Budget(b).neurons)]
        if not shares:
            continue
        at = [float(b.removesuffix("%")) for b in shares]
        axis.set_prop_cycle(color=plt.get_cmap("tab20").colors)  # type: ignore[attr-defined]
        for method in methods:
            scores = [_scores(table, task, method, b, seeds) for b in shares]
            means, spreads = zip(*map(interval, scores), strict=True)
            first = method == methods[0]
            style: dict[str, Any] = {"linewidth": 2.5, "color": "black", "zorder": 3} if first else {"linewidth": 1}
            axis.errorbar(at, means, spreads, label=method, capsize=2, marker=".", **style)
            if first:
                least = min(means) - 3 * (max(means) - min(means)) - max(spreads)
        axis.set(xscale="log", xlabel="weights that live, %", ylabel=f"{TASKS[task].unit}, test", title=task)
        axis.set_xticks(at, [f"{share:g}" for share in at])
        axis.minorticks_off()
        axis.set_ylim(max(least, axis.get_ylim()[0]))  # what falls far below the first would flatten everything else
        axis.invert_xaxis()
        axis.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    made = program(__spec__, __doc__)
    made.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    made.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    made.add_argument("--budgets", nargs="+", metavar="B", help="like 5%% 2:4 'neurons 25%%' (each task's own)")
    made.add_argument("--seeds", type=int, default=5)
    made.add_argument("--processes", type=int, default=2)
    made.add_argument("--csv", type=Path, default=Path("benchmarks/data/frontier.csv"))
    made.add_argument("--plot", type=Path, default=Path("out/frontier.png"))
    made.add_argument("--quick", action="store_true")
    args = made.parse_args(argv)
    if args.quick:
        args.tasks, args.budgets, args.seeds = ["lenet-300-100"], ["5%", "1%"], 1
        args.methods = ["symopt AdamW", "dense", "gradual pruning"]
        args.csv = Path("out/frontier-quick.csv")
    if "characters" in args.tasks:
        print(f"text: {text_hash()}")
    table = Table(args.csv, FIELDS, _work)
    cells = [(t, m, b) for t in args.tasks for m in args.methods for b in args.budgets or BUDGETS[t]]
    cases = [_case(t, m, b) for t, m, b in cells if METHODS[m].takes(Budget(b))]
    table.run({case: settings(METHODS[case[1]].grid) for case in cases}, args.seeds, args.processes)
    for task in args.tasks:
        print("\n".join(tables(table, task, args.methods, args.budgets or BUDGETS[task], args.seeds)))
    plot(table, {t: (args.methods, args.budgets or BUDGETS[t]) for t in args.tasks}, args.seeds, args.plot)
    budgeted = [row for row in table.rows.values() if row["method"] != "dense"]
    missed = [row for row in budgeted if int(row["alive"]) != int(row["allowed"])]
    print(f"budgets met to the unit in {len(budgeted) - len(missed)} of {len(budgeted)} runs that have one")
    for row in missed:
        print(f"not met: {row}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
