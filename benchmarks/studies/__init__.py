"""Experiments behind the tables of docs/: one program each, run as ``python -m benchmarks.studies.<name>``."""

from __future__ import annotations

import argparse
from importlib.machinery import ModuleSpec

__all__ = ["program"]


def program(spec: ModuleSpec, text: str | None) -> argparse.ArgumentParser:
    """The parser of a program's arguments, from its ``__spec__`` and ``__doc__``."""
    kind = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(f"python -m {spec.name}", description=text, formatter_class=kind)
