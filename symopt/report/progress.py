"""How far the training of a parameter has come, as its optimizer has written it down."""

from __future__ import annotations

from torch import Tensor

from symopt.optim.direction import Options, State
from symopt.optim.options import PROGRESS

__all__ = ["progress"]


def progress(group: Options, state: State) -> tuple[int | None, int | None]:
    """Steps counted, None if nobody counts, and their number in all, None if that was not given."""
    counted, total = state.get(PROGRESS), group.get("total_steps")
    if isinstance(counted, (int, float, Tensor)):
        return int(counted), None if total is None else int(total)
    return (None, None) if total is None else (0, int(total))
