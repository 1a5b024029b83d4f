"""Explicit modules multiply their factors in torch's memory, or in memory that is used again."""

import pytest

from symopt.module.memory import ReusedMemory


@pytest.fixture(params=["torch's memory", "reused memory"])
def memory(request, monkeypatch):
    """Tensors of the tests are too small for the pool, unless it is told otherwise."""
    if request.param == "reused memory":
        monkeypatch.setattr(ReusedMemory, "large", 0)
