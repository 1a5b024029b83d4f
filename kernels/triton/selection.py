"""The k-th smallest size among the weights of any number of tensors, on the device: thresholds of budgets.

Sizes of floats are ordered as their bits are, so the answer is found digit by digit: 11, 10 and 10 bits, one pass over
memory each.  Every program counts its block in a histogram; whichever is last picks the digit, and the next pass
reads it where it was left, so that the host waits for nothing.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["rank"]

BLOCK = 4096


@triton.jit
def count(
    table, owners, counts, found, arrived, programs,
    SHIFT: tl.constexpr, BITS: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One digit.  ``found`` holds the bits known so far and how many of the remaining lie below the answer (k - 1)."""
    program = tl.program_id(0)
    entry = tl.load(owners + program)
    p = tl.load(table + 3 * entry).to(tl.pointer_type(tl.float32))
    at = (program - tl.load(table + 3 * entry + 2)) * BLOCK + tl.arange(0, BLOCK)
    mask = at < tl.load(table + 3 * entry + 1)
    key = tl.load(p + at, mask=mask, other=0.0).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    known = tl.load(found).to(tl.int32)
    mask = mask & ((key >> (SHIFT + BITS)) == (known >> (SHIFT + BITS)))
    digit = (key >> SHIFT) & ((1 << BITS) - 1)
    bins = tl.arange(0, 1 << BITS)
    mine = tl.histogram(digit, 1 << BITS, mask=mask)
    tl.atomic_add(counts + bins, mine.to(tl.int64), mask=mine > 0, sem="relaxed")
    tl.debug_barrier()
    if tl.atomic_add(arrived, 1, sem="acq_rel") == programs - 1:
        tl.debug_barrier()
        k = tl.load(found + 1)
        many = tl.load(counts + bins, cache_modifier=".cg")
        upto = tl.cumsum(many, 0)
        bucket = tl.minimum(tl.sum((upto <= k).to(tl.int32), 0), (1 << BITS) - 1)
        below = tl.sum(tl.where(bins == bucket, upto - many, 0), 0)
        known = known | (bucket << SHIFT)
        tl.store(found, known.to(tl.int64))
        tl.store(found + 1, k - below)
        tl.store(counts + bins, tl.zeros((1 << BITS,), tl.int64))
        tl.store(arrived, 0)
        if LAST:
            tl.store((found + 2).to(tl.pointer_type(tl.float32)), known.to(tl.float32, bitcast=True))


def rank(tensors: Sequence[Tensor], k: int | Tensor) -> Tensor:
    """The ``k``-th smallest size, counted from 1, among all elements of dense fp32 tensors of one device.

    A 0-dim tensor on that device; ``k`` may be one too.  NaN counts as largest, as in ``native.rank``.
    """
    device = tensors[0].device
    rows: list[int] = []
    owners: list[int] = []
    for i, t in enumerate(tensors):
        rows += [t.data_ptr(), t.numel(), len(owners)]
        owners += [i] * -(-t.numel() // BLOCK)
    table = torch.tensor(rows, dtype=torch.int64).to(device)
    where = torch.tensor(owners, dtype=torch.int32).to(device)
    found = torch.zeros(3, dtype=torch.int64, device=device)
    found[1] = k - 1
    counts = torch.zeros(1 << 11, dtype=torch.int64, device=device)
    arrived = torch.zeros(1, dtype=torch.int32, device=device)
    for shift, bits in ((20, 11), (10, 10), (0, 10)):
        count[(len(owners),)](
            table, where, counts, found, arrived, len(owners), SHIFT=shift, BITS=bits, LAST=shift == 0, BLOCK=BLOCK,
            num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
    return found.view(torch.float32)[4]
