"""What the constraints of a module bind, by name and as param groups."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from symopt.constraints import Constraint
from symopt.module.annotation import Annotation, annotated
from symopt.module.explicit import Explicit, explicit
from symopt.module.remembered import check, find

__all__ = ["annotated_bindings", "bindings", "check_module", "check_whole", "constraints", "free", "param_groups"]


def constraints(module: nn.Module) -> dict[str, Constraint]:
    """Qualified parameter name -> constraint, for everything :func:`constrain` bound under ``module``.

    Raises:
        TypeError: if ``module`` is no Module.

    Example:
        >>> import torch, symopt
        >>> symopt.constraints(symopt.constrain(torch.nn.Linear(2, 2), {"weight": symopt.Sparse(strength=0.1)}))
        {'weight': Sparse(strength=0.1)}
    """
    check_module("constraints", module)
    find(module)
    rows = {name: binding.constraint for name, binding, _ in _annotated(module)}
    return rows | {name: how.constraint for name, _, how in _explicit(module)}


def free(module: nn.Module) -> list[str]:
    """Names of the parameters of ``module`` that no constraint binds."""
    check_module("free", module)
    find(module)
    bound = {id(binding.parameter(i)) for _, binding, i in _annotated(module)}
    bound |= {id(factor) for _, holder, _ in _explicit(module) for factor in holder.parameters(recurse=False)}
    return [name for name, p in module.named_parameters() if id(p) not in bound]


def bindings(module: nn.Module) -> list[tuple[tuple[str, ...], Constraint]]:
    """Every constraint under ``module``, with the parameters it binds in its order, as :func:`constraints` names them.

    Raises:
        ValueError: if one binds parameters outside of ``module``, too, or no longer fits its weight.
    """
    check(module)
    check_whole(module, "pass the module that holds them all")
    rows = dict[tuple[str, ...], Constraint]()
    # A tensor that has several names has several bindings: it gets the last name, and one row.
    names = {id(binding.parameter(i)): name for name, binding, i in _annotated(module)}
    for binding in annotated_bindings(module):
        rows[tuple(names[id(p)] for p in binding.binding().parameters)] = binding.constraint
    factorised = list(_explicit(module))
    explicitly = {id(holder): name for name, holder, _ in factorised}
    for _, holder, how in factorised:
        holders = [holder] if how.shared is None else how.shared.holders
        rows[tuple(explicitly[id(h)] for h in holders)] = how.constraint
    return list(rows.items())


def param_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Param groups of a constrained module: one per distinct constraint, and one for the rest, which comes last.

    For symopt's optimizers each group of constrained parameters has its own ``"strength"`` (None means the
    constraint's own), which a scheduler may change.  In explicit mode the groups are for any optimizer: factors get
    ``weight_decay = strength`` (the coupled default if None; 0 for a factor that lies on a plane), the rest keeps the
    optimizer's own and has no ``"strength"``.

    Raises:
        TypeError: if ``module`` is no Module.
        ValueError: if a constraint no longer fits its weight.

    Example:
        >>> import torch, symopt
        >>> net = symopt.constrain(torch.nn.Linear(2, 2), {"weight": symopt.Sparse(strength=0.3)})
        >>> [(len(g["params"]), g["strength"]) for g in symopt.param_groups(net)]
        [(1, 0.3), (1, None)]
        >>> net = symopt.constrain(torch.nn.Linear(2, 2), {"weight": symopt.Sparse(strength=0.3)}, mode="explicit")
        >>> [(len(g["params"]), g.get("weight_decay")) for g in symopt.param_groups(net)]
        [(2, 0.3), (1, None)]
    """
    check_module("param_groups", module)
    check(module)
    of = {id(binding.parameter(i)): binding.constraint for _, binding, i in _annotated(module)}
    factors = {
        id(p): (how.constraint, i)
        for _, holder, how in _explicit(module)
        for i, p in zip(how.indices(), holder.parameters(recurse=False), strict=False)
    }
    by_constraint: dict[tuple[Constraint | None, bool], list[tuple[str, nn.Parameter]]] = {}
    still: list[tuple[str, nn.Parameter]] = []
    for name, p in module.named_parameters():
        if id(p) in factors and factors[id(p)][1] < factors[id(p)][0].free_factors:
            still.append((name, p))
            continue
        key = (factors[id(p)][0], True) if id(p) in factors else (of.get(id(p)), False)
        by_constraint.setdefault(key, []).append((name, p))
    rest = by_constraint.pop((None, False), [])
    groups: list[dict[str, Any]] = []
    for (constraint, explicitly), named in by_constraint.items():
        assert constraint is not None
        own = constraint.strength
        if explicitly and own is None:
            own = constraint.default_strength(decoupled=False)
        groups.append({"params": named, "strength": own} | ({"weight_decay": own} if explicitly else {}))
    if still:
        groups.append({"params": still, "weight_decay": 0.0})
    if rest:
        groups.append({"params": rest} if factors else {"params": rest, "strength": None})
    return groups


def check_module(function: str, module: object) -> None:
    """Raise unless ``module`` is a torch.nn.Module."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"{function}: expected a torch.nn.Module, got {type(module).__name__}")


def _annotated(module: nn.Module) -> Iterator[tuple[str, Annotation, int]]:
    """Qualified name of every parameter constrained in optimizer mode, its binding, its place in that."""
    for prefix, sub in module.named_modules():
        for name, binding, i in annotated(sub):
            yield f"{prefix}.{name}" if prefix else name, binding, i


def annotated_bindings(module: nn.Module) -> list[Annotation]:
    """Every binding in optimizer mode that a parameter of ``module`` is in, once."""
    return list({id(binding): binding for _, binding, _ in _annotated(module)}.values())


def check_whole(module: nn.Module, advice: str) -> None:
    """Raise if a constraint inside of ``module`` binds parameters outside of it, too."""
    inside = set(map(id, module.modules()))
    for binding in annotated_bindings(module):
        within = [id(owner) in inside for owner in binding.owners]
        if not all(within):
            name, other = binding.names[within.index(True)], binding.names[within.index(False)]
            raise ValueError(f"{name} shares a constraint with {other}, which is outside of this module; {advice}")
    for name, _, how in _explicit(module):
        if how.shared is not None and any(id(holder) not in inside for holder in how.shared.holders):
            raise ValueError(f"{name} shares an explicit constraint with weights outside of this module; {advice}")


def _explicit(module: nn.Module) -> Iterator[tuple[str, nn.Module, Explicit]]:
    """Qualified name, the module that holds the factors, parametrization."""
    for prefix, sub in module.named_modules():
        for name, holder, how in explicit(sub):
            yield f"{prefix}.{name}" if prefix else name, holder, how
