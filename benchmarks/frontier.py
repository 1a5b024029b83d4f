"""Accuracy against budget: symopt's budgets against pruning and what else leads to few weights.

    python -m benchmarks.frontier                         the full grid (hours); stop it and start it again as you like
    python -m benchmarks.frontier --quick                 one seed, two budgets, few methods (minutes)
    python -m benchmarks.frontier --tasks characters --methods "symopt AdamW" "gradual pruning" --budgets 2% 0.5%

Every method is first tuned, per task and budget: all settings of its grid on two seeds that are not used again, by
*validation* score; symopt has no grid but its defaults.  Then the chosen setting is trained on fresh seeds, which also
draw the split, and the *test* score is what counts.  Runs are kept in a CSV and never repeated.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.methods import METHODS, Budget, run
from benchmarks.tasks import TASKS, text_hash

__all__ = ["main"]

FIELDS = ("task", "method", "budget", "seed", "setting", "validation", "test", "alive", "allowed", "seconds")
TUNING = (100, 101)
BUDGETS = {
    "lenet-300-100": ["50%", "20%", "10%", "5%", "2%", "1%", "0.5%", "0.25%", "2:4"]
    + [f"neurons {n}%" for n in (50, 25, 10)],
    "lenet-5": ["10%", "2%", "0.5%", "2:4"],
    "resnet": ["10%", "2%", "0.5%", "2:4"],
    "characters": ["10%", "2%", "0.5%", "2:4"],
}
Job = tuple[str, str, str, int, str]


def _work(job: Job) -> dict[str, Any]:
    torch.set_num_threads(1)
    task, method, budget, seed, setting = job
    start = time.perf_counter()
    found = run(method, TASKS[task], seed, Budget(budget), **json.loads(setting))
    row = dict(zip(FIELDS, job, strict=False))
    row |= {key: round(found[key], 4) for key in ("validation", "test")}
    return row | {"alive": found["alive"], "allowed": found["budget"], "seconds": round(time.perf_counter() - start, 1)}


class Table:
    """The CSV of all runs so far."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(",".join(FIELDS) + "\n", encoding="utf-8")
        with path.open(encoding="utf-8", newline="") as file:
            self.rows: dict[Job, dict[str, Any]] = {_key(row): row for row in csv.DictReader(file)}

    def complete(self, jobs: Iterable[Job], processes: int) -> None:
        """Run what is missing and write every result down at once."""
        jobs = [job for job in dict.fromkeys(jobs) if job not in self.rows]
        start = time.perf_counter()
        with multiprocessing.get_context("spawn").Pool(processes) as pool, self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            for i, row in enumerate(pool.imap_unordered(_work, jobs), 1):
                writer.writerow(row)
                file.flush()
                self.rows[_key(row)] = row
                left = (time.perf_counter() - start) / i * (len(jobs) - i)
                print(f"\r[{i}/{len(jobs)}] {left / 60:.0f} minutes left ", end="", file=sys.stderr, flush=True)
        if jobs:
            print(file=sys.stderr)


def _key(row: dict[str, Any]) -> Job:
    return (row["task"], row["method"], row["budget"], int(row["seed"]), row["setting"])


def _settings(method: str) -> list[str]:
    return [json.dumps(setting, sort_keys=True) for setting in METHODS[method].grid]


def _chosen(table: Table, task: str, method: str, budget: str) -> str:
    """The setting with the best mean validation score on the tuning seeds."""

    def score(setting: str) -> float:
        return statistics.mean(float(table.rows[task, method, budget, seed, setting]["validation"]) for seed in TUNING)

    settings = _settings(method)
    return settings[0] if len(settings) == 1 else max(settings, key=score)


def _scores(table: Table, task: str, method: str, budget: str, seeds: int) -> list[float]:
    setting = _chosen(table, task, method, budget)
    return [float(table.rows[task, method, budget, seed, setting]["test"]) for seed in range(seeds)]


def _interval(values: list[float]) -> tuple[float, float]:
    """Mean and half of its 95 % interval."""
    n = len(values)
    return statistics.mean(values), statistics.stdev(values) / n**0.5 * _T[n] if n > 1 else 0.0


def _cell(values: list[float], digits: int, sign: str = "") -> str:
    mean, spread = _interval(values)
    return f"{mean:{sign}.{digits}f} ± {spread:.{digits}f}"


def tables(table: Table, task: str, methods: list[str], budgets: list[str], seeds: int) -> list[str]:
    """Test scores per method and budget, then the first method minus each other one seed by seed, as Markdown."""
    digits, first = TASKS[task].decimals, methods[0]
    scores = {(m, b): _scores(table, task, m, b, seeds) for m in methods for b in budgets}
    rows = {m: [_cell(scores[m, b], digits) for b in budgets] for m in methods}
    gaps = {m: [[x - y for x, y in zip(scores[first, b], scores[m, b], strict=True)] for b in budgets] for m in methods}
    less = {m: [_cell(gap, digits, "+") for gap in gaps[m]] for m in methods[1:]}
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
        shares = [b for b in budgets if b.endswith("%") and not b.startswith("neurons")]
        if not shares:
            continue
        at = [float(b.removesuffix("%")) for b in shares]
        for method in methods:
            scores = [_scores(table, task, method, b, seeds) for b in shares]
            means, spreads = zip(*map(_interval, scores), strict=True)
            first = method == methods[0]
            style: dict[str, Any] = {"linewidth": 2.5, "color": "black", "zorder": 3} if first else {"linewidth": 1}
            axis.errorbar(at, means, spreads, label=method, capsize=2, marker=".", **style)
        axis.set(xscale="log", xlabel="weights that live, %", ylabel=f"{TASKS[task].unit}, test", title=task)
        axis.invert_xaxis()
        axis.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


_T = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Student's t at 97.5 % for n - 1 degrees of freedom."""


def main(argv: list[str] | None = None) -> int:
    made = argparse.ArgumentParser(
        "python -m benchmarks.frontier", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    made.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    made.add_argument("--budgets", nargs="+", metavar="B", help="like 5%% 2:4 'neurons 25%%' (each task's own)")
    made.add_argument("--seeds", type=int, default=5)
    made.add_argument("--processes", type=int, default=2)
    made.add_argument("--csv", type=Path, default=Path("benchmarks/frontier.csv"))
    made.add_argument("--plot", type=Path, default=Path("out/frontier.png"))
    made.add_argument("--quick", action="store_true")
    args = made.parse_args(argv)
    if args.quick:
        args.tasks, args.budgets, args.seeds = ["lenet-300-100"], ["5%", "1%"], 1
        args.methods = ["symopt AdamW", "dense", "gradual pruning"]
        args.csv = Path("out/frontier-quick.csv")
    if "characters" in args.tasks:
        print(f"text: {text_hash()}")
    table = Table(args.csv)
    cases = [(t, m, b) for t in args.tasks for m in args.methods for b in args.budgets or BUDGETS[t]]
    tuned = [
        (t, m, b, seed, s) for t, m, b in cases if len(METHODS[m].grid) > 1 for seed in TUNING for s in _settings(m)
    ]
    table.complete(tuned, args.processes)
    final = [(t, m, b, seed, _chosen(table, t, m, b)) for t, m, b in cases for seed in range(args.seeds)]
    table.complete(final, args.processes)
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
