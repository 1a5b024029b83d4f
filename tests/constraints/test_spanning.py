"""Units that span several parameters as a constraint: verbs, explicit mode, where training ends, what it refuses."""

import math

import pytest
import torch

import symopt
from support.cases import cases
from support.runs import take
from support.table import EVERY_OPTIMIZER, UNITS, bound_module, taken
from support.tolerances import tolerance
from support.units import gradients_of, units_of


def constraint_of(module):
    return next(iter(symopt.constraints(module).values()))


def randn(n, seed):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a, b, kind="identity", scale=1.0):
    torch.testing.assert_close(a, b, rtol=tolerance(kind), atol=tolerance(kind) * scale)


def written(row):
    """Unit and factor of every weight of the flat vector, and the number of units."""
    of_weights, count = units_of(row)
    factors = [a for part, a in zip(of_weights, row.factors, strict=True) for _ in part]
    return torch.tensor([u for part in of_weights for u in part]), torch.tensor(factors, dtype=torch.float64), count


# -- the verbs -------------------------------------------------------------------------------------------------------


def composed(row, factors):
    unit, a, count = written(row)
    *base, gate, direction = factors
    flat = direction.flatten()
    w = [a[i] * gate[u] * flat[i] if u < count else base[0].flatten()[i] for i, u in enumerate(unit.tolist())]
    return torch.stack(w).reshape(direction.shape)


@cases(row=UNITS, c=[0.0, 0.3, 50.0])
def test_factors_are_one_gate_per_unit_and_a_direction(row, c):
    constraint, (unit, a, count) = constraint_of(bound_module(row)), written(row)
    shape = row.shapes[0] if len(row.shapes) == 1 else (len(unit),)
    w = randn(shape, 1)
    w[unit.reshape(shape) == 1] = 0
    *base, gate, direction = constraint.split(w, c)
    assert gate.shape == (count,) and len(base) == constraint.free_factors == int(bool((unit >= count).any()))
    close(composed(row, (*base, gate, direction)), w)
    close(constraint.compose((*base, gate, direction)), w)
    assert torch.equal(constraint.compose((*base, gate, direction)) == 0, w == 0)
    bound = torch.stack([direction.flatten()[unit == u].square().sum() for u in range(count)])
    close(gate * gate - bound, torch.full_like(gate, c), scale=float((gate * gate).max()))
    sizes = torch.stack([(w.flatten() / a)[unit == u].norm() for u in range(count)])
    close(constraint.size(w), sizes)
    close(constraint.penalty(w), sizes.sum())
    least = sum(f.square().sum() for f in constraint.split(w)[len(base) :]) / 2
    close(constraint.penalty(w), least)
    random = [randn(f.shape, 2 + i) for i, f in enumerate((gate, direction))]
    over = constraint.compose((*(torch.zeros_like(w) for _ in base), *random))
    assert float(constraint.penalty(over)) <= sum(float(f.square().sum()) for f in random) / 2
    image = constraint.mirror((*base, gate, direction))
    close(constraint.compose(image), w)
    assert torch.equal(image[-1], -direction)


@cases(row=UNITS)
def test_pullback_is_the_gradient_of_compose(row):
    constraint = constraint_of(bound_module(row))
    shape = row.shapes[0] if len(row.shapes) == 1 else (sum(math.prod(s) for s in row.shapes),)
    factors = [randn(f.shape, i).requires_grad_() for i, f in enumerate(constraint.split(randn(shape, 9)))]
    grad = randn(shape, 5)
    expected = torch.autograd.grad(composed(row, factors), factors, grad)
    found = constraint.pullback(tuple(f.detach() for f in factors), grad)
    for mine, theirs in zip(found, expected, strict=True):
        close(mine, theirs, scale=10)


@cases(row=UNITS)
def test_the_dual_norm_is_that_of_the_gradient_times_the_factors(row):
    """Above it a unit without weight stays so: the largest ``(sum_t a_t**2 ||g_t||**2)**(1/2)``."""
    constraint, (unit, a, count) = constraint_of(bound_module(row)), written(row)
    g = randn(len(unit), 3)
    expected = max(float((a * g)[unit == u].norm()) for u in range(count))
    shaped = g.reshape(row.shapes[0]) if len(row.shapes) == 1 else g
    assert float(constraint.critical(shaped)) == pytest.approx(expected, rel=tolerance("identity"))


# -- explicit mode -----------------------------------------------------------------------------------------------------


@cases(row=UNITS)
def test_the_first_step_is_that_of_explicit_mode(row):
    """Which starts in the same gauge, without the time scale: torch.optim on factors; a base does not decay."""
    ours, theirs = bound_module(row), torch.nn.Module()
    for name, p in ours.named_parameters():
        theirs.register_parameter(name, torch.nn.Parameter(p.detach().clone()))
    symopt.constrain(theirs, {"*": row.make(0.3)}, mode="explicit")
    groups, free = symopt.param_groups(theirs), constraint_of(ours).free_factors
    assert [g["weight_decay"] for g in groups] == [0.3] + [0.0] * free
    factors = {name.split(".")[-1] for name, _ in groups[-1]["params"]} if free else set()
    assert factors == ({"original0"} if free else set())  # a base comes first
    opt = torch.optim.SGD(groups, lr=0.05)
    grads = gradients_of(ours, 0)
    sum((getattr(theirs, name) * g).sum() for name, g in zip(ours._parameters, grads, strict=True)).backward()
    opt.step()
    take([(ours, symopt.SGD(ours, lr=0.05, time_scale="none"))], grads)
    for name, p in ours.named_parameters():
        close(getattr(theirs, name).detach(), p.detach(), "factor step")


# -- where training ends -----------------------------------------------------------------------------------------------


class Regression:
    """``0.5 mean((X w - y)**2)`` over three parameters whose slices make up 12 units, three of which are in the truth.

    ``w_t = a_t v_t``: in v it is a group lasso on columns ``a_t X_t``, with columns that no penalty sees.
    """

    shapes = ((12, 3), (12,), (2, 13))
    dims = (0, 0, 1)
    factors = (1.0, 2.0, 0.5)
    kappa = 0.4

    def __init__(self, seed):
        index = [torch.arange(12), torch.arange(12).flip(0), torch.tensor([*range(12), -1])]
        of_weights = [
            i.reshape([-1 if d == dim else 1 for d in range(len(shape))]).expand(shape).flatten()
            for i, shape, dim in zip(index, self.shapes, self.dims, strict=True)
        ]
        self.index, self.unit = index, torch.cat(of_weights)
        counts = torch.tensor([len(of) for of in of_weights])
        self.a = torch.where(self.unit < 0, 1.0, torch.tensor(self.factors).repeat_interleave(counts)).double()
        self.sizes = counts.tolist()
        n, g = len(self.unit), torch.Generator().manual_seed(seed)
        self.x = torch.randn(300, n, generator=g, dtype=torch.float64)
        truth = torch.where((self.unit >= 0) & (self.unit < 3), torch.randn(n, generator=g, dtype=torch.float64), 0.0)
        truth = torch.where(self.unit < 0, 0.7, truth)
        self.y = self.x @ truth + 0.1 * torch.randn(300, generator=g, dtype=torch.float64)
        self.start = torch.randn(n, generator=g, dtype=torch.float64) / math.sqrt(n)

    def gradient(self, w):
        return self.x.T @ (self.x @ w - self.y) / len(self.y)

    def norms(self, v):
        return torch.stack([v[self.unit == u].norm() for u in range(12)])

    def objective(self, w):
        return 0.5 * (self.x @ w - self.y).square().mean() + self.kappa * self.norms(w / self.a).sum()

    def solve(self):
        """Accelerated proximal gradient in v."""
        x = self.x * self.a
        step = len(self.y) / torch.linalg.matrix_norm(x, 2) ** 2
        v = z = self.start / self.a
        t = 1.0
        for _ in range(600):
            moved = z - step * (x.T @ (x @ z - self.y)) / len(self.y)
            shrink = (1 - step * self.kappa / self.norms(moved)).clamp(min=0)
            new = torch.where(self.unit >= 0, shrink[self.unit.clamp(min=0)], 1.0) * moved
            t, before = (1 + math.sqrt(1 + 4 * t * t)) / 2, t
            v, z = new, new + (before - 1) / t * (new - v)
        return self.a * v

    def fit(self, cls, steps, backend, **options):
        module = torch.nn.Module()
        for i, (part, shape) in enumerate(zip(self.start.split(self.sizes), self.shapes, strict=True)):
            module.register_parameter(f"w{i}", torch.nn.Parameter(part.reshape(shape).clone()))
        groups = {f"w{i}": (dim, index) for i, (dim, index) in enumerate(zip(self.dims, self.index, strict=True))}
        factors = {f"w{i}": a for i, a in enumerate(self.factors)}
        symopt.constrain(module, {"*": symopt.GroupSparse(groups, strength=self.kappa, factors=factors)})
        opt = cls(module, backend=backend, **options)
        for _ in range(steps):
            g = self.gradient(torch.cat([p.detach().flatten() for p in module.parameters()]))
            take([(module, opt)], [x.reshape(s) for x, s in zip(g.split(self.sizes), self.shapes, strict=True)])
        return torch.cat([p.detach().flatten() for p in module.parameters()])


@cases(
    how=[
        (symopt.SGD, 1200, {"lr": 0.3}),
        (symopt.SGD, 1200, {"lr": 0.05, "momentum": 0.9}),
        (symopt.Adam, 1800, {"lr": 2e-2}),
    ],
    backend=["reference", "native"],
)
def test_training_ends_at_the_group_lasso(how, backend):
    problem, (cls, steps, options) = Regression(0), how
    best, w = problem.solve(), problem.fit(cls, steps, backend, **options)
    assert float(problem.objective(w) / problem.objective(best) - 1) <= tolerance("convex gap")
    live = problem.norms(w / problem.a) > 0
    assert torch.equal(live, problem.norms(best / problem.a) > 1e-9) and 3 <= int(live.sum()) < 12
    # The same without a solver: in v the force on a unit is kappa along it where it lives, and at most that where not.
    force, slack = -problem.a * problem.gradient(w), tolerance("threshold")
    for u in range(12):
        v, f = (w / problem.a)[problem.unit == u], force[problem.unit == u]
        if live[u]:
            assert float((f - problem.kappa * v / v.norm()).norm()) <= slack * problem.kappa
        else:
            assert float(f.norm()) <= (1 + slack) * problem.kappa
    assert bool((force[problem.unit < 0].abs() <= slack * problem.kappa).all())


# -- what it refuses ---------------------------------------------------------------------------------------------------


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(3, 4, 2), torch.nn.BatchNorm2d(4)
        self.scalar = torch.nn.Parameter(torch.ones(()))


MAPPINGS = {
    "nothing given": ({}, {}, ValueError, r"groups is an empty mapping; give \{pattern: \(dim, index\)\}"),
    "a pattern without a parameter": (
        {"conv.*": (0, None), "head.*": (0, None)},
        {},
        ValueError,
        r"groups\['head.\*'\] matches none of the parameters .* \(conv.weight, conv.bias\); widen the key or remove",
    ),
    "a pattern that is no text": ({3: (0, None)}, {}, TypeError, "a key of groups must be a pattern, got int"),
    "no pair": ({"conv.*": 0}, {}, TypeError, r"groups\['conv.\*'\] must be a pair \(dim, index\), got 0"),
    "too short an index": (
        {"conv.*": (0, [0, 1, 2])},
        {},
        ValueError,
        r"on conv.weight: the index of 'conv.\*' has 3 entries, dimension 0 of shape \(4, 3, 2, 2\) has 4; give one",
    ),
    "an index of numbers that are none": (
        {"conv.*": (0, [0.0, 1.0, 2.0, 3.0])},
        {},
        TypeError,
        r"the index of groups\['conv.\*'\] must be a list or 1-d tensor of integers",
    ),
    "an index of truth values": ({"conv.*": (0, torch.ones(4) > 0)}, {}, TypeError, "1-d tensor of integers"),
    "an index per weight": ({"conv.*": (0, torch.zeros(4, 3).long())}, {}, TypeError, "1-d tensor of integers"),
    "an index below -1": ({"conv.*": (0, [0, -2, 1, 2])}, {}, ValueError, "holds -2; use -1 for no unit"),
    "no unit at all": (
        {"conv.*": (0, [-1] * 4)},
        {},
        ValueError,
        "on conv.weight, conv.bias: every index is -1, so there is no unit to constrain",
    ),
    "a dimension that is not there": (
        {"conv.*": (1, None)},
        {},
        ValueError,
        r"on conv.bias: shape \(4,\) has no dimension 1",
    ),
    "a negative one": ({"conv.*": (-2, None)}, {}, ValueError, r"on conv.bias: shape \(4,\) has no dimension -2"),
    "a parameter without dimensions": ({"scalar": (0, None)}, {}, ValueError, r"scalar has shape \(\); there is"),
    "a dimension that is no integer": (
        {"conv.*": ("out", None)},
        {},
        TypeError,
        r"dimension of groups\['conv.\*'\] must be an integer, got 'out'",
    ),
    "a factor of zero": (
        {"conv.*": (0, None)},
        {"factors": {"conv.*": 0.0}},
        ValueError,
        r"factors\['conv.\*'\] must be finite and > 0, got 0.0",
    ),
    "a negative factor": ({"conv.*": (0, None)}, {"factors": {"conv.*": -1}}, ValueError, "finite and > 0, got -1"),
    "a factor that is no number": (
        {"conv.*": (0, None)},
        {"factors": {"conv.*": "2"}},
        TypeError,
        r"factors\['conv.\*'\] must be a number, got str",
    ),
    "a factor for nothing": (
        {"conv.*": (0, None)},
        {"factors": {"norm.*": 2.0}},
        ValueError,
        r"factors\['norm.\*'\] is no key of groups; there are conv.\*",
    ),
    "more depth": ({"conv.*": (0, None)}, {"depth": 3}, ValueError, "that span parameters need depth=2, got depth=3"),
    "another scope": (
        {"conv.*": (0, None)},
        {"keep": 2, "scope": "global"},
        ValueError,
        "scope='global' compares groups of equal size; name them by a string",
    ),
}


@pytest.mark.parametrize("why", MAPPINGS)
def test_mappings_that_make_no_units(why):
    groups, options, kind, message = MAPPINGS[why]
    net = Net()
    with pytest.raises(kind, match=message):
        symopt.constrain(net, {"*": symopt.GroupSparse(groups, **options)})
    assert symopt.constraints(net) == {}


def test_factors_without_a_mapping():
    with pytest.raises(ValueError, match="factors belong to groups given as a mapping"):
        symopt.GroupSparse("out", factors={"w": 2.0})


def test_it_has_units_only_once_it_is_bound():
    with pytest.raises(TypeError, match=r"has units only once symopt\.constrain has bound it to parameters"):
        symopt.GroupSparse({"w": (0, None)}).size(torch.ones(3, 2))


def constrained():
    return symopt.constrain(Net(), {"*": symopt.GroupSparse({"conv.*": (0, None), "norm.*": (0, None)})})


@cases(lambda opt_row: taken(UNITS[0], opt_row), opt_row=EVERY_OPTIMIZER)
def test_an_optimizer_needs_all_of_them_in_one_param_group(opt_row):
    net = constrained()
    with pytest.raises(ValueError, match=r"shares a constraint with norm.bias, which is not in its param group"):
        opt_row.cls([p for name, p in net.named_parameters() if name != "norm.bias"], lr=opt_row.lr)
    with pytest.raises(ValueError, match=r"shares a constraint with norm.weight, which is not in its param group"):
        opt_row.cls([{"params": net.conv.parameters()}, {"params": net.norm.parameters()}], lr=opt_row.lr)


def test_an_orthogonalising_optimizer_refuses_it_by_name():
    module = torch.nn.Module()
    module.a, module.b = (torch.nn.Parameter(torch.ones(3, 2)) for _ in range(2))
    symopt.constrain(module, {"*": symopt.GroupSparse({"*": (0, None)})})
    with pytest.raises(ValueError, match=r"a: Muon orthogonalises .* GroupSparse\({'\*': 0}\) is none; constrain rows"):
        symopt.Muon(module)


@cases(backend=["reference", "native", None], warm=[False, True])
def test_parameters_of_different_dtypes_are_refused_by_name(backend, warm):
    net = constrained()
    opt = symopt.AdamW(net, backend=backend)

    def step():
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        opt.step()

    if warm:
        step()
    net.norm.double()
    before = [p.detach().clone() for p in net.parameters()]
    found = "conv.weight torch.float32 on cpu, norm.weight torch.float64 on cpu"
    with pytest.raises(ValueError, match=rf"must be of one dtype and on one device, but {found}; change all of them"):
        step()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    symopt.release(net)
    with pytest.raises(ValueError, match=r"norm.weight is torch.float64 on cpu, conv.weight torch.float32 on cpu"):
        symopt.constrain(net, {"*": symopt.GroupSparse({"conv.*": (0, None), "norm.*": (0, None)})})
