"""SGD: gradient, momentum, dampening, Nesterov."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor
from torch.optim.sgd import sgd as torch_sgd

from symopt.constraints import Constraint
from symopt.optim.base import ConstrainedOptimizer
from symopt_kernels.groups import Groups
from symopt_kernels.reference import directions

__all__ = ["SGD"]


@final
class SGD(ConstrainedOptimizer, torch.optim.SGD):
    """``torch.optim.SGD`` (same arguments, defaults and state keys) that imposes the constraints of its parameters.

    A constrained weight moves by its constraint's retraction with ``delta = lr t d`` and
    ``rho = 1 - lr t strength (1 - dampening) / (1 - momentum)``, d being torch's momentum direction and t the time
    scale.  Fixed points are those of ``loss + strength * penalty``: the Lasso, the group Lasso.

    Args:
        params: a module, or anything ``torch.optim.SGD`` takes.
        lr, momentum, dampening, weight_decay, nesterov, maximize, foreach, differentiable, fused: as in torch;
            ``weight_decay`` applies to unconstrained parameters only, ``foreach`` and ``fused`` to how those step.
        strength, time_scale, imbalance, backend: see :class:`symopt.optim.ConstrainedOptimizer`.

    Raises:
        ValueError, TypeError: as torch's; also for a bad strength, time_scale or imbalance, and for ``momentum >= 1``
            with constrained parameters.

    Source: L. Ziyin, ICML 2024 (arXiv 2309.16932), Section 4; Ziyin & Wang, ICML 2023 (arXiv 2210.01212), Section 3.

    Example:
        >>> import torch, symopt
        >>> net = symopt.constrain(torch.nn.Linear(3, 1, bias=False), {"weight": symopt.Sparse(strength=1.0)})
        >>> opt = symopt.SGD(net, lr=0.1)
        >>> for _ in range(1000):
        ...     opt.zero_grad()
        ...     net(torch.ones(1, 3)).sum().mul(0.1).backward()  # a gradient of 0.1 is weaker than strength 1
        ...     opt.step()
        >>> net.weight.detach().abs().max()
        tensor(0.)
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        strength: float | Tensor | None = None,
        time_scale: str = "saturated",
        imbalance: float = 1.0,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
            strength=strength,
            time_scale=time_scale,
            imbalance=imbalance,
            backend=backend,
        )

    def decoupled(self, group: dict[str, Any]) -> bool:
        return False

    def gain(self, group: dict[str, Any], p: Tensor, constraint: Constraint) -> float:
        return float((1 - group["dampening"]) / (1 - group["momentum"])) if group["momentum"] else 1.0

    def preconditioner(self, group: dict[str, Any], p: Tensor) -> None:
        return None

    def _check_supported(self, name: str, group: dict[str, Any], constraint: Constraint) -> None:
        if group["momentum"] >= 1:
            raise ValueError(f"{name}: momentum must be < 1 for a constrained parameter, got {group['momentum']}")

    def _init_moments(self, group: dict[str, Any], state: dict[str, Any], p: Tensor, groups: Groups | None) -> None:
        pass  # torch's first momentum is the first gradient itself

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def _settings(self, group: dict[str, Any]) -> dict[str, Any]:
        return {"direction": "sgd", **{key: group[key] for key in ("momentum", "dampening", "nesterov")}}

    def _direction(
        self, group: dict[str, Any], state: dict[str, Any], w: Tensor, grad: Tensor, groups: Groups | None
    ) -> tuple[Tensor, float]:
        update, gain, buffer = directions.sgd(
            grad,
            state.get("momentum_buffer"),
            momentum=group["momentum"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
        )
        if buffer is not None:
            state["momentum_buffer"] = buffer
        return update, gain

    def _step_plain(self, group: dict[str, Any]) -> None:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        buffers: list[Tensor | None] = []
        has_sparse_grad = self._init_group(group, params, grads, buffers)
        torch_sgd(
            params,
            grads,
            buffers,
            has_sparse_grad=has_sparse_grad,
            foreach=group["foreach"],
            fused=group["fused"],
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
            **{k: group[k] for k in ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize")},
        )
        if group["momentum"] != 0:
            for p, buffer in zip(params, buffers, strict=True):
                self.state[p]["momentum_buffer"] = buffer
        elif any(constraint is not None for constraint in self._bound.values()):
            # torch's distributed checkpoints want state for all parameters or for none.
            for p in params:
                self.state.setdefault(p, {})
