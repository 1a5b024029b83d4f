"""How far the training of a parameter has come, as its optimizer has written it down."""

from __future__ import annotations

from torch import Tensor

from symopt.optim.direction import Options, State

__all__ = ["options_now", "progress"]


def progress(group: Options, state: State) -> tuple[int | None, int | None]:
    """Steps counted, None if nobody counts, and their number in all, None if that was not given."""
    counted, total = state.get("progress"), group.get("total_steps")
    if isinstance(counted, (int, float, Tensor)):
        return int(counted), None if total is None else int(total)
    return (None, None) if total is None else (0, int(total))


def options_now(group: Options, state: State) -> Options:
    """The options of a param group with what holds for a parameter after its steps."""
    step, total = progress(group, state)
    commit = group.get("commit")
    past = step is not None and total is not None and commit is not None and step >= commit * total
    return {"imbalance_factor": None, **group, "committed": past or bool(group.get("committed", False))}
