"""Explicit mode: the constraint as a torch parametrization whose factors are ordinary Parameters.

The literal method, for any optimizer: ``weight`` becomes ``compose(factors)`` and weight decay on the factors is the
strength.  It costs the memory of the factors and of the composed weight, and renames keys; the optimizers of this
package need neither.  It is also the oracle they are tested against.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from symopt.backends import fused_product
from symopt.constraints import Constraint
from symopt.constraints.base import check_number
from symopt.constraints.planes.plane import flat
from symopt.module.annotation import Factored

__all__ = ["INITS", "Explicit", "attach", "check_init", "detach", "explicit", "plain_state_dict"]

INITS = ("imbalanced", "balanced", "gates", "independent", "matched")


class _Compose(torch.autograd.Function):
    """``compose`` whose backward is ``pullback``: it saves the factors alone, never the weight or a partial product."""

    generate_vmap_rule = True

    @staticmethod
    def forward(constraint: Constraint, pool: _Pool, *factors: Tensor) -> Tensor:
        if fused_product(constraint, factors):
            from symopt_kernels.triton import product as triton_explicit

            return triton_explicit.compose(factors)
        return constraint.compose(factors, pool.like(factors[-1]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.constraint, ctx.pool, *factors = inputs
        ctx.save_for_backward(*factors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        factors: tuple[Tensor, ...] = ctx.saved_tensors
        double = torch.is_grad_enabled()  # create_graph: the pull-back must itself be differentiable
        if not double and fused_product(ctx.constraint, (*factors, grads[0])):
            from symopt_kernels.triton import product as triton_explicit

            return None, None, *triton_explicit.pullback(factors, grads[0])
        out = None if double else tuple(ctx.pool.like(f) for f in factors)
        return None, None, *ctx.constraint.pullback(factors, grads[0], out)


class _Pool:
    """Memory of large CPU tensors, handed out again once nobody else holds it.

    Every step composes the weight and makes gradients of the factors anew.  On the CPU each such tensor is fresh memory
    from the system, whose page faults cost several times the arithmetic: at 4096 x 4096, 25 ms against 6 ms for
    ``u * v`` (``python benchmarks/explicit_mode.py``).  A storage is reused only if the pool's is the one reference to
    it, so whatever still lives (a graph, ``.grad``, a view) keeps its values.
    """

    large = 1 << 20

    def __init__(self, size: int) -> None:
        self.size, self.storages = size, list[torch.UntypedStorage]()

    def like(self, x: Tensor) -> Tensor | None:
        """Uninitialised memory of the shape of ``x``; None where torch's own allocation is as good."""
        nbytes = x.numel() * x.element_size()
        if nbytes < self.large or x.device.type != "cpu" or not x.is_contiguous() or not _counts_references(x):
            return None
        for storage in self.storages:
            # Python's count too: the list, the loop and the call; a storage taken from a tensor is this very object.
            free = torch._C._storage_Use_Count(storage._cdata) == 1 and sys.getrefcount(storage) <= 3
            if free and storage.nbytes() == nbytes:
                return torch.empty(0, dtype=x.dtype).set_(storage, 0, x.shape, x.stride())
        fresh = torch.empty(x.shape, dtype=x.dtype)
        self.storages = [*self.storages, fresh.untyped_storage()][-self.size :]
        return fresh

    def __reduce__(self) -> tuple[type[_Pool], tuple[int]]:
        return _Pool, (self.size,)


def _counts_references(x: Tensor) -> bool:
    plain = type(x) in (Tensor, nn.Parameter) and not torch._C._are_functorch_transforms_active()
    return plain and hasattr(torch._C, "_storage_Use_Count")


class Together:
    """What a constraint over several parameters shares in explicit mode.

    Each parameter holds its part of every factor of their flat vector that has an entry per weight; other factors are
    the first one's.  Every weight needs the factors of all, so each knows where the others' are.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.weights: tuple[Tensor, ...] | None = tuple(w.detach() for w in weights)  # until all have factors
        self.shapes = [w.shape for w in weights]
        self.cut: list[bool] = []
        """Which factors are held in parts."""
        self.chains: list[nn.Module] = []
        """In the constraint's order, what holds each one's factors."""

    def factors(self) -> tuple[Tensor, ...]:
        """Those of the flat vector of all weights."""
        own: list[Any] = [iter(chain._parameters.values()) for chain in self.chains]
        return tuple(flat([next(factors) for factors in own]) if cut else next(own[0]) for cut in self.cut)

    def part(self, whole: Tensor, place: int) -> Tensor:
        """What belongs to one member."""
        part: Tensor = whole.split([shape.numel() for shape in self.shapes])[place]
        return part.reshape(self.shapes[place])

    def split(self, place: int, weight: Tensor, constraint: Constraint, init: str | float) -> tuple[Tensor, ...]:
        """Factors of one member that takes this weight, while the others stay; all are written."""
        held = [*(self.weights if self.weights is not None else (chain() for chain in self.chains))]
        held[place] = weight
        whole = flat(held)
        factors = factors_of(constraint, whole, init)
        self.cut = [factor.shape == whole.shape for factor in factors]
        pieces = [
            tuple(self.part(f, i) if cut else f for f, cut in zip(factors, self.cut, strict=True) if cut or i == 0)
            for i in range(len(held))
        ]
        for chain, values in zip(self.chains, pieces, strict=True) if self.weights is None else ():
            for factor, value in zip(chain._parameters.values(), values, strict=True):
                assert factor is not None
                factor.copy_(value)
        return pieces[place]


class Explicit(nn.Module):
    """The parametrization that :func:`symopt.constrain` registers with ``mode="explicit"``.

    Args:
        constraint: gives ``compose``, ``split`` and ``pullback``.
        init: how a weight becomes factors, see :func:`symopt.constrain`.
        together: what is constrained along with this weight, in whose order it has a ``place``.
    """

    def __init__(
        self,
        constraint: Constraint,
        init: str | float = "imbalanced",
        together: Together | None = None,
        place: int = 0,
    ) -> None:
        super().__init__()
        self.constraint, self.init, self.together, self.place = constraint, init, together, place
        self._pool = _Pool(constraint.depth + 1)

    def forward(self, *factors: Tensor) -> Tensor:
        """Factors -> effective weight."""
        if self.together is not None:
            factors = self.together.factors()
        weight: Tensor
        if torch.compiler.is_compiling():  # the compiler fuses it, and breaks the graph at a Function
            weight = self.constraint.compose(factors)
        else:
            weight = _Compose.apply(self.constraint, self._pool, *factors)  # type: ignore[no-untyped-call]
        if self.together is not None:
            weight = self.together.part(weight, self.place)
        return weight

    @torch.no_grad()
    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Effective weight -> factors; for inits that keep the weight, ``forward`` of the result is ``weight``."""
        weight = weight.detach()
        if self.together is None:
            found = factors_of(self.constraint, weight, self.init)
        else:
            found = self.together.split(self.place, weight, self.constraint, self.init)
        return tuple(f.clone() for f in found)

    def extra_repr(self) -> str:
        """The constraint and its init."""
        return f"{self.constraint}, init={self.init!r}"


def check_init(init: object) -> None:
    """Raise unless ``init`` is one of :data:`INITS` or an imbalance >= 0."""
    if isinstance(init, (int, float)) and not isinstance(init, bool):
        check_number("constrain", "init", init)
    elif init not in INITS:
        raise ValueError(f"constrain: init must be a number >= 0 or one of {', '.join(map(repr, INITS))}, got {init!r}")


def factors_of(constraint: Constraint, weight: Tensor, init: str | float) -> tuple[Tensor, ...]:
    """Factors of ``weight`` by one of :data:`INITS`, or with the imbalance given as a number."""
    if not isinstance(init, str):
        return constraint.split(weight, float(init))
    if init == "balanced":
        return constraint.split(weight)
    if init == "imbalanced":
        return constraint.split(weight, constraint.imbalance(weight, 1.0))
    if constraint.is_matrix:
        raise ValueError(
            f"constrain: init={init!r} draws factors of the weight's own shape, which those of {constraint} are not; "
            "use 'imbalanced', 'balanced' or a number"
        )
    balanced = constraint.split(weight)
    gates = balanced[:-1]
    if init == "gates":
        return (*(torch.ones_like(g) for g in gates), weight.clone())
    size = weight.square().mean().sqrt()
    if not bool(size > 0):
        raise ValueError(f"constrain: init={init!r} draws factors of the weight's size, which is 0; use 'gates'")
    if init == "independent":
        # Every factor has the law of the weight itself, as if each were a freshly initialised layer.
        return (*(torch.randn_like(g) * size for g in gates), weight.clone())
    # "matched": the product has the weight's variance; truncation keeps both tails of the product in check.
    depth = len(balanced)
    root = size ** (1 / depth)
    return tuple(_truncated(f, root) for f in balanced)


def _truncated(like: Tensor, std: Tensor) -> Tensor:
    """Normal, magnitude between .1 and 2 standard deviations, then rescaled to the standard deviation asked for."""
    lo, hi = (0.5 * (1 + math.erf(z / math.sqrt(2))) for z in (0.1, 2.0))
    magnitude = torch.special.ndtri(lo + (hi - lo) * torch.rand_like(like))
    signed = torch.where(torch.rand_like(like) < 0.5, -magnitude, magnitude)
    return signed * (std / _TRUNCATED_STD)


def _second_moment(a: float, b: float) -> float:
    """Of a standard normal whose magnitude is kept between ``a`` and ``b``."""
    low, high = (z * math.exp(-z * z / 2) / math.sqrt(2 * math.pi) for z in (a, b))
    mass = 0.5 * (math.erf(b / math.sqrt(2)) - math.erf(a / math.sqrt(2)))
    return 1 - (high - low) / mass


_TRUNCATED_STD = math.sqrt(_second_moment(0.1, 2.0))


# ------------------------------------------------------------------------------------- attaching to a module, and back


def attach(places: Sequence[tuple[nn.Module, str]], constraint: Constraint, init: str | float) -> None:
    """Register parametrizations on each ``module.<name>``; a plain ``state_dict`` can still be loaded."""
    weights = [module._parameters[name] for module, name in places]
    together = Together(weights) if len(places) > 1 else None  # type: ignore[arg-type]
    for place, (module, name) in enumerate(places):
        how = Explicit(constraint, init, together, place)
        parametrize.register_parametrization(module, name, how, unsafe=together is not None)  # it needs the others
        factors: Any = module.parametrizations[name]  # type: ignore[index]
        vars(factors)["_symopt_factored"] = Factored(factors)
        module.register_load_state_dict_pre_hook(_Splitter(name))
        if together is not None:
            together.chains.append(factors)
    if together is not None:
        together.weights = None


def detach(module: nn.Module) -> None:
    """Replace every explicit constraint of ``module`` itself by a plain Parameter with the composed value."""
    names = [name for name, _, _ in explicit(module)]
    if names:
        # torch keeps the property `weight` on the class it injected, which a deepcopy shares, and removing the
        # parametrization of one would take it from the other.
        shared = type(module)
        module.__class__ = type(shared.__name__, shared.__bases__, dict(shared.__dict__))
    for name in names:
        trained = any(p.requires_grad for p in module.parametrizations[name].parameters())  # type: ignore[index, union-attr]
        with torch.enable_grad():
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        # torch leaves a buffer where the composed weight needs no gradient.
        weight = getattr(module, name).detach()
        module._buffers.pop(name, None)
        module.register_parameter(name, nn.Parameter(weight, requires_grad=trained))
        hooks = module._load_state_dict_pre_hooks
        for key, hook in list(hooks.items()):
            inner = getattr(hook, "hook", hook)
            if isinstance(inner, _Splitter) and inner.name == name:
                del hooks[key]


def explicit(module: nn.Module) -> list[tuple[str, nn.Module, Explicit]]:
    """Name, holder of the factors and parametrization of every explicitly constrained tensor of ``module`` itself."""
    chains = module._modules.get("parametrizations")
    if not isinstance(chains, nn.ModuleDict):
        return []
    return [(name, chain, p) for name, chain in chains.items() for p in chain.children() if isinstance(p, Explicit)]


class _Splitter:
    """Load hook: turns the plain key ``weight`` of a ``state_dict`` into the keys of its factors."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        plain = state_dict.pop(prefix + self.name, None)
        if plain is None:
            return
        ((holder, how),) = [(chain, p) for name, chain, p in explicit(module) if name == self.name]
        plain = plain.to(next(holder.parameters()).dtype)  # split in the precision the factors have
        if how.together is not None and plain.shape == how.together.shapes[how.place]:
            how.right_inverse(plain)
            found = tuple(p.detach() for p in holder.parameters())  # which the other members' hooks still write to
        elif how.together is not None:
            found = (plain,)  # torch says what does not fit
        else:  # inits that draw factors would change the weight
            drawn = how.init in ("independent", "matched")
            found = factors_of(how.constraint, plain, "imbalanced" if drawn else how.init)
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
