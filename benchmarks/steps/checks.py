"""What must hold before anything is timed: a fast step that is wrong is not fast.

symopt's native step against its reference, and every peer that is the same method as another against that other, each
from the same start for a few steps with different gradients, on the very sizes that are timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.steps.cases import Case
from benchmarks.steps.peers import PEERS, Ours, Pat, Torch, Variant

__all__ = ["check", "check_native", "first_line", "tolerance"]

STEPS = 3
SCALE = 0.3
"""Of the gradients: a step moves a weight by some percent, so that a wrong step shows beside the weight's rounding."""

Found = list[tuple[str, Tensor]]
"""What a variant ends at: names and tensors."""


def tolerance(case: Case) -> float:
    """Largest difference allowed, relative to the weight plus the root mean square of its tensor.

    Both sides round the same formulas in a different order: a handful of roundings of relative size 2**-24 (fp32) per
    step, with the two terms of ``(rho**2 + delta**2) w - rho delta sqrt(c**2 + 4 w**2)`` and the two of a moment adding
    up to something smaller than each.  64 roundings leave room for that over three steps, and a wrong constant or a
    missed term is many thousands.  Weights stored in half precision may round to neighbouring values.
    """
    return 64 * {"float64": 2.0**-53}.get(case.dtype, 2.0**-24)


def check(case: Case, peers: list[str]) -> tuple[list[str], dict[str, str]]:
    """What is wrong with this case, and which peers cannot take part and why."""
    wrong: list[str] = []
    absent = {name: reason for name in peers if (reason := PEERS[name].why_not(case))}
    wrong += check_native(case)
    if wrong:
        return wrong, absent
    present = [name for name in peers if name not in absent]
    ends: dict[str, Found] = {}
    for name in present:
        if name == "reference":
            continue  # has been checked above
        try:
            ends[name] = _weights(_run(PEERS[name].build(case)))
        except Exception as error:  # whatever a peer raises is a reason to go on without it
            absent[name] = f"raises {first_line(error)}"
    for one, other in _same(ends):
        wrong += _compare(f"{one} against {other}", ends[one], ends[other], case)
    if case.optimizer == "sgd" and case.constraint == "sparse_free" and "explicit" in ends:
        literal = _weights(_run(Ours(case, time_scale="none")))
        wrong += _compare("native, time_scale='none', against explicit", literal, ends["explicit"], case)
    if "pat" in ends:
        wrong += _pat(case)
    return wrong, absent


def _same(ends: dict[str, Found]) -> Iterator[tuple[str, str]]:
    for one, other in (("torch-foreach", "torch-fused"), ("compiled", "parametrize"), ("parametrize", "explicit")):
        if one in ends and other in ends:
            yield one, other


def _run(variant: Variant, steps: int = STEPS) -> Variant:
    for i in range(steps):
        variant.give(variant.case.gradients(seed=100 + i, scale=SCALE))
        variant.arm()
        variant.step()
        variant.clear()
    return variant


def _weights(variant: Variant) -> Found:
    return [(f"weight {i}", w.clone()) for i, w in enumerate(variant.weights())]


def _everything(variant: Ours) -> Found:
    found = _weights(variant)
    for i, p in enumerate(variant.params):
        state = variant.opt.state[p]
        found += [(f"{key} of weight {i}", state[key].clone()) for key in sorted(state) if key != "step"]
    return found


def check_native(case: Case) -> list[str]:
    """The native step against the reference."""
    ends = []
    for backend in ("native", "reference"):
        variant = Ours(case, backend)
        try:
            _run(variant)
        except Exception as error:  # a crash of one case must not take the numbers of all others
            return [f"native against reference: {backend} raises {first_line(error)}"]
        ends.append(_everything(variant))
        del variant
    return _compare("native against reference", ends[0], ends[1], case)


def first_line(error: Exception) -> str:
    """Kind and first line of an error."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def _compare(what: str, ours: Found, theirs: Found, case: Case, allowed: float | None = None) -> list[str]:
    """One line for the worst difference, or none."""
    worst, line = 1.0, ""
    for (name, a), (other, b) in zip(ours, theirs, strict=True):
        if name != other or a.shape != b.shape or a.dtype != b.dtype:
            return [f"{what}: {name} {tuple(a.shape)} {a.dtype}, but {other} {tuple(b.shape)} {b.dtype}"]
        if torch.equal(a, b):
            continue
        limit = tolerance(case) if allowed is None else allowed
        if a.itemsize == 2:
            limit = max(limit, 2 * torch.finfo(a.dtype).eps)
        a, b = a.double(), b.double()
        excess = (a - b).abs() / (limit * (b.square().mean().sqrt() + b.abs()))
        most = float(excess.nan_to_num(nan=float("inf")).max())  # NaN is a difference
        if most > worst:
            worst, line = most, f"{what}: {name} differs by {most:.3g} times what rounding explains"
    return [line] if line else []


def _pat(case: Case) -> list[str]:
    """After its first step PAT's weights are the proximal map, with lr times the strength, of torch's step."""
    plain = Torch(case, foreach=True)
    expected = [(name, _prox(case)(w)) for name, w in _weights(_run(plain, 1))]
    # Thresholding subtracts two numbers of the weight's size: the same rounding, in the weight's own precision.
    eps = torch.finfo(case.torch_dtype).eps
    return _compare("pat against its formula", _weights(_run(Pat(case), 1)), expected, case, allowed=64 * eps)


def _prox(case: Case) -> Callable[[Tensor], Tensor]:
    threshold = Pat.threshold
    if not case.grouped:
        return lambda w: w * (1 - threshold / w.abs()).clamp(min=0)
    dim = 1 if case.constraint == "group-out" else 0
    return lambda w: w * (1 - threshold * w.shape[dim] ** 0.5 / w.norm(dim=dim, keepdim=True)).clamp(min=0)
