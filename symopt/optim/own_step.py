"""OwnStep: a constraint that is not stepped by a retraction of the weight, but has state and a step of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from symopt.constraints import Constraint
from symopt.optim.binding import Binding
from symopt.optim.direction import Direction, Options, State

__all__ = ["OwnStep", "own_step", "register"]


class OwnStep(ABC):
    """Abstract, stateless."""

    @abstractmethod
    def ready(self, binding: Binding, direction: Direction, options: Options, state: State) -> None:
        """Complete the state."""

    @abstractmethod
    def step(
        self, binding: Binding, direction: Direction, options: Options, state: State, grad_scale: Tensor | None
    ) -> None:
        """One step of the parameter and of its state."""

    @abstractmethod
    def known_gain(
        self, binding: Binding, direction: Direction, options: Options, state: State
    ) -> Tensor | float | None:
        """What multiplies ``lr * strength``; None before the first step if it depends on the gradient."""

    @abstractmethod
    def per_weight(self, direction: Direction, state: State, p: Tensor) -> dict[str, Tensor]:
        """The moments as a plain optimizer of the weight would have them."""

    @abstractmethod
    def saved(self, constraint: Constraint, state: State, p: Tensor) -> dict[str, Tensor]:
        """What a checkpoint has in place of state whose shape changes, so that all of one weight have one shape."""

    @abstractmethod
    def loaded(self, state: State) -> None:
        """Undo :meth:`saved`, in place."""

    @abstractmethod
    def sizes(self, constraint: Constraint, state: State, p: Tensor) -> Tensor:
        """Size of every unit, for a budget."""

    @abstractmethod
    def align(self, options: Options, state: State, p: Tensor) -> None:
        """Bring the units up to date before a budget chooses among them."""

    @abstractmethod
    def prune(self, constraint: Constraint, state: State, p: Tensor, pruned: Tensor) -> None:
        """Remove units at a commit."""

    @abstractmethod
    def owns(self, key: str) -> bool:
        """Whether a state key is its own."""


_OWN: dict[str, OwnStep] = {}


def register(retraction: str, step: OwnStep) -> None:
    """Let constraints with this row be stepped by ``step``."""
    _OWN[retraction] = step


def own_step(constraint: Constraint) -> OwnStep | None:
    """What steps ``constraint``; None where its retraction does."""
    return _OWN.get(constraint.retraction)
