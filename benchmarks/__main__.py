"""Time symopt's native step against the alternatives, on this machine.

    python -m benchmarks                          one step, memory and whole training steps (about 15 minutes)
    python -m benchmarks --quick                  tiny sizes, few repeats: does everything run?
    python -m benchmarks --training               whole training steps only
    python -m benchmarks --sizes 1x64M --optimizers adamw --constraints sparse --peers torch-fused --threads 1 all

Nothing is timed before its results were found to agree with the reference; a case that does not agree prints one
line and makes the exit status 1.  What every column means: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Collection
from pathlib import Path

import torch

from benchmarks import machine, report, timing
from benchmarks.steps import memory
from benchmarks.steps.cases import CONSTRAINTS, DTYPES, OPTIMIZERS, Case, Size, cases
from benchmarks.steps.checks import check_native
from benchmarks.steps.kernels import KernelResult, run_case
from benchmarks.steps.peers import PEERS
from benchmarks.steps.training import FLAGS, NETS, run_training
from symopt_kernels.native import binding as native

__all__ = ["main"]

PARTS = ("kernels", "memory", "training")
QUICK_SIZES = ["20x1k", "1x256k"]
SIZES = ["1x1", "200x1k", "1x1M", "1x16M"]


def parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:14}{peer.what}" for name, peer in PEERS.items())
    made = argparse.ArgumentParser(
        "python -m benchmarks",
        description=__doc__,
        epilog=f"peers:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument

    def several(flag: str, choices: Collection[str], default: list[str]) -> None:
        text = f"of {', '.join(choices)} ({'all' if len(default) == len(choices) else ' '.join(default)})"
        add(flag, nargs="+", choices=choices, default=default, metavar="NAME", help=text)

    add("--sizes", nargs="+", type=_size, metavar="NxM", help=f"tensors x weights, like 1x64M ({' '.join(SIZES)})")
    several("--dtypes", DTYPES, ["float32"])
    several("--constraints", CONSTRAINTS, ["sparse", "group-out"])
    several("--optimizers", OPTIMIZERS, ["adamw", "sgd-momentum"])
    several("--peers", PEERS, list(PEERS))
    add("--threads", nargs="+", type=_threads, default=["all"], metavar="N", help="numbers, or all (all)")
    add("--repeats", type=_positive, metavar="N", help="pairs per peer, at most (41; quick 9)")
    add("--seconds", type=float, metavar="S", help="time per peer after which no more pairs start (8; quick 1)")
    add("--quick", action="store_true", help=f"sizes {' '.join(QUICK_SIZES)}, few repeats")
    several("--parts", PARTS, list(PARTS))
    add("--training", action="store_true", help="the same as --parts training")
    add("--instructions", choices=native.INSTRUCTIONS, help="of symopt's kernel (the best this processor has)")
    add("--json", type=Path, metavar="FILE", help="write every median and quartile, after every case")
    add(
        "--markdown", nargs="?", const="-", metavar="FILE", help="write the tables as Markdown; without FILE print them"
    )
    add("--plot", type=Path, metavar="FILE", help="write a figure of times relative to torch.optim's fused step")
    add("--write-readme", action="store_true", help="put the tables into benchmarks/README.md")
    return made


def _size(text: str) -> str:
    try:
        return Size.parse(text).text
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number above 0, not {text!r}")
    return int(text)


def _threads(text: str) -> str:
    return text if text == "all" else str(_positive(text))


def main(argv: list[str] | None = None) -> int:
    make = parser()
    args = make.parse_args(argv)
    if native.UNAVAILABLE is not None:
        print(f"there is no native step to time: {native.UNAVAILABLE}", file=sys.stderr)
        return 2
    parts = ["training"] if args.training else args.parts
    sizes = args.sizes or (QUICK_SIZES if args.quick else SIZES)
    repeats = args.repeats or (9 if args.quick else 41)
    seconds = args.seconds if args.seconds is not None else (1.0 if args.quick else 8.0)
    every = torch.get_num_threads()
    counts = list(dict.fromkeys(every if n == "all" else int(n) for n in args.threads))
    chosen = cases(args.optimizers, args.constraints, sizes, args.dtypes, counts)
    for case in chosen:
        if reason := case.why_not():
            make.error(f"{case}: {reason}")
    peers = list(dict.fromkeys(args.peers))
    if args.plot is not None and ("torch-fused" not in peers or "kernels" not in parts):
        make.error("--plot shows kernels relative to torch-fused, so it needs both")
    small = _memory_jobs(chosen, peers) if "memory" in parts else []
    nets = [(net, flags) for net in NETS for flags in FLAGS] if "training" in parts else []
    used = {every} if parts == ["training"] else {*counts, *([every] if nets else [])}
    results = report.Results(machine.describe(sorted(used), args.instructions))
    total = (len(chosen) if "kernels" in parts else 0) + len(small) + len(nets)
    # torch.compile imports torch modules that are deprecated themselves.
    warnings.filterwarnings("ignore", message="`torch.jit.script_method` is deprecated", category=DeprecationWarning)
    with timing.instructions(args.instructions), report.progress(total) as say:

        def keep() -> None:
            """A run takes long: whoever stops it has what was measured until then."""
            if args.json is not None:
                _write(args.json, json.dumps(results.to_dict(), indent=1) + "\n")

        for case in chosen if "kernels" in parts else []:
            say(str(case))
            results.kernels.append(run_case(case, peers, repeats, seconds))
            keep()
        known = {r.case: r for r in results.kernels}
        for case, method in small:
            say(f"memory of {case}: {method}")
            if case not in known:
                with timing.threads(case.threads):
                    known[case] = KernelResult(case, wrong=check_native(case))
                results.kernels += [known[case]] if known[case].wrong else []
            if not known[case].wrong and method not in known[case].absent:
                results.memory.append(memory.measure(case, method))
                keep()
        for net, flags in nets:
            say(f"{net}, {flags}")
            results.training.append(run_training(net, flags, repeats, seconds))
            keep()
    return _finish(args, results)


def _memory_jobs(chosen: list[Case], peers: list[str]) -> list[tuple[Case, str]]:
    """symopt at every size, to show that its extra does not grow; the peers at the largest."""
    first = chosen[0]
    of = [c for c in chosen if (c.optimizer, c.dtype, c.threads) == (first.optimizer, first.dtype, first.threads)]
    largest = max(c.size.total for c in of)
    return [(c, m) for c in of for m in ("symopt", *peers) if m == "symopt" or c.size.total == largest]


def _finish(args: argparse.Namespace, results: report.Results) -> int:
    wrong = [(f"case {r.case}", r.wrong) for r in results.kernels if r.wrong]
    wrong += [(f"case {r.net}, {r.flags}", r.wrong) for r in results.training if r.wrong]
    if not results.empty():
        if args.markdown == "-":
            print(report.markdown(results), end="")
        else:
            report.show(results)
    if args.markdown not in (None, "-") and not results.empty():
        _write(Path(args.markdown), report.markdown(results))
    if args.plot is not None and results.timed() and not report.plot(results, args.plot):
        print("no figure: torch-fused could not be timed in any case", file=sys.stderr)
    if args.write_readme and not wrong and not results.empty():
        report.fill(results, report.README)
    for name, lines in wrong:
        print(f"{name}: not timed, its correctness check failed: {'; '.join(lines)}", file=sys.stderr)
    return 1 if wrong else 0


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
