"""Options of the suite; ``tests/README.md`` says which promise is tested where."""

from __future__ import annotations

import pytest
import torch

from support import cases


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exhaustive", action="store_true", help="run all cases, not only some of each kind")
    parser.addoption("--case", default="", help="run only the cases with this in their name")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # two in each of two workers wait for each other at every small operation
    cases.EXHAUSTIVE = config.getoption("exhaustive")
    cases.ONLY = config.getoption("case")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    exhaustive, only = config.getoption("exhaustive"), config.getoption("case")

    def runs(item: pytest.Item) -> bool:
        if not exhaustive and item.get_closest_marker("exhaustive"):
            return False
        parameters = item.name.partition("[")[2]
        return only in parameters or cases.has(getattr(item, "obj", None), only)

    left_out = [item for item in items if not runs(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
