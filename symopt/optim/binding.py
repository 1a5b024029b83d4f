"""Binding: one constraint and the parameters it binds, as an optimizer steps them.

Several parameters under one constraint are seen as one flat vector; what belongs to each of them (its weight, gradient
and first moment) lies with it, in its shape, as torch keeps it, and what the binding has one of is one tensor that the
states of all refer to.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor

from symopt.constraints import Constraint
from symopt.constraints.planes.plane import flat, parts
from symopt.optim.direction import Direction, Options, State
from symopt_kernels.groups import Groups
from symopt_kernels.reference.gauge import AUTO_STRENGTH_MARGIN, math_dtype
from symopt_kernels.units import Units

__all__ = ["Binding", "shared_moment"]


@final
class Binding:
    """A constraint, or None where a fused backend steps an unconstrained parameter, and what it binds."""

    __slots__ = ("_groups", "biases", "combine", "constraint", "missing", "names", "parameters", "several", "units")

    def __init__(
        self,
        constraint: Constraint | None,
        names: tuple[str, ...],
        parameters: tuple[Tensor, ...],
        missing: tuple[str, ...] = (),
        biases: tuple[Tensor | None, ...] = (),
    ) -> None:
        self.constraint, self.names, self.parameters = constraint, names, parameters
        self.missing = missing
        """Names of parameters that the constraint binds but their modules no longer have."""
        self.biases = biases
        """Per parameter the bias of its rows in the same module, if that has one; or nothing."""
        self.combine: Callable[[Tensor], None] | None = None
        """Adds the sums of its units, ``(4, count)``, in place over the processes that hold some of the weights."""
        self.several = len(parameters) > 1
        """Whether it has more than one parameter."""
        spanning = None if constraint is None or not parameters else constraint.spanning_units
        self.units: Units | None = None if spanning is None else spanning.to(parameters[0].device)
        """Units that span several parameters; None of every other constraint."""
        self._groups: tuple[torch.Size, Groups] | None = None

    def __reduce__(self) -> tuple[type[Binding], tuple[object, ...]]:
        return Binding, (self.constraint, self.names, self.parameters, self.missing, self.biases)

    def name(self, p: Tensor) -> str:
        """The name of one of its parameters."""
        return self.names[self.place(p)]

    @property
    def constrained_by(self) -> Constraint:
        """The constraint, of a binding that has one."""
        assert self.constraint is not None
        return self.constraint

    def same(self, other: Binding) -> bool:
        """Whether ``other`` is the same constraint on the same parameters under the same names."""
        mine, theirs = (self.names, self.missing), (other.names, other.missing)
        return (
            self.constraint is other.constraint
            and mine == theirs
            and all(map(operator.is_, self.parameters, other.parameters))
            and len(self.biases) == len(other.biases)
            and all(map(operator.is_, self.biases, other.biases))
        )

    def place(self, p: Tensor) -> int:
        """The position of one of its parameters."""
        return next(i for i, q in enumerate(self.parameters) if q is p)

    @property
    def label(self) -> str:
        """Its names, for messages."""
        return ", ".join(self.names)

    def groups(self, state: State) -> Groups | None:
        """Which weights share one second moment, cached; an index map is the state tensor ``group_index``.

        Of several parameters they are those of the flat vector; None where every weight has its own, and for
        :attr:`units`.
        """
        if self.constraint is None or self.units is not None:
            return None
        if self.several:
            return self.constraint.partition(self.template())
        (p,), index = self.parameters, state.get("group_index")
        if self._groups is not None and self._groups[0] == p.shape and self._groups[1].index is index:
            return self._groups[1]
        found = self.constraint.partition(p.detach(), index)
        if found is not None and found.index is index:
            self._groups = p.shape, found
        return found

    def size(self, state: State) -> Tensor | None:
        """Number of weights of each unit that shares a second moment; None of single weights."""
        if self.units is not None:
            return self.units.sizes(self.parameters[0].detach().flatten()[:0].to(math_dtype(self.parameters[0])))
        groups = self.groups(state)
        return None if groups is None else groups.size(self.template())

    def moment_count(self, state: State) -> int | None:
        """Length of a second moment that units share; None where every weight has its own."""
        if self.units is not None:
            return self.units.count + self.units.unbound
        groups = self.groups(state)
        return None if groups is None else groups.count

    def template(self) -> Tensor:
        """A tensor of the flat vector's shape, without its values."""
        p = self.parameters[0]
        shape = (sum(q.numel() for q in self.parameters),) if self.several else p.shape
        return p.detach().new_empty(shape, dtype=math_dtype(p))

    def weight(self) -> Tensor:
        """What the constraint sees: the parameter, or several as one flat vector."""
        return flat(self.parameters).detach()

    def stepped_weight(self, states: Sequence[State]) -> Tensor:
        """The same in the precision it is stepped in."""
        return flat(tuple(state.get("master", p) for state, p in zip(states, self.parameters, strict=True)))

    def gradient(self, dtype: torch.dtype) -> Tensor:
        """The flat gradient; a parameter without one counts as zero, because the others move it all the same."""
        return flat(tuple(torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters)).to(dtype)

    def decoupled(self, direction: Direction, options: Options) -> bool:
        """Whether the strength bypasses the preconditioner; that of a budget always does."""
        budget = self.constraint is not None and self.constraint.budget is not None
        return budget or direction.decoupled(options)

    def automatic(self, options: Options) -> bool:
        """Whether the strength is the running estimate of what a plane needs."""
        constraint = self.constraint
        return (
            constraint is not None
            and constraint.is_plane
            and options["strength"] is None
            and constraint.strength is None
        )

    def strength(self, direction: Direction, options: Options, state: State) -> float | Tensor:
        """The strength in force: the group's, else the constraint's own, else its default for this direction.

        That of a plane is automatic: ``AUTO_STRENGTH_MARGIN`` times the running estimate in the parameter's ``state``
        of what it needs, which a step updates for the next; NaN before the first step.
        """
        constraint, given = self.constraint, options["strength"]
        assert constraint is not None
        if options.get("committed") and not constraint.is_plane:
            return 0.0
        if isinstance(given, (int, float, Tensor)):
            return given
        if constraint.strength is not None:
            return constraint.strength
        if constraint.budget is not None:
            return 0.0  # the schedule chooses
        if constraint.is_plane:
            critical = state.get("critical")
            return AUTO_STRENGTH_MARGIN * critical if isinstance(critical, Tensor) else math.nan
        return constraint.default_strength(decoupled=direction.decoupled(options))

    def preconditioner(self, direction: Direction, options: Options, state: State) -> Tensor | None:
        """The direction's, one number per unit whatever a checkpoint has brought."""
        shape = self.parameters[0].shape
        groups, units = None if self.several else self.groups(state), self.units

        def average(moment: Tensor) -> Tensor:
            if units is not None:  # one parameter's moments say nothing about the others'
                return moment[: units.count] if moment.dim() == 1 else moment.new_full((units.count,), math.nan)
            if groups is None or moment.shape != shape or shape == (groups.count,):
                return moment
            return shared_moment(moment, groups)

        return direction.preconditioner(options, state, average)

    def per_weight(self, direction: Direction, state: State, p: Tensor) -> dict[str, Tensor]:
        """The second moments of ``p`` that a unit shares, written out for every weight."""
        place = self.place(p)
        count, found = self.moment_count(state), dict[str, Tensor]()
        if count is None:
            return found
        units, groups = self.units, self.groups(state)
        for moment in direction.table:
            value = state.get(moment.key)
            if not moment.per_unit or not isinstance(value, Tensor) or value.shape != (count,):
                continue  # loaded ones are per weight until the first step
            if units is not None:
                found[moment.key] = units.write_out(value, place)
            else:
                assert groups is not None
                found[moment.key] = parts(groups.expand(value).flatten(), self.parameters)[place].contiguous()
        return found


def shared_moment(per_weight: Tensor, groups: Groups) -> Tensor:
    """Mean over each group, exact where all its weights are equal (so that saving and loading changes no bit)."""
    first = groups.first(per_weight)
    return first + groups.sum(per_weight - groups.expand(first).reshape(per_weight.shape)) / groups.size(per_weight)
