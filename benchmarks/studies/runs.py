"""Training runs as rows of a CSV: never repeated, resumed where they were stopped, tuned and then scored.

A case is what is compared, like (task, method, budget).  Every setting of its method is run on the ``TUNING`` seeds,
the one with the best mean *validation* score on other seeds, where the *test* score is what counts.
"""

from __future__ import annotations

import csv
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

__all__ = ["TUNING", "Case", "Job", "Table", "cell", "grid", "interval", "settings"]

TUNING = (100, 101)
Case = tuple[str, ...]
Job = tuple[Any, ...]
"""A case, a seed, and a setting as JSON."""

_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
"""Student's t at 97.5 % for 1, 2, ... degrees of freedom."""


class Table:
    """The CSV of all runs so far; ``fields`` are those of a job and then whatever else ``work`` says of a run."""

    def __init__(self, path: Path, fields: tuple[str, ...], work: Callable[[Job], dict[str, Any]]) -> None:
        self.path, self.fields, self.work = path, fields, work
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(",".join(fields) + "\n", encoding="utf-8")
        with path.open(encoding="utf-8", newline="") as file:
            self.rows: dict[Job, dict[str, Any]] = {self._key(row): row for row in csv.DictReader(file)}

    def _key(self, row: dict[str, Any]) -> Job:
        names = self.fields[: self.fields.index("setting") + 1]
        return tuple(int(row[name]) if name == "seed" else row[name] for name in names)

    def complete(self, jobs: Iterable[Job], processes: int) -> None:
        """Run what is missing and write every result down at once."""
        jobs = [job for job in dict.fromkeys(jobs) if job not in self.rows]
        start = time.perf_counter()
        with multiprocessing.get_context("spawn").Pool(processes) as pool, self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self.fields)
            for i, row in enumerate(pool.imap_unordered(self.work, jobs), 1):
                writer.writerow(row)
                file.flush()
                self.rows[self._key(row)] = row
                left = (time.perf_counter() - start) / i * (len(jobs) - i)
                print(f"\r[{i}/{len(jobs)}] {left / 60:.0f} minutes left ", end="", file=sys.stderr, flush=True)
        if jobs:
            print(file=sys.stderr)

    def run(self, cases: dict[Case, list[str]], seeds: int, processes: int) -> None:
        """Tune every case over its settings, then train it on ``seeds`` fresh ones."""
        tuned = [(*c, seed, s) for c, found in cases.items() if len(found) > 1 for seed in TUNING for s in found]
        self.complete(tuned, processes)
        final = [(*c, seed, self.chosen(c, found)) for c, found in cases.items() for seed in range(seeds)]
        self.complete(final, processes)

    def chosen(self, case: Case, found: list[str]) -> str:
        """The setting with the best mean validation score on the tuning seeds."""

        def score(setting: str) -> float:
            return statistics.mean(float(self.rows[(*case, seed, setting)]["validation"]) for seed in TUNING)

        return found[0] if len(found) == 1 else max(found, key=score)

    def scores(self, case: Case, found: list[str], seeds: int) -> list[float]:
        """Test scores of the chosen setting."""
        setting = self.chosen(case, found)
        return [float(self.rows[(*case, seed, setting)]["test"]) for seed in range(seeds)]


def grid(**axes: tuple[Any, ...]) -> tuple[dict[str, Any], ...]:
    """All combinations."""
    rows: list[dict[str, Any]] = [{}]
    for key, values in axes.items():
        rows = [{**row, key: value} for row in rows for value in values]
    return tuple(rows)


def settings(found: Iterable[dict[str, Any]]) -> list[str]:
    """As the CSV has them."""
    return [json.dumps(setting, sort_keys=True) for setting in found]


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half of its 95 % interval."""
    n = len(values)
    return statistics.mean(values), statistics.stdev(values) / n**0.5 * _T[n - 2] if n > 1 else 0.0


def cell(values: list[float], digits: int, sign: str = "") -> str:
    if not values:
        return ""
    mean, spread = interval(values)
    return f"{mean:{sign}.{digits}f} ± {spread:.{digits}f}"
