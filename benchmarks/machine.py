"""What the numbers were measured on."""

from __future__ import annotations

import datetime
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

import symopt
from symopt_kernels.native import binding as native

__all__ = ["describe", "in_cache", "line"]

DISTURBED = 0.1
"""Share of the cores that others may use before the tables say so."""

_CACHES = "/sys/devices/system/cpu/cpu{}/cache"


def describe(threads: list[int], instructions: str | None = None) -> dict[str, Any]:
    return {
        "cpu": _cpu(),
        "cores": len(_available()),
        "l2_bytes": _cache(2),
        "l3_bytes": _cache(3),
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "symopt": symopt.__version__,
        "threads": threads,
        "instructions": instructions or native.INSTRUCTIONS[-1],
        "pool": native.THREADS,
        "busy": _busy(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def line(machine: dict[str, Any]) -> str:
    """The same in one sentence."""
    caches = ", ".join(
        f"{_mib(machine[key])} {name}" for key, name in (("l2_bytes", "L2"), ("l3_bytes", "L3")) if machine[key]
    )
    counts = machine["threads"]
    threads = f"{' and '.join(map(str, counts))} thread{'s' * (counts != [1])}"
    busy = machine.get("busy")
    disturbed = f"; other programs kept {100 * busy:.0f} % of the cores busy" if busy and busy > DISTURBED else ""
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {caches or 'caches unknown'}; torch {machine['torch']}, "
        f"{threads}, {machine['instructions']} instructions, {machine['os']}, "
        f"Python {machine['python']}, symopt {machine['symopt']}, {machine['date']}{disturbed}"
    )


def in_cache(touched: int, machine: dict[str, Any]) -> bool:
    """Whether a step's memory may partly stay in the last-level cache from one step to the next."""
    last = machine["l3_bytes"] or machine["l2_bytes"]
    return bool(last) and touched < 2 * last


def _busy(seconds: float = 0.5) -> float | None:
    """Share of all cores' time that others use while this process sleeps; None where the system does not say."""

    def read() -> list[int]:
        with open("/proc/stat", encoding="utf-8") as stat:
            return [int(word) for word in stat.readline().split()[1:9]]

    try:
        before = read()
        time.sleep(seconds)
        spent = [b - a for a, b in zip(before, read(), strict=True)]
    except (OSError, ValueError):
        return None
    idle = spent[3] + spent[4]
    return 1 - idle / sum(spent) if sum(spent) else None


def _available() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, _, value in (row.partition(":") for row in text.splitlines())}
    name = fields.get("model name", platform.machine())
    if "model" in fields and "cpu family" in fields:
        name += f" (family {fields['cpu family']}, model {fields['model']})"
    return name


def _cache(level: int) -> int | None:
    """Bytes of all caches of this level that the available cores use; None where the system does not say."""
    found: dict[str, int] = {}
    for core in _available():
        for index in Path(_CACHES.format(core)).glob("index*"):
            try:
                kind, at, size, shared = (
                    (index / name).read_text(encoding="utf-8").strip()
                    for name in ("type", "level", "size", "shared_cpu_list")
                )
            except OSError:
                continue
            if kind != "Instruction" and int(at) == level:
                found[shared] = int(size.rstrip("KM")) * (1 << 20 if size.endswith("M") else 1 << 10)
    return sum(found.values()) or None


def _mib(nbytes: int) -> str:
    return f"{nbytes / (1 << 20):.0f} MiB"
