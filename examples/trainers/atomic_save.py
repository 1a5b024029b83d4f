"""Checkpoints that a crash cannot spoil: written beside the old file, then put in its place."""

import os
import tempfile
from pathlib import Path
from typing import Any

import torch


def save(path: Path, **parts: Any) -> None:
    """Whoever reads ``path`` sees the old checkpoint or the new one, never half of one."""
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        try:
            torch.save({name: part.state_dict() for name, part in parts.items()}, file)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            Path(file.name).unlink()
            raise
    Path(file.name).replace(path)


def load(path: Path, **parts: Any) -> None:
    """Load what ``save`` wrote, if it is there; a file that cannot be read raises before anything is touched."""
    if path.exists():
        for name, state in torch.load(path, weights_only=True).items():
            parts[name].load_state_dict(state)
