"""Explicit mode: the constraint as a torch parametrization whose factors are ordinary Parameters.

The literal method, for any optimizer: ``weight`` becomes ``compose(factors)`` and weight decay on the factors is the
strength.  It costs the memory of the factors and of the composed weight, and renames keys; the optimizers of this
package need neither.  It is also the oracle they are tested against.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol, final

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from symopt.backends import fused_product
from symopt.constraints import Constraint
from symopt.module.annotation import Annotation, Factored
from symopt.module.factors import factors_of, keeps_weight
from symopt.module.memory import ReusedMemory
from symopt.module.shared_factors import SharedFactors

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Explicit", "Factorised", "attach", "detach", "explicit", "plain_state_dict"]


class _Context(Protocol):
    """What autograd keeps of a call of :class:`_Compose`."""

    constraint: Constraint
    memory: ReusedMemory
    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _Compose(torch.autograd.Function):
    """``compose`` whose backward is ``pullback``: it saves the factors alone, never the weight or a partial product."""

    generate_vmap_rule = True

    @staticmethod
    def forward(constraint: Constraint, memory: ReusedMemory, *factors: Tensor) -> Tensor:
        if fused_product(constraint, factors):
            from symopt_kernels.triton import product as triton_explicit

            return triton_explicit.compose(factors)
        return constraint.compose(factors, memory.like(factors[-1]))

    @staticmethod
    def setup_context(
        ctx: _Context, inputs: tuple[Constraint, ReusedMemory, Unpack[tuple[Tensor, ...]]], output: Tensor
    ) -> None:
        ctx.constraint, ctx.memory, *factors = inputs
        ctx.save_for_backward(*factors)

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        factors = ctx.saved_tensors
        double = torch.is_grad_enabled()  # create_graph: the pull-back must itself be differentiable
        if not double and fused_product(ctx.constraint, (*factors, grads[0])):
            from symopt_kernels.triton import product as triton_explicit

            return None, None, *triton_explicit.pullback(factors, grads[0])
        out = None if double else tuple(ctx.memory.like(f) for f in factors)
        return None, None, *ctx.constraint.pullback(factors, grads[0], out)


@final
class Factorised:
    """One explicit constraint and the names of the parameters that it made factors of."""

    def __init__(self, constraint: Constraint, names: tuple[str, ...]) -> None:
        self.constraint, self.names, self.released = constraint, names, False


@final
class Explicit(nn.Module):
    """The parametrization that :func:`symopt.constrain` registers with ``mode="explicit"``.

    Args:
        constraint: gives ``compose``, ``split`` and ``pullback``.
        init: how a weight becomes factors, see :func:`symopt.constrain`.
        shared: the factors of a constraint over several parameters, of which this one is number ``place``.
    """

    def __init__(
        self,
        constraint: Constraint,
        init: str | float = "imbalanced",
        shared: SharedFactors | None = None,
        place: int = 0,
    ) -> None:
        super().__init__()
        self.constraint, self.init, self.shared, self.place = constraint, init, shared, place
        self._memory = ReusedMemory(constraint.depth + 1)
        self.written: Factorised | None = None
        """What is remembered of it."""

    def forward(self, *factors: Tensor) -> Tensor:
        """Factors -> effective weight."""
        if self.shared is not None:
            factors = self.shared.factors()
        weight: Tensor
        if torch.compiler.is_compiling():  # the compiler fuses it, and breaks the graph at a Function
            weight = self.constraint.compose(factors)
        else:
            weight = _Compose.apply(self.constraint, self._memory, *factors)  # type: ignore[no-untyped-call]
        return weight if self.shared is None else self.shared.split(weight)[self.place]

    @torch.no_grad()
    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Effective weight -> factors; for inits that keep the weight, ``forward`` of the result is ``weight``."""
        weight = weight.detach()
        if self.shared is None:
            found = factors_of(self.constraint, weight, self.init)
        elif len(self.shared.holders) < len(self.shared.shapes):  # while parametrizations are registered
            found = self.shared.initial[self.place]
        else:
            found = self.shared.assign(self.place, weight, self.init)
        return tuple(f.clone() for f in found)

    def indices(self) -> Iterable[int]:
        """Which of the constraint's factors are stored with this parameter, in the order they are stored in."""
        return itertools.count() if self.shared is None else self.shared.indices(self.place)

    def extra_repr(self) -> str:
        """The constraint and its init."""
        return f"{self.constraint}, init={self.init!r}"


# ------------------------------------------------------------------------------------- attaching to a module, and back


def attach(binding: Annotation, init: str | float) -> Factorised:
    """Register a parametrization on every parameter; a plain ``state_dict`` can still be loaded."""
    written = Factorised(binding.constraint, binding.names)
    weights = [w.detach() for w in binding.binding().parameters]
    shared = SharedFactors(binding.constraint, weights, init) if len(weights) > 1 else None
    for i, (module, name) in enumerate(zip(binding.owners, binding.attributes, strict=True)):
        # Unsafe: no check of the result by torch, because it needs the factors of the parameters that come later.
        how = Explicit(binding.constraint, init, shared, i)
        how.written = written
        parametrize.register_parametrization(module, name, how, unsafe=shared is not None)
        holder = _holders(module)[name]
        vars(holder)["_symopt_factored"] = Factored(holder)
        module.register_load_state_dict_pre_hook(_LoadPlain(name))
        if shared is not None:
            shared.holders.append(holder)
    if shared is not None:
        shared.initial = []
    return written


def detach(module: nn.Module) -> None:
    """Replace every explicit constraint of ``module`` itself by a plain Parameter with the composed value."""
    found = explicit(module)
    names = [name for name, _, _ in found]
    for _, _, how in found:
        if how.written is not None:
            how.written.released = True
    if names:
        # torch keeps the property `weight` on the class it injected, which a deepcopy shares, and removing the
        # parametrization of one would take it from the other.
        shared = type(module)
        module.__class__ = type(shared.__name__, shared.__bases__, dict(shared.__dict__))
    for name in names:
        trained = any(p.requires_grad for p in _holders(module)[name].parameters())
        with torch.enable_grad():
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        # torch leaves a buffer where the composed weight needs no gradient.
        weight = getattr(module, name).detach()
        module._buffers.pop(name, None)
        module.register_parameter(name, nn.Parameter(weight, requires_grad=trained))
        hooks = module._load_state_dict_pre_hooks
        for key, hook in list(hooks.items()):
            inner = getattr(hook, "hook", hook)
            if isinstance(inner, _LoadPlain) and inner.name == name:
                del hooks[key]


def _holders(module: nn.Module) -> dict[str, nn.Module]:
    """By name of the parameter, what holds the factors of each parametrized one of ``module`` itself."""
    holders = dict(module._modules.items()).get("parametrizations")  # what a ScriptModule has instead has no `get`
    return dict(holders.items()) if isinstance(holders, nn.ModuleDict) else {}


def explicit(module: nn.Module) -> list[tuple[str, nn.Module, Explicit]]:
    """Name, holder of the factors and parametrization of every explicitly constrained tensor of ``module`` itself."""
    holders = _holders(module).items()
    return [(name, holder, p) for name, holder in holders for p in holder.children() if isinstance(p, Explicit)]


@final
class _LoadPlain:
    """Load hook: turns the plain key ``weight`` of a ``state_dict`` into the keys of its factors."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
        plain = state_dict.pop(prefix + self.name, None)
        if plain is None:
            return
        ((holder, how),) = [(holder, p) for name, holder, p in explicit(module) if name == self.name]
        plain = plain.to(next(holder.parameters()).dtype)  # split in the precision the factors have
        init = how.init if keeps_weight(how.init) else "imbalanced"
        found: tuple[Tensor, ...]
        if how.shared is None:
            found = factors_of(how.constraint, plain, init)
        elif plain.shape == how.shared.shapes[how.place]:
            how.shared.assign(how.place, plain, init)
            # The Parameters themselves: the hooks of the other parameters still write to them.
            found = tuple(p.detach() for p in holder.parameters())
        else:
            found = (plain,)  # torch says what does not fit
        for i, factor in enumerate(found):
            state_dict[f"{prefix}parametrizations.{self.name}.original{i}"] = factor


def plain_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """``module.state_dict()`` with the keys and values it has without explicit constraints.

    Each ``parametrizations.weight.original*`` becomes ``weight``, composed; everything else is as in torch.

    Raises:
        TypeError: if ``module`` is no Module.

    Example:
        >>> import torch, symopt
        >>> net = symopt.constrain(torch.nn.Linear(3, 2), {"weight": symopt.Sparse()}, mode="explicit")
        >>> sorted(net.state_dict())
        ['bias', 'parametrizations.weight.original0', 'parametrizations.weight.original1']
        >>> sorted(symopt.plain_state_dict(net))
        ['bias', 'weight']
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"plain_state_dict: expected a torch.nn.Module, got {type(module).__name__}")
    state: dict[str, Tensor] = dict(module.state_dict())
    for prefix, sub in module.named_modules():
        dot = f"{prefix}." if prefix else ""
        for name, _, _ in explicit(sub):
            for key in [k for k in state if k.startswith(f"{dot}parametrizations.{name}.")]:
                del state[key]
            state[dot + name] = getattr(sub, name).detach()
    return state
