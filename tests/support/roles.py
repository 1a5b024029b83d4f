"""State as torch names it, as the fused kernels take it: moments under their roles."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

ROLES = {"exp_avg": "first", "momentum_buffer": "first", "exp_avg_sq": "second", "max_exp_avg_sq": "peak"}


def roles(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {ROLES.get(key, key): value for key, value in state.items()}
