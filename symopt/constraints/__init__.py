"""The constraints: one file each, one line here."""

from symopt.constraints.base import Constraint
from symopt.constraints.composed import Composed
from symopt.constraints.group import GroupSparse
from symopt.constraints.lowrank import LowRank
from symopt.constraints.sparse import Sparse

CONSTRAINTS: tuple[type[Constraint], ...] = (Sparse, GroupSparse, LowRank)
"""Every public constraint; the tests fail for one without a row in their table."""

__all__ = ["CONSTRAINTS", "Composed", "Constraint", "GroupSparse", "LowRank", "Sparse"]
