"""Muon: momentum whose update is orthogonalised, for matrices."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor
from torch.optim import _muon

from symopt.optim.base import ConstrainedOptimizer
from symopt.optim.direction import Direction, Moment, Moments, Options, ParamGroup, State
from symopt.optim.options import Params

__all__ = ["Muon"]


@final
class MuonDirection(Direction):
    """``torch.optim.Muon``'s: momentum, Nesterov, orthogonalised by Newton-Schulz, times its adjustment of the lr."""

    table = (Moment("momentum_buffer", "first"),)
    sided = True

    def lead(self, options: Options, state: State, grad: Tensor) -> tuple[Tensor, Moments]:
        momentum = options["momentum"]
        buffer = state["momentum_buffer"].lerp(grad, 1 - momentum)
        mean = grad.lerp(buffer, momentum) if options["nesterov"] else buffer
        given = options["ns_coefficients"], options["ns_steps"], options["eps"]
        update = _muon._zeropower_via_newtonschulz(mean, *given).to(grad.dtype)
        return self._adjustment(options, grad.shape) * update, {"momentum_buffer": buffer}

    def typical(self, options: Options, shape: torch.Size) -> float:
        """Of an orthogonal update, ``1 / sqrt(max(shape))``, adjusted.

        So the strength is a signal-to-noise ratio per coordinate, whatever the shape of the matrix.
        """
        return self._adjustment(options, shape) / math.sqrt(max(shape))

    @staticmethod
    def _adjustment(options: Options, shape: torch.Size) -> float:
        return float(_muon._adjust_lr(1.0, options["adjust_lr_fn"], shape))


@final
class Muon(ConstrainedOptimizer, torch.optim.Muon):
    """``torch.optim.Muon`` (same arguments, defaults and state keys) that imposes the constraints of its parameters.

    The update of a matrix is orthogonalised as a whole, ``O = NS(m)``; this commutes with ``m -> Q m`` and ``m -> m Q``
    for orthogonal Q and with nothing else.  So a constraint is allowed where its mirrors multiply the matrix from one
    side: rows, columns and heads (:class:`symopt.GroupSparse`) and :class:`symopt.ZeroMean` over one dimension.  Others
    are refused by name.  A constrained weight takes ``delta = lr t O`` with torch's adjustment of lr, and
    ``rho = 1 - lr t strength r sqrt(n)``, with r the root mean square of an orthogonal update of that shape, n the
    size of the group and t the time scale: the strength is dimensionless, as :class:`symopt.AdamW`'s.

    Args:
        params: matrices, in any form that ``torch.optim.Muon`` takes, or a module that has no others.
        lr, weight_decay, momentum, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn: as in torch;
            ``weight_decay`` applies to unconstrained parameters only.
        strength, time_scale, imbalance, backend, total_steps, commit: see :class:`symopt.optim.ConstrainedOptimizer`.

    Raises:
        ValueError, TypeError: as torch's, for parameters that are no matrices too; for a constraint whose mirrors are
            not one-sided.

    Source: K. Jordan et al., *Muon: An optimizer for hidden layers in neural networks*, 2024; L. Ziyin, ICML 2024
    (arXiv 2309.16932), Section 4.

    Example:
        >>> import torch, symopt
        >>> net = symopt.constrain(torch.nn.Linear(6, 4, bias=False), {"weight": symopt.GroupSparse("out")})
        >>> opt = symopt.Muon(net, lr=1e-2)
        >>> net(torch.randn(8, 6)).square().mean().backward()
        >>> opt.step()
        >>> sorted(opt.state[net.weight])
        ['imbalance', 'metric_scale', 'momentum_buffer', 'progress']
    """

    direction = MuonDirection()

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (_muon.DEFAULT_A, _muon.DEFAULT_B, _muon.DEFAULT_C),
        eps: float = _muon.EPS,
        ns_steps: int = _muon.DEFAULT_NS_STEPS,
        adjust_lr_fn: str | None = None,
        *,
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
            weight_decay,
            momentum,
            nesterov,
            ns_coefficients,
            eps,
            ns_steps,
            adjust_lr_fn,
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
        buffers: list[Tensor] = []
        has_complex = self._init_group(group, params, grads, buffers)
        passed = ("lr", "weight_decay", "momentum", "nesterov", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")
        _muon.muon(params, grads, buffers, has_complex=has_complex, **{key: group[key] for key in passed})
