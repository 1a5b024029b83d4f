"""Adam and AdamW: one direction, with a strength that passes through the preconditioner or around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor
from torch.optim.adam import adam as torch_adam

from symopt.constraints import Constraint
from symopt.optim.base import ConstrainedOptimizer
from symopt.optim.direction import Direction, Moment, Moments, Options, ParamGroup, State
from symopt.optim.options import Params
from symopt_kernels.reference import directions

__all__ = ["Adam", "AdamW"]


@final
class AdamDirection(Direction):
    """``torch.optim.Adam``'s, on the gradient of the effective weight; AdamW's has a decoupled strength."""

    table = (
        Moment("exp_avg", "first"),
        Moment("exp_avg_sq", "second", per_unit=True),
        Moment("max_exp_avg_sq", "peak", per_unit=True),
    )
    counts_steps = True
    scaled_by = "gradient"
    switches = ("amsgrad", "decoupled_weight_decay")

    def row(self, options: Options) -> str:
        return "adamw" if self.decoupled(options) else "adam"

    def moments(self, options: Options) -> tuple[Moment, ...]:
        return self.table if options["amsgrad"] else self.table[:2]

    def decoupled(self, options: Options) -> bool:
        return bool(options["decoupled_weight_decay"])

    def settings(self, options: Options) -> dict[str, float | bool]:
        beta1, beta2 = (float(beta) for beta in options["betas"])
        return {"beta1": beta1, "beta2": beta2, "eps": options["eps"]}

    def why_not(self, options: Options, constraint: Constraint) -> str | None:
        if not options["capturable"] or not constraint.is_matrix:
            return None
        return (
            f"{type(constraint).__name__} drops columns while it trains, and a captured graph has fixed shapes; use "
            "capturable=False, or leave it out of symopt.constrain"
        )

    def lead(self, options: Options, state: State, grad: Tensor) -> tuple[Tensor, Moments]:
        step = state["step"] if options["capturable"] else state["step"].item()
        lead, exp_avg = directions.adam_lead(grad, state["exp_avg"], step=step, beta1=options["betas"][0])
        return lead, {"exp_avg": exp_avg}

    def scale(self, options: Options, state: State, mean_square: Tensor) -> tuple[Tensor, Moments]:
        step, amsgrad = state["step"] if options["capturable"] else state["step"].item(), options["amsgrad"]
        scale, exp_avg_sq, peak = directions.adam_scale(
            mean_square,
            state["exp_avg_sq"],
            state["max_exp_avg_sq"] if amsgrad else None,
            step=step,
            beta2=options["betas"][1],
            eps=options["eps"],
        )
        return scale, {"exp_avg_sq": exp_avg_sq} | ({} if peak is None else {"max_exp_avg_sq": peak})

    def preconditioner(
        self, options: Options, state: State, average: Callable[[Tensor], Tensor] = lambda moment: moment
    ) -> Tensor | None:
        if "exp_avg_sq" not in state or not state["step"]:
            return None
        peak = average(state["max_exp_avg_sq" if options["amsgrad"] else "exp_avg_sq"])
        found: Tensor = 1 / ((peak / (1 - options["betas"][1] ** state["step"])).sqrt() + options["eps"])
        return found


def _step_plain(optimizer: Adam | AdamW, group: ParamGroup) -> None:
    """Torch's functions on the unconstrained parameters, and its own error if a graph is captured by mistake."""
    check = "_accelerator_graph_capture_health_check"  # the method's name depends on torch
    getattr(optimizer, check if hasattr(optimizer, check) else "_cuda_graph_capture_health_check")()
    params: list[Tensor] = []
    grads: list[Tensor] = []
    exp_avgs: list[Tensor] = []
    exp_avg_sqs: list[Tensor] = []
    max_exp_avg_sqs: list[Tensor] = []
    steps: list[Tensor] = []
    has_complex = optimizer._init_group(group, params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps)
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
        grad_scale=getattr(optimizer, "grad_scale", None),
        found_inf=getattr(optimizer, "found_inf", None),
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
class Adam(ConstrainedOptimizer, torch.optim.Adam):
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
        strength, time_scale, imbalance, backend, total_steps, commit: see :class:`symopt.optim.ConstrainedOptimizer`.

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
        ['bias_rows', 'exp_avg', 'exp_avg_sq', 'imbalance', 'metric_scale', 'progress', 'step']
    """

    direction = AdamDirection()

    def __init__(
        self,
        params: Params,
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
        total_steps: int | None = None,
        commit: float | None = None,
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
            total_steps=total_steps,
            commit=commit,
        )

    def _step_plain(self, group: ParamGroup) -> None:
        _step_plain(self, group)


@final
class AdamW(ConstrainedOptimizer, torch.optim.AdamW):
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
        strength, time_scale, imbalance, backend, total_steps, commit: see :class:`symopt.optim.ConstrainedOptimizer`.

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

    direction = AdamDirection()

    def __init__(
        self,
        params: Params,
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
        total_steps: int | None = None,
        commit: float | None = None,
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
            total_steps=total_steps,
            commit=commit,
        )

    def _step_plain(self, group: ParamGroup) -> None:
        _step_plain(self, group)
