"""Lion: the sign of an interpolated gradient, or what that is for a group of weights."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from symopt.optim.base import ConstrainedOptimizer
from symopt.optim.direction import Direction, Moment, Moments, Options, ParamGroup, State
from symopt.optim.options import Params
from symopt_kernels.reference import directions

__all__ = ["Lion"]


@final
class LionDirection(Direction):
    """``c = beta1 m + (1 - beta1) g`` divided by its root mean square over the unit: of a single weight, its sign."""

    table = (Moment("exp_avg", "first"),)
    scaled_by = "lead"

    def row(self, options: Options) -> str:
        return "lion"

    def settings(self, options: Options) -> dict[str, float | bool]:
        return {"beta1": float(options["betas"][0]), "beta2": float(options["betas"][1])}

    def lead(self, options: Options, state: State, grad: Tensor) -> tuple[Tensor, Moments]:
        beta1, beta2 = options["betas"]
        lead, exp_avg = directions.lion_lead(grad, state["exp_avg"], beta1=beta1, beta2=beta2)
        return lead, {"exp_avg": exp_avg}

    def scale(self, options: Options, state: State, mean_square: Tensor) -> tuple[Tensor, Moments]:
        return directions.lion_scale(mean_square), {}


@final
class Lion(ConstrainedOptimizer):
    """Lion (evolved sign momentum), which imposes the constraints of its parameters.

    An unconstrained weight takes ``w' = (1 - lr weight_decay) w - lr sign(c)`` with ``c = beta1 m + (1 - beta1) g``,
    then ``m' = beta2 m + (1 - beta2) g``.  A constrained one moves by its constraint's retraction with
    ``delta = lr t c / rms(c)``, the root mean square taken over the unit, and ``rho = 1 - lr t strength``, t being the
    time scale.  The strength is dimensionless, as :class:`symopt.AdamW`'s: a weight dies while the mean of its signs,
    towards growth, stays below it.  It does not minimise loss + penalty.

    Args:
        params: a module, or anything ``torch.optim.Optimizer`` takes.
        lr: learning rate; about a tenth to a third of AdamW's.
        betas: of the update and of the moment, in [0, 1).
        weight_decay: decoupled, of unconstrained parameters only.
        maximize: as in torch.
        strength, time_scale, imbalance, backend, total_steps, commit: see :class:`symopt.optim.ConstrainedOptimizer`.

    Raises:
        ValueError, TypeError: for an option out of range.

    Source: X. Chen et al., *Symbolic Discovery of Optimization Algorithms*, NeurIPS 2023 (arXiv 2302.06675),
    Algorithm 2; L. Ziyin, ICML 2024 (arXiv 2309.16932), Section 4.

    Example:
        >>> import torch, symopt
        >>> net = symopt.constrain(torch.nn.Linear(3, 1), {"weight": symopt.Sparse(strength=0.3)})
        >>> opt = symopt.Lion(net, lr=1e-3)
        >>> net(torch.randn(8, 3)).square().mean().backward()
        >>> opt.step()
        >>> sorted(opt.state[net.weight])
        ['bias_rows', 'exp_avg', 'imbalance', 'metric_scale', 'progress']
    """

    direction = LionDirection()

    def __init__(
        self,
        params: Params,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        strength: float | Tensor | None = None,
        time_scale: str = "saturated",
        imbalance: float = 1.0,
        backend: str | None = None,
        total_steps: int | None = None,
        commit: float | None = None,
    ) -> None:
        if not lr >= 0:
            raise ValueError(f"Lion: lr must be >= 0, got {lr}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"Lion: betas must be two numbers in [0, 1), got {betas}")
        if not weight_decay >= 0:
            raise ValueError(f"Lion: weight_decay must be >= 0, got {weight_decay}")
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize},
            strength=strength,
            time_scale=time_scale,
            imbalance=imbalance,
            backend=backend,
            total_steps=total_steps,
            commit=commit,
        )

    def _step_plain(self, group: ParamGroup) -> None:
        for p in self.unconstrained(group):
            if p.grad is None:
                continue
            state = self.state[p]
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(p)
            lead, moments = self.direction.lead(group, state, -p.grad if group["maximize"] else p.grad)
            shown = lead.sign() + 0 * lead  # the sign alone would make numbers of NaN and infinity
            p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * shown)
            state["exp_avg"].copy_(moments["exp_avg"])
