"""How much memory one step needs beyond what is held between steps.

Measured in a fresh process per method: three steps, then the kernel's peak of resident memory is reset (Linux,
/proc/self/clear_refs), one more step is taken, and the peak is compared with the resident memory before it.  That sees
every allocation, C++ included.  The allocator is told (environment variables of glibc) to return freed blocks at once,
so memory a former step left behind does not hide what the next one needs.  The same is done with a step that does
nothing, and its figure is the resolution.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import timing
from benchmarks.steps.cases import Case, Size
from benchmarks.steps.checks import first_line
from benchmarks.steps.peers import PEERS, Ours

__all__ = ["measure"]

_ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "0",
}
ROUNDS = 3


def measure(case: Case, method: str) -> dict[str, Any]:
    """Bytes of the weights, bytes held between steps, peak extra bytes of one step, and the resolution."""
    job = [case.optimizer, case.constraint, case.size.text, case.dtype, str(case.threads), method]
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.steps.memory", *job],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, **_ALLOCATOR},
        capture_output=True,
        text=True,
    )
    row = {"case": str(case), "size": case.size.text, "method": method}
    if run.returncode:
        return {**row, "absent": (run.stderr.strip().splitlines() or ["no output"])[-1]}
    return {**row, **json.loads(run.stdout.splitlines()[-1])}


def peak(step: Callable[[], Any], before: Callable[[], Any], after: Callable[[], Any]) -> int:
    """Median over a few steps of peak minus resident bytes."""
    found = []
    for _ in range(ROUNDS):
        before()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        resident = _status("VmRSS")
        step()
        found.append(_status("VmHWM") - resident)
        after()
    return sorted(found)[ROUNDS // 2]


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def main(job: list[str]) -> int:
    optimizer, constraint, size, dtype, threads, method = job
    case = Case(optimizer, constraint, Size.parse(size), dtype, int(threads))
    if not Path("/proc/self/clear_refs").exists():
        print("peak memory needs Linux", file=sys.stderr)
        return 1
    if method != "symopt" and (reason := PEERS[method].why_not(case)):
        print(reason, file=sys.stderr)
        return 1
    try:
        result = _measure(case, method)
    except Exception as error:
        print(f"raises {first_line(error)}", file=sys.stderr)
        return 1
    print(json.dumps(result))
    return 0


def _measure(case: Case, method: str) -> dict[str, int]:
    with timing.threads(case.threads):
        variant = Ours(case) if method == "symopt" else PEERS[method].build(case)
        for _ in range(3):
            variant.arm()
            variant.step()
            variant.clear()
        variant.arm()
        return {
            "weights_bytes": case.size.total * case.torch_dtype.itemsize,
            "held_bytes": variant.held(),
            "extra_bytes": peak(variant.step, variant.arm, variant.clear),
            "resolution_bytes": peak(lambda: None, lambda: None, lambda: None),
        }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
