"""The ways of taking one step: symopt's, and everything it is compared with."""

from __future__ import annotations

import functools
import importlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import symopt
from benchmarks.steps.cases import BLOCK, OPTIMIZERS, Case

__all__ = ["PEERS", "Ours", "Peer", "Variant", "load_pat"]


class Variant(ABC):
    """One method with its own copy of weights, gradients and state.

    ``arm`` (not timed) puts the gradients where ``step`` expects them; ``clear`` is ``zero_grad``.
    """

    composed = False
    """Whether the weights are made from factors, so that a step must make them, pull back, and free again."""

    opt: Any

    def __init__(self, case: Case) -> None:
        self.case = case
        self.grads = case.gradients()

    def give(self, grads: list[Tensor]) -> None:
        """Exchange the gradients for others, in place."""
        for mine, new in zip(self.grads, grads, strict=True):
            mine.copy_(new)

    def arm(self) -> None:  # noqa: B027 (factors need no preparation)
        """Prepare a step."""

    @abstractmethod
    def step(self) -> None: ...

    def clear(self) -> None:
        self.opt.zero_grad(set_to_none=True)

    @abstractmethod
    def weights(self) -> list[Tensor]: ...

    def kept(self) -> list[torch.UntypedStorage]:
        """What is kept between steps: parameters, optimizer state, and the gradient of the weight."""
        tensors = [*self.grads, *(p for group in self.opt.param_groups for p in group["params"])]
        tensors += [v for state in self.opt.state.values() for v in state.values() if isinstance(v, Tensor)]
        return [t.untyped_storage() for t in tensors]

    def held(self) -> int:
        """Its bytes."""
        return sum({storage.data_ptr(): storage.nbytes() for storage in self.kept()}.values())


# ------------------------------------------------------------------------------------------ weights are parameters


class Plain(Variant):
    """Weights are ordinary parameters."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.net = _holder(case)
        self.params = list(self.net.parameters())

    def arm(self) -> None:
        for p, g in zip(self.params, self.grads, strict=True):
            if p.grad is None:
                p.grad = g

    def step(self) -> None:
        self.opt.step()

    def weights(self) -> list[Tensor]:
        return [p.detach() for p in self.params]


class Ours(Plain):
    def __init__(self, case: Case, backend: str = "native", time_scale: str = "saturated") -> None:
        super().__init__(case)
        symopt.constrain(self.net, {tuple(_names(self.net)): case.make_constraint()})
        make: Any = case.direction.ours
        self.opt = make(self.net, **case.options, backend=backend, time_scale=time_scale)


class Torch(Plain):
    def __init__(self, case: Case, **flags: bool) -> None:
        super().__init__(case)
        make: Any = case.direction.torch
        self.opt = make(self.params, **case.options, **flags)


@functools.cache
def _fused_is_right(optimizer: str, dtype: torch.dtype) -> bool:
    """False for SGD in bf16 of torch 2.13, whose fused step leaves most weights where they are (pytorch #191763)."""
    ends: list[Tensor] = []
    for fused in (True, False):
        p = nn.Parameter(torch.zeros(64, dtype=dtype))
        p.grad = torch.ones_like(p)
        make: Any = OPTIMIZERS[optimizer].torch
        make([p], lr=1.0, fused=fused).step()
        ends.append(p.detach())
    return bool(torch.allclose(ends[0], ends[1], rtol=0.02))


def _why_no_fused(case: Case) -> str | None:
    if _fused_is_right(case.optimizer, case.torch_dtype):
        return None
    return f"fused=True does not step {case.dtype} weights here (pytorch #191763); other columns use foreach=True"


def _fused(case: Case) -> dict[str, bool]:
    """Flags of the fastest torch.optim that is right."""
    return {"fused": True} if _fused_is_right(case.optimizer, case.torch_dtype) else {"foreach": True}


class Pat(Plain):
    """torchao's PruneOptimizer wraps an optimizer whose groups name a proximal map and a grouper."""

    groupers: ClassVar = {
        "sparse": ("ProxLasso", "ElemGrouper"),
        "sparse_free": ("ProxLasso", "ElemGrouper"),
        "group-out": ("ProxGroupLasso", "Dim0Grouper"),
        "group-in": ("ProxGroupLasso", "Dim1Grouper"),
    }
    threshold = 1e-4
    """What every step adds to the threshold below which a weight is zero (times the root of the group's size)."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        prox, grouper = self.groupers[case.constraint]
        make: Any = case.direction.torch
        groups = [{"params": self.params, "prox_type": prox, "group_type": grouper}]
        base = make(groups, **case.options, **_fused(case))
        # Its threshold grows by lr * reg_lambda in every step.
        self.opt = load_pat().PruneOptimizer(base, reg_lambda=self.threshold / case.options["lr"])

    @classmethod
    def why_not(cls, case: Case) -> str | None:
        if case.constraint not in cls.groupers:
            return "has no grouper for blocks of a matrix"
        try:
            load_pat()
        except ImportError as error:
            return f"not installed ({error})"
        return None


def load_pat() -> Any:
    # On import torchao logs a warning for every GPU library it cannot load.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return importlib.import_module("torchao.prototype.pat")


# ------------------------------------------------------------------------------------------- factors are parameters


class Factored(Variant):
    """Weights are composed from factors: compose, pull the given gradient back, step the factors."""

    composed = True

    def make_optimizer(self, params: Any) -> None:
        make: Any = self.case.direction.torch
        self.opt = make(params, **self.case.options, **_fused(self.case))

    @abstractmethod
    def compose(self) -> list[Tensor]: ...

    def step(self) -> None:
        torch.autograd.backward(self.compose(), self.grads)
        self.opt.step()

    def weights(self) -> list[Tensor]:
        with torch.no_grad():
            return [w.detach() for w in self.compose()]


class Parametrized(Factored):
    """Weights are parametrizations of torch's: to read one composes it."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.net = _holder(case)
        self.names = _names(self.net)

    def compose(self) -> list[Tensor]:
        return [getattr(self.net, name) for name in self.names]


class Explicit(Parametrized):
    """symopt's own explicit mode, stepped by torch's fused optimizer."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        symopt.constrain(self.net, {tuple(self.names): case.make_constraint()}, mode="explicit")
        self.make_optimizer(symopt.param_groups(self.net))

    def kept(self) -> list[torch.UntypedStorage]:
        # Explicit mode keeps the memory of large temporaries for the next step.
        pools: list[Any] = [getattr(module, "_memory", None) for module in self.net.modules()]
        return [*super().kept(), *(storage for pool in pools if pool for storage in pool.storages)]


class Product(nn.Module):
    """``w = u * v`` as anyone would write it; u is a gate, if groups are, and broadcasts over v seen as ``view``."""

    def __init__(self, case: Case, view: tuple[int, ...]) -> None:
        super().__init__()
        self.constraint, self.view = case.make_constraint(), view

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        return (u * v.view(self.view)).view_as(v)

    def right_inverse(self, w: Tensor) -> tuple[Tensor, Tensor]:
        u, v = self.constraint.split(w, self.constraint.imbalance(w, 1.0))
        return u.reshape(_gate(self.constraint.partition(w), self.view)), v


def _gate(groups: Any, view: tuple[int, ...]) -> list[int]:
    return [1 if groups is not None and d in groups.dims else n for d, n in enumerate(view)]


class Parametrize(Parametrized):
    """The product above, registered with torch's parametrization."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        rows, columns = case.size.shape
        blocks = (rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
        for name in self.names:
            view = blocks if case.constraint == "group-block" else (rows, columns)
            parametrize.register_parametrization(self.net, name, Product(case, view))
        self.make_optimizer([{"params": list(self.net.parameters()), "weight_decay": case.strength}])


class Compiled(Parametrize):
    """The same product in one compiled graph, forward and backward; the optimizer's step is a fused kernel already."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        chains: Any = self.net.parametrizations
        self.factors = [(chains[n].original0, chains[n].original1) for n in self.names]
        self.view = chains[self.names[0]][0].view

    def compose(self) -> list[Tensor]:
        return _compiled()(self.factors, self.view)


def _products(factors: list[tuple[Tensor, Tensor]], view: tuple[int, ...]) -> list[Tensor]:
    return [(u * v.view(view)).view_as(v) for u, v in factors]


@functools.cache
def _compiled() -> Callable[[list[tuple[Tensor, Tensor]], tuple[int, ...]], list[Tensor]]:
    return torch.compile(_products, dynamic=False, fullgraph=True)


# --------------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Peer:
    what: str
    build: Callable[[Case], Variant]
    why_not: Callable[[Case], str | None] = lambda case: None


PEERS: dict[str, Peer] = {
    "torch-fused": Peer(
        "torch.optim, fused=True, unconstrained: the floor", lambda c: Torch(c, fused=True), _why_no_fused
    ),
    "torch-foreach": Peer("torch.optim, foreach=True, unconstrained", lambda c: Torch(c, foreach=True)),
    "parametrize": Peer("u * v by torch's parametrize, fused torch.optim on the factors", Parametrize),
    "compiled": Peer("the same, composition and pull-back compiled by torch.compile", Compiled),
    "explicit": Peer("symopt.constrain(mode='explicit'), fused torch.optim on the factors", Explicit),
    "pat": Peer("torchao.prototype.pat: proximal l1 / group l1 around fused torch.optim", Pat, Pat.why_not),
    "reference": Peer("symopt's own step in eager PyTorch, backend='reference'", lambda c: Ours(c, "reference")),
}


def _holder(case: Case) -> nn.Module:
    net = nn.Module()
    for i, w in enumerate(case.start()):
        net.register_parameter(f"w{i}", nn.Parameter(w))
    return net


def _names(net: nn.Module) -> list[str]:
    return [name for name, _ in net.named_parameters()]
