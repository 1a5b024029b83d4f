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
from symopt_kernels.triton import launch as triton

__all__ = ["BACKENDS", "FUSED", "check_backend", "choose", "explain", "fused_product", "why_not"]

BACKENDS = ("native", "triton", "reference")
"""Best first."""

FUSED = BACKENDS[:-1]
"""Those that step unconstrained tensors too, if asked for by name."""


_R = ("plain", "sparse", "nm", "sparse_free", "group", "orbit", "centred", "basis")


class _Interim(Backend):
    def refuses(self, request: Request) -> str | None:
        for p in request.weights:
            reason = self._one(request, p)
            if reason:
                return reason
        return None

    def _one(self, request: Request, p: Tensor) -> str | None:
        groups, backend = request.groups if len(request.weights) == 1 else None, self.name
        all_groups = request.groups
        plane = request.retraction in ("orbit", "centred", "basis")
        if backend == "native" and p.device.type != "cpu":
            return f"it runs on CPUs, the tensor is on {p.device}"
        if backend == "triton" and p.device.type != ("cpu" if triton.INTERPRETED else "cuda"):
            return f"it runs on GPUs, the tensor is on {p.device}"
        if plane and not p.is_contiguous():
            return f"strides {p.stride()} of shape {tuple(p.shape)} are not those of a contiguous tensor"
        pattern = request.pattern
        if pattern and p.stride(1) != 1:
            return f"the {pattern[0]}:{pattern[1]} neighbours do not lie side by side (channels_last would place them so)"
        if pattern and backend == "triton" and pattern[1] not in triton.PATTERNS:
            return f"it knows N:M with M in {triton.PATTERNS}, not {pattern[0]}:{pattern[1]}"
        gathered = request.retraction == "orbit" and all_groups is not None and all_groups.index is not None
        if gathered and p.numel() >= 2**31:
            return f"its index of equal weights ends at 2**31, the tensor has {p.numel()}"
        if gathered and backend == "triton" and groups is not None and p.numel() > 64 * groups.count:
            return f"orbits of more than {64} weights leave a GPU too few to step side by side"
        if backend == "triton" and not gathered and groups is not None and groups.index is not None:
            return "it knows groups that are a view of the weight, not an index map"
        if p.data_ptr() % p.element_size():
            return "the tensor's memory is not aligned to its element size"
        if native.layout(p) is None:
            return f"strides {p.stride()} of shape {tuple(p.shape)} are not those of a dense tensor"
        if groups is not None and native.layout(p, groups) is None:
            return f"strides {p.stride()} interleave the groups in memory"
        return None


def _rows(*more: str) -> frozenset[tuple[str, str]]:
    return frozenset((d, r) for d in ("sgd", "adam", "adamw") for r in (*_R, *more))


class _Native(_Interim):
    name, rows, dtypes = "native", _rows(), native.DTYPES
    unavailable = property(lambda self: native.UNAVAILABLE)


_BACKENDS: dict[str, Backend] = {"native": _Native(), "triton": triton.BACKEND}


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
