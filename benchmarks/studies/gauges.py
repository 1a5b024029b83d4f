"""The figure and the numbers of docs/gauges.md: explicit, free, fixed.

python -m benchmarks.studies.gauges            a few minutes; writes docs/gauges.png and prints the tables
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
from sklearn.linear_model import Lasso
from torch import Tensor, nn

import symopt
from benchmarks.studies import program

matplotlib.use("Agg")
import matplotlib.pyplot as plt

N, P, KAPPA = 100, 200, 0.1
FORMS = {
    "explicit, balanced": ("explicit", "balanced", {}),
    "explicit, imbalanced": ("explicit", "imbalanced", {}),
    "free gauge": ("free", None, {}),
    "fixed gauge, imbalance 0": ("fixed", None, {"imbalance": 0.0}),
    "fixed gauge": ("fixed", None, {}),
}


def scalar_paths(steps: int = 300) -> dict[str, list[float]]:
    """One weight that starts at -.5 and is pulled to +.8 by ``(w - 1)**2 / 2`` with strength .2, plain SGD."""
    paths = {}
    for name, (form, init, options) in FORMS.items():
        net = nn.Linear(1, 1, bias=False).double()
        nn.init.constant_(net.weight, -0.5)
        if form == "explicit":
            symopt.constrain(net, {"weight": symopt.Sparse(strength=0.2)}, mode="explicit", init=init)
            opt: torch.optim.Optimizer = torch.optim.SGD(symopt.param_groups(net), lr=0.05)
        else:
            symopt.constrain(net, {"weight": symopt.Sparse(strength=0.2, gauge=form)})
            opt = symopt.SGD(net, lr=0.05, time_scale="none", **options)
        path = []
        for _ in range(steps):
            opt.zero_grad()
            (0.5 * (net.weight - 1).square().sum()).backward()
            opt.step()
            path.append(float(net.weight.detach()))
        paths[name] = path
    return paths


def problem(seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(N, P, generator=g, dtype=torch.float64)
    truth = torch.zeros(P, dtype=torch.float64)
    truth[:10] = 3 * torch.randn(10, generator=g, dtype=torch.float64)
    return x, x @ truth + 0.1 * torch.randn(N, generator=g, dtype=torch.float64)


def train(kind: str, strength: float, batches: Callable[[], tuple[Tensor, Tensor]], steps: int) -> Tensor:
    """The weight after training by ``kind``, an optimizer and where it acts."""
    torch.manual_seed(0)
    net = nn.Linear(P, 1, bias=False).double()
    name, where = kind.split(", ")
    if where == "factors":
        symopt.constrain(net, {"weight": symopt.Sparse(strength=strength)}, mode="explicit")
        opt: torch.optim.Optimizer = getattr(torch.optim, name)(symopt.param_groups(net), lr=1e-2)
    else:
        symopt.constrain(net, {"weight": symopt.Sparse(strength=strength)})
        opt = getattr(symopt, name)(net, lr=1e-2)
    for _ in range(steps):
        x, y = batches()
        opt.zero_grad()
        (0.5 * (net(x)[:, 0] - y).square().mean()).backward()
        opt.step()
    return net.weight.detach()[0]


def live(w: Tensor) -> int:
    """Weights above 1e-6 of the largest: factors reach exact zero only by underflow."""
    return int((w.abs() > 1e-6 * w.abs().max()).sum())


def main() -> None:
    parser = program(__spec__, __doc__)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--out", type=Path, default=Path("docs/gauges.png"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for name, path in scalar_paths().items():
        left.plot(path, label=name, linestyle="--" if name.startswith("free") else "-")
        print(f"one weight, {name:24} ends at {path[-1]:+.4f}")
    left.axhline(0, color="0.8", zorder=0)
    left.set(title="one weight: start -.5, optimum +.8", xlabel="step", ylabel="w")
    left.legend()

    x, y = problem()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # at tol 1e-13 scikit-learn may warn that it is not reached
        best = torch.tensor(Lasso(KAPPA, fit_intercept=False, max_iter=200_000, tol=1e-13).fit(x, y).coef_)
    optimum = float(0.5 * (x @ best - y).square().mean() + KAPPA * best.abs().sum())
    print(f"\nLasso, n = {N}, p = {P}, full batch: {live(best)} live weights at strength {KAPPA}\n")
    strengths = [0.003, 0.01, 0.03, 0.1, 0.3]
    header = "| live weights at strength | " + " | ".join(map(str, strengths)) + " |"
    print(header + f" relative gap at {KAPPA} |\n" + "|---" * (len(strengths) + 2) + "|")
    for kind in ("Adam, factors", "Adam, fixed gauge", "AdamW, factors"):
        ends = [train(kind, s, lambda: (x, y), args.steps) for s in strengths]
        w = ends[strengths.index(KAPPA)]
        gap = float(0.5 * (x @ w - y).square().mean() + KAPPA * w.abs().sum()) / optimum - 1
        print(f"| {kind} | " + " | ".join(str(live(w)) for w in ends) + f" | {max(gap, 0):.0e} |", flush=True)

    truth = torch.zeros(P, dtype=torch.float64)
    truth[:10] = torch.linspace(0.5, 3, 10, dtype=torch.float64)

    def fresh() -> tuple[Tensor, Tensor]:
        batch = torch.randn(16, P, dtype=torch.float64)
        return batch, batch @ truth + torch.randn(16, dtype=torch.float64)

    print(f"\nregression on fresh batches of 16, noise 1, {P} weights of which 10 matter\n")
    print(header + "\n" + "|---" * (len(strengths) + 1) + "|")
    for kind in ("AdamW, factors", "AdamW, fixed gauge"):
        counts = [live(train(kind, s, fresh, args.steps)) for s in strengths]
        right.semilogx(strengths, counts, marker="o", label=kind)
        print(f"| {kind} | " + " | ".join(map(str, counts)) + " |", flush=True)
    right.axhline(10, color="0.8", zorder=0)
    right.set(
        title=f"noisy regression, {P} weights, 10 matter", xlabel="strength", ylabel="live weights", ylim=(0, None)
    )
    right.legend()
    args.out.parent.mkdir(exist_ok=True)
    figure.savefig(args.out, dpi=110)
    print(f"\nwrote {args.out}")


if __name__ == "__main__":
    main()
