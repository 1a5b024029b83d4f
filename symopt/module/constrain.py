"""Attach constraints to the parameters of a module, and take them off again."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, overload

from torch import nn

from symopt.constraints import Composed, Constraint
from symopt.module.annotation import Binding, Guard, annotated, watch
from symopt.module.explicit import Explicit, attach, detach, explicit
from symopt.module.factors import check_init
from symopt.module.patterns import Patterns, Rows, checked, match

__all__ = ["bindings", "constrain", "constraints", "free", "param_groups", "release"]


M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")
Bind = Callable[[nn.Module, list[Binding]], None]


@overload
def constrain(target: M, patterns: Patterns, *, mode: str = ..., init: str | float = ...) -> M: ...
@overload
def constrain(target: Patterns, *, mode: str = ..., init: str | float = ...) -> Callable[[T], T]: ...


def constrain(
    target: Any, patterns: Patterns | None = None, *, mode: str = "optimizer", init: str | float = "imbalanced"
) -> Any:
    """Write down which parameters of a module obey which constraint.

    Nothing about the module changes: weights, ``state_dict`` keys, forward pass and memory stay as they are.  The
    constraint is imposed by the symopt optimizer that trains the module, which finds it through the module: keep that
    alive until the optimizer is built.

    Three forms: ``constrain(module, patterns)`` returns the module; ``@constrain(patterns)`` on a Module subclass
    constrains every new instance (patterns see the class's own parameters); on a factory function, what it returns.

    Args:
        target: a module, or the patterns when used as a decorator.
        patterns: maps an :mod:`fnmatch` pattern on qualified parameter names, or a tuple of patterns, to a constraint,
            to a list of them (:class:`symopt.constraints.Composed`), or to None to leave what it matches free.  The
            first match wins.  A pattern with a wildcard binds parameters of two or more dimensions only: a bias or
            normalisation scale must be named in full.

        mode: ``"optimizer"`` (above), or ``"explicit"``: each constrained parameter becomes a torch parametrization
            whose factors are ordinary Parameters, for any optimizer; :func:`param_groups` puts the strength on them as
            ``weight_decay``.  Keys change (:func:`plain_state_dict` undoes that on saving, a plain ``state_dict``
            still loads), memory grows by the factors, and symopt's own optimizers refuse such a module.
        init: how explicit mode turns a weight into factors.

            - ``"imbalanced"`` keeps the weight; ``u**2 - v**2`` is its root mean square, so signs may still change.
            - ``"balanced"`` keeps the weight; all factors are equal in size, which locks signs and makes zeros
              permanent.
            - a number >= 0 keeps the weight; it is ``u**2 - v**2`` (1 in PILoT, Jacobs & Burkholz, 2025).
            - ``"gates"`` keeps the weight; it is one factor and all others are 1 (D-Gating, Kolb et al., 2025).
            - ``"independent"`` replaces the weight: one factor is the old weight, the others are fresh draws of its
              standard deviation (spred, Ziyin & Wang, 2023), which makes weights small.
            - ``"matched"`` replaces the weight: D draws of standard deviation ``std(w)**(1/D)``, truncated to .1 to 2
              of theirs, so that products keep the weight's variance (after Kolb et al., 2025, for depth >= 3).

    Raises:
        TypeError: for a target that is no module, a value that is no constraint, integer or complex parameters.
        ValueError: for a pattern that binds nothing, a weight constrained twice, frozen, empty, 0-dim or with NaN or
            infinite entries, and for a constraint that does not fit its weight.

    Source: the construction is DCS of L. Ziyin, ICML 2024 (arXiv 2309.16932), Section 4.

    Example:
        >>> import torch
        >>> from symopt import constrain, constraints, GroupSparse, Sparse
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> net = constrain(net, {"0.weight": GroupSparse("out"), "*.weight": Sparse(strength=0.2)})
        >>> constraints(net)
        {'0.weight': GroupSparse(groups='out'), '2.weight': Sparse(strength=0.2)}
        >>> @constrain({"weight": Sparse()})
        ... class Block(torch.nn.Linear): ...
        >>> constraints(Block(2, 2))
        {'weight': Sparse()}
    """
    if mode not in ("optimizer", "explicit"):
        raise ValueError(f"constrain: mode must be 'optimizer' or 'explicit', got {mode!r}")
    check_init(init)
    bind: Bind = _annotate if mode == "optimizer" else functools.partial(_factorise, init)
    if isinstance(target, nn.Module):
        if patterns is None:
            raise TypeError("constrain: give the patterns too, constrain(module, {'*.weight': Sparse()})")
        _apply(target, checked(patterns), bind)
        return target
    if patterns is None and isinstance(target, Mapping):
        return functools.partial(_decorate, checked(target), bind)
    raise TypeError(f"constrain: expected a torch.nn.Module or a mapping of patterns, got {type(target).__name__}")


def release(module: M) -> M:
    """Remove every constraint from ``module`` and its submodules, in place; weights stay as they are.

    Optimizers that own these weights treat them as unconstrained from then on.

    Raises:
        TypeError: if ``module`` is no Module.

    Example:
        >>> import torch, symopt
        >>> net = symopt.constrain(torch.nn.Linear(2, 2), {"weight": symopt.Sparse()})
        >>> symopt.constraints(symopt.release(net))
        {}
    """
    _check_whole(_module("release", module), "release the module that holds both")
    for binding in _bindings(module):
        binding.release()
    for sub in module.modules():
        for key, hook in list(sub._forward_pre_hooks.items()):
            if isinstance(hook, Guard):
                del sub._forward_pre_hooks[key]
        detach(sub)
    return module


def constraints(module: nn.Module) -> dict[str, Constraint]:
    """Qualified parameter name -> constraint, for everything :func:`constrain` bound under ``module``.

    Raises:
        TypeError: if ``module`` is no Module.

    Example:
        >>> import torch, symopt
        >>> symopt.constraints(symopt.constrain(torch.nn.Linear(2, 2), {"weight": symopt.Sparse(0.1)}))
        {'weight': Sparse(strength=0.1)}
    """
    rows = {name: binding.constraint for name, binding, _ in _annotated(_module("constraints", module))}
    return rows | {name: how.constraint for name, _, how in _explicit(module)}


def free(module: nn.Module) -> list[str]:
    """Names of the parameters of ``module`` that no constraint binds."""
    bound = {id(binding.parameter(i)) for _, binding, i in _annotated(_module("free", module))}
    bound |= {id(factor) for _, holder, _ in _explicit(module) for factor in holder.parameters(recurse=False)}
    return [name for name, p in module.named_parameters() if id(p) not in bound]


def bindings(module: nn.Module) -> list[tuple[tuple[str, ...], Constraint]]:
    """Every constraint under ``module``, with the parameters it binds in its order, as :func:`constraints` names them.

    Raises:
        ValueError: if one binds parameters outside of ``module``, too.
    """
    _check_whole(module, "pass the module that holds them all")
    rows = dict[tuple[str, ...], Constraint]()
    # A tensor that has several names has several bindings: it gets the last name, and one row.
    names = {id(binding.parameter(i)): name for name, binding, i in _annotated(module)}
    for binding in _bindings(module):
        rows[tuple(names[id(p)] for p in binding.bound().parameters)] = binding.constraint
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

    Example:
        >>> import torch, symopt
        >>> net = symopt.constrain(torch.nn.Linear(2, 2), {"weight": symopt.Sparse(strength=0.3)})
        >>> [(len(g["params"]), g["strength"]) for g in symopt.param_groups(net)]
        [(1, 0.3), (1, None)]
        >>> net = symopt.constrain(torch.nn.Linear(2, 2), {"weight": symopt.Sparse(strength=0.3)}, mode="explicit")
        >>> [(len(g["params"]), g.get("weight_decay")) for g in symopt.param_groups(net)]
        [(2, 0.3), (1, None)]
    """
    of = {id(binding.parameter(i)): binding.constraint for _, binding, i in _annotated(_module("param_groups", module))}
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


# ------------------------------------------------------------------------------------------------------------ binding


def _module(function: str, module: M) -> M:
    if not isinstance(module, nn.Module):
        raise TypeError(f"{function}: expected a torch.nn.Module, got {type(module).__name__}")
    return module


def _annotated(module: nn.Module) -> Iterator[tuple[str, Binding, int]]:
    """Qualified name of every parameter constrained in optimizer mode, its binding, its place in that."""
    for prefix, sub in module.named_modules():
        for name, binding, i in annotated(sub):
            yield f"{prefix}.{name}" if prefix else name, binding, i


def _bindings(module: nn.Module) -> list[Binding]:
    """Every binding that a parameter of ``module`` is in, once."""
    return list({id(binding): binding for _, binding, _ in _annotated(module)}.values())


def _check_whole(module: nn.Module, advice: str) -> None:
    """Raise if a constraint inside of ``module`` binds parameters outside of it, too."""
    inside = set(map(id, module.modules()))
    for binding in _bindings(module):
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


def _apply(module: nn.Module, rows: Rows, bind: Bind) -> None:
    if found := match(module, rows):
        bind(module, found)


def _decorate(rows: Rows, bind: Bind, target: Any) -> Any:
    if isinstance(target, type) and issubclass(target, nn.Module):
        original = target.__init__

        @functools.wraps(original)
        def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            _apply(self, rows, bind)

        target.__init__ = __init__  # type: ignore[method-assign]
        return target
    if inspect.isroutine(target):

        @functools.wraps(target)
        def factory(*args: Any, **kwargs: Any) -> Any:
            module = target(*args, **kwargs)
            if not isinstance(module, nn.Module):
                raise TypeError(f"constrain: {target.__name__} must return a Module, got {type(module).__name__}")
            _apply(module, rows, bind)
            return module

        return factory
    raise TypeError(
        f"constrain: decorate a torch.nn.Module subclass or a function that returns one, not {type(target).__name__}; "
        "for an instance call constrain(module, patterns)"
    )


def _annotate(module: nn.Module, found: list[Binding]) -> None:
    for binding in found:
        binding.annotate()
    watch(module)


def _factorise(init: str | float, module: nn.Module, found: list[Binding]) -> None:
    names: dict[int, str] = {}
    for binding in found:
        constraint, full = binding.constraint, binding.names[0]
        if constraint.is_plane and isinstance(init, str) and init not in ("imbalanced", "balanced"):
            raise ValueError(
                f"constrain: init={init!r} is no gauge of {constraint}; use 'imbalanced', 'balanced' or a number"
            )
        if constraint.is_plane and constraint.strength is None:
            raise ValueError(
                f"constrain: {full}: an automatic strength is symopt's optimizers' own; give {constraint} a strength, "
                "or use mode='optimizer'"
            )
        for i, own in enumerate(binding.names):
            other = names.setdefault(id(binding.parameter(i)), own)
            if other != own:
                raise ValueError(
                    f"constrain: {other} and {own} are one tensor under several names, which mode='explicit' cannot "
                    "keep; use mode='optimizer'"
                )
        if constraint.budget is not None:
            raise ValueError(
                f"constrain: {full} has a budget, which only symopt's optimizers impose; use mode='optimizer'"
            )
        if isinstance(constraint, Composed):
            raise ValueError(
                f"constrain: {full} has a list of constraints, whose strength differs from weight to weight, so weight "
                "decay on factors cannot impose it; use mode='optimizer'"
            )
    for binding in found:
        attach(binding, init)
