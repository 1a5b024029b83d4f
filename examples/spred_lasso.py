"""spred as published: a Lasso with 40 000 weights and 100 samples by w = u * v, Adam and weight decay.

    python examples/spred_lasso.py        about two minutes; needs scikit-learn

The setting of the paper's Lasso notebook (Ziyin & Wang, ICML 2023, arXiv 2210.01212): Adam lr 1e-2, coupled decay 2e-5,
10 000 steps; the data are our own draw.  The loss is half the mean squared error, so the decay is scikit-learn's alpha.
Then the same in the fixed gauge, where the weight is the only state.
"""

import argparse
import time
import warnings

import torch
from sklearn.linear_model import Lasso
from torch import Tensor, nn

import symopt
from symopt import recipes

WEIGHTS, SAMPLES, LIVE, DECAY = 40_000, 100, 20, 2e-5


def data(seed: int) -> tuple[Tensor, Tensor]:
    """Samples of about unit norm, a sparse truth, noise of a twentieth of the signal."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(SAMPLES, WEIGHTS, generator=g) / WEIGHTS**0.5
    truth = torch.zeros(WEIGHTS)
    truth[:LIVE] = torch.randn(LIVE, generator=g)
    return x, x @ truth + 0.001 * torch.randn(SAMPLES, generator=g)


def fit(net: nn.Linear, opt: torch.optim.Optimizer, x: Tensor, y: Tensor, steps: int) -> Tensor:
    """Full-batch least squares with a cosine learning rate; returns the weight."""
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    for _ in range(steps):
        opt.zero_grad()
        (0.5 * (net(x)[:, 0] - y).square().mean()).backward()
        opt.step()
        cosine.step()
    return net.weight.detach()[0]


def main() -> None:
    """Fit, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    x, y = data(args.seed)

    def objective(w: Tensor) -> float:
        return float(0.5 * (x @ w - y).square().mean() + DECAY * w.abs().sum())

    def show(name: str, w: Tensor, seconds: float) -> None:
        share = float((w.abs() <= 1e-4 * w.abs().max()).float().mean())
        exact = float((w == 0).float().mean())
        print(f"{name:34} {share:8.2%} {exact:8.2%} {objective(w):12.6e} {seconds:7.1f} s", flush=True)

    print(f"{'':34} {'zeros':>8} {'exact':>8} {'objective':>12}")
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that its own tolerance is not reached
        best = torch.tensor(Lasso(DECAY, fit_intercept=False, max_iter=5_000, tol=1e-6).fit(x, y).coef_).float()
    show("scikit-learn Lasso", best, time.perf_counter() - start)

    torch.manual_seed(args.seed)
    recipe = recipes.spred(DECAY)
    net = nn.Linear(WEIGHTS, 1, bias=False)
    recipe.constrain(net, "weight")
    opt = torch.optim.Adam(symopt.param_groups(net), lr=1e-2)
    start = time.perf_counter()
    show("spred (explicit factors), Adam", fit(net, opt, x, y, args.steps), time.perf_counter() - start)

    torch.manual_seed(args.seed)
    plain = symopt.constrain(nn.Linear(WEIGHTS, 1, bias=False), {"weight": symopt.Sparse(strength=DECAY)})
    start = time.perf_counter()
    adam = symopt.Adam(plain, lr=1e-2)
    show("fixed gauge, symopt.Adam", fit(plain, adam, x, y, args.steps), time.perf_counter() - start)


if __name__ == "__main__":
    main()
