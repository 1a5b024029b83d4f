"""Every recipe trains, and shows on a small regression what its paper claims; the references are convex solvers."""

import dataclasses
import inspect
import math

import pytest
import torch
from skglm import GroupLasso
from sklearn.linear_model import Lasso

import symopt
from support.cases import cases, exhaustive
from support.tolerances import tolerance
from symopt import recipes

# A row per public recipe: what it constrains with, starts from and publishes.  A new recipe without a row fails.
RECIPES = {
    "spred": (recipes.spred, symopt.Sparse, 2, "independent", "2210.01212", {"lr": 0.256, "momentum": 0.875}),
    "deep_weight_factorization": (
        recipes.deep_weight_factorization,
        symopt.Sparse,
        3,
        "matched",
        "2502.02496",
        {"lr": 0.1, "momentum": 0.9},
    ),
    "d_gating": (recipes.d_gating, symopt.GroupSparse, 2, "gates", "D-Gating", {"lr": 0.1, "momentum": 0.9}),
    "pilot": (recipes.pilot, symopt.Sparse, 2, 1.0, "2408.09966", {"lr": 0.1, "momentum": 0.9}),
}


class Regression:
    """``0.5 mean((X w - y)**2)``: n samples, p features of which the first few are live, with weights in +-[1, 2]."""

    def __init__(self, seed, n, p, live, noise):
        g = torch.Generator().manual_seed(seed)
        self.x = torch.randn(n, p, generator=g, dtype=torch.float64)
        self.truth = torch.zeros(p, dtype=torch.float64)
        sign = torch.randn(live, generator=g, dtype=torch.float64).sign()
        self.truth[:live] = sign * (1 + torch.rand(live, generator=g, dtype=torch.float64))
        self.y = self.x @ self.truth + noise * torch.randn(n, generator=g, dtype=torch.float64)
        self.seed = seed

    def loss(self, w):
        return 0.5 * (self.x @ w - self.y).square().mean()

    def error(self, w):
        return float((w - self.truth).norm() / self.truth.norm())

    def fit(self, recipe, steps, shape=None, **options):
        """Full-batch training from the recipe's own start; weights of ``shape`` are features in row-major order."""
        torch.manual_seed(self.seed)
        net = torch.nn.Linear(*(shape or (1, self.x.shape[1]))[::-1], bias=False, dtype=torch.float64)
        net = recipe.constrain(net, "weight")
        opt = recipe.optimizer(net, **options)
        for k in range(steps):
            recipe.schedule(opt, k / steps)
            opt.zero_grad()
            self.loss(net.weight.flatten()).backward()
            opt.step()
        return net.weight.detach().flatten()


def live(w):
    """Weights above 1e-4 of the largest: factors under SGD decay for ever, and Adam at a constant lr trembles."""
    return w.abs() > 1e-4 * w.abs().max()


# -- what a recipe is ------------------------------------------------------------------------------------------------


def test_every_public_recipe_has_a_row():
    functions = {name for name in recipes.__all__ if inspect.isfunction(getattr(recipes, name))}
    assert functions == set(RECIPES) == set(recipes.__all__) - {"Recipe"}
    defined = {k for k, f in vars(recipes).items() if inspect.isfunction(f) and f.__module__ == recipes.__name__}
    assert {name for name in defined if not name.startswith("_")} == functions


@cases(name=RECIPES)
def test_a_recipe_is_what_its_row_says(name):
    make, kind, depth, init, source, options = RECIPES[name]
    recipe = make(0.25)
    assert type(recipe) is recipes.Recipe and source in recipe.source
    assert type(recipe.constraint) is kind
    assert (recipe.constraint.strength, recipe.constraint.depth, recipe.init) == (0.25, depth, init)
    assert recipe.optimizer_class is torch.optim.SGD and recipe.options == options
    for field in dataclasses.fields(recipe):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(recipe, field.name, None)


@cases(name=RECIPES)
def test_a_recipe_trains(name):
    """A net with a bias: the loss falls, its factors alone decay, options override, and it folds to plain weights."""
    recipe = RECIPES[name][0](1e-3)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    assert recipe.constrain(net, "0.weight", "2.weight") is net
    assert set(symopt.constraints(net)) == {"0.weight", "2.weight"}
    opt = recipe.optimizer(net, lr=0.01)
    *factors, rest = opt.param_groups
    assert sum(len(g["params"]) for g in factors) == 2 * recipe.constraint.depth
    assert {g["weight_decay"] for g in factors} == {1e-3} and rest["weight_decay"] == 0
    assert {g["lr"] for g in opt.param_groups} == {0.01}
    assert {g["momentum"] for g in opt.param_groups} == {recipe.options["momentum"]}  # what is not overridden stays
    x, losses = torch.randn(64, 8), []
    target = (x[:, :1] - 0.5 * x[:, 1:2]).tanh()
    for k in range(400):
        recipe.schedule(opt, k / 400)
        opt.zero_grad()
        loss = (net(x) - target).square().mean()
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]
    weights = symopt.plain_state_dict(net)
    assert weights["0.weight"].shape == (16, 8) and "0.parametrizations.weight.original0" not in weights


# -- schedule --------------------------------------------------------------------------------------------------------


@cases(name=RECIPES)
def test_schedule(name):
    """Constant ones keep the strength; pilot's is in force until ``off``; unconstrained weights are left alone."""
    recipe = RECIPES[name][0](0.3)
    opt = recipe.optimizer(recipe.constrain(torch.nn.Linear(4, 2), "weight"))
    factors, rest = opt.param_groups
    for progress in (0.0, 0.25, 0.49, 0.5, 0.75, 1.0, 0.1):
        recipe.schedule(opt, progress)
        expected = 0.0 if name == "pilot" and progress >= 0.5 else 0.3
        assert factors["weight_decay"] == pytest.approx(expected, rel=tolerance("identity"))
        assert rest["weight_decay"] == 0


def test_schedule_takes_any_shape():
    recipe = dataclasses.replace(recipes.spred(0.4), strength_at=lambda progress: 1 - progress**2)
    opt = recipe.optimizer(recipe.constrain(torch.nn.Linear(4, 2), "weight"))
    for progress in (0.0, 0.5, 1.0, 0.5):
        recipe.schedule(opt, progress)
        assert opt.param_groups[0]["weight_decay"] == pytest.approx(0.4 * (1 - progress**2), abs=tolerance("identity"))


def test_pilot_switches_off_where_it_is_told():
    recipe = recipes.pilot(0.3, off=0.8)
    assert [recipe.strength_at(p) for p in (0.0, 0.79, 0.8, 1.0)] == [1.0, 1.0, 0.0, 0.0]


def test_schedule_leaves_decay_of_other_weights_alone():
    recipe = recipes.pilot(0.3)
    opt = recipe.optimizer(recipe.constrain(torch.nn.Linear(4, 2), "weight"), weight_decay=5e-4)
    recipe.schedule(opt, 0.9)
    assert [g["weight_decay"] for g in opt.param_groups] == [0.0, 5e-4]


# -- the papers' claims ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "strength"), [(0, 0.1), *exhaustive((0, 0.5), (1, 0.1))])
def test_spred_is_the_lasso(seed, strength):
    """Many irrelevant features, Adam at 1e-2 with coupled decay as in the paper's notebook: scikit-learn's zeros."""
    problem = Regression(seed, 100, 2000, 10, 0.1)
    solver = Lasso(strength, fit_intercept=False, max_iter=200_000, tol=1e-13)
    best = torch.tensor(solver.fit(problem.x.numpy(), problem.y.numpy()).coef_)
    recipe = dataclasses.replace(recipes.spred(strength), optimizer_class=torch.optim.Adam, options={"lr": 1e-2})
    w = problem.fit(recipe, 3000)
    shares = [float((~live(v)).double().mean()) for v in (w, best)]
    assert abs(shares[0] - shares[1]) <= tolerance("share of zeros")
    assert 0.9 < shares[1] < 1

    def objective(w):
        return problem.loss(w) + strength * w.abs().sum()

    assert abs(float(objective(w) / objective(best) - 1)) <= tolerance("trembling gap")


@pytest.mark.parametrize("seed", [0, *exhaustive(1)])
def test_deep_weight_factorization_is_sparser_at_equal_fit(seed):
    """Depth 2 keeps several times as many weights even where it fits slightly worse: it shrinks the live ones."""
    problem = Regression(seed, 100, 200, 10, 0.3)
    deep = problem.fit(recipes.deep_weight_factorization(0.02), 2500, lr=0.02)
    flat = problem.fit(recipes.deep_weight_factorization(0.05, depth=2), 2500, lr=0.02)
    assert 1 <= float(problem.loss(flat) / problem.loss(deep)) < 1.2
    assert torch.equal(live(deep), problem.truth != 0)
    assert int(live(flat).sum()) >= 2 * int(live(deep).sum())
    assert problem.error(deep) < problem.error(flat)


@cases(depth=[2, 3, 4])
def test_deep_weight_factorization_starts_variance_matched(depth):
    """D factors of deviation std**(1/D) whose product has the weight's, and no factor near zero or far out."""
    torch.manual_seed(0)
    net = torch.nn.Linear(400, 400, bias=False, dtype=torch.float64)
    std = float(net.weight.detach().std())
    recipes.deep_weight_factorization(1e-3, depth=depth).constrain(net, "weight")
    factors = [f.detach() for f in net.parametrizations.weight.parameters()]
    assert len(factors) == depth
    for f in factors:
        assert float(f.std()) == pytest.approx(std ** (1 / depth), rel=tolerance("law"))
        assert abs(float(f.mean())) <= tolerance("law") * float(f.std())
        low, high = float(f.abs().min()), float(f.abs().max())
        assert high / low <= 20 * (1 + tolerance("identity"))  # .1 to 2 of one deviation
    assert float(net.weight.detach().std()) == pytest.approx(std, rel=tolerance("law"))


GROUPS, SIZE = 20, 5


@pytest.mark.parametrize("strength", [0.1, 1.2, *exhaustive(0.03, 0.3)])
def test_d_gating_follows_the_group_lasso(strength):
    problem = Regression(0, 150, GROUPS * SIZE, 4 * SIZE, 0.3)
    members = torch.arange(GROUPS * SIZE).reshape(GROUPS, SIZE).tolist()
    solver = GroupLasso(members, strength, fit_intercept=False, tol=1e-10, max_iter=500)
    best = torch.tensor(solver.fit(problem.x.numpy(), problem.y.numpy()).coef_)

    def norms(w):
        return w.reshape(GROUPS, SIZE).norm(dim=1)

    def objective(w):
        return problem.loss(w) + strength * norms(w).sum()

    def force(w):
        return problem.x.T @ (problem.y - problem.x @ w) / len(problem.y)

    # the slowest zero shrinks by 2 lr / (1 - momentum) (strength - ||force||) per step; e**-14 is 1e-6
    margin = float((strength - norms(force(best)))[norms(best) == 0].min())
    steps = 1000 + math.ceil(14 / (2 * 0.05 / (1 - 0.9) * margin))
    w = problem.fit(recipes.d_gating(strength), steps, (GROUPS, SIZE), lr=0.05)
    assert abs(float(objective(w) / objective(best) - 1)) <= tolerance("convex gap")
    assert torch.equal(live(norms(w)), norms(best) != 0)
    assert bool((norms(best) != 0).any())
    slack = tolerance("threshold") * strength  # stationary without skglm, too
    unit, alive = w.reshape(GROUPS, SIZE) / norms(w)[:, None], live(norms(w))
    assert bool((norms(force(w))[~alive] <= strength + slack).all())
    assert bool((norms(force(w) - strength * unit.flatten())[alive] <= slack).all())


def test_d_gating_starts_with_open_gates():
    net = torch.nn.Linear(6, 4, bias=False)
    before = net.weight.detach().clone()
    recipes.d_gating(0.1, depth=3).constrain(net, "weight")
    *gates, direction = net.parametrizations.weight.parameters()
    assert len(gates) == 2 and all(torch.equal(g, torch.ones(4)) for g in gates)
    assert torch.equal(direction, before) and torch.equal(net.weight, before)


@pytest.mark.parametrize("seed", [0, *exhaustive(1)])
def test_pilot_ends_nearer_to_the_truth(seed):
    """n = 40, p = 100, 5 live, no noise: constant decay is biased by shrinkage, none by the l2 start."""
    problem, strength = Regression(seed, 40, 100, 5, 0.0), 0.1
    pilot = recipes.pilot(strength)
    constant = dataclasses.replace(pilot, strength_at=lambda progress: 1.0)
    switched, always, never = (
        problem.error(problem.fit(recipe, 1500, lr=0.02)) for recipe in (pilot, constant, recipes.pilot(0.0))
    )
    assert switched < 0.2 * min(always, never)
    assert math.isfinite(never) and switched < tolerance("law")
