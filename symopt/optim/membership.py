"""Membership: which binding each parameter of an optimizer belongs to, looked up again when a constraint changes."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

from torch import Tensor

from symopt.optim import registry
from symopt.optim.binding import Binding
from symopt.optim.direction import Direction, Options, ParamGroup

__all__ = ["GroupBindings", "Membership"]


@final
@dataclass(frozen=True, eq=False)
class GroupBindings:
    """The bindings of one param group, as it was when this was looked up."""

    owner: str
    """Name of the optimizer, for messages."""
    params: tuple[Tensor, ...]
    bindings: tuple[Binding, ...]
    """Constrained parameters, each binding once."""
    unconstrained: tuple[Binding, ...]
    """One for each of the others."""


@final
class Membership:
    """Parameter -> binding, for all param groups of one optimizer."""

    def __init__(self, owner: str, direction: Direction, bindings: dict[Tensor, Binding] | None = None) -> None:
        self.owner, self.direction = owner, direction
        self.bindings: dict[Tensor, Binding] = {} if bindings is None else bindings
        """Of every parameter, also of unconstrained ones."""
        self.parameters = list(self.bindings)
        self._groups: dict[int, GroupBindings] = {}
        self._epoch = -1
        self._owned: set[int] = set()
        self._stepped = False

    @property
    def complete(self) -> bool:
        """Whether parameters have been looked up at all."""
        return self._epoch >= 0

    @property
    def constrained(self) -> bool:
        """Whether any parameter is."""
        return any(binding.constraint is not None for binding in self.bindings.values())

    def binding(self, p: Tensor, param_groups: list[ParamGroup]) -> Binding:
        """That of a parameter."""
        if self._epoch != registry.changes.count or p not in self.bindings:
            self.look_up(param_groups)
        return self.bindings[p]

    def of(self, group: Options, param_groups: list[ParamGroup]) -> GroupBindings:
        """Those of one of the param groups, looked up again if it was edited or a constraint has come or gone."""
        if not self._stepped and any(p.grad is not None for p in group["params"]):
            self.look_up(param_groups)
            registry.check(self, self._owned, stepping=True)
            self._stepped = True
        epoch, found, params = registry.changes.count, self._groups.get(id(group)), group["params"]
        current = found is not None and self._epoch == epoch and len(params) == len(found.params)
        if found is None or not current or not all(map(operator.is_, params, found.params)):
            self.look_up(param_groups)
            found = self._groups[id(group)]
        return found

    def look_up(self, param_groups: Iterable[ParamGroup]) -> None:
        """Ask the registry again; parameters that it no longer knows keep the constraint they had.

        Raises:
            ValueError: if a parameter is a factor of explicit mode, cannot be stepped under its constraint, has two,
                has lost it with its module, or shares it with one that is in no param group or another.
        """
        param_groups = list(param_groups)
        mine = {id(p) for group in param_groups for p in group["params"]}
        if mine != self._owned:
            registry.check(self, mine, stepping=False)
        known, factors = registry.bindings(mine), registry.factors()
        found: dict[Tensor, Binding] = {}
        groups: dict[int, GroupBindings] = {}
        for group in param_groups:
            names = group.get("param_names", ["a parameter"] * len(group["params"]))
            own: dict[int, Binding] = {}
            in_group = set(map(id, group["params"]))
            for p, name in zip(group["params"], names, strict=True):
                if id(p) in factors:
                    raise ValueError(
                        f"{self.owner}: the parameters hold factors of an explicit constraint, which this "
                        "optimizer would constrain twice; use torch.optim with symopt.param_groups(model), or "
                        "constrain(..., mode='optimizer')"
                    )
                if (binding := found.get(p)) is None:
                    binding = self._binding(p, name, known.get(id(p)))
                    if binding.constraint is not None:
                        self._check(binding, group, p, in_group)
                    found.update(dict.fromkeys(binding.parameters, binding))
                own[id(binding)] = binding
            bound = tuple(b for b in own.values() if b.constraint is not None)
            rest = tuple(b for b in own.values() if b.constraint is None)
            groups[id(group)] = GroupBindings(self.owner, tuple(group["params"]), bound, rest)
        self.bindings, self._groups, self._epoch = found, groups, registry.changes.count
        self.parameters = list(found)
        self._owned = mine

    def _binding(self, p: Tensor, name: str, now: Binding | None) -> Binding:
        """``now`` is what the registry knows; the binding of before if that is the same, with what it has cached."""
        before = self.bindings.get(p)
        if now is None:
            return Binding(None, (name,), (p,)) if before is None else before
        return before if before is not None and before.same(now) else now

    def _check(self, binding: Binding, group: Options, p: Tensor, in_group: set[int]) -> None:
        """Raise if the group, which holds the parameters ``in_group``, cannot step the binding."""
        constraint, direction = binding.constraint, self.direction
        assert constraint is not None
        name = binding.name(p)
        if (reason := direction.why_not(group, constraint)) is not None:
            raise ValueError(f"{name}: {reason}")
        if direction.sided and not all(map(constraint.one_sided, binding.parameters)):
            raise ValueError(
                f"{name}: {self.owner} orthogonalises the update of the whole matrix, which only commutes with "
                f"reflections of whole rows or columns, and {constraint} is none; constrain rows, columns or heads, or "
                "use symopt.AdamW for this parameter"
            )
        parameters = zip(binding.names, binding.parameters, strict=True)
        lacking = [other for other, q in parameters if id(q) not in in_group]
        lacking += binding.missing
        if lacking:
            raise ValueError(
                f"{self.owner}: {name} shares a constraint with {lacking[0]}, which is not in its param group; give "
                "both to one group, as symopt.param_groups(model) does"
            )

    def forget(self, p: Tensor) -> None:
        """Treat a parameter as unconstrained from now on."""
        binding = self.bindings[p]
        name = binding.name(p)
        self.bindings[p] = Binding(None, (name,), (p,))
        self._groups.clear()
