"""A module's parameters as they are now, by name, by identity and by constraint."""

from __future__ import annotations

from typing import final

from torch import Tensor, nn
from torch.nn.utils import parametrize

from symopt.constraints import Constraint
from symopt.module.annotation import Annotation, annotated
from symopt.module.patterns import named
from symopt.module.roles import Named

__all__ = ["Tree", "computes"]


@final
class Tree:
    """One look at ``root``."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.prefixes = {id(sub): prefix for prefix, sub in root.named_modules()}
        self.named = named(root)
        self.by_name = {parameter[0]: parameter for parameter in self.named}
        self.by_id: dict[int, Named] = {}
        for parameter in self.named:
            self.by_id.setdefault(id(parameter[3]), parameter)

    def place(self, owner: nn.Module, attribute: str) -> Named | None:
        """The parameter that a module of the tree has under this name."""
        prefix = self.prefixes[id(owner)]
        return self.by_name.get(f"{prefix}.{attribute}" if prefix else attribute)

    def moved(self, name: str, p: Tensor | None) -> Named | None:
        """Where a parameter of a module that has left the tree is: itself, or else what has its name."""
        same = self.by_name.get(name)
        if p is None or (same is not None and same[3] is p):
            return same
        return self.by_id.get(id(p), same)

    def module_of(self, name: str) -> nn.Module | None:
        """The module that has, or would have, a parameter of this name."""
        try:
            return self.root.get_submodule(name.rpartition(".")[0])
        except AttributeError:
            return None

    def annotation(self, place: Named) -> Annotation | None:
        """What is written down for a parameter."""
        return next((found for name, found, _ in annotated(place[1]) if name == place[2]), None)

    def bound(self) -> set[int]:
        """``id`` of every constrained parameter."""
        return {id(found.parameter(i)) for sub in self.root.modules() for _, found, i in annotated(sub)}

    def pools(self) -> list[tuple[Constraint, list[tuple[str, Tensor]]]]:
        """Every budget that is shared, with the names and the parameters that share it."""
        shared: dict[Constraint, dict[int, tuple[str, Tensor]]] = {}
        for prefix, sub in self.root.named_modules():
            for attribute, found, i in annotated(sub):
                constraint, p = found.constraint, found.parameter(i)
                if p is not None and constraint.budget is not None and constraint.budget.scope != "tensor":
                    parameters = shared.setdefault(constraint.shared_budget(), {})
                    parameters.setdefault(id(p), (f"{prefix}.{attribute}" if prefix else attribute, p))
        return [(constraint, list(parameters.values())) for constraint, parameters in shared.items()]


def computes(module: nn.Module, attribute: str) -> bool:
    """Whether a module computes what is no parameter of it: by a parametrization, pruning, weight_norm, ..."""
    if parametrize.is_parametrized(module, attribute):
        return True
    return module._parameters.get(attribute) is None and isinstance(getattr(module, attribute, None), Tensor)
