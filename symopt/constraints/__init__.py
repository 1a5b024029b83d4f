"""The constraints: one file each (matrices share one), one line here."""

from symopt.constraints.base import Constraint
from symopt.constraints.composed import Composed
from symopt.constraints.group import GroupSparse
from symopt.constraints.group_bridge import GroupBridge
from symopt.constraints.lowrank import LowRank
from symopt.constraints.planes.circulant import Circulant
from symopt.constraints.planes.equivariant import Equivariant
from symopt.constraints.planes.mirror import Mirror
from symopt.constraints.planes.symmetric import Symmetric
from symopt.constraints.planes.tied import Tied
from symopt.constraints.planes.zero_mean import ZeroMean
from symopt.constraints.sparse import Sparse

CONSTRAINTS: tuple[type[Constraint], ...] = (
    *(Sparse, GroupSparse, GroupBridge, LowRank),
    *(Mirror, Tied, Symmetric, Circulant, Equivariant, ZeroMean),
)
"""Every public constraint; the tests fail for one without a row in their table."""

__all__ = [
    "CONSTRAINTS",
    "Circulant",
    "Composed",
    "Constraint",
    "Equivariant",
    "GroupBridge",
    "GroupSparse",
    "LowRank",
    "Mirror",
    "Sparse",
    "Symmetric",
    "Tied",
    "ZeroMean",
]
