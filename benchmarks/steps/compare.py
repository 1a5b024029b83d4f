"""Two checkouts side by side: do they make the same steps, and is one of them slower?

    python -m benchmarks.steps.compare BEFORE AFTER [--only adamw] [--threads 1] [--rounds 5] [--seconds 2]

BEFORE and AFTER are folders of checkouts whose C++ extension is built in place.  In every round three processes live at
the same time: BEFORE, BEFORE once more, and AFTER.  They step the same cases in turns, a block of steps each, so all of
them see the same moments of the machine; BEFORE against itself is the noise that a real difference has to exceed.  The
processes of every round are new, because the same step takes longer or shorter on other pages of memory.

Nothing is timed before both were found to take the same steps: on the reference bit for bit (planes, whose sums may be
added in another order, up to rounding; not the largest weights), on native code up to rounding.  A case that differs
prints one line and makes the exit status 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.steps import compare_worker

__all__ = ["main"]

WORKER = Path(compare_worker.__file__)
BLOCK_MS = 20.0
"""Time of a block of steps; much shorter ones would measure the switch between processes."""
ROUNDING = 64 * 2.0**-24
"""Largest difference allowed, relative to a value plus the root mean square of its tensor; see checks.py."""


class Worker:
    """A process that imports symopt from one checkout."""

    def __init__(self, links: Path, threads: int) -> None:
        command = [sys.executable, str(WORKER), str(links), str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **job: Any) -> Any:
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise SystemExit("a process that imports a checkout has ended; its error stands above")
        return json.loads(line)

    def close(self) -> None:
        with self.process:  # which closes its pipes
            self.process.kill()


@contextmanager
def workers(folders: list[Path], threads: int) -> Iterator[list[Worker]]:
    """One process per checkout, all alive."""
    with ExitStack() as stack:
        found = []
        for folder in folders:
            links = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            (links / "symopt").symlink_to(folder / "symopt")
            (links / "symopt_kernels").symlink_to(folder / "kernels")
            found.append(Worker(links, threads))
            stack.callback(found[-1].close)
        yield found


def differences(case: str, before: Worker, after: Worker, folder: Path) -> list[str]:
    """What the two do not do alike in a few steps of a case."""
    wrong = []
    for backend in compare_worker.CASES[case].checked:
        ends: list[dict[str, Tensor]] = []
        for i, worker in enumerate((before, after)):
            path = folder / f"{i}.pt"
            if error := worker.ask(what="check", case=case, backend=backend, file=str(path)):
                return [f"{case}, {backend}: {error}"]
            ends.append(torch.load(path))
        exact = backend == "reference" and not compare_worker.CASES[case].summed
        wrong += [f"{case}, {backend}: {line}" for line in unlike(ends[0], ends[1], exact)]
    return wrong


def unlike(before: dict[str, Tensor], after: dict[str, Tensor], exact: bool) -> list[str]:
    """Tensors of one name and shape that differ; a tensor of the state that only one of both keeps is not compared."""
    lines = []
    for name in before.keys() & after.keys():
        a, b = before[name], after[name]
        if torch.equal(a, b) or (a.shape != b.shape and not name.startswith("weight")):
            continue
        if a.shape != b.shape:
            lines.append(f"{name} has shape {tuple(b.shape)}, not {tuple(a.shape)}")
            continue
        a, b = a.double(), b.double()
        excess = (b - a).abs() / (ROUNDING * (a.square().mean().sqrt() + a.abs()))
        most = float(excess.nan_to_num(nan=float("inf")).max())  # NaN is a difference
        if exact or most > 1:
            lines.append(f"{name} differs by {most:.3g} times what rounding explains")
    if missing := {name for name in before.keys() ^ after.keys() if name.startswith("weight")}:
        lines.append(f"only one has {', '.join(sorted(missing))}")
    return sorted(lines)


def measure(case: str, backend: str, three: list[Worker], seconds: float) -> list[list[float]]:
    """Milliseconds per step of each process, in blocks taken in turns."""
    for worker in three:
        worker.ask(what="build", case=case, backend=backend)
    count = 1
    while (first := three[0].ask(what="steps", count=count)) * count < BLOCK_MS / 2 and count < 1 << 14:
        for worker in three[1:]:
            worker.ask(what="steps", count=count)
        count *= 2
    turns = max(7, round(1e3 * seconds / (3 * count * first)))
    times: list[list[float]] = [[] for _ in three]
    for i in range(turns):
        for j in range(3):
            at = (i + j) % 3  # who comes first changes, for the others find the caches as it left them
            times[at].append(three[at].ask(what="steps", count=count))
    return times


def summary(ratios: list[float]) -> str:
    low, mid, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{mid:.3f} ({low:.3f}-{high:.3f})"


def commit(folder: Path) -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True)
    return done.stdout.strip() or folder.name


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        "python -m benchmarks.steps.compare",
        description=__doc__,
        epilog="cases: " + ", ".join(compare_worker.CASES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("before", type=Path, metavar="BEFORE")
    made.add_argument("after", type=Path, metavar="AFTER")
    made.add_argument("--only", nargs="+", default=[""], metavar="PART", help="cases whose name contains one of these")
    made.add_argument("--backends", nargs="+", choices=["native", "reference"], default=["native", "reference"])
    made.add_argument("--threads", type=int, default=torch.get_num_threads())
    made.add_argument("--rounds", type=int, default=5, help="each in processes of its own")
    made.add_argument("--seconds", type=float, default=2.0, help="per case and round")
    made.add_argument("--check", action="store_true", help="compare the steps and time nothing")
    return made


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    before, after = args.before.resolve(), args.after.resolve()
    for folder in (before, after):
        if not (folder / "kernels").is_dir() or not list(folder.glob("kernels/**/_native.*.so")):
            raise SystemExit(f"{folder} has no built extension: run `python setup.py build_ext --inplace` there")
    chosen = [name for name in compare_worker.CASES if any(part in name for part in args.only)]
    wrong: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder, workers([before, after], args.threads) as (one, other):
        for case in chosen:
            if found := differences(case, one, other, Path(folder)):
                wrong[case] = found
                print("\n".join(found), file=sys.stderr, flush=True)
    right = [case for case in chosen if case not in wrong]
    print(f"{len(right)} of {len(chosen)} cases take the same steps", file=sys.stderr, flush=True)
    if not args.check and right:
        _time(args, before, after, right)
    return 1 if wrong else 0


def _time(args: argparse.Namespace, before: Path, after: Path, chosen: list[str]) -> None:
    jobs = [(c, b) for c in chosen for b in args.backends if b in compare_worker.CASES[c].backends]
    found: dict[tuple[str, str], list[list[list[float]]]] = {job: [] for job in jobs}
    for i in range(args.rounds):
        with workers([before, before, after], args.threads) as three:
            for job in jobs:
                print(f"[{i + 1}/{args.rounds}] {', '.join(job)}", file=sys.stderr, flush=True)
                found[job].append(measure(*job, three, args.seconds))
    print(f"before: {commit(before)}, after: {commit(after)}; torch {torch.__version__}, threads: {args.threads}\n")
    print("| step | before, ms | after / before | before once more / before | |\n|---|---|---|---|---|")
    for (case, backend), rounds in found.items():
        ratios = [[[y / x for x, y in zip(r[0], r[k], strict=True)] for r in rounds] for k in (1, 2)]
        again, new = ([statistics.median(one) for one in side] for side in ratios)
        # Beyond the noise where no round of one is within the rounds of the other.
        verdict = "slower" if min(new) > max(again) else "faster" if max(new) < min(again) else ""
        every = [[x for one in side for x in one] for side in ratios]
        ms = statistics.median(x for r in rounds for x in r[0])
        cells = f"{ms:.3g} | {summary(every[1])} | {summary(every[0])} | {verdict}"
        print(f"| {case}, {backend} | {cells} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
