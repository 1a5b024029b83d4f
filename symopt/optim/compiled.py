"""One operator for ``torch.compile``: a whole optimizer step, opaque to the compiler.

The graph hands over weights and gradients and gets the weights back changed; learning rates, strengths and state are
read when it runs.  So a compiled step has no graph break, and nothing that a scheduler changes is a constant to
recompile for.
"""

from __future__ import annotations

from itertools import count
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from symopt.optim.direction import ParamGroup
from symopt.optim.membership import Membership

__all__ = ["register", "trace"]


class Stepped(Protocol):
    """What this file needs of an optimizer."""

    number: int
    membership: Membership
    param_groups: list[ParamGroup]

    def take_step(self) -> None: ...


_numbers = count()
_optimizers: WeakValueDictionary[int, Stepped] = WeakValueDictionary()

_library = torch.library.Library("symopt", "DEF")
_library.define("step(int optimizer, Tensor(a!)[] weights, Tensor[] grads) -> ()")


def register(optimizer: Stepped) -> int:
    """A number by which the operator finds ``optimizer`` again."""
    number = next(_numbers)
    _optimizers[number] = optimizer
    return number


def trace(optimizer: Stepped) -> None:
    """What the compiler sees of ``optimizer.step()``."""
    # Not by way of param_groups: Dynamo would guard every number in them.
    params = [p for p in optimizer.membership.parameters if p.grad is not None]
    if params:
        torch.ops.symopt.step(optimizer.number, params, [p.grad for p in params])


def _step(number: int, weights: list[Tensor], grads: list[Tensor]) -> None:
    optimizer = _optimizers[number]
    params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if [id(p) for p in params] != [id(p) for p in optimizer.membership.parameters if p.grad is not None]:
        raise RuntimeError("the optimizer's parameters have changed since its step was compiled; compile it again")
    before = [p.grad for p in params]
    # The compiler may have copied a weight; the optimizer's own one is what the state belongs to.
    copied = [(p, w) for p, w in zip(params, weights, strict=True) if p.data_ptr() != w.data_ptr()]
    for p, w in copied:
        p.copy_(w)
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad
    try:
        optimizer.take_step()
    finally:
        for p, grad in zip(params, before, strict=True):
            p.grad = grad
    for p, w in copied:
        w.copy_(p)


_library.impl("step", _step, "CompositeExplicitAutograd")


torch.library.register_fake("symopt::step", lambda number, weights, grads: None, lib=_library)
