"""Depth above two, the free gauge and lists of constraints: steps, zeros, penalties and where training ends.

Oracles are written out here: factors multiplied in loops, stationary points by root finding, proximal gradient.
"""

import itertools
import math
from contextlib import nullcontext

import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import brentq

import symopt
from support.cases import cases, exhaustive, pairs
from support.oracles import Explicit, labels
from support.runs import gradients, optimizer
from support.table import DEEP, EVERY_OPTIMIZER, FREE, OPTIMIZERS, constrained_parameter, taken
from support.tolerances import tolerance
from symopt_kernels.reference import elementwise, gauge

STRENGTH, SNAP = 0.3, 1e-6
DEPTHS = [2, 3, 4, 5]


def randn(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a, b, kind="factor step", scale=1.0):
    torch.testing.assert_close(a, b, rtol=tolerance(kind), atol=tolerance(kind) * float(scale))


def module_of(w, constraint):
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(w.clone())
    return symopt.constrain(module, {"weight": constraint})


def multiplied(factors):
    w = torch.ones_like(factors[0])
    for u in factors:
        w = w * u
    return w


def without(factors, i):
    return multiplied([u for j, u in enumerate(factors) if j != i])


def threshold(scale, depth):
    """What snaps: SNAP times twice the weight at which ``depth * size**(2 - 2 / depth)`` is the metric scale."""
    return SNAP * 2 * float(scale / depth) ** (1 / (2 - 2 / depth))


# -- one step in the fixed gauge is the balanced factor step ---------------------------------------------------------


class Balanced(Explicit):
    """All gates and the direction's norm equal at the start of every step; ``depth`` explicit factors."""

    def __init__(self, row, opt_row, w, *, time_scale):
        super().__init__(row, opt_row, w, time_scale=time_scale, imbalance=0.0)
        self.depth = row.make(None).depth
        scale = self.depth_metric().square().mean().sqrt()
        self.state = {"imbalance": torch.tensor(0.0, dtype=torch.float64), "metric_scale": scale}

    def depth_metric(self):
        """The squared length of d||w|| / d(factors), each of the ``depth`` parts being ``size**(1 - 1/depth)``."""
        return sum((self.size() ** (1 - 1 / self.depth)) ** 2 for _ in range(self.depth))

    def step(self, grad):
        depth, member, scale = self.depth, self.member, self.state["metric_scale"]
        d, gain = self.direction(grad)
        delta, decay = self.lr * d, self.lr * self.strength * gain
        s = self.size() ** (1 / depth)
        pull = self.norm(delta) * s ** (depth - 2)
        if self.saturated:
            t = torch.minimum(1 / self.depth_metric().clamp(min=float(scale)), 1 / (decay + 2 * pull))
        else:
            t = (1 / decay).clamp(max=1.0)
        delta, rho = delta * (member @ t), 1 - decay * t
        dead = s == 0
        part = torch.where(member @ dead.to(s) > 0, 0.0, self.w / (member @ s) ** (depth - 1))
        gates = [rho * s - ((delta * part) @ member) * without([s] * (depth - 1), i) for i in range(depth - 1)]
        assert bool((gates[0][~dead] > 0).all())  # the claim is for a' > 0
        new_part = (member @ rho) * part - delta * (member @ multiplied([s] * (depth - 1)))
        self.w = (member @ multiplied(gates)) * new_part
        snapped = (self.size() <= threshold(scale, depth)) & (pull * t < decay * t)
        self.w = torch.where(member @ (snapped | dead).to(self.w) > 0, 0.0, self.w)


@pairs(taken, row=DEEP, opt_row=EVERY_OPTIMIZER, time_scale=["none", "saturated"])
def test_the_balanced_step_is_the_factor_step(row, opt_row, time_scale):
    module = constrained_parameter(row, strength=STRENGTH)
    p = module.weight
    p.data[labels(row).reshape(row.shape) == 1] = 0
    opt = optimizer(module, opt_row, time_scale=time_scale)
    oracle = Balanced(row, opt_row, p, time_scale=time_scale)
    for g in gradients(row.shape, 6):
        p.grad = g
        opt.step()
        oracle.step(g)
        oracle.compare(p, opt)


@pairs(
    # An orthogonal update is not along the gradient.
    lambda row, opt_row, **_: taken(row, opt_row) and not opt_row.cls.direction.sided,
    row=DEEP,
    opt_row=EVERY_OPTIMIZER,
    time_scale=["none", "saturated"],
)
def test_signs_are_locked_and_zeros_absorb(row, opt_row, time_scale):
    """Under gradients that push every unit straight through zero, along itself (a group may walk around its zero)."""
    module = constrained_parameter(row, strength=1e-3)
    p, dead = module.weight, (labels(row) == 1).reshape(row.shape)
    p.data[dead] = 0
    start, was_dead = p.detach().clone(), dead.clone()
    opt = optimizer(module, opt_row, time_scale=time_scale, lr=0.3)
    downhill = -1.0 if opt_row.options.get("maximize") else 1.0
    for k in range(60):
        p.grad = torch.where(dead & (k % 2 == 1), -1.0, downhill * start + dead)  # zeros are pulled both ways
        opt.step()
        assert int(p[was_dead].count_nonzero()) == 0
        assert bool((p.detach() * start >= 0).all())
        was_dead |= p.detach() == 0
    assert bool((p.detach().abs() <= start.abs())[~dead].all()) and bool(p.detach().norm() < 0.5 * start.norm())


@cases(row=DEEP)
def test_a_factor_that_would_turn_over_ends_at_zero(row):
    """Without the time scale one step can be larger than a: ``max(a', 0)``."""
    module = constrained_parameter(row, strength=0.0)
    p = module.weight
    opt = symopt.SGD(module, lr=1.0, time_scale="none")
    p.grad = 1e9 * p.detach()
    opt.step()
    assert int(p.count_nonzero()) == 0


# -- reductions ------------------------------------------------------------------------------------------------------


@cases(
    make=[symopt.Sparse, lambda **k: symopt.GroupSparse("out", **k)],
    opt_row=OPTIMIZERS,
    time_scale=["none", "saturated"],
)
def test_depth_two_is_the_default(make, opt_row, time_scale):
    ends = []
    for constraint in (make(), make(depth=2)):
        module = module_of(randn((6, 5)), constraint)
        opt = optimizer(module, opt_row, time_scale=time_scale, strength=STRENGTH)
        for g in gradients((6, 5), 6):
            module.weight.grad = g
            opt.step()
        ends.append(module.weight.detach())
    assert torch.equal(*ends)
    assert not torch.equal(ends[0], randn((6, 5)))


@cases(depth=DEPTHS, time_scale=["none", "saturated"])
def test_groups_of_one_weight_are_sparse(depth, time_scale):
    shape, ends = (6, 5), []
    for constraint in (
        symopt.Sparse(strength=STRENGTH, depth=depth),
        symopt.GroupSparse(torch.arange(30).reshape(shape), strength=STRENGTH, depth=depth),
    ):
        module = module_of(randn(shape), constraint)
        opt = symopt.SGD(module, lr=0.05, time_scale=time_scale)
        for g in gradients(shape, 12):
            module.weight.grad = g
            opt.step()
        ends.append(module.weight.detach())
    close(*ends)
    assert bool((ends[0] - randn(shape)).abs().max() > 1e-2)


# -- factors and penalty ---------------------------------------------------------------------------------------------

KINDS = {
    "sparse": lambda depth: symopt.Sparse(depth=depth),
    "group": lambda depth: symopt.GroupSparse("out", depth=depth),
}


def sizes(kind, w):
    return w.abs().flatten() if kind == "sparse" else torch.stack([row.norm() for row in w])


@cases(kind=KINDS, depth=DEPTHS, imbalance=[0.0, 1e-3, 0.5, 50.0])
def test_split_composes_back_and_is_in_its_gauge(kind, depth, imbalance):
    constraint = KINDS[kind](depth)
    for scale in (1e-4, 1.0, 1e3):
        w = scale * randn((6, 5))
        w[1] = 0
        w[2, 2] = 0
        factors = constraint.split(w, imbalance)
        assert len(factors) == depth and all(bool(f.isfinite().all()) for f in factors)
        close(constraint.compose(factors), w, "identity", scale)
        assert torch.equal(constraint.compose(factors) == 0, w == 0)
        *gates, part = factors
        assert all(torch.equal(gate, gates[0]) for gate in gates)
        heavy, light = gates[0].flatten() ** 2, sizes(kind, part) ** 2
        close(heavy - light, torch.full_like(heavy, imbalance), "identity", (heavy + light).max())


@cases(kind=KINDS, depth=DEPTHS)
def test_the_penalty_is_the_least_decay(kind, depth):
    constraint, slack = KINDS[kind](depth), 1 + tolerance("identity")
    w = randn((6, 5), 1)
    w[3] = 0
    expected = depth / 2 * sum(float(x) ** (2 / depth) for x in sizes(kind, w))
    close(constraint.penalty(w), torch.tensor(expected, dtype=torch.float64), "identity")

    def decay(factors):
        return 0.5 * sum(f.square().sum() for f in factors)

    close(decay(constraint.split(w)), constraint.penalty(w), "identity")
    assert float(decay(constraint.split(w, 1.0))) > 1.001 * expected  # strict off balance
    template = constraint.split(w)
    for seed in range(50):
        factors = tuple(randn(f.shape, 10 * seed + i) for i, f in enumerate(template))
        assert bool(constraint.penalty(constraint.compose(factors)) <= decay(factors) * slack)


# -- the free gauge --------------------------------------------------------------------------------------------------


@cases(row=FREE, imbalance=[1.0, 0.2, 0.0])
def test_the_free_gauge_is_explicit_mode_step_for_step(row, imbalance):
    """Without time scale: torch.optim.SGD with weight decay on the factors, which autograd differentiates."""
    module = constrained_parameter(row, strength=STRENGTH)
    p, depth = module.weight, row.make(None).depth
    opt = symopt.SGD(module, lr=0.05, time_scale="none", imbalance=imbalance)
    c = imbalance * p.detach().square().mean().sqrt() ** (2 / depth)
    factors = [torch.nn.Parameter(f.clone()) for f in row.make(None).split(p.detach(), c)]
    theirs = torch.optim.SGD(factors, lr=0.05, weight_decay=STRENGTH)
    for g in gradients(row.shape, 12):
        p.grad = g
        opt.step()
        theirs.zero_grad()
        (multiplied(factors) * g).sum().backward()
        theirs.step()
        close(p.detach(), multiplied(factors).detach())
        for i, factor in enumerate(factors):
            close(opt.state[p][f"factor_{i}"], factor.detach())


@cases(row=FREE)
def test_the_free_gauge_with_time_scale(row):
    module = constrained_parameter(row, strength=STRENGTH)
    p, depth, lr = module.weight, row.make(None).depth, 0.05
    opt = symopt.SGD(module, lr=lr)
    c = p.detach().square().mean().sqrt() ** (2 / depth)
    factors = [f.clone() for f in row.make(None).split(p.detach(), c)]

    def metric():
        return sum(without(factors, i) ** 2 for i in range(depth))

    scale = metric().square().mean().sqrt()
    for g in gradients(row.shape, 12):
        p.grad = g
        opt.step()
        others = torch.stack([u.abs() for u in factors]).sort(0).values[2:].prod(0)
        t = torch.minimum(1 / metric().clamp(min=float(scale)), 1 / (lr * STRENGTH + lr * g.abs() * others))
        parts = [without(factors, i) for i in range(depth)]
        factors = [(1 - lr * STRENGTH * t) * u - lr * g * t * rest for u, rest in zip(factors, parts, strict=True)]
        close(p.detach(), multiplied(factors))
        close(opt.state[p]["metric_scale"], scale)


@cases(row=FREE)
def test_signs_change_in_the_free_gauge(row):
    module = constrained_parameter(row, strength=1e-3)
    p, target = module.weight, -module.weight.detach()
    opt = symopt.SGD(module, lr=0.05)
    for _ in range(1500):
        p.grad = p.detach() - target
        opt.step()
    assert torch.equal(p.detach().sign(), target.sign())


LOW, HIGH = 1 - 1e-3, 1 + 1e-3


@cases(row=FREE)
def test_snapping_in_the_free_gauge(row):
    """The lightest factor becomes zero, the others stay, and through them the weight may come back."""
    constraint = row.make(None)
    depth, decay = constraint.depth, 1e-2
    scale = torch.tensor(2.0, dtype=torch.float64)
    edge = threshold(scale, depth)
    heavy = torch.ones(4, dtype=torch.float64)

    def advance(size, pull, kappa, *, saturated=True):
        factors = (heavy,) * (depth - 1) + (size * heavy,)
        return constraint.advance(factors, -pull * heavy, kappa, scale, saturated=saturated)

    t = 1 / max(2.0, 1.0)  # one heavy partial product of 1, depth - 1 of about 1e-6
    rho = (1 - decay * t) ** depth
    w, factors = advance(LOW * edge / rho, 0.0, decay)
    assert int(w.count_nonzero()) == 0 == int(factors[-1].count_nonzero())
    for f in factors[:-1]:
        close(f, (1 - decay * t) * heavy)
    w, _ = advance(HIGH * edge / rho, 0.0, decay)
    close(w, HIGH * edge * heavy, scale=edge)
    w, _ = advance(LOW * edge / rho, 0.0, decay, saturated=False)  # the literal method snaps nothing
    assert bool((w > 0).all())
    w, _ = advance(0.5 * edge, 0.0, 0.0)  # not attracted
    close(w, 0.5 * edge * heavy, scale=edge)
    w, _ = advance(0.0, 0.1, decay)
    assert bool((w > 0).all())


@cases(row=DEEP)
def test_snapping_in_the_fixed_gauge(row):
    """Below the threshold while ``|delta| a**(depth - 2) < decay``, whichever way delta points."""
    constraint, decay = row.make(None), 1e-2
    scale, depth = torch.tensor(2.0, dtype=torch.float64), constraint.depth
    label = labels(row)
    member = torch.nn.functional.one_hot(label).double()
    w = randn(row.shape).flatten()
    unit = (w / (member @ (w * w @ member).sqrt())).reshape(row.shape)
    size, zero = 0.5 * threshold(scale, depth), torch.tensor(0.0, dtype=torch.float64)
    for share, dies in ((0.0, True), (LOW, True), (HIGH, False)):
        for sign in (1, -1):
            delta = sign * share * decay / size ** (1 - 2 / depth) * unit
            new = constraint.retract(size * unit, delta, decay, zero, scale, constraint.partition(unit))
            assert bool((new == 0).all()) if dies else bool((new * unit > 0).all())
    above = 1.1 * threshold(scale, depth) * unit
    assert bool((constraint.retract(above, 0 * unit, decay, zero, scale, constraint.partition(unit)) != 0).all())


# -- where scalar problems end ---------------------------------------------------------------------------------------

KAPPA = 0.2
BARRIER = (KAPPA / 3) ** 0.75  # where w + kappa w**(-1/3), whose value is y at a stationary point, is least
LEAST = BARRIER + KAPPA * BARRIER ** (-1 / 3)
YS = torch.tensor([-3.0, -1.0, -0.7, 0.6, 0.9, 2.0, 5.0, 0.4, -0.3], dtype=torch.float64)


def stationary(y, lo, hi):
    """Root of the derivative of ``(w - y)**2 / 2 + 1.5 kappa w**(2/3)`` between lo and hi, for y > 0."""
    return brentq(lambda w: w - y + KAPPA * w ** (-1 / 3), lo, hi, xtol=1e-15, rtol=1e-14)


def minimiser(y):
    """The l_{2/3} minimum beyond the barrier, 0 where there is none."""
    y = float(y)
    return math.copysign(stationary(abs(y), BARRIER, abs(y)), y) if abs(y) > LEAST else 0.0


MINIMA = torch.tensor([minimiser(y) for y in YS], dtype=torch.float64)


def solve(how, start):
    if how == "explicit":
        module = torch.nn.Module()
        module.weight = torch.nn.Parameter(start.clone())
        symopt.constrain(module, {"weight": symopt.Sparse(strength=KAPPA, depth=3)}, mode="explicit", init="balanced")
        opt = torch.optim.SGD(symopt.param_groups(module), lr=0.02)
        for _ in range(6000):
            opt.zero_grad()
            (0.5 * (module.weight - YS).square().sum()).backward()
            opt.step()
        return module.weight.detach()
    module = module_of(start, symopt.Sparse(strength=KAPPA, depth=3, gauge=how))
    opt = symopt.SGD(module, lr=0.2)
    for _ in range(3000):
        module.weight.grad = module.weight.detach() - YS
        opt.step()
    return module.weight.detach()


@pytest.mark.parametrize("how", ["explicit", "fixed", "free"])
def test_depth_three_ends_at_the_minimum_of_its_penalty(how):
    w = solve(how, YS)
    alive = MINIMA != 0
    assert alive.tolist() == [True] * 7 + [False] * 2
    close(w[alive], MINIMA[alive], "stationary")
    if how == "explicit":
        assert bool((w[~alive].abs() <= tolerance("stationary")).all())
    else:
        assert torch.equal(w[~alive], torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("how", ["explicit", "fixed"])
def test_depth_three_started_inside_the_barrier_ends_at_zero(how):
    """Zero is a local minimum whatever y: with balanced factors the local maximum divides the starts."""
    peaks = torch.tensor([stationary(abs(float(y)), 1e-9, BARRIER) for y in YS[:7]], dtype=torch.float64)
    for share, target in ((0.9, torch.zeros(7, dtype=torch.float64)), (1.1, MINIMA[:7])):
        start = YS.clone()
        start[:7] = share * peaks * YS[:7].sign()
        torch.testing.assert_close(solve(how, start)[:7], target, rtol=0, atol=tolerance("stationary"))


# -- collapse --------------------------------------------------------------------------------------------------------


def collapse_by_quadrature(radius, scale, depth, saturated):
    """Time of ``dr/dt = -depth r / max(scale, metric(r))`` from the radius down to the snapping threshold."""
    lowest = math.log(threshold(scale, depth))

    def slowness(log_r):
        metric = depth * math.exp(log_r) ** (2 - 2 / depth)
        return max(float(scale), metric) / depth if saturated else 1 / depth

    knee = math.log(float(scale) / depth) / (2 - 2 / depth)
    cut = min(max(knee, lowest), math.log(radius))
    return quad(slowness, lowest, cut)[0] + quad(slowness, cut, math.log(radius))[0]


@pairs(depth=[3, 4], kind=["sparse", "group", "free"], time_scale=["saturated", "none"])
def test_collapse_takes_the_steps_the_formula_says(depth, kind, time_scale):
    strength, lr = 2.0, {"saturated": 0.1, "none": 0.006}[time_scale]
    radius = torch.logspace(-2, 1, 12, dtype=torch.float64)
    size = 3 if kind == "group" else 1
    w = radius[:, None] * torch.nn.functional.normalize(randn((12, size)), dim=1)
    constraint = {
        "sparse": symopt.Sparse(strength=strength, depth=depth),
        "group": symopt.GroupSparse("out", strength=strength, depth=depth),
        "free": symopt.Sparse(strength=strength, depth=depth, gauge="free"),
    }[kind]
    module = module_of(w, constraint)
    opt = symopt.SGD(module, lr=lr, time_scale=time_scale, imbalance=0.0)
    p = module.weight
    p.grad = torch.zeros_like(p)
    died = torch.full((12,), math.inf, dtype=torch.float64)
    for k in itertools.count(1):
        opt.step()
        size_now = p.detach().norm(dim=1)
        # the literal free gauge snaps nothing: count until it passes the threshold
        bound = threshold(opt.state[p]["metric_scale"], depth) if (kind, time_scale) == ("free", "none") else 0.0
        died = torch.where((size_now <= bound) & died.isinf(), float(k), died)
        if not bool(died.isinf().any()):
            break
        assert k < 10_000
    scale, saturated = opt.state[p]["metric_scale"], time_scale == "saturated"
    need = constraint.collapse(radius, scale, saturated=saturated)
    exact = [collapse_by_quadrature(float(r), float(scale), depth, saturated) for r in radius]
    torch.testing.assert_close(need, torch.tensor(exact, dtype=torch.float64), rtol=tolerance("quadrature"), atol=0)
    metric = depth * radius ** (2 - 2 / depth)
    assert bool((metric > scale).any()) and bool((metric < scale).any())
    torch.testing.assert_close(died, need / (lr * strength), rtol=tolerance("law"), atol=1.0)


# -- lists: the sparse-group Lasso -----------------------------------------------------------------------------------

ROWS, COLUMNS, L1, L2 = 12, 5, 0.05, 0.15


class SparseGroupLasso:
    """``0.5 mean((X w - y)**2) + L1 ||w||_1 + L2 sum_g ||w_g||`` over rows; half of two live rows is zero."""

    def __init__(self, seed):
        x = randn((100, ROWS * COLUMNS), seed)
        truth = torch.zeros(ROWS, COLUMNS, dtype=torch.float64)
        truth[:4] = 2 * randn((4, COLUMNS), seed + 100)
        truth[:4, 3:] = 0
        y = x @ truth.flatten() + 0.3 * randn((100,), seed + 200)
        self.gram, self.moment, self.square = x.T @ x / 100, x.T @ y / 100, y @ y / 100

    def gradient(self, w):
        return (self.gram @ w.flatten() - self.moment).reshape(w.shape)

    def objective(self, w):
        flat = w.flatten()
        loss = 0.5 * (flat @ self.gram @ flat - 2 * self.moment @ flat + self.square)
        return loss + L1 * w.abs().sum() + L2 * w.norm(dim=1).sum()

    def solve(self):
        """Accelerated proximal gradient: soft threshold, then group soft threshold."""
        step = 1 / torch.linalg.eigvalsh(self.gram)[-1]
        w = z = torch.zeros(ROWS, COLUMNS, dtype=torch.float64)
        for k in range(3000):
            u = z - step * self.gradient(z)
            u = u.sign() * (u.abs() - step * L1).clamp(min=0)
            norm = u.norm(dim=1, keepdim=True)
            u = u * (1 - step * L2 / norm.clamp(min=1e-300)).clamp(min=0)
            w, z = u, u + k / (k + 3) * (u - w)
        return w

    def steps(self, best, scale, lr, cls):
        """A few thousand, and the time in which the slowest zero collapses: its net rate times lr and gain."""
        force, live = self.gradient(best).abs(), (best != 0).any(1)
        rest = (force - L1).clamp(min=0).norm(dim=1)
        # in a live row the whole margin to L1; in a dead one the margin to L2, at worst shared by all of the row
        margin = torch.where(live[:, None], L1 - force, ((L2 - rest) / math.sqrt(COLUMNS))[:, None])
        rate = margin / force.clamp(max=L1 + L2) if cls is symopt.Adam else margin  # Adam's gain is 1 / |gradient|
        slowest = float(rate[best == 0].min())
        return 2000 + math.ceil(symopt.Sparse().collapse(scale / 2, scale) / (lr * slowest))


@pytest.mark.parametrize(("cls", "lr"), [(symopt.SGD, 0.2), (symopt.Adam, 2e-2)], ids=["sgd", "adam"])
@pytest.mark.parametrize("seed", [0, *exhaustive(1)])
def test_a_list_ends_at_the_sparse_group_lasso(seed, cls, lr):
    problem = SparseGroupLasso(seed)
    best = problem.solve()
    module = module_of(
        0.3 * randn((ROWS, COLUMNS), seed + 300), [symopt.Sparse(strength=L1), symopt.GroupSparse("out", strength=L2)]
    )
    opt, p = cls(module, lr=lr), module.weight
    scale = symopt.constraints(module)["weight"].start(p.detach(), 1.0)[1]
    for _ in range(problem.steps(best, scale, lr, cls)):
        p.grad = problem.gradient(p.detach())
        opt.step()
    w = p.detach()
    close(symopt.constraints(module)["weight"].penalty(w), L1 * w.abs().sum() + L2 * w.norm(dim=1).sum(), "identity")
    gap = float(problem.objective(w) / problem.objective(best) - 1)
    assert abs(gap) <= tolerance("convex gap")
    assert torch.equal(w != 0, best != 0)
    live, force = (w != 0).any(1), -problem.gradient(w)
    assert bool(live.any()) and bool((~live).any()) and bool((w[live] == 0).any())  # zeros of both kinds
    # KKT: dead rows, zeros in live rows, live weights
    slack = tolerance("threshold") * L1
    rest = (force.abs() - L1).clamp(min=0)
    assert bool((rest[~live].norm(dim=1) <= L2 + slack).all())
    inside = live[:, None] & (w == 0)
    assert bool((force[inside].abs() <= L1 + slack).all())
    pull = L1 * w.sign() + L2 * w / w.norm(dim=1, keepdim=True).clamp(min=1e-300)
    assert bool(((force - pull)[w != 0].abs() <= slack).all())


def test_the_order_of_a_list_does_not_matter():
    parts, ends = [symopt.Sparse(strength=L1), symopt.GroupSparse("out", strength=L2), symopt.GroupSparse("in")], []
    for order in (1, -1):
        module = module_of(randn((6, 5)), parts[::order])
        opt = symopt.AdamW(module, lr=0.01)
        for g in gradients((6, 5), 12):
            module.weight.grad = g
            opt.step()
        ends.append(module.weight.detach())
    close(*ends)
    assert bool((ends[0] - randn((6, 5))).abs().max() > 1e-2)


@cases(keep=[0.99, 0.5, 0.0], depth=[2, 3, 4, 5])
def test_rebalancing_shrinks_every_imbalance_and_keeps_the_weight(depth, keep):
    g = torch.Generator().manual_seed(depth)
    factors = tuple(torch.randn(200, generator=g, dtype=torch.float64) for _ in range(depth))
    factors = (torch.where(torch.arange(200) < 20, 0.0, factors[0]), *factors[1:])
    new = elementwise.rebalance(factors, keep)
    before, after = (torch.stack([u * u for u in fs]) for fs in (factors, new))
    live = factors[0] != 0
    products = gauge.product(new), gauge.product(factors)
    torch.testing.assert_close(*products, rtol=tolerance("rebalanced product"), atol=tolerance("identity"))
    differences = [(squares - squares[-1])[:, live] for squares in (before, after)]
    near = {"rtol": tolerance("rebalanced differences"), "atol": tolerance("rebalanced product")}
    torch.testing.assert_close(differences[1], keep * differences[0], **near)
    assert bool((gauge.product(new)[~live] == 0).all())
    assert all(bool((a.sign() * b.sign() >= 0).all()) for a, b in zip(factors, new, strict=True))


@cases(depth=[2, 3])
def test_a_schedule_balances_the_free_gauge(depth):
    torch.manual_seed(0)
    net = symopt.constrain(
        torch.nn.Linear(6, 4).double(), {"weight": symopt.Sparse(strength=0.0, depth=depth, gauge="free")}
    )
    opt = symopt.SGD(net, lr=0.01, total_steps=40)
    for k in range(40):
        opt.zero_grad()
        net(torch.ones(1, 6, dtype=torch.float64)).square().sum().backward()
        with nullcontext() if k else pytest.warns(UserWarning, match="strength"):
            opt.step()
    state = opt.state[net.weight]
    squares = torch.stack([state[f"factor_{i}"].square() for i in range(depth)])
    live = net.weight != 0
    assert bool(((squares - squares[0]).abs().amax(0)[live] <= 1e-8).all()) and bool(live.any())


def test_a_schedule_knows_the_strengths_of_a_list():
    def steps_named(*strengths):
        torch.manual_seed(0)
        parts = [symopt.Sparse(strength=strengths[0]), symopt.GroupSparse("out", strength=strengths[1])]
        net = symopt.constrain(torch.nn.Linear(16, 4), {"weight": parts})
        opt = symopt.SGD(net, lr=0.01, total_steps=1)
        net(torch.randn(2, 16)).sum().backward()
        with pytest.warns(UserWarning, match="too few|give a strength") as caught:
            opt.step()
        return str(caught[0].message)

    assert "give a strength > 0" in steps_named(0.0, 0.0)
    # Equal weights of a group of n would make the group's penalty count 1 / sqrt(n) per weight.
    one, both = (int(steps_named(*s).rsplit(", or ", 1)[1].split()[0]) for s in ((0.1, 0.0), (0.1, 0.4)))
    assert 0.3 * one < both < 0.8 * one
