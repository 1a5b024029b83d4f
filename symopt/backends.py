"""Which kernel steps which tensor: the best one that can, and for every other the reason why not.

``reference`` is readable torch code and can step everything.  ``native`` is the fused C++ step on CPUs.  On a CPU it is
the faster of the two at every size, a single weight included (a tenth of its time there), so what can run natively
does.  ``triton`` is the same on GPUs.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile
from typing import Protocol

import torch
from torch import Tensor

from symopt.constraints import Constraint
from symopt_kernels.backend import Backend, Request
from symopt_kernels.native import binding as native
from symopt_kernels.native.capability import NATIVE
from symopt_kernels.triton import launch as triton

__all__ = ["BACKENDS", "FUSED", "check_backend", "choose", "explain", "fused_product", "why_not"]

BACKENDS = ("native", "triton", "reference")
"""Best first."""

FUSED = BACKENDS[:-1]
"""Those that step unconstrained tensors too, if asked for by name."""


_BACKENDS: dict[str, Backend] = {"native": NATIVE, "triton": triton.BACKEND}


class Explained(Protocol):
    """What :func:`explain` needs of an optimizer."""

    def backends(self) -> Iterable[tuple[str, str, dict[str, str | None]]]: ...


def check_backend(owner: str, backend: object) -> None:
    """Raise unless ``backend`` is None or the name of one."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"{owner}: backend must be None or one of {BACKENDS}, got {backend!r}")


def why_not(backend: str, request: Request) -> str | None:
    """Why ``backend`` cannot step what is requested, or None if it can."""
    if backend == "reference":
        return None
    return _BACKENDS[backend].why_not(request)


def fused_product(constraint: Constraint, tensors: tuple[Tensor, ...]) -> bool:
    """Whether the fused product of explicit mode knows these factors (and the gradient of their product)."""
    first = tensors[0]
    if not constraint.is_product or why_not("triton", Request("sgd", "plain", (first,))) is not None:
        return False
    same = all(t.stride() == first.stride() and t.dtype == first.dtype and t.shape == first.shape for t in tensors)
    return same and not torch._C._are_functorch_transforms_active()


def choose(requested: str | None, name: str, reasons: dict[str, str | None]) -> str:
    """The first backend that can; an explicitly requested one or an error, never another."""
    if requested is None:
        return next(backend for backend, reason in reasons.items() if reason is None)
    if (reason := reasons[requested]) is not None:
        raise ValueError(f"{name}: backend={requested!r} cannot step it: {reason}; use backend=None for one that can")
    return requested


def explain(optimizer: Explained) -> str:
    """Say which backend each tensor of a symopt optimizer gets, and why not a better one.

    Unconstrained tensors take torch's own code (``foreach`` and ``fused`` mean what they mean there), unless the group
    names one of the fused backends.

    Raises:
        TypeError: if ``optimizer`` is not symopt's.

    Example:
        >>> import torch, symopt
        >>> net = symopt.constrain(torch.nn.Linear(3, 2), {"weight": symopt.Sparse(depth=3)})
        >>> print(symopt.explain(symopt.AdamW(net)))  # doctest: +ELLIPSIS
        weight  reference  native: ...
        bias    torch      no constraint
        ...
    """
    if not hasattr(optimizer, "backends"):
        raise TypeError(f"explain: expected an optimizer of symopt, got {type(optimizer).__name__}")
    rows = []
    for name, backend, reasons in optimizer.backends():
        better = reasons if backend == "torch" else dict(takewhile(lambda item: item[1] is not None, reasons.items()))
        rows.append((name, backend, "; ".join(f"{k}: {v}" if v else k for k, v in better.items())))
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    lines = [f"{name:{widths[0]}}  {backend:{widths[1]}}  {why}".rstrip() for name, backend, why in rows]
    if native.UNAVAILABLE is None:
        lines.append(f"native: {native.INSTRUCTIONS[-1]} instructions, {native.THREADS}")
    return "\n".join(lines)
