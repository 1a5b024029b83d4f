"""Where the steps end: Lasso and group Lasso optima, thresholds of the strength, and the time a collapse takes.

The optima come from scikit-learn and skglm and are checked by the KKT conditions as well; thresholds and times come
from the formulas in the docs.  Nothing here is tuned to a seed: the designs are the first few seeds.
"""

import itertools
import math

import pytest
import torch
from skglm import GroupLasso
from sklearn.linear_model import Lasso

import symopt
from support.cases import cases, exhaustive
from support.tolerances import tolerance
from symopt_kernels.reference import gauge

N = 100

SGD = {
    "plain": (symopt.SGD, {"lr": 0.1}, 4000),
    "momentum": (symopt.SGD, {"lr": 0.02, "momentum": 0.9}, 2000),
    "nesterov": (symopt.SGD, {"lr": 0.02, "momentum": 0.9, "nesterov": True}, 2000),
    "dampening": (symopt.SGD, {"lr": 0.04, "momentum": 0.9, "dampening": 0.5}, 2000),
}
ADAM = {
    "adam": (symopt.Adam, {"lr": 1e-2}, 5000),
    "amsgrad": (symopt.Adam, {"lr": 3e-2, "amsgrad": True}, 5000),  # its preconditioner remembers the first gradients
}


class Regression:
    """``0.5 mean((X w - y)**2)`` with ten live weights of 3 standard units and noise of 0.1."""

    def __init__(self, seed: int, p: int, *, spread: float = 0.0):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(N, p, generator=g, dtype=torch.float64)
        self.x = x * 10 ** (spread * torch.randn(p, generator=g, dtype=torch.float64))
        truth = torch.zeros(p, dtype=torch.float64)
        truth[:10] = 3 * torch.randn(10, generator=g, dtype=torch.float64) / self.x[:, :10].std(0)
        self.y = self.x @ truth + 0.1 * torch.randn(N, generator=g, dtype=torch.float64)
        self.start = (torch.rand(1, p, generator=g, dtype=torch.float64) * 2 - 1) / math.sqrt(p)  # as nn.Linear
        self.gram, self.moment = self.x.T @ self.x / N, self.x.T @ self.y / N

    def gradient(self, w: torch.Tensor) -> torch.Tensor:
        return self.gram @ w - self.moment

    def loss(self, w: torch.Tensor) -> torch.Tensor:
        return 0.5 * (self.x @ w - self.y).square().mean()

    def fit(self, constraint, cls, options, steps: int, *, scheduled: bool = False) -> torch.Tensor:
        module = torch.nn.Module()
        module.weight = torch.nn.Parameter(self.start.clone())
        symopt.constrain(module, {"weight": constraint})
        opt = cls(module, **options, total_steps=steps if scheduled else None)
        p = module.weight
        for _ in range(steps):
            p.grad = self.gradient(p.detach()[0])[None]
            opt.step()
        return p.detach()[0]

    def steps(self, constraint, cls, options, steps: int, slowest: float) -> int:
        """``steps`` and the time after which even the unit with the largest ``|gradient| / strength`` < 1 is zero.

        Without that time supports could not be compared: zeros that are almost alive collapse slowly.
        """
        scale = constraint.start(self.start, 1.0)[1]
        gain = (1 - options.get("dampening", 0.0)) / (1 - options.get("momentum", 0.0))
        if cls is symopt.Adam:  # preconditioned by that very gradient
            gain = 1 / (slowest * constraint.strength)
        need = constraint.collapse(scale / 2, scale) / (options["lr"] * gain * constraint.strength * (1 - slowest))
        return steps + math.ceil(need)


# -- Lasso -----------------------------------------------------------------------------------------------------------


def check_lasso(
    seed: int, kind: str, cls, options, steps: int, *, spread: float = 0.0, scheduled: bool = False
) -> None:
    kappa, problem = 0.1, Regression(seed, 200, spread=spread)
    solver = Lasso(kappa, fit_intercept=False, max_iter=200_000, tol=1e-13)
    best = torch.tensor(solver.fit(problem.x.numpy(), problem.y.numpy()).coef_)
    slowest = float(problem.gradient(best)[best == 0].abs().max() / kappa)
    constraint = symopt.Sparse(strength=kappa)
    steps = problem.steps(constraint, cls, options, steps, slowest)
    w = problem.fit(constraint, cls, options, steps, scheduled=scheduled)

    def objective(w):
        return problem.loss(w) + kappa * w.abs().sum()

    assert float(objective(w) / objective(best) - 1) <= tolerance(kind)
    assert torch.equal(w != 0, best != 0)
    # The same without scikit-learn: |gradient| <= kappa at zeros, = kappa at live weights; those as the distance to
    # where they are equal, because on a steep column Adam turns a small step into a large gradient.
    force, live, slack = -problem.gradient(w), w != 0, tolerance("threshold")
    assert bool((force[~live].abs() <= (1 + slack) * kappa).all())
    distance = (force - kappa * w.sign())[live] / problem.gram.diagonal()[live]
    assert bool((distance.abs() <= slack * w.abs().mean()).all())


@pytest.mark.parametrize("seed", [0, *exhaustive(1, 2)])
@pytest.mark.parametrize("name", SGD | ADAM)
def test_lasso(name, seed):
    check_lasso(seed, "convex gap", *(SGD | ADAM)[name])


@pytest.mark.parametrize("name", ["plain", "adam"])
def test_lasso_with_a_schedule(name):
    check_lasso(0, "convex gap", *(SGD | ADAM)[name], scheduled=True)


@pytest.mark.parametrize("seed", [0, *exhaustive(1, 2)])
def test_lasso_on_badly_scaled_columns(seed):
    check_lasso(seed, "scaled convex gap", symopt.Adam, {"lr": 1e-2}, 10_000, spread=0.7)


# -- group Lasso -----------------------------------------------------------------------------------------------------

GROUPS = 24


def scattered_groups() -> torch.Tensor:
    """Groups of 1 to 9 columns, in no order."""
    label = torch.cat([torch.full((1 + i % 9,), i) for i in range(GROUPS)])
    return label[torch.randperm(len(label), generator=torch.Generator().manual_seed(9))][None]


INDEX = scattered_groups()


def group_norms(w: torch.Tensor) -> torch.Tensor:
    member = torch.nn.functional.one_hot(INDEX[0]).double()
    return (w * w @ member).sqrt()


@pytest.mark.parametrize("seed", [0, *exhaustive(1, 2)])
@pytest.mark.parametrize("name", ["plain", "adam"])
def test_group_lasso(name, seed):
    kappa, problem = 0.3, Regression(seed, INDEX.numel())
    members = [(INDEX[0] == i).nonzero()[:, 0].tolist() for i in range(GROUPS)]
    solver = GroupLasso(members, kappa, fit_intercept=False, tol=1e-10, max_iter=500)
    best = torch.tensor(solver.fit(problem.x.numpy(), problem.y.numpy()).coef_)
    norms = group_norms(best)
    slowest = float(group_norms(problem.gradient(best))[norms == 0].max() / kappa)
    cls, options, steps = (SGD | ADAM)[name]
    constraint = symopt.GroupSparse(INDEX, strength=kappa)
    w = problem.fit(constraint, cls, options, problem.steps(constraint, cls, options, steps, slowest))

    def objective(w):
        return problem.loss(w) + kappa * group_norms(w).sum()

    assert float(objective(w) / objective(best) - 1) <= tolerance("convex gap")
    live = group_norms(w) != 0
    assert torch.equal(live, norms != 0)
    assert 0 < int(live.sum()) < GROUPS
    assert torch.equal(w != 0, live[INDEX[0]])  # all of a group or nothing
    # The same without skglm: ||gradient_g|| <= kappa at zero groups, gradient_g = -kappa w_g / ||w_g|| at live ones.
    force, slack = -problem.gradient(w) / kappa, tolerance("threshold")
    assert bool((group_norms(force)[~live] <= 1 + slack).all())
    unit = w / group_norms(w)[INDEX[0]]
    assert bool((group_norms(force - unit.nan_to_num())[live] <= slack).all())


# -- the strength at which nothing survives --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "options", "steps", "seed"),
    [(symopt.SGD, {"lr": 0.1}, 2500, seed) for seed in range(3)] + [(symopt.Adam, {"lr": 3e-2}, 4000, 0)],
    ids=["sgd-0", "sgd-1", "sgd-2", "adam"],
)
@pytest.mark.parametrize("grouped", [False, True], ids=["sparse", "group"])
def test_nothing_survives_from_the_largest_initial_gradient_on(grouped, cls, options, steps, seed):
    problem = Regression(seed, INDEX.numel())
    gradient = problem.gradient(torch.zeros(INDEX.numel(), dtype=torch.float64))
    critical = float((group_norms(gradient) if grouped else gradient.abs()).max())
    for side in (1, -1):
        strength = critical * (1 + side * tolerance("threshold"))
        constraint = symopt.GroupSparse(INDEX, strength=strength) if grouped else symopt.Sparse(strength=strength)
        w = problem.fit(constraint, cls, options, steps)
        assert bool((w == 0).all()) == (side == 1)


# -- AdamW's threshold is a signal-to-noise ratio --------------------------------------------------------------------

COUNT = 400
NOISE = {
    # Both have root mean square 1, so the mean r is the signed mean over the root mean square.
    "coin": lambda r, g: torch.where(torch.rand(r.shape, generator=g, dtype=r.dtype) < (1 + r) / 2, 1.0, -1.0),
    "normal": lambda r, g: r + (1 - r * r).sqrt() * torch.randn(r.shape, generator=g, dtype=r.dtype),
}


@pytest.mark.parametrize(("noise", "imbalance", "size"), [("coin", 1.0, 1), ("normal", 0.0, 1), ("coin", 0.0, 4)])
def test_adamw_keeps_what_has_signal_above_the_strength(noise, imbalance, size):
    """``d ln|w|`` per step is ``2 lr t (r - strength)``: 5 % below dies, 5 % above lives, whatever the group's size.

    The noise spreads ``ln|w|`` by ``2 lr t sqrt((1 - r**2) steps)``, a fifth of the drift after these steps.
    """
    strength, lr, steps = 0.95, 0.12, 4000
    g = torch.Generator().manual_seed(0)
    signs = torch.where(torch.rand(COUNT, size, generator=g) < 0.5, -1.0, 1.0).double()
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(signs * 0.5 / math.sqrt(size))
    constraint = symopt.GroupSparse("out", strength=strength) if size > 1 else symopt.Sparse(strength=strength)
    symopt.constrain(module, {"weight": constraint})
    opt = symopt.AdamW(module, lr=lr, imbalance=imbalance)
    above = torch.arange(COUNT) % 2 == 1
    r = torch.where(above, 1.05, 0.95).double()[:, None].expand(COUNT, size) * strength
    p, total = module.weight, torch.zeros(COUNT, size, dtype=torch.float64)
    for k in range(1, steps + 1):
        p.grad = -signs * NOISE[noise](r, g)
        opt.step()
        if noise == "normal":
            state = opt.state[p]
            rms = (state["exp_avg_sq"] / (1 - 0.999**k)).sqrt()
            total -= signs * state["exp_avg"] / (1 - 0.9**k) / rms
    alive = (p != 0).any(1)
    assert torch.equal(alive, above)
    assert not imbalance or float(opt.state[p]["imbalance"]) == 0
    if noise == "normal":  # the signal was what it was meant to be
        for side in (above, ~above):
            assert float(total[side].mean()) / steps == pytest.approx(float(r[side].mean()), rel=tolerance("threshold"))


# -- the time a collapse takes ---------------------------------------------------------------------------------------

COLLAPSE = {
    "sgd": (symopt.SGD, {}),
    "momentum": (symopt.SGD, {"momentum": 0.8, "dampening": 0.3}),
    "adamw": (symopt.AdamW, {}),
    "adam": (symopt.Adam, {}),
}


@cases(
    # Adam without any gradient has the preconditioner 1 / eps and no time to measure: see test_steps.
    lambda name, pulled, **_: pulled or name != "adam",
    size=[1, 3],
    name=COLLAPSE,
    pulled=[False, True],
    time_scale=["saturated", "none"],
)
def test_collapse_takes_the_steps_the_formula_says(size, name, pulled, time_scale):
    cls, options = COLLAPSE[name]
    strength, lr = 2.0, {"saturated": 0.03, "none": 0.006}[time_scale]
    g = torch.Generator().manual_seed(0)
    radius = torch.logspace(-2, 1, 16, dtype=torch.float64)  # both sides of half the metric scale, which is 3.9
    unit = torch.nn.functional.normalize(torch.randn(16, size, generator=g, dtype=torch.float64), dim=1)
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(radius[:, None] * unit)
    constraint = symopt.GroupSparse("out", strength=strength) if size > 1 else symopt.Sparse(strength=strength)
    symopt.constrain(module, {"weight": constraint})
    opt = cls(module, lr=lr, time_scale=time_scale, imbalance=1e-4, **options)
    p, pull = module.weight, 0.5 * strength if pulled else 0.0
    born_dead = torch.full((16,), math.inf, dtype=torch.float64)
    for k in itertools.count(1):
        p.grad = -pull * unit  # towards growth
        opt.step()
        dead = (p == 0).all(1)
        born_dead = torch.where(dead & born_dead.isinf(), float(k), born_dead)
        if bool(dead.all()):
            break
        assert k < 20_000
    gain, ratio = {
        "sgd": (1.0, pull / strength),
        "momentum": (0.7 / 0.2, pull / strength),
        # a constant gradient is its own root mean square: 1 per coordinate
        "adamw": (math.sqrt(size), 1 / strength if pulled else 0.0),
        "adam": (math.sqrt(size) / (pull or 1.0), pull / strength),
    }[name]
    scale = opt.state[p]["metric_scale"]
    need = constraint.collapse(radius, scale, saturated=time_scale == "saturated")
    steps = need / (lr * strength * gain) / (1 - ratio)
    assert bool((radius > scale / 2).any()) and bool((radius < scale / 2).any())
    torch.testing.assert_close(born_dead, steps, rtol=tolerance("law"), atol=1.0)  # a step is a whole one
    tol = gauge.SNAP * scale
    half = scale / 2
    by_hand = (radius / tol).log() / 2
    if time_scale == "saturated":
        by_hand = torch.relu(radius - half) + half * (radius.clamp(max=float(half)) / tol).log()
    torch.testing.assert_close(need, by_hand, rtol=tolerance("identity"), atol=0)
