"""Where a warning belongs: the line of the user's code that led to it."""

from __future__ import annotations

import sys

__all__ = ["callers_level"]


def callers_level() -> int:
    """``stacklevel`` of the code outside of torch and of this package that led to the caller of this."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("torch", "symopt"):
        frame, level = frame.f_back, level + 1
    return level
