"""SGD: gradient, momentum, dampening, Nesterov."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor
from torch.optim.sgd import sgd as torch_sgd

from symopt.constraints import Constraint
from symopt.optim.base import ConstrainedOptimizer
from symopt.optim.direction import Direction, Moment, Moments, Options, ParamGroup, State
from symopt.optim.options import Params
from symopt_kernels.reference import directions
from symopt_kernels.reference.gauge import math_dtype

__all__ = ["SGD"]


@final
class SGDDirection(Direction):
    """``torch.optim.SGD``'s: gradient, momentum, dampening, Nesterov."""

    table = (Moment("momentum_buffer", "first", lazy=True),)
    switches = ("momentum",)

    def row(self, options: Options) -> str:
        return "sgd"

    def moments(self, options: Options) -> tuple[Moment, ...]:
        return self.table if options["momentum"] else ()

    def decoupled(self, options: Options) -> bool:
        return False

    def settings(self, options: Options) -> dict[str, float | bool]:
        return {key: options[key] for key in ("momentum", "dampening", "nesterov")}

    def why_not(self, options: Options, constraint: Constraint) -> str | None:
        if options["momentum"] < 1:
            return None
        return f"momentum must be < 1 for a constrained parameter, got {options['momentum']}"

    def lead(self, options: Options, state: State, grad: Tensor) -> tuple[Tensor, Moments]:
        lead, buffer = directions.sgd_lead(
            grad, state.get("momentum_buffer"), **{key: options[key] for key in ("momentum", "dampening", "nesterov")}
        )
        return lead, {} if buffer is None else {"momentum_buffer": buffer}

    def gain(
        self,
        options: Options,
        scale: Tensor | float,
        size: Tensor | None,
        shape: torch.Size,
        *,
        decoupled: bool,
    ) -> Tensor | float:
        """As much as momentum amplifies a constant gradient, so that fixed points do not depend on it."""
        return directions.amplification(float(options["momentum"]), float(options["dampening"]))

    def strength_unit(self, p: Tensor, grad: Tensor | None, state: State, units: int) -> float | Tensor:
        """The root mean square of the gradient, per unit; 0 before a first one."""
        grad = state.get("momentum_buffer") if grad is None else grad
        if not isinstance(grad, Tensor):
            return 0.0
        return grad.detach().to(math_dtype(p)).square().mean().sqrt() * math.sqrt(p.numel() / units)


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
        strength, time_scale, imbalance, backend, total_steps, commit: see :class:`symopt.optim.ConstrainedOptimizer`.

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

    direction = SGDDirection()

    def __init__(
        self,
        params: Params,
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
        total_steps: int | None = None,
        commit: float | None = None,
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
            total_steps=total_steps,
            commit=commit,
        )

    def _step_plain(self, group: ParamGroup) -> None:
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
        elif self.membership.constrained:
            # torch's distributed checkpoints want state for all parameters or for none.
            for p in params:
                self.state.setdefault(p, {})
