"""The quick cases for pytest-benchmark: ``pytest benchmarks/ --benchmark-only`` (one at a time, not in turns)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.__main__ import QUICK_SIZES
from benchmarks.steps.cases import Case, cases
from benchmarks.steps.checks import check
from benchmarks.steps.peers import PEERS, Ours, Variant

CASES = cases(["adamw", "sgd-momentum"], ["sparse", "group-out"], QUICK_SIZES, ["float32"], [torch.get_num_threads()])


def build(case: Case, method: str) -> Variant:
    return Ours(case) if method == "symopt" else PEERS[method].build(case)


def rows() -> Iterator[Any]:
    for case in CASES:
        for method in ("symopt", *PEERS):
            if method == "symopt" or PEERS[method].why_not(case) is None:
                yield pytest.param(case, method, id=f"{case.label}-{method}".replace(" ", "-"))


@pytest.mark.parametrize("case, method", list(rows()))
def test_step(benchmark: Any, case: Case, method: str) -> None:
    torch.compiler.reset()
    wrong, absent = check(case, [] if method in ("symopt", "reference") else [method])
    assert wrong == [] and absent == {}
    variant = build(case, method)
    variant.arm()
    variant.step()  # makes state, compiles
    variant.clear()

    def step() -> None:
        variant.step()
        if variant.composed:
            variant.clear()

    benchmark.group = str(case)
    benchmark.pedantic(step, setup=variant.arm, rounds=15, warmup_rounds=2)
