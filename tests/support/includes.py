"""Literal includes of Markdown files: a fence of Python below ``<!-- include: PATH -->`` is that file, whole.

``make recipes`` brings CONTRIBUTING.md up to date.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

_INCLUDE = re.compile(r"(<!-- include: (?P<path>\S+) -->\n```python\n)(?P<code>.*?)(?P<end>^```$)", re.M | re.S)


def included(text: str) -> dict[str, str]:
    """Path of a file -> the code that stands in its fence."""
    return {found["path"]: found["code"] for found in _INCLUDE.finditer(text)}


def filled(text: str) -> str:
    """``text`` with every fence as its file is now."""

    def fence(found: re.Match[str]) -> str:
        code = (ROOT / found["path"]).read_text(encoding="utf-8")
        if "```" in code:
            raise ValueError(f"{found['path']} has a fence of its own")
        return f"{found[1]}{code}{found['end']}"

    return _INCLUDE.sub(fence, text)


def main() -> None:
    path = ROOT / "CONTRIBUTING.md"
    path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
