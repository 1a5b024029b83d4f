"""Slot: a binding as a step sees it, with everything that holds as long as state and options stay what they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

from torch import Tensor

from symopt.optim.binding import Binding
from symopt.optim.direction import Direction, Options, State
from symopt.optim.own_step import own_step
from symopt.optim.state import prepare, refresh

__all__ = ["Slot"]


@final
class Slot:
    """One binding, the complete states of its parameters, and the backend that steps them."""

    __slots__ = (
        *("_held", "_key", "_refreshes", "_volatile"),
        *("backend", "binding", "decoupled", "default", "direction", "groups", "has_budget", "own", "states"),
    )

    def __init__(
        self, binding: Binding, direction: Direction, options: Options, states: list[State], backend: str, key: object
    ) -> None:
        self.binding, self.direction, self.states, self.backend, self._key = binding, direction, states, backend, key
        prepare(binding, direction, options, states)
        constraint = binding.constraint
        self.groups = binding.groups(states[0])
        self.decoupled = binding.decoupled(direction, options)
        self.has_budget = constraint is not None and constraint.budget is not None
        self.own = None if constraint is None else own_step(constraint)
        self.default: float | None = None
        """The strength if neither the options nor the state say otherwise; None: a plane's, from the state."""
        if constraint is not None and (constraint.strength is not None or not constraint.is_plane):
            self.default = constraint.strength
            if self.default is None:
                decoupled = direction.decoupled(options)
                # That of a budget is chosen by its schedule.
                self.default = 0.0 if self.has_budget else constraint.default_strength(decoupled=decoupled)
        # State that a step replaces instead of writing to it has no address to hold on to.
        self._volatile = self.own is not None or bool(options.get("differentiable", False))
        self._refreshes = backend == "reference" and any("master" in state or "factor_0" in state for state in states)
        self.note()

    def note(self) -> None:
        """Remember where everything lies now."""
        self._held = [
            (
                p,
                (p.data_ptr(), p.shape, p.stride(), p.dtype),
                state,
                [x for x in state.items() if isinstance(x[1], Tensor)],
            )
            for p, state in zip(self.binding.parameters, self.states, strict=True)
        ]

    def lies(self, i: int) -> bool:
        """Whether one of its parameters still has the memory it had."""
        p, place, *_ = self._held[i]
        return p.data_ptr() == place[0]

    def holds(self, states: Mapping[Tensor, State], key: object) -> bool:
        """Whether everything still lies where it lay."""
        if key != self._key or self._volatile:
            return False
        for p, place, state, tensors in self._held:
            if (p.data_ptr(), p.shape, p.stride(), p.dtype) != place or states.get(p) is not state:
                return False
            if len(state) != len(tensors):
                return False
            for name, tensor in tensors:
                if state.get(name) is not tensor:
                    return False
        if self._refreshes:
            refresh(self.binding, self.states)
        return True

    def strength(self, options: Options) -> float | Tensor:
        """The strength in force: as :meth:`Binding.strength`, of which most is looked up once."""
        strength: float | Tensor | None = options["strength"]
        if options["committed"]:
            return self.binding.strength(self.direction, options, self.states[0])
        if strength is None:
            strength = self.default
        return self.binding.strength(self.direction, options, self.states[0]) if strength is None else strength
