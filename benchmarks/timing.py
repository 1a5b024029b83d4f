"""The clock: interleaved steps, quartiles, the bandwidth that simple loops reach, and settings that are put back."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from symopt_kernels.native import binding as native

__all__ = ["LEAST", "Summary", "bandwidth", "instructions", "interleave", "summarize", "threads"]

LEAST = 7
"""Pairs measured even where the time allowed is over."""


@dataclass(frozen=True)
class Summary:
    """Median and quartiles."""

    median: float
    low: float
    high: float
    n: int


def summarize(values: list[float]) -> Summary:
    if len(values) < 2:
        return Summary(values[0], values[0], values[0], len(values))
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Summary(median, low, high, len(values))


Timed = tuple[Callable[[], Any], Callable[[], Any]]
"""What is done before the clock starts, and what is timed."""


def interleave(a: Timed, b: Timed, repeats: int, seconds: float, warm: int = 3) -> tuple[list[float], list[float]]:
    """Milliseconds of ``a`` and ``b``, taken in turns (a b a b ...), so that both see the same moments."""
    times: tuple[list[float], list[float]] = ([], [])
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        for i in range(warm + repeats):
            for (before, run), mine in zip((a, b), times, strict=True):
                before()
                start = time.perf_counter_ns()
                run()
                elapsed = time.perf_counter_ns() - start
                if i >= warm:
                    mine.append(elapsed / 1e6)
            if len(times[0]) >= min(LEAST, repeats) and time.perf_counter() > end:
                break
    finally:
        gc.enable()
    return times


def bandwidth(nbytes: int, seconds: float = 0.3) -> dict[str, float]:
    """GB/s of simple loops of torch over ``nbytes`` of fp32 memory, each the best of many runs."""

    def arrays(count: int) -> list[Tensor]:
        n = max(1, nbytes // (4 * count))
        return [torch.zeros(n).add_(i) for i in range(count)]

    def best(run: Callable[[], Any], moved: int) -> float:
        for _ in range(2):
            run()
        fastest, end, runs = float("inf"), time.perf_counter() + seconds, 0
        while runs < LEAST or time.perf_counter() < end:
            start = time.perf_counter_ns()
            run()
            fastest, runs = min(fastest, (time.perf_counter_ns() - start) / 1e9), runs + 1
        return moved / fastest / 1e9

    rates = {}
    a, b = arrays(2)
    rates["copy: 1 read, 1 write"] = best(lambda: a.copy_(b), 2 * a.nbytes)
    rates["triad: 2 reads, 1 write in place"] = best(lambda: a.add_(b, alpha=1e-9), 3 * a.nbytes)
    del a, b
    a, b, c = arrays(3)
    rates["3 streams: 2 reads, 1 write"] = best(lambda: torch.add(a, b, alpha=1e-9, out=c), 3 * a.nbytes)
    rates["3 streams: 3 reads, 1 write in place"] = best(lambda: a.addcmul_(b, c, value=1e-9), 4 * a.nbytes)
    return rates


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def instructions(name: str | None) -> Iterator[None]:
    """Let the native step use another instruction set than the best one this processor has."""
    defaults: Any = native.step.__kwdefaults__
    before = defaults["instructions"]
    defaults["instructions"] = before if name is None else name
    try:
        yield
    finally:
        defaults["instructions"] = before
