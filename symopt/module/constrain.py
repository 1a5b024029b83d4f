"""Attach constraints to the parameters of a module, and take them off again."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TypeVar, overload

from torch import nn

from symopt.constraints import Composed
from symopt.module.annotation import Annotation, Guard, watch
from symopt.module.bindings import annotated_bindings, check_module, check_whole
from symopt.module.construction import after_construction
from symopt.module.explicit import Factorised, attach, detach
from symopt.module.factors import check_init
from symopt.module.patterns import Patterns, Rows, checked, match
from symopt.module.remembered import forget, remember

__all__ = ["constrain", "release"]

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")
Bind = Callable[[nn.Module, list[Annotation]], list[Factorised]]


@overload
def constrain(target: M, patterns: Patterns, *, mode: str = ..., init: str | float = ...) -> M: ...
@overload
def constrain(target: Patterns, *, mode: str = ..., init: str | float = ...) -> Callable[[T], T]: ...


def constrain(
    target: object, patterns: Patterns | None = None, *, mode: str = "optimizer", init: str | float = "imbalanced"
) -> object:
    """Write down which parameters of a module obey which constraint.

    Nothing about the module changes: weights, ``state_dict`` keys, forward pass and memory stay as they are.  The
    constraint is imposed by the symopt optimizer that trains the module, which finds it through the module: that has to
    exist until the optimizer is built.

    The module remembers the patterns.  When an optimizer is built, in its first step, and in :func:`symopt.report` and
    :func:`symopt.fold`, a constraint whose layer was replaced (``net[2] = nn.Linear(...)``, quantisation,
    ``SyncBatchNorm``) binds the same Parameter, or the new one of the same name and shape; an error names a weight that
    the constraint no longer fits, and a warning one that a pattern matches but was added later, or that is gone.
    Another call says what is meant: ``{name: constraint}`` or ``{name: None}``.  A budget that weights share
    (``scope="global"``) is refused if its weights of one module are not all in one optimizer.

    Three forms: ``constrain(module, patterns)`` returns the module; ``@constrain(patterns)`` on a Module subclass
    constrains every new instance once it is complete (patterns see the parameters it then has); on a factory function,
    what it returns.

    Args:
        target: a module, or the patterns when used as a decorator.
        patterns: maps an :mod:`fnmatch` pattern on qualified parameter names, or a tuple of patterns, to a constraint,
            to a list of them (:class:`symopt.constraints.Composed`), or to None to leave what it matches free.  The
            first match wins.  A pattern with a wildcard binds parameters of two or more dimensions only: a bias or
            normalisation scale must be named in full, or in a mapping of :class:`symopt.GroupSparse`.
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
    check_module("release", module)
    check_whole(module, "release the module that holds both")
    for binding in annotated_bindings(module):
        binding.release()
    forget(module)
    for sub in module.modules():
        for key, hook in list(sub._forward_pre_hooks.items()):
            if isinstance(hook, Guard):
                del sub._forward_pre_hooks[key]
        detach(sub)
    return module


def _apply(module: nn.Module, rows: Rows, bind: Bind) -> None:
    found = match(module, rows)
    remember(module, found, bind(module, found.annotations))


def _decorate(rows: Rows, bind: Bind, target: object) -> object:
    if isinstance(target, type) and issubclass(target, nn.Module):
        return after_construction(target, lambda module: _apply(module, rows, bind))
    if inspect.isroutine(target) and callable(target):

        @functools.wraps(target)
        def factory(*args: object, **kwargs: object) -> nn.Module:
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


def _annotate(module: nn.Module, found: list[Annotation]) -> list[Factorised]:
    for binding in found:
        binding.annotate()
    if found:
        watch(module)
    return []


def _factorise(init: str | float, module: nn.Module, found: list[Annotation]) -> list[Factorised]:
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
    return [attach(binding, init) for binding in found]
