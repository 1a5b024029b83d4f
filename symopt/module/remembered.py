"""What :func:`symopt.constrain` was told, so that a weight that loses its constraint gets it back, or is named.

A constraint is written on the modules that own its parameters (:mod:`symopt.module.annotation`), so it goes with a
module that is replaced: ``net[2] = nn.Linear(...)``, quantisation, ``SyncBatchNorm``.  A :class:`Remembered` on the
module that ``constrain`` was called on knows what was bound; optimizers ask it when they are built and in their first
step, everything else by :func:`check`.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Set
from typing import final

from torch import Tensor, nn

from symopt.constraints import Constraint
from symopt.module.annotation import REMEMBERED, Annotation, Seen, guard_of
from symopt.module.explicit import Factorised, explicit
from symopt.module.patterns import KeyTable, Match, Rows
from symopt.module.tree import Tree
from symopt.module.whereabouts import followed, now
from symopt.optim import registry
from symopt.optim.callers import callers_level

__all__ = ["Remembered", "check", "find", "forget", "remember"]


@final
class Remembered:
    """Everything that ``constrain`` was told about ``root``."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.calls: list[Rows] = []
        self.annotations: list[Annotation] = []
        self.factorised: list[Factorised] = []
        self.left: set[str] = set()
        """Names of parameters that are meant to be free."""
        self.told: set[str] = set()
        """Names of parameters that were warned about."""
        registry.remember(self)

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        registry.remember(self)

    def add(self, match: Match, factorised: list[Factorised]) -> None:
        """One call; of earlier ones that is given up which has lost its module where this says something new."""
        self.calls.append(match.rows)
        bound = {name for annotation in match.annotations for name in annotation.names}
        self.left = (self.left | match.left) - bound
        self.factorised = [f for f in self.factorised if bound.isdisjoint(f.names)] + factorised
        self.annotations += [] if factorised else match.annotations

    # -- looking -----------------------------------------------------------------------------------------------------

    def check(self, holder: registry.Holder, owned: Set[int], *, stepping: bool) -> None:
        """See :func:`symopt.optim.registry.check`."""
        before = {id(a.parameter(i)) for a in self.annotations for i in range(len(a.names))}
        tree = Tree(self.root)
        if owned.isdisjoint(before) and owned.isdisjoint(tree.by_id):
            return
        self._say(tree, owned, holder)
        for annotation in self.annotations:
            for i, name in enumerate(annotation.names):
                p = annotation.parameter(i)
                if p is None or (i in annotation.seen and annotation.seen[i].gathered(p)):
                    continue
                if id(p) in owned:
                    annotation.seen[i] = Seen(p, holder)
                elif stepping and annotation.seen_by(holder, i) in owned:
                    raise ValueError(
                        f"{holder.owner}: {name} was replaced after the optimizer was built, which would train the "
                        "parameter of before; build the optimizer anew"
                    )
        for constraint, parameters in tree.pools():
            mine = [name for name, p in parameters if id(p) in owned]
            lacking = [(name, p) for name, p in parameters if id(p) not in owned]
            if not mine or not lacking:
                continue
            others = [type(o).__name__ for o in registry.owners() for _, p in lacking if o.owns(p)]
            if others or stepping:
                where = f"another optimizer ({others[0]})" if others else "no optimizer"
                raise ValueError(_divided(holder.owner, mine, [name for name, _ in lacking], constraint, where))

    def say(self) -> None:
        """Bind what can be bound again; warn or raise about all else."""
        self._say(Tree(self.root), None, None)

    def find(self) -> None:
        """Bind what can be bound again, and say nothing of the rest."""
        self.rebind(Tree(self.root))

    def _say(self, tree: Tree, owned: Set[int] | None, holder: registry.Holder | None) -> None:
        errors, gone = self.rebind(tree, holder)
        if errors:
            raise ValueError(errors[0])
        told = [_gone(", ".join(a.names), a.constraint, a.key) for a in gone]
        self.annotations = [a for a in self.annotations if a not in gone]
        for annotation in gone:
            if all(id(owner) in tree.prefixes for owner in annotation.owners):
                annotation.retire()
        told += [_gone_explicit(f) for f in self._unfactorised(tree)]
        for name, key, constraint, p in self._added(tree):
            if name not in self.told and (owned is None or id(p) in owned):
                self.told.add(name)
                told.append(
                    f"{name} matches the key {key!r} of symopt.constrain but was added later, so nothing constrains "
                    f"it; write symopt.constrain(module, {{{name!r}: {constraint}}}) to constrain it, or "
                    f"{{{name!r}: None}} to leave it free"
                )
        for text in told:
            warnings.warn(text, stacklevel=callers_level())

    def rebind(self, tree: Tree, holder: registry.Holder | None = None) -> tuple[list[str], list[Annotation]]:
        """Bind what can be bound again; what is wrong with others, and what has nothing to bind."""
        errors, gone, kept = list[str](), list[Annotation](), list[Annotation]()
        for annotation in self.annotations:
            if annotation.released:
                self.left.update(annotation.names)
                continue
            superseded, by = self._superseded(tree, annotation)
            if superseded:
                kept += [] if by is None or by.names != annotation.names or by in kept else [by]
                continue
            kept.append(annotation)
            if holder is not None and followed(annotation, holder):
                continue
            found = [now(tree, annotation, i) for i in range(len(annotation.names))]
            wrong = [f for f in found if isinstance(f, str)]
            places = [f for f in found if isinstance(f, tuple)]
            if wrong:
                errors.append(wrong[0])
            elif not places:
                gone.append(annotation)
            elif len(places) < len(found):
                missing = annotation.names[found.index(None)]
                errors.append(
                    f"{places[0][0]} shares a constraint with {missing}, which is no parameter of the module any more; "
                    "call symopt.release(module) and constrain what is left"
                )
            elif all(owner is place[1] for owner, place in zip(annotation.owners, places, strict=True)):
                annotation.names = tuple(name for name, *_ in places)
            else:
                kept[-1] = annotation.replace(places)
        if self.annotations and not kept:
            self.calls.clear()  # everything was released
        self.annotations = kept
        return errors, gone

    def _superseded(self, tree: Tree, annotation: Annotation) -> tuple[bool, Annotation | None]:
        """Whether it is said what is meant for the parameter that took this one's place, and by which constraint."""
        if len(annotation.names) > 1 or id(annotation.owners[0]) in tree.prefixes:
            return False, None
        place = tree.moved(annotation.names[0], annotation.parameter(0))
        by = None if place is None else tree.annotation(place)
        by = None if by is annotation else by
        return by is not None or annotation.names[0] in self.left, by

    def _added(self, tree: Tree) -> Iterator[tuple[str, str, Constraint, Tensor]]:
        """Parameters that a pattern selects and nothing constrains, with the key and its constraint."""
        bound = tree.bound()
        calls = [KeyTable(rows) for rows in reversed(self.calls)]
        for name, _, _, p in tree.named:
            if id(p) in bound or name in self.left or not p.requires_grad or "parametrizations" in name.split("."):
                continue
            if isinstance(p, nn.parameter.UninitializedParameter) or not p.is_floating_point():
                continue
            found = next(((call, first) for call in calls if (first := call.first(name, p)) is not None), None)
            if found is not None:
                call, (row, place) = found
                keys, constraint = call.rows[row]
                if constraint is not None:
                    yield name, keys[place], constraint, p

    def _unfactorised(self, tree: Tree) -> list[Factorised]:
        """Explicit constraints whose parametrization is gone; each once."""
        present = Counter(id(how.written) for sub in tree.root.modules() for _, _, how in explicit(sub))
        for f in self.factorised:
            if f.released:
                self.left.update(f.names)
        existing = [f for f in self.factorised if not f.released]
        self.factorised = [f for f in existing if present[id(f)] == len(f.names)]
        gone = [f for f in existing if present[id(f)] != len(f.names)]
        self.told.update(name for f in gone for name in f.names)
        return gone


def _gone(names: str, constraint: Constraint, key: str) -> str:
    return (
        f"{names}: the module has no such parameter any more, so {constraint} (key {key!r} of symopt.constrain) binds "
        "nothing; if it has another name now, write symopt.constrain(module, {'that name': ...})"
    )


def _gone_explicit(gone: Factorised) -> str:
    names = ", ".join(gone.names)
    return (
        f"{names}: the module has no factors of {gone.constraint} any more, which symopt.constrain(..., "
        "mode='explicit') had made, so nothing constrains it; constrain it anew and build the optimizer after that, or "
        "release it before its layer is replaced"
    )


def _divided(owner: str, mine: list[str], lacking: list[str], constraint: Constraint, where: str) -> str:
    """What is wrong with a budget of which an optimizer has a part only."""
    return (
        f"{owner}: {', '.join(mine)} and {', '.join(lacking)} share one budget, {constraint}, but {lacking[0]} is in "
        f"{where}, so the part that {owner} has would keep all of it; give all of them to one optimizer, in any of its "
        "param groups, or give each part a budget of its own"
    )


# ------------------------------------------------------------------------------------------------ by module


def remember(module: nn.Module, match: Match, factorised: list[Factorised]) -> None:
    """Keep what ``constrain`` was told about ``module``."""
    memory = vars(module).get(REMEMBERED)
    if not isinstance(memory, Remembered) or memory.root is not module:  # a shallow copy has that of the original
        memory = vars(module)[REMEMBERED] = Remembered(module)
    memory.add(match, factorised)
    guard = guard_of(module)
    if guard is not None:
        guard.memory = memory


def forget(module: nn.Module) -> None:
    """Release what is remembered of ``module`` and its submodules."""
    for memory in _within(module):
        for annotation in memory.annotations:
            if not annotation.released:
                annotation.release()
    for sub in module.modules():
        vars(sub).pop(REMEMBERED, None)


def find(module: nn.Module) -> None:
    """Bind what can be bound again under ``module``, and say nothing of the rest."""
    for memory in _within(module):
        memory.find()


def check(module: nn.Module) -> None:
    """Look whether everything that :func:`symopt.constrain` bound under ``module`` still binds what it should.

    A constraint whose module was replaced by one with a parameter of the same name and shape binds that from then on.
    Warns of weights that a pattern selects but were added later, and of constraints whose weight is gone.

    Raises:
        ValueError: if a constraint no longer fits its weight, a tensor has two, or optimizers divide a shared budget.

    Example:
        >>> import torch, symopt
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
        >>> _ = symopt.constrain(net, {"0.weight": symopt.Sparse()})
        >>> net[0] = torch.nn.Linear(4, 3)
        >>> check(net)
        >>> symopt.constraints(net)
        {'0.weight': Sparse()}
    """
    memories = _within(module)
    above = [m for m in registry.memories() if isinstance(m, Remembered) and m not in memories]
    memories += [m for m in above if any(sub is module for sub in m.root.modules())]
    for memory in memories:
        memory.say()
    tree = Tree(module)
    registry.bindings(tree.by_id)
    for constraint, parameters in tree.pools():
        parts = [(type(o).__name__, [n for n, p in parameters if o.owns(p)]) for o in registry.owners()]
        parts = [(owner, names) for owner, names in parts if names]
        if len(parts) > 1 and all(len(names) < len(parameters) for _, names in parts):
            lacking = [name for name, _ in parameters if name not in parts[0][1]]
            raise ValueError(_divided(*parts[0], lacking, constraint, "another optimizer"))


def _within(module: nn.Module) -> list[Remembered]:
    for sub in module.modules():
        guard = guard_of(sub)
        memory = None if guard is None else guard.memory
        if not isinstance(memory, Remembered) or vars(sub).get(REMEMBERED) is memory:
            continue
        if not any(inner is memory.root for inner in sub.modules()):
            memory.root = sub  # the hooks of the root were moved here, as quantisation does
            vars(sub)[REMEMBERED] = memory
    found = (vars(sub).get(REMEMBERED) for sub in module.modules())
    return [memory for memory in found if isinstance(memory, Remembered)]
