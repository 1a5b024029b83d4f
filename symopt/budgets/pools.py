"""Budgets as exact selections: which units of a weight, or of several that share one budget, may live."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from symopt.budgets.selection import Threshold, largest_groups, largest_weights
from symopt.constraints import Constraint
from symopt.constraints.budget import Budget
from symopt_kernels.groups import Groups

__all__ = ["BudgetedWeight", "Pool", "pools"]


@dataclass(frozen=True, eq=False)
class BudgetedWeight:
    """A weight with a budget, in the precision it is stepped in."""

    name: str
    w: Tensor
    constraint: Constraint
    groups: Groups | None

    def sizes(self) -> Tensor:
        """Size of every unit, flat; a weight itself where its size is its absolute value."""
        return self.w if self.single else self.constraint.size(self.w, self.groups)

    @property
    def single(self) -> bool:
        """Whether every weight is its own unit."""
        return self.groups is None and self.constraint.spanning_units is None

    @property
    def units(self) -> int:
        spanning = self.constraint.spanning_units
        if spanning is not None:
            return spanning.count
        return self.w.numel() if self.groups is None else self.groups.count

    @property
    def live(self) -> int:
        """How many units are not zero."""
        return int(self.sizes().count_nonzero())

    @property
    def target(self) -> float:
        """Its budget as a number that another budget does not have: units if it is its own, else the pool's amount."""
        return self.budget.count(self.units) if self.budget.scope == "tensor" else float(self.budget.amount)

    @property
    def run(self) -> int:
        """Neighbours that compete in its pattern, or 0."""
        return 0 if self.budget.pattern is None else self.budget.pattern[1]

    @property
    def budget(self) -> Budget:
        found = self.constraint.budget
        assert found is not None
        return found

    @property
    def cost(self) -> int:
        """What a unit takes of the budget: 1, or its multiply-adds per example."""
        budget = self.budget
        return self.w.numel() // self.units * budget.positions if budget.scope == "flops" else 1


@dataclass(frozen=True)
class Pool:
    """Weights that share one budget: a single one, or all of a scope that is not ``"tensor"``."""

    weights: tuple[BudgetedWeight, ...]
    settled: tuple[BudgetedWeight, ...] = ()
    """Others that share it and whose support is committed: what lives of them is taken from it."""
    waiting: tuple[BudgetedWeight, ...] = ()
    """Others that share it and whose support is not chosen yet: one unit of each is left to them."""

    def __post_init__(self) -> None:
        every = (*self.weights, *self.settled, *self.waiting)
        units = sum(m.units * m.cost for m in every)
        if (
            self.budget.scope != "tensor" and self.budget.count(units) > units
        ):  # one tensor's is checked where it is bound
            raise ValueError(
                f"{self.weights[0].constraint!r}: {self.budget.count(units):g} units shall live, but "
                f"{', '.join(m.name for m in every)} have {units} in all; give at most {units}, or a share in (0, 1]; "
                "all that share it need one optimizer"
            )
        if self.pattern is None and self.count < self._least:
            names = ", ".join(m.name for m in self.weights)
            raise ValueError(
                f"{self.weights[0].constraint!r}: the budget ({self.count:g}) is less than one unit of each of {names} "
                f"takes ({self._least}); give a larger one or constrain fewer weights"
            )

    @property
    def budget(self) -> Budget:
        return self.weights[0].budget

    @property
    def pattern(self) -> tuple[int, int] | None:
        return self.budget.pattern

    @property
    def total(self) -> int:
        """What all units take, without the settled ones."""
        return sum(m.units * m.cost for m in self.weights)

    @property
    def _least(self) -> int:
        """What one unit of each member takes."""
        return sum(m.cost for m in self.weights)

    @property
    def count(self) -> float:
        """What the units that live in the end may take: their number, or multiply-adds."""
        others = (*self.settled, *self.waiting)
        taken = sum(m.live * m.cost for m in self.settled) + sum(m.cost for m in self.waiting)
        whole = self.budget.count(self.total + sum(m.units * m.cost for m in others))
        return max(whole - taken, self._least) if others else whole

    @property
    def live(self) -> int:
        """What the units that live now take."""
        return sum(m.live * m.cost for m in self.weights)

    @property
    def exceeded(self) -> bool:
        """Whether more lives than the budget has room for."""
        if self.pattern is not None:
            return any(
                bool((m.constraint.pruned(m.w, math.inf, m.groups) & (m.w.flatten() != 0)).any()) for m in self.weights
            )
        return self.live > self.count

    @property
    def short(self) -> bool:
        """Whether fewer live than the budget has room for; not judged where units differ in cost."""
        return self.pattern is None and self.budget.scope != "flops" and self.live < int(self.count)

    @property
    def met(self) -> bool:
        """Whether exactly the budget lives and something does not, as a commit leaves it."""
        live = self.live
        full = live == self.total or live <= self.count - max(m.cost for m in self.weights)
        return not full and not self.exceeded

    @property
    def share(self) -> float:
        """The same as a share."""
        return self.count / self.total

    def at(self, left: float) -> float:
        """The budget while a share ``left`` of all that is too much may still live."""
        return self.count + round((self.total - self.count) * left)

    def thresholds(self, keep: float) -> list[Threshold]:
        """Per weight the size up to which units are pruned if the pool may keep ``keep``; -1 where none is pruned.

        Kernels add up a group in another order than torch, so between groups the middle of two sizes is taken.
        """
        if self.pattern is not None:
            return [math.inf] * len(self.weights)
        if self.weights[0].single:
            return self._limits(int(keep))
        limits: list[Threshold] = []
        for m, kept in zip(self.weights, self._kept(keep), strict=True):
            sizes = m.sizes()
            middle = (sizes.masked_fill(kept, 0.0).max() + sizes.masked_fill(~kept, math.inf).min()) / 2
            limits.append(torch.where(kept.all(), -1.0, middle))
        return limits

    def _limits(self, keep: int) -> list[Threshold]:
        return largest_weights([m.w.detach() for m in self.weights], keep)

    def _kept(self, keep: float) -> list[Tensor]:
        """Per weight which groups live."""
        return largest_groups([m.sizes() for m in self.weights], [m.cost for m in self.weights], keep)

    def pruned(self) -> list[Tensor]:
        """Per weight which units must go so that exactly the budget lives; one truth value per unit, flat.

        Of units of the same size the first ones live.
        """
        if self.pattern is not None:
            return [m.constraint.pruned(m.w, math.inf, m.groups) for m in self.weights]
        if not self.weights[0].single:
            return [~kept for kept in self._kept(self.count)]
        limits = self._limits(int(self.count))
        sizes = [m.sizes().abs().flatten() for m in self.weights]
        kept = [s > t for s, t in zip(sizes, limits, strict=True)]
        spare = int(self.count) - sum(int(x.sum()) for x in kept)
        for mine, s, t in zip(kept, sizes, limits, strict=True):
            ties = (s == t).nonzero().flatten()[:spare]
            mine[ties] = True
            spare -= ties.numel()
        return [~x for x in kept]


def pools(
    weights: Iterable[BudgetedWeight],
    settled: Container[BudgetedWeight] = (),
    waiting: Container[BudgetedWeight] = (),
) -> list[Pool]:
    """Weights with equal constraints share a budget if its scope is not a tensor; every other has its own.

    Those that are ``settled`` or ``waiting`` stay as they are; a pool of which all are is left out.
    """
    shared: dict[Constraint, list[BudgetedWeight]] = {}
    alone: list[list[BudgetedWeight]] = []
    for m in weights:
        budget = m.constraint.budget
        if budget is not None and budget.scope != "tensor":
            shared.setdefault(m.constraint.shared_budget(), []).append(m)
        elif budget is not None:
            alone.append([m])
    found = []
    for sharing in (*alone, *shared.values()):
        closed, later = ([m for m in sharing if m in some] for some in (settled, waiting))
        open_ = [m for m in sharing if m not in settled and m not in waiting]
        if open_:
            found.append(Pool(tuple(open_), tuple(closed), tuple(later)))
    return found
