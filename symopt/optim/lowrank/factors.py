"""The factors of a low-rank weight as state: are they still those of the weight, in which gauge, which columns live.

State is ``factor_u`` (m x r), ``factor_v`` (n x r), their moments ``factor_u_exp_avg`` (m x r),
``factor_u_exp_avg_sq`` (m, one number per row), ..., and ``factor_age``, the steps since columns were last aligned.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from symopt.constraints import Constraint, LowRank
from symopt.optim.direction import Options, State
from symopt_kernels.groups import Groups
from symopt_kernels.reference import lowrank as kernel
from symopt_kernels.reference.gauge import SNAP, math_dtype

__all__ = [
    "SIDES",
    "align",
    "cut",
    "holds",
    "moments",
    "move",
    "padded",
    "pair",
    "rows",
    "sizes",
    "strip",
    "turn",
    "write",
]

SIDES = ("u", "v")
RANK = "factor_rank"
"""State key, 0-dim: the number of columns, which those of a checkpoint may exceed."""
_probes = WeakTensorKeyDictionary()
"""factor_u -> the weight it last composed, seen through one vector: cheap to compare with the weight of now."""


def pair(state: State) -> tuple[Tensor, Tensor]:
    """U and V."""
    return state["factor_u"], state["factor_v"]


def moments(state: State, side: str) -> dict[str, Tensor]:
    """The state of one factor under torch's keys."""
    prefix = f"factor_{side}_"
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def rows(factor: Tensor) -> Groups:
    """Its rows, each of which shares one second moment."""
    return Groups(factor.shape[0], tuple(factor.shape), (1,))


def _probe(p: Tensor) -> Tensor:
    matrix = p.detach().flatten(1)
    matrix = matrix if matrix.dtype == math_dtype(p) else matrix.float()
    x = torch.linspace(1, 2, matrix.shape[1], dtype=matrix.dtype, device=matrix.device).cos()
    return matrix @ x


def sizes(state: State, p: Tensor, c: Constraint) -> Tensor:
    """Size of every singular direction, zeros for those that are gone, as many as the smaller side of W has."""
    side = min(p.shape[0], p[0].numel())
    found = c.size(p.detach())[: c.max_rank] if isinstance(c, LowRank) else p.new_zeros(0)
    if "factor_u" in state:
        found = kernel.column_sizes(*pair(state))
    return torch.cat([found, found.new_zeros(side - len(found))])


def padded(c: Constraint, state: State, p: Tensor) -> dict[str, Tensor]:
    """Everything with a column per direction, with zeros for those that are gone.

    Distributed checkpoints are loaded into the tensors of a new optimizer, which has all columns.
    """
    if "factor_u" not in state:
        return {}
    live = state["factor_u"].shape[1]
    most = min(p.shape[0], p[0].numel())
    if isinstance(c, LowRank) and c.max_rank is not None:
        most = min(most, c.max_rank)
    found = {}
    for key, value in state.items():
        if key.startswith("factor_") and value.dim() == 2:
            found[key] = torch.cat([value, value.new_zeros(len(value), max(0, most - live))], dim=1)
    return found


def strip(state: State) -> None:
    """Take the columns that live out of what :func:`padded` has made."""
    if RANK not in state:
        return
    live = int(state[RANK])
    for key, value in state.items():
        if key.startswith("factor_") and value.dim() == 2 and value.shape[1] > live:
            state[key] = value[:, :live].clone()


def holds(state: State, p: Tensor, matrix: Tensor) -> bool:
    """Whether the factors still compose to the weight, up to rounding."""
    u, v = pair(state)
    if u.shape[0] != matrix.shape[0] or v.shape[0] != matrix.shape[1] or u.shape[1] != v.shape[1]:
        return False
    known = _probes.get(u)
    if known is not None and torch.equal(known, _probe(p)):
        return True
    made = u @ v.mT
    # Entry (i, j) of a product rounds by eps |u_i| |v_j|, on another machine differently.
    slack = 4 * torch.finfo(u.dtype).eps * u.norm(dim=1, keepdim=True) * v.norm(dim=1)
    slack += torch.finfo(p.dtype).eps * made.abs()
    return bool(((matrix - made).abs() <= slack).all())


def write(state: State, p: Tensor) -> None:
    """Give the weight the value of its factors."""
    u, v = pair(state)
    p.copy_((u @ v.mT).reshape(p.shape))
    _probes[u] = _probe(p)


def turn(state: State, balance: bool, before: tuple[Tensor, Tensor] | None, least: int = 0) -> None:
    """Turn columns into singular directions; seen from where the last step began, drop those that still shrink to 0.

    The ``least`` largest, which a budget keeps, are dropped only if nothing is left of them.
    """
    u, v, turn_u, turn_v = kernel.align(*pair(state), balance=balance)
    size = kernel.column_sizes(u, v)
    dead = size == 0
    if before is not None:
        shrinks = size < kernel.column_sizes(before[0] @ turn_u, before[1] @ turn_v)
        gone = (size <= SNAP * state["metric_scale"]) & shrinks
        gone[size.argsort(descending=True, stable=True)[:least]] = False
        dead |= gone
    move(state, (u, v), turn_v, turn_u)
    state["factor_age"].zero_()
    if bool(dead.any()):
        _keep(state, ~dead)


def move(state: State, new: tuple[Tensor, Tensor], for_u: Tensor, for_v: Tensor) -> None:
    """Take other factors, and moments along: what V pulled back times ``for_u`` is what the new V would have."""
    for side, turn, old, now in (("u", for_u, "factor_v", new[1]), ("v", for_v, "factor_u", new[0])):
        ratio = kernel.scale_of(state[old]) / kernel.scale_of(now)
        for key, value in moments(state, side).items():
            if value.dim() == 2:
                state[f"factor_{side}_{key}"] = value @ (turn * ratio)
    state["factor_u"], state["factor_v"] = new
    state[RANK].fill_(new[0].shape[1])


def _keep(state: State, live: Tensor) -> None:
    """Drop all other columns."""
    eye = torch.eye(len(live), dtype=state["factor_u"].dtype, device=live.device)[:, live]
    u, v = pair(state)
    move(state, (u[:, live].contiguous(), v[:, live].contiguous()), eye, eye)


def align(group: Options, state: State, p: Tensor) -> None:
    """Singular directions as of now, for a budget that is about to choose among them."""
    if "factor_u" in state and float(state["factor_age"]) > 0 and not group.get("differentiable", False):
        turn(state, group["time_scale"] == "saturated", None)
        write(state, p)


def cut(state: State, p: Tensor, gone: Tensor) -> None:
    """Drop the directions that are outside the budget."""
    _keep(state, ~gone[: state["factor_u"].shape[1]])
    write(state, p)
