"""Adam and AdamW: one direction, with a strength that passes through the preconditioner or around it."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor
from torch.optim.adam import adam as torch_adam

from symopt.constraints import Constraint
from symopt.optim.base import ConstrainedOptimizer
from symopt.optim.options import shared_moment
from symopt.optim.steppers import stepper
from symopt_kernels.groups import Groups
from symopt_kernels.reference import directions
from symopt_kernels.reference.gauge import math_dtype

__all__ = ["Adam", "AdamW"]


class _AdamBase(ConstrainedOptimizer):
    """Abstract: everything but the torch class behind it and whether the strength is decoupled."""

    def _check_supported(self, name: str, group: dict[str, Any], constraint: Constraint) -> None:
        if group["capturable"] and constraint.is_matrix:
            raise ValueError(
                f"{name}: {type(constraint).__name__} drops columns while it trains, and a captured graph has fixed "
                "shapes; use capturable=False, or leave it out of symopt.constrain"
            )

    def gain(self, group: dict[str, Any], p: Tensor, constraint: Constraint) -> Tensor | float | None:
        if own := stepper(constraint):
            return own.gain(self, group, p, constraint)  # type: ignore[no-any-return]
        groups = self.groups(p, constraint)
        if self.decoupled(group):
            return 1.0 if groups is None else groups.size(p.detach()).sqrt()
        return self.preconditioner(group, p)

    def preconditioner(self, group: dict[str, Any], p: Tensor) -> Tensor | None:
        state = self.state.get(p, {})
        if "exp_avg_sq" not in state or not state["step"]:
            return None
        peak = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
        constraint = self._constraint(p)
        groups = None if constraint is None or len(self.members(p)) > 1 else self.groups(p, constraint)
        if groups is not None and peak.shape == p.shape != (groups.count,):
            peak = shared_moment(peak, groups)  # as loaded, until the first step
        return 1 / ((peak / (1 - group["betas"][1] ** state["step"])).sqrt() + group["eps"])  # type: ignore[no-any-return]

    def _init_moments(self, group: dict[str, Any], state: dict[str, Any], p: Tensor, groups: Groups | None) -> None:
        dtype = math_dtype(p)
        if "step" not in state:
            wide = torch.get_default_dtype() == torch.float64  # as torch's, which must not be half precision
            device = p.device if group["capturable"] or group["fused"] else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float64 if wide else torch.float32, device=device)
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
        for key in self._moments(group)[1:]:
            if key not in state:
                like: dict[str, Any] = {"dtype": dtype, "device": p.device}
                state[key] = torch.zeros_like(p, **like) if groups is None else torch.zeros(groups.count, **like)

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq")

    def _settings(self, group: dict[str, Any]) -> dict[str, Any]:
        beta1, beta2 = (float(beta) for beta in group["betas"])
        direction = "adamw" if self.decoupled(group) else "adam"
        return {"direction": direction, "beta1": beta1, "beta2": beta2, "eps": group["eps"]}

    def _direction(
        self, group: dict[str, Any], state: dict[str, Any], w: Tensor, grad: Tensor, groups: Groups | None
    ) -> tuple[Tensor, Tensor | float]:
        direction = directions.adamw if self.decoupled(group) else directions.adam
        state["step"] += 1
        update, gain, *moments = direction(
            grad,
            state["exp_avg"],
            state["exp_avg_sq"],
            state["max_exp_avg_sq"] if group["amsgrad"] else None,
            step=state["step"] if group["capturable"] else state["step"].item(),
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            groups=groups,
        )
        for key, value in zip(("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), moments, strict=True):
            if value is not None:
                self._update(group, state, key, value)
        return update, gain

    def _graph_check(self) -> None:
        """torch's own error if a CUDA graph is captured without ``capturable``; the method's name depends on torch."""
        name = "_accelerator_graph_capture_health_check"
        getattr(self, name if hasattr(self, name) else "_cuda_graph_capture_health_check")()

    def _step_plain(self, group: dict[str, Any]) -> None:
        self._graph_check()
        params: list[Tensor] = []
        grads: list[Tensor] = []
        exp_avgs: list[Tensor] = []
        exp_avg_sqs: list[Tensor] = []
        max_exp_avg_sqs: list[Tensor] = []
        steps: list[Tensor] = []
        has_complex = self._init_group(group, params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps)
        torch_adam(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            max_exp_avg_sqs,
            steps,
            has_complex=has_complex,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
            **{key: group[key] for key in _PASSED},
        )


_PASSED = (
    "amsgrad",
    "lr",
    "weight_decay",
    "eps",
    "maximize",
    "foreach",
    "capturable",
    "differentiable",
    "fused",
    "decoupled_weight_decay",
)


@final
class Adam(_AdamBase, torch.optim.Adam):
    """``torch.optim.Adam`` (same arguments, defaults and state keys) that imposes its parameters' constraints.

    The strength goes through the same preconditioner as the gradient: with ``p = 1 / (sqrt(v_hat) + eps)`` a
    constrained weight takes ``delta = lr t m_hat p`` and ``rho = 1 - lr t strength p``.  Fixed points are those of
    ``loss + strength * penalty``, in the units of the loss: the Lasso, the group Lasso.

    Preconditioning happens on the gradient of the effective weight; groups share one second moment
    (``exp_avg_sq`` is a vector with one entry per group, written out per weight in ``state_dict``).

    Args:
        params: a module, or anything ``torch.optim.Adam`` takes.
        lr, betas, eps, weight_decay, amsgrad, foreach, maximize, capturable, differentiable, fused,
            decoupled_weight_decay: as in torch; ``weight_decay`` applies to unconstrained parameters only.
        strength, time_scale, imbalance, backend: see :class:`symopt.optim.ConstrainedOptimizer`.

    Raises:
        ValueError, TypeError: as torch's; also for a bad strength, time_scale or imbalance.

    Source: Kingma & Ba, ICLR 2015 (arXiv 1412.6980), Algorithm 1; L. Ziyin, ICML 2024 (arXiv 2309.16932), Section 4.

    Example:
        >>> import torch, symopt
        >>> net = symopt.constrain(torch.nn.Linear(3, 1), {"weight": symopt.Sparse(strength=0.01)})
        >>> opt = symopt.Adam(net, lr=1e-2)
        >>> net(torch.randn(8, 3)).square().mean().backward()
        >>> opt.step()
        >>> sorted(opt.state[net.weight])
        ['exp_avg', 'exp_avg_sq', 'imbalance', 'metric_scale', 'step']
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        strength: float | Tensor | None = None,
        time_scale: str = "saturated",
        imbalance: float = 1.0,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
            strength=strength,
            time_scale=time_scale,
            imbalance=imbalance,
            backend=backend,
        )

    def decoupled(self, group: dict[str, Any]) -> bool:
        return bool(group["decoupled_weight_decay"])


@final
class AdamW(_AdamBase, torch.optim.AdamW):
    """``torch.optim.AdamW`` (same arguments, defaults and state keys) that imposes its parameters' constraints.

    A constrained weight takes ``delta = lr t m_hat / (sqrt(v_hat) + eps)`` and ``rho = 1 - lr t strength``: the
    strength is a dimensionless signal-to-noise threshold.  A weight dies while its mean gradient, towards growth, stays
    below ``strength`` times its root mean square, and lives above; nothing needs tuning to the loss's scale.  It does
    *not* minimise loss + l1: use :class:`symopt.Adam` or :class:`symopt.SGD` for that.

    Groups share one second moment, and their strength counts per coordinate (times the root of the group's size).

    Args:
        params: a module, or anything ``torch.optim.AdamW`` takes.
        lr, betas, eps, weight_decay, amsgrad, maximize, foreach, capturable, differentiable, fused: as in torch;
            ``weight_decay`` applies to unconstrained parameters only.
        strength, time_scale, imbalance, backend: see :class:`symopt.optim.ConstrainedOptimizer`.

    Raises:
        ValueError, TypeError: as torch's; also for a bad strength, time_scale or imbalance.

    Source: Loshchilov & Hutter, ICLR 2019 (arXiv 1711.05101), Algorithm 2; L. Ziyin, ICML 2024 (arXiv 2309.16932),
    Section 4.

    Example:
        >>> import torch, symopt
        >>> net = symopt.constrain(torch.nn.Linear(3, 2), {"weight": symopt.GroupSparse("out")})
        >>> opt = symopt.AdamW(net, lr=1e-2)
        >>> net(torch.randn(8, 3)).square().mean().backward()
        >>> opt.step()
        >>> opt.state[net.weight]["exp_avg_sq"].shape
        torch.Size([2])
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
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
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            strength=strength,
            time_scale=time_scale,
            imbalance=imbalance,
            backend=backend,
        )

    def decoupled(self, group: dict[str, Any]) -> bool:
        return True
