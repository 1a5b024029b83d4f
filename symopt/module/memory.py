"""Memory for the tensors that explicit mode makes anew in every step."""

from __future__ import annotations

import sys
from typing import final

import torch
from torch import Tensor, nn

__all__ = ["ReusedMemory"]


@final
class ReusedMemory:
    """Memory of large CPU tensors, used again when nothing else refers to it.

    Every step composes the weight and makes gradients of the factors anew.  On the CPU each such tensor is fresh memory
    from the system, whose page faults cost several times the arithmetic: at 4096 x 4096, 25 ms against 6 ms for
    ``u * v`` (``python -m benchmarks.studies.explicit_mode``).  A storage is used again only if this is the one
    reference to it, so the values that a graph, ``.grad`` or a view still needs stay.
    """

    large = 1 << 20

    def __init__(self, size: int) -> None:
        self.size, self.storages = size, list[torch.UntypedStorage]()

    def like(self, x: Tensor) -> Tensor | None:
        """Uninitialised memory of the shape of ``x``; None where torch's own allocation is as good."""
        nbytes = x.numel() * x.element_size()
        if nbytes < self.large or x.device.type != "cpu" or not x.is_contiguous() or not _counts_references(x):
            return None
        for storage in self.storages:
            # Python's references, too: the list, the loop and the call; a storage taken from a tensor is this object.
            free = torch._C._storage_Use_Count(storage._cdata) == 1 and sys.getrefcount(storage) <= 3
            if free and storage.nbytes() == nbytes:
                return torch.empty(0, dtype=x.dtype).set_(storage, 0, x.shape, x.stride())
        fresh = torch.empty(x.shape, dtype=x.dtype)
        self.storages = [*self.storages, fresh.untyped_storage()][-self.size :]
        return fresh

    def __reduce__(self) -> tuple[type[ReusedMemory], tuple[int]]:
        return ReusedMemory, (self.size,)


def _counts_references(x: Tensor) -> bool:
    plain = type(x) in (Tensor, nn.Parameter) and not torch._C._are_functorch_transforms_active()
    return plain and hasattr(torch._C, "_storage_Use_Count")
