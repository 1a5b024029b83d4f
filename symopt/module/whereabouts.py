"""Where a parameter that a constraint binds is by now, and whether the constraint still fits it."""

from __future__ import annotations

from torch import nn

from symopt.constraints import Constraint
from symopt.module.advice import check_layout
from symopt.module.annotation import Annotation
from symopt.module.roles import Named
from symopt.module.tree import Tree, computes
from symopt.optim import registry

__all__ = ["followed", "now"]


def followed(annotation: Annotation, holder: registry.Holder) -> bool:
    """Whether what a weight is computed from by now is what the optimizer has constrained all along."""
    for i, owner in enumerate(annotation.owners):
        seen = annotation.seen_by(holder, i)
        if annotation.parameter(i) is None and seen is not None and any(id(p) == seen for p in owner.parameters()):
            return True
    return False


def now(tree: Tree, annotation: Annotation, i: int) -> Named | str | None:
    """Where parameter i is now; what is wrong with it; None if it is nowhere."""
    owner, attribute, name = annotation.owners[i], annotation.attributes[i], annotation.names[i]
    p, key = annotation.parameter(i), f"{annotation.constraint} (key {annotation.key!r} of symopt.constrain)"
    place = tree.place(owner, attribute) if id(owner) in tree.prefixes else tree.moved(name, p)
    if place is None:
        sub = owner if id(owner) in tree.prefixes else tree.module_of(name)
        if sub is None or not computes(sub, attribute):
            return None
        return (
            f"{name} is computed from other parameters now (a parametrization, pruning or weight_norm was added), so "
            f"{key} cannot bind it; remove that, e.g. by torch.nn.utils.parametrize.remove_parametrizations, or call "
            "symopt.release on its module and constrain what it is computed from"
        )
    if place[3].shape != annotation.shapes[i]:
        fix = "" if place[1] is not owner else "call symopt.release on its module and "
        return (
            f"{place[0]} has shape {tuple(place[3].shape)} now, but {key} was set for {tuple(annotation.shapes[i])}; "
            f"{fix}write symopt.constrain(module, {{{place[0]!r}: ...}}) for what it is now, or "
            f"{{{place[0]!r}: None}} to leave it free"
        )
    if place[3] is not p and not _alike(owner, place, annotation.constraint):
        return (
            f"{place[0]} belongs to a {type(place[1]).__name__} now, not to a {type(owner).__name__}, so whether {key} "
            f"fits it is unknown; write symopt.constrain(module, {{{place[0]!r}: ...}}), or {{{place[0]!r}: None}} to "
            "leave it free"
        )
    if not place[3].is_floating_point():
        return f"{place[0]} has dtype {place[3].dtype} now, which {key} cannot bind; call symopt.release on its module"
    return place


def _alike(before: nn.Module, place: Named, constraint: Constraint) -> bool:
    """Whether rows and columns of a new parameter of the same shape surely mean what those of the old one did."""
    name, owner, attribute, p = place
    try:
        check_layout(name, owner, attribute, p, constraint, told=True)
    except ValueError:
        return False
    related = isinstance(owner, type(before)) or isinstance(before, type(owner))
    elementwise = constraint.is_product and (constraint.budget is None or constraint.budget.pattern is None)
    return related or elementwise or p.dim() < 2 or p.shape[0] != p.shape[1]
