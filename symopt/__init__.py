"""symopt: structure by symmetry, while training.

One idea.  If a loss cannot tell ``theta`` from its mirror image ``(I - 2 O O^T) theta``, then the plane
``O^T theta = 0`` is stationary, and with enough weight decay it attracts.  So a hard constraint is imposed by *adding*
a symmetry: write the weight as a product of factors that a mirror flips together, and decay the factors.  symopt does
this inside the optimizer, where the factors never exist: the weight is the only state.

Exactly zero weights::

    net = symopt.constrain(net, {"*.weight": symopt.Sparse()})
    opt = symopt.AdamW(net, lr=1e-3)

Neurons that are really gone, half of them, by the end of a training of known length::

    net = symopt.constrain(net, {"encoder.*.weight": symopt.GroupSparse("out", keep=0.5)})
    opt = symopt.AdamW(net, lr=1e-3, total_steps=10_000)
    ...
    small = symopt.fold(net)

The Lasso, to its optimum.  With SGD and Adam, ``Sparse(strength=alpha)`` under *half* the mean squared error is
scikit-learn's ``Lasso(alpha)``: the minimum of ``mean((y - X w)**2) / 2 + alpha * ||w||_1``.  Under ``mse_loss`` itself
the penalty counts half as much, ``alpha = strength / 2``.  Zeros take time: :func:`report` says how many steps::

    >>> import torch, symopt
    >>> from sklearn.linear_model import Lasso
    >>> _ = torch.manual_seed(0)
    >>> x = torch.randn(200, 100)
    >>> y = x[:, :5] @ torch.tensor([3.0, -2.0, 1.5, 1.0, -1.0]) + 0.5 * torch.randn(200)
    >>> model = symopt.constrain(torch.nn.Linear(100, 1, bias=False), {"weight": symopt.Sparse(strength=0.1)})
    >>> opt = symopt.Adam(model, lr=3e-2)
    >>> for _ in range(3000):
    ...     opt.zero_grad()
    ...     ((model(x)[:, 0] - y).square().mean() / 2).backward()
    ...     opt.step()
    >>> best = torch.as_tensor(Lasso(alpha=0.1, fit_intercept=False).fit(x, y).coef_)
    >>> int((model.weight != 0).sum()), int((best != 0).sum())
    (5, 5)
    >>> torch.allclose(model.weight[0], best.float(), atol=1e-3)
    True

Source: L. Ziyin, *Symmetry Induces Structure and Constraint of Learning*, ICML 2024, arXiv 2309.16932.
"""

from symopt.backends import explain
from symopt.certify import certify, critical_strength
from symopt.constraints import (
    Circulant,
    Constraint,
    Equivariant,
    GroupBridge,
    GroupSparse,
    LowRank,
    Mirror,
    Sparse,
    Symmetric,
    Tied,
    ZeroMean,
)
from symopt.folding.fold import fold
from symopt.folding.resize import resize
from symopt.module.bindings import constraints, param_groups
from symopt.module.constrain import constrain, release
from symopt.module.explicit import plain_state_dict
from symopt.optim import SGD, Adam, AdamW, Lion, Muon
from symopt.report import report

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Circulant",
    "Constraint",
    "Equivariant",
    "GroupBridge",
    "GroupSparse",
    "Lion",
    "LowRank",
    "Mirror",
    "Muon",
    "Sparse",
    "Symmetric",
    "Tied",
    "ZeroMean",
    "certify",
    "constrain",
    "constraints",
    "critical_strength",
    "explain",
    "fold",
    "param_groups",
    "plain_state_dict",
    "release",
    "report",
    "resize",
]
