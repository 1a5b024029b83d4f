"""Planes as exact penalties: from which strength on they are reached, without a number too, and in explicit mode."""

import copy
from dataclasses import replace

import pytest
import torch

import symopt
from support.cases import cases
from support.planes import KEYS, ExplicitPlane, Pair, bound, close, matrix, randn
from support.table import OPTIMIZERS, PLANES, ids, plane_module
from support.tolerances import tolerance
from symopt.constraints.planes.plane import flat

every_plane = pytest.mark.parametrize("row", PLANES, ids=ids)


class Regression:
    """Least squares whose minimum on the row's plane, and gradient there, are known in closed form."""

    def __init__(self, row, seed=0):
        off = matrix(row)
        n = len(off)
        x = randn((3 * n, n), seed)
        self.gram = x.T @ x / len(x)
        self.moment = self.gram @ randn(n, seed + 1)
        values, vectors = torch.linalg.eigh(off)
        on = vectors[:, values < 0.5]
        self.best = on @ torch.linalg.solve(on.T @ self.gram @ on, on.T @ self.moment)
        self.gradient = self.gram @ self.best - self.moment

    def loss(self, params):
        w = torch.cat([p.flatten() for p in params])
        return 0.5 * w @ self.gram @ w - self.moment @ w


def train(problem, module, opt, steps, schedule=None):
    params = tuple(module.parameters())
    for _ in range(steps):
        opt.zero_grad()
        problem.loss(params).backward()
        opt.step()
        if schedule:
            schedule.step()
    return flat(params).detach().flatten()


THRESHOLD = ["tied", "tied-elementwise", "symmetric", "zero-mean", "mirror", "mirror-coordinates"]


def dual(row, gradient):
    off = matrix(row) @ gradient
    if row.id == "mirror-coordinates":
        return float((row.make(None).basis.T @ gradient).abs().max())
    if row.id == "tied-elementwise":
        return float(off.reshape(3, -1).norm(dim=0).max())
    return float(off.norm())


@cases(row=[r for r in PLANES if r.id in THRESHOLD])
def test_the_plane_attracts_from_the_critical_strength_on(row):
    """Each form by its own norm, from both sides at 2 %; above it the minimum is that on the plane."""
    problem = Regression(row)
    critical = dual(row, problem.gradient)
    for factor in (0.98, 1.02):
        module, params, constraint = bound(row, factor * critical)
        with torch.no_grad():  # near the end: what is tested is where it goes from here
            start = problem.best + 0.05 * matrix(row) @ randn(len(problem.best), 5)
            for p, part in zip(params, start.split([p.numel() for p in params]), strict=True):
                p.copy_(part.reshape(p.shape))
        opt = symopt.SGD(module, lr=0.05, momentum=0.9)
        w = train(problem, module, opt, 800)
        distance = float(constraint.violation(flat(params).detach()))
        found = symopt.certify(module, opt, lambda p=params: problem.loss(p)).rows[0]
        if factor < 1:
            assert distance > 1e-4 and found.verdict == "not reached"
        else:
            assert distance < 1e-5 and found.verdict in ("exact", "attracting")
            close(w, problem.best, "scaled convex gap", scale=10)
            assert found.critical == pytest.approx(critical, rel=tolerance("critical strength"))


FEW = [row for row in PLANES if row.id in ("tied", "tied-elementwise", "zero-mean", "mirror-coordinates")]
AUTOMATIC = [
    *((row, symopt.SGD, {"lr": 0.05, "momentum": 0.8}) for row in PLANES),
    *((row, symopt.Adam, {"lr": 0.03}) for row in FEW),
    *((row, symopt.AdamW, {"lr": 0.03}) for row in FEW),
]


@pytest.mark.parametrize(
    ("row", "cls", "options"), AUTOMATIC, ids=lambda x: getattr(x, "id", getattr(x, "__name__", ""))
)
def test_without_a_number_the_plane_is_reached_and_the_projected_gradient_vanishes(row, cls, options):
    problem, (module, params, constraint) = Regression(row), bound(row, None)
    opt = cls(module, **options)
    train(problem, module, opt, 500)
    w = train(problem, module, opt, 300, torch.optim.lr_scheduler.ExponentialLR(opt, 0.97))
    assert float(constraint.violation(flat(params).detach())) <= constraint.rounding(w)
    off, gradient = matrix(row), problem.gram @ w - problem.moment
    assert float((gradient - off @ gradient).norm()) < 1e-5 * float(problem.moment.norm())
    found = symopt.certify(module, opt, lambda: problem.loss(params)).rows[0]
    assert found.verdict == "exact" and found.steps == 0 and found.kkt < 1e-4 * float(problem.moment.norm())
    if cls is not symopt.AdamW and row.id in THRESHOLD:
        assert found.critical == pytest.approx(dual(row, problem.gradient), rel=tolerance("critical strength"))
        assert found.strength >= 1.99 * found.critical


def test_a_projection_and_a_basis_are_the_same_constraint():
    rows = {row.id: row for row in PLANES}
    shapes = rows["mirror"].shapes
    finals = []
    for make in (rows["mirror"].make, rows["mirror-basis"].make):
        row = type(rows["mirror"])("x", make, shapes, rows["mirror"].equations)
        module = plane_module(row)
        finals.append(train(Regression(row), module, symopt.Adam(module, lr=1e-2), 50))
    close(*finals, "factor step")


def made(row, mode):
    """A module of weights ``w0``, ``w1``, ... of the row, and how to read them all."""
    module, names = torch.nn.Module(), [f"w{i}" for i in range(len(row.shapes))]
    for i, (name, shape) in enumerate(zip(names, row.shapes, strict=True)):
        module.register_parameter(name, torch.nn.Parameter(randn(shape, 3 + i)))
    symopt.constrain(module, {tuple(names): row.make(0.3)}, mode=mode)
    return module, lambda: tuple(getattr(module, name) for name in names)


def explicit_factors(module):
    """Those of the flat vector of all weights."""
    how = module.parametrizations.w0[0]
    return how.shared.factors() if how.shared else tuple(module.parametrizations.w0.parameters())


def test_explicit_mode_takes_the_same_step():
    for row in PLANES:
        problem, finals = Regression(row), []
        for mode in ("optimizer", "explicit"):
            module, weights = made(row, mode)
            groups = symopt.param_groups(module)
            opt = (
                torch.optim.SGD(groups, lr=0.01)
                if mode == "explicit"
                else symopt.SGD(groups, lr=0.01, time_scale="none")
            )
            problem.loss(weights()).backward()
            opt.step()
            finals.append(flat(weights()).detach().clone())
        close(*finals, "factor step")


@cases(row=PLANES)
def test_explicit_mode_is_free_descent_on_written_out_factors(row):
    """Many steps, momentum and the decay of gate and direction included, by autograd through the plane's equations."""
    problem, off = Regression(row), matrix(row)
    module, weights = made(row, "explicit")
    opt = torch.optim.SGD(symopt.param_groups(module), lr=0.01, momentum=0.9)
    constraint = symopt.constraints(module)["w0"]
    coordinates = getattr(constraint, "form", "gate") == "coordinates"
    base, gate, direction = (p.detach().clone().requires_grad_() for p in explicit_factors(module))
    mine = torch.optim.SGD(
        [{"params": [base]}, {"params": [gate, direction], "weight_decay": 0.3}], lr=0.01, momentum=0.9
    )
    oracle = ExplicitPlane(row, constraint, OPTIMIZERS[0])
    for _ in range(60):
        opt.zero_grad()
        problem.loss(weights()).backward()
        opt.step()
        mine.zero_grad()
        if coordinates:
            away = constraint.basis @ (gate * direction)
        else:
            away = (oracle.gate @ gate) * (off @ direction.flatten())
        w = base.flatten() - off @ base.flatten() + away
        problem.loss((w,)).backward()
        mine.step()
    for theirs, factor in zip(explicit_factors(module), (base, gate, direction), strict=True):
        close(theirs.detach(), factor.detach(), "factor step", scale=10)


SEVERAL = [r for r in PLANES if len(r.shapes) > 1]


@cases(row=SEVERAL)
def test_explicit_constraints_over_several_parameters_come_and_go(row):
    """Plain checkpoints in and out, copies, one weight set anew, and plain parameters again."""
    module, weights = made(row, "explicit")
    plain, _ = made(row, "optimizer")
    start = [p.detach().clone() for p in plain.parameters()]
    close(flat(weights()).detach(), flat(start))
    assert list(symopt.constraints(module)) == [f"w{i}" for i in range(len(row.shapes))]
    decays = {id(p): g["weight_decay"] for g in symopt.param_groups(module) for p in g["params"]}
    assert len(decays) == len(list(module.parameters()))
    copied = copy.deepcopy(module)
    opt = torch.optim.SGD(symopt.param_groups(module), lr=0.01)
    for _ in range(3):
        opt.zero_grad()
        Regression(row).loss(weights()).backward()
        opt.step()
    moved = flat(weights()).detach().clone()
    assert not torch.allclose(moved, flat(start))
    close(flat([getattr(copied, f"w{i}") for i in range(len(start))]).detach(), flat(start))
    copied.load_state_dict(symopt.plain_state_dict(module))
    close(flat([getattr(copied, f"w{i}") for i in range(len(start))]).detach(), moved)
    twin, others = made(row, "explicit")
    twin.load_state_dict(module.state_dict())
    assert torch.equal(flat(others()), flat(weights()))
    with torch.no_grad():
        twin.w1 = start[1] + 1
    close(others()[1].detach(), start[1] + 1)
    close(others()[0].detach(), weights()[0].detach())
    folded, constraint = symopt.fold(module), symopt.constraints(module)["w0"]
    on = flat([folded.get_parameter(f"w{i}").detach() for i in range(len(start))])
    assert float(constraint.violation(on)) <= constraint.rounding(on)
    symopt.release(module)
    assert sorted(dict(module.named_parameters())) == [f"w{i}" for i in range(len(start))]
    close(flat(weights()).detach(), moved)


def test_an_explicit_tie_trains_by_any_optimizer_until_it_is_one():
    x, y = randn((64, 10)).float(), randn((64, 1), 1).float()
    net = symopt.constrain(Pair(), {key: replace(c, strength=3.0) for key, c in KEYS.items()}, mode="explicit")
    opt = torch.optim.Adam(symopt.param_groups(net), lr=1e-2)
    for _ in range(800):
        opt.zero_grad()
        (net(x) - y).square().mean().backward()
        opt.step()
    for one, other in ((net.a.weight, net.b.weight), (net.a.bias, net.b.bias)):
        assert float((one - other).detach().norm()) < 1e-6 * float(one.detach().norm())
    small = symopt.fold(net)
    assert small.a.weight is small.b.weight
    with pytest.raises(ValueError, match="weight shares an explicit constraint"):
        symopt.release(net.a)
    with pytest.raises(ValueError, match="outside of this module"):
        symopt.report(net.b)
    assert sorted(symopt.plain_state_dict(net)) == sorted(Pair().state_dict())


def test_explicit_factors_end_where_the_optimizer_does():
    row = next(r for r in PLANES if r.id == "symmetric")
    problem, finals = Regression(row), []
    for mode in ("optimizer", "explicit"):
        module = torch.nn.Module()
        module.w0 = torch.nn.Parameter(randn(row.shapes[0], 3))
        symopt.constrain(module, {"w0": row.make(0.3)}, mode=mode)
        cls = torch.optim.SGD if mode == "explicit" else symopt.SGD
        opt = cls(symopt.param_groups(module), lr=0.01, momentum=0.9)
        for _ in range(800):
            opt.zero_grad()
            problem.loss((module.w0,)).backward()
            opt.step()
        finals.append(module.w0.detach())
    close(*finals, "scaled convex gap", scale=10)
