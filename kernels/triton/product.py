"""Explicit mode on GPUs: ``w = u_1 * ... * u_D`` and the gradients of all factors, one pass over memory each."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["compose", "pullback"]

BLOCK = 1024


@triton.jit
def product(factors, skip: tl.constexpr):
    p = factors[1 if skip == 0 else 0]
    for i in tl.static_range(2 if skip == 0 else 1, len(factors)):
        if i != skip:
            p = p * factors[i]
    return p


@triton.jit
def fetch(factors, at, mask):
    """All factors at once, before anything is stored: the compiler must not think that a store changed one."""
    values: Any = ()
    for i in tl.static_range(len(factors)):
        values = values + (tl.load(factors[i] + at, mask=mask, other=0.0).to(tl.float32),)  # noqa: RUF005
    return values


@triton.jit
def composes(out, factors, numel, BLOCK: tl.constexpr):
    """One block of the weight."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < numel
    tl.store(out + at, product(fetch(factors, at, mask), -1), mask=mask)


@triton.jit
def pulls_back(outs, factors, grad, strength, numel, BLOCK: tl.constexpr):
    """One block of all gradients."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < numel
    g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    values = fetch(factors, at, mask)
    for i in tl.static_range(len(factors)):
        mine = g * product(values, i)
        if strength is not None:
            mine = mine + strength * values[i]
        tl.store(outs[i] + at, mine, mask=mask)


def compose(factors: Sequence[Tensor]) -> Tensor:
    """Elementwise product of dense factors of equal strides."""
    out, n = torch.empty_like(factors[0]), factors[0].numel()
    composes[(triton.cdiv(n, BLOCK),)](out, tuple(factors), n, BLOCK=BLOCK, enable_fp_fusion=True)
    return out


def pullback(factors: Sequence[Tensor], grad: Tensor, strength: float | None = None) -> tuple[Tensor, ...]:
    """Gradients of the factors from that of the weight; with a ``strength`` plus its ``strength * factor`` each."""
    outs: Any = tuple(torch.empty_like(u) for u in factors)
    n = grad.numel()
    given = None if strength is None else float(strength)
    pulls_back[(triton.cdiv(n, BLOCK),)](outs, tuple(factors), grad, given, n, BLOCK=BLOCK, enable_fp_fusion=True)
    return outs  # type: ignore[no-any-return]
