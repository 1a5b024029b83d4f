"""docs/migration.md: every snippet runs, from a fresh network."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "migration.md").read_text(encoding="utf-8")
START, *SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=[s.splitlines()[0][:40] for s in SNIPPETS])
def test_snippet(snippet: str) -> None:
    scope: dict[str, object] = {}
    exec(START, scope)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*too few")
        exec(snippet, scope)


def test_nothing_is_left_out() -> None:
    assert len(SNIPPETS) == PAGE.count("```python") - 1 == 6
