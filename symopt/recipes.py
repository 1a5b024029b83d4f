"""Methods of the literature as named configurations of explicit mode: what they constrain, start from and train with.

Each is a :class:`Recipe` with its source; the papers' own numbers at small scale are reproduced in
``tests/test_recipes.py``.  They are starting points as published, not recommendations: compare
``constrain(..., mode="optimizer")``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import final

import torch
from torch import nn

from symopt.constraints import Constraint, GroupSparse, Sparse
from symopt.module.bindings import param_groups
from symopt.module.constrain import constrain
from symopt.module.patterns import Patterns


def _constant(progress: float) -> float:
    return 1.0


__all__ = ["Recipe", "d_gating", "deep_weight_factorization", "pilot", "spred"]


@final
@dataclass(frozen=True)
class Recipe:
    """One published method: ``net = recipe.constrain(net, "*.weight")``, then ``opt = recipe.optimizer(net)``.

    Example:
        >>> import torch
        >>> from symopt import recipes
        >>> recipe = recipes.spred(strength=1e-3)
        >>> net = recipe.constrain(torch.nn.Linear(4, 2), "weight")
        >>> opt = recipe.optimizer(net, lr=0.1)
        >>> [(len(g["params"]), g["weight_decay"]) for g in opt.param_groups]
        [(2, 0.001), (1, 0)]
        >>> recipe.schedule(opt, progress=0.5)
    """

    source: str
    constraint: Constraint
    init: str | float
    optimizer_class: Callable[..., torch.optim.Optimizer] = torch.optim.SGD
    options: dict[str, float] = field(default_factory=dict)
    """Of the optimizer, as published."""
    strength_at: Callable[[float], float] = _constant
    """Share of the strength in force after a share ``progress`` of training."""

    def constrain(self, module: nn.Module, *patterns: str) -> nn.Module:
        """:func:`symopt.constrain` in explicit mode with this recipe's constraint and init."""
        rows: Patterns = {tuple(patterns): self.constraint}
        return constrain(module, rows, mode="explicit", init=self.init)

    def optimizer(self, module: nn.Module, **options: object) -> torch.optim.Optimizer:
        """The published optimizer on :func:`symopt.param_groups`; ``options`` override its settings."""
        return self.optimizer_class(param_groups(module), **{**self.options, **options})

    def schedule(self, optimizer: torch.optim.Optimizer, progress: float) -> None:
        """Set the strength in force after a share ``progress`` of training; a no-op for constant ones."""
        for group in optimizer.param_groups:
            if "strength" in group:  # the factors' groups, see symopt.param_groups
                group["weight_decay"] = group["strength"] * self.strength_at(progress)


def spred(strength: float) -> Recipe:
    """``w = u * v``, ordinary weight decay, SGD: the l1 penalty by gradient descent.

    Published for ResNet18 on CIFAR-10: lr .256, momentum .875, cosine schedule, batch 256; afterwards small weights are
    cut and the rest fine-tuned.  Source: Ziyin & Wang, ICML 2023 (arXiv 2210.01212).
    """
    options = {"lr": 0.256, "momentum": 0.875}
    return Recipe("arXiv 2210.01212", Sparse(strength=strength), "independent", options=options)


def deep_weight_factorization(strength: float, depth: int = 3) -> Recipe:
    """``w = u_1 * ... * u_D`` with a variance-matched, truncated init and large lr: the l_{2/D} penalty.

    Source: Kolb et al., ICLR 2025 (arXiv 2502.02496).  The paper finds depth 3 and 4 best and large learning rates
    necessary; lr is left to the caller's problem, .1 here.
    """
    options = {"lr": 0.1, "momentum": 0.9}
    return Recipe("arXiv 2502.02496", Sparse(strength=strength, depth=depth), "matched", options=options)


def d_gating(strength: float, groups: str | torch.Tensor = "out", depth: int = 2) -> Recipe:
    """``w_g = s_1 ... s_{D-1} d_g`` with gates that start at 1: the group penalty L_{2,2/D}.

    Source: Kolb et al., *Differentiable Sparsity via D-Gating*, NeurIPS 2025.
    """
    options = {"lr": 0.1, "momentum": 0.9}
    return Recipe(
        "D-Gating, NeurIPS 2025", GroupSparse(groups, strength=strength, depth=depth), "gates", options=options
    )


def pilot(strength: float, off: float = 0.5) -> Recipe:
    """``w = u * v`` started at ``u**2 - v**2 = 1``, which lets signs flip, with a decay that changes over training.

    The decay moves the implicit bias from l2 to l1; switched off after a share ``off`` of training it leaves no
    shrinkage behind.  PILoT's own schedule reacts to the sparsity reached; this is its principle (a time-varying
    decay), in the simplest form.  Source: Jacobs & Burkholz, ICLR 2025 (arXiv 2408.09966).
    """
    return Recipe(
        "arXiv 2408.09966",
        Sparse(strength=strength),
        1.0,
        options={"lr": 0.1, "momentum": 0.9},
        strength_at=lambda progress: 1.0 if progress < off else 0.0,
    )
