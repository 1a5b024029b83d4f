"""Fixed planes: the projection, the step, the threshold, and several parameters under one constraint.

The oracle of every row is the matrix of its equations, written in the table without the library: its pseudo-inverse
gives the projection, the pattern of that the orbits, and explicit factors ``(base, gate, direction)`` the step.
"""

import copy
import io
from dataclasses import replace

import pytest
import torch

import symopt
from support.cases import cases, pairs
from support.table import OPTIMIZERS, PLANES, ids, plane_module
from support.tolerances import tolerance
from symopt.constraints.planes.plane import flat
from symopt_kernels.reference import plane as kernel

every_plane = pytest.mark.parametrize("row", PLANES, ids=ids)
F64 = {"dtype": torch.float64}


def close(a, b, kind="projection", scale=1.0):
    tol = tolerance(kind)
    torch.testing.assert_close(a, b, rtol=tol, atol=tol * scale)


def matrix(row):
    """The projection off the plane, ``I - P``."""
    n = sum(torch.Size(shape).numel() for shape in row.shapes)
    equations = torch.stack(row.equations(torch.eye(n, **F64)))
    return torch.linalg.pinv(equations) @ equations


def bound(row, strength=0.3):
    module = plane_module(row, strength)
    return module, tuple(module.parameters()), symopt.constraints(module)["w0"]


def randn(shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), **F64)


def orbits(off):
    """Label of every weight: those that the projection mixes, directly or not, share one."""
    label = torch.arange(len(off))
    for _ in range(len(off)):
        label = torch.where(off.abs() > 1e-12, label, len(off)).amin(1).minimum(label)
    return label


# -- the plane and its factors ---------------------------------------------------------------------------------------


@cases(row=PLANES)
def test_the_projection_is_that_of_the_equations(row):
    _, params, constraint = bound(row)
    off = matrix(row)
    w = flat(params).detach()
    close(constraint.off(w).flatten(), off @ w.flatten())
    close(constraint.onto(w).flatten(), w.flatten() - off @ w.flatten())
    assert constraint.codimension(w) == pytest.approx(float(off.trace()))
    folded = constraint.fold(w)
    assert float(constraint.violation(folded)) <= constraint.rounding(folded)
    if constraint.rounding(w) == 0:
        assert torch.equal(constraint.fold(folded), folded)  # bit for bit


@cases(row=PLANES)
def test_factors(row):
    _, params, constraint = bound(row)
    w = flat(params).detach()
    for c in (0.0, 0.5):
        factors = tuple(f.requires_grad_() for f in constraint.split(w, c))
        close(constraint.compose(factors), w)
        grad = randn(w.shape)
        expected = torch.autograd.grad(constraint.compose(factors), factors, grad)
        for mine, theirs in zip(constraint.pullback(factors, grad), expected, strict=True):
            close(mine, theirs)
        image = constraint.mirror(factors)
        if constraint.is_plane and getattr(constraint, "form", "gate") == "gate":
            gate, part = factors[1].square().sum(), factors[2].square().sum()
            units = (factors[1] > 0).sum() if c else 0
            close(gate - part, torch.as_tensor(c * float(units), **F64))
        close(constraint.compose(image), w)
        assert not torch.equal(image[2], factors[2])
    decayed = sum(f.square().sum() for f in constraint.split(w)[1:]) / 2
    close(decayed, constraint.penalty(w))
    random = tuple(randn(f.shape, i) for i, f in enumerate(constraint.split(w)))
    assert float(constraint.penalty(constraint.compose(random))) <= float(sum(f.square().sum() for f in random[1:])) / 2


@cases(row=PLANES)
def test_a_weight_on_its_plane_has_the_scale_of_a_random_one(row):
    """Not of what rounding leaves off the plane."""
    _, params, constraint = bound(row)
    w = flat(params).detach().float()
    c, scale = constraint.start(constraint.fold(w), 1.0)
    assert c == 0
    drawn = [x / x.norm() for x in (randn(w.shape, seed) for seed in range(400))]
    typical = torch.stack([constraint.start(x, 0.0)[1] for x in drawn]).square().mean().sqrt()
    assert float(scale / constraint.fold(w).norm()) == pytest.approx(float(typical), rel=tolerance("typical scale"))
    assert constraint.start(torch.zeros_like(w), 1.0)[1] == 1


# -- the step --------------------------------------------------------------------------------------------------------


class Explicit:
    """One step on factors, from a weight in the gauge of the optimizer's imbalance."""

    def __init__(self, row, constraint, opt_row):
        self.off, self.options, self.name = matrix(row), opt_row.options, opt_row.torch_cls.__name__
        self.label = orbits(self.off)
        self.coordinates = getattr(constraint, "form", "gate") == "coordinates"
        gate = self.label if getattr(constraint, "mode", "joint") == "elementwise" else torch.zeros_like(self.label)
        self.gate = torch.nn.functional.one_hot(torch.unique(gate, return_inverse=True)[1]).double()
        self.member = torch.nn.functional.one_hot(torch.unique(self.label, return_inverse=True)[1]).double()
        self.state = {}

    def direction(self, g):
        """What is subtracted at lr 1, and the preconditioner of every weight."""
        g = -g if self.options.get("maximize") else g
        s = self.state
        if self.name == "SGD":
            momentum, dampening = self.options.get("momentum", 0.0), self.options.get("dampening", 0.0)
            if not momentum:
                return g, torch.ones_like(g)
            s["m"] = momentum * s["m"] + (1 - dampening) * g if "m" in s else g
            update = g + momentum * s["m"] if self.options.get("nesterov") else s["m"]
            return update, torch.full_like(g, (1 - dampening) / (1 - momentum))
        b1, b2 = self.options.get("betas", (0.9, 0.999))
        k = s["k"] = s.get("k", 0) + 1
        s["m"] = b1 * s.get("m", 0) + (1 - b1) * g
        square = self.member @ ((g * g @ self.member) / self.member.sum(0))
        v = s["v"] = b2 * s.get("v", 0) + (1 - b2) * square
        if self.options.get("amsgrad"):
            v = s["peak"] = torch.maximum(s.get("peak", v), v)
        p = 1 / (v.sqrt() / (1 - b2**k) ** 0.5 + 1e-8)
        return p * s["m"] / (1 - b1**k), p

    def step(self, w, g, c, scale, lr, strength, saturated):
        update, p = self.direction(g)
        delta, on = lr * update, w - self.off @ w
        sizes = self.gate.sum(0)
        if self.name == "AdamW":
            spread = (self.off.trace() if len(sizes) == 1 else (sizes - 1).clamp(min=1)) ** 0.5
            decay = lr * strength * (self.gate @ torch.as_tensor(spread).expand(len(sizes)).double())
            p = torch.ones_like(p)
        else:
            decay = lr * strength * p
        off, pull = self.off @ w, self.off @ delta
        if self.coordinates:
            q = self.basis
            z, dz = q.T @ w, q.T @ delta
            rate = decay[0] / (self.off.trace() ** 0.5 if self.name == "AdamW" else 1.0)
            metric = (c * c + 4 * z * z).sqrt()
            t = 1 / torch.maximum(metric, torch.maximum(scale, rate + dz.abs())) if saturated else 1.0
            u = ((c + metric) / 2).sqrt()
            v = z / u
            rho = 1 - t * rate
            new = (rho * u - t * dz * v) * (rho * v - t * dz * u)
            return on - (delta - pull) + q @ new
        uniform = self.name == "AdamW"  # else the gate's rate is the harmonic mean
        own = (decay @ self.gate) / sizes if uniform else sizes / ((1 / decay) @ self.gate)
        metric = (c * c + 4 * (off * off) @ self.gate).sqrt()
        norm = ((pull * pull) @ self.gate).sqrt()
        t = 1 / torch.maximum(metric, torch.maximum(scale, own + norm)) if saturated else 1 / own.clamp(min=1)
        s = ((c + metric) / 2).sqrt()
        d = torch.where(self.gate @ s > 0, off / (self.gate @ s), 0.0)
        seen = pull if uniform else pull * (self.gate @ own) / decay  # the gradient behind its preconditioner
        t_each = self.gate @ t
        s_new = (1 - t * own) * s - t * ((seen * d) @ self.gate)
        d_new = (1 - t_each * decay) * d - t_each * pull * (self.gate @ s)
        return on - (delta - pull) + (self.gate @ s_new) * d_new


def follow(row, opt_row, time_scale, imbalance=1.0, steps=12, backend=None):
    module, params, constraint = bound(row)
    options = {"time_scale": time_scale, "imbalance": imbalance, "backend": backend, **opt_row.options}
    opt = opt_row.cls(module, lr=opt_row.lr, **options)
    oracle = Explicit(row, constraint, opt_row)
    oracle.basis = getattr(constraint, "basis", None)
    w = flat(params).detach().clone().flatten()
    n, state = len(w), None
    c, scale = constraint.start(flat(params).detach(), imbalance)
    first = c
    for i in range(steps):
        g = randn(n, 10 + i) * (1 if i % 3 else 3)
        for p, part in zip(params, g.split([p.numel() for p in params]), strict=True):
            p.grad = part.reshape(p.shape)
        opt.step()
        expected = oracle.step(w, g, c, scale, opt_row.lr, 0.3, time_scale == "saturated")
        w = flat(params).detach().clone().flatten()
        close(w, expected, "factor step", scale=float(w.abs().max()))
        state = opt.state[params[0]]
        c = state["imbalance"].clone()
    assert bool(c < first)
    return opt, params, state


@pairs(row=PLANES, opt_row=OPTIMIZERS, time_scale=["none", "saturated"])
def test_a_step_is_that_of_explicit_factors(row, opt_row, time_scale):
    opt, params, state = follow(row, opt_row, time_scale)
    if "exp_avg_sq" in state:  # written out per weight, like torch's
        packed = opt.state_dict()["state"]
        assert [packed[i]["exp_avg_sq"].shape for i in range(len(params))] == [p.shape for p in params]
        label = orbits(matrix(row))
        saved = torch.cat([packed[i]["exp_avg_sq"].flatten() for i in range(len(params))])
        assert all(len(saved[label == k].unique()) == 1 for k in label.unique())


@every_plane
def test_the_suite_notices_a_wrong_retraction(row, monkeypatch):
    opt_row = next(r for r in OPTIMIZERS if r.id == "adam")
    if getattr(row.make(None), "form", "gate") == "coordinates":
        return  # its retraction is that of Sparse, of which test_table.py says the same
    original = kernel.plane_step
    monkeypatch.setattr(kernel, "plane_step", lambda *args, **kwargs: original(*args, **kwargs) * (1 + 1e-9))
    with pytest.raises(AssertionError, match="not close"):
        follow(row, opt_row, "saturated", backend="reference")


# -- the threshold ---------------------------------------------------------------------------------------------------


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
    oracle = Explicit(row, constraint, OPTIMIZERS[0])
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


# -- bits ------------------------------------------------------------------------------------------------------------


def test_equivariant_weights_are_on_the_plane_bit_for_bit():
    shift = [(torch.arange(8).roll(1), torch.arange(12).roll(3))]
    net = torch.nn.Linear(12, 8)
    symopt.constrain(net, {("weight", "bias"): symopt.Equivariant(shift)})
    opt = symopt.AdamW(net, lr=2e-2)
    x, y = randn((40, 12)).float(), randn((40, 8), 2).float()
    for _ in range(30):
        opt.zero_grad()
        (net(x) - y).square().mean().backward()
        opt.step()
    folded = symopt.fold(net)
    for layer, exact in ((net, False), (folded, True)):
        rolled = layer.weight.roll(1, 0).roll(3, 1)
        assert torch.equal(rolled, layer.weight) == exact and torch.equal(layer.bias.roll(1), layer.bias) == exact
    for _ in range(500):
        opt.zero_grad()
        (net(x) - y).square().mean().backward()
        opt.step()
    assert torch.equal(net.weight.roll(1, 0).roll(3, 1), net.weight) and torch.equal(net.bias.roll(1), net.bias)


class Pair(torch.nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a, self.b, self.out = torch.nn.Linear(5, 4), torch.nn.Linear(5, 4), torch.nn.Linear(4, 1)
        for p in self.parameters():
            torch.nn.init.normal_(p, 0.0, 0.3, generator=generator)

    def forward(self, x):
        return self.out(self.a(x[:, :5]).relu() + self.b(x[:, 5:]).relu())


KEYS = {("a.weight", "b.weight"): symopt.Tied(), ("a.bias", "b.bias"): symopt.Tied(mode="elementwise")}


def pair():
    return symopt.constrain(Pair(), KEYS)


def fit(net, opt, steps):
    x = randn((30, 10), 7).float()
    for _ in range(steps):
        opt.zero_grad()
        loss = (net(x) - 1).square().mean()
        (-loss if opt.param_groups[0]["maximize"] else loss).backward()
        opt.step()


@cases(opt_row=OPTIMIZERS)
def test_a_tied_network_goes_on_from_a_checkpoint(opt_row):
    lr = opt_row.lr * (0.01 if opt_row.options.get("maximize") else 1)  # a square has no maximum
    build = lambda net: opt_row.cls(net, lr=lr, **opt_row.options)  # noqa: E731
    net = pair()
    opt = build(net)
    fit(net, opt, 8)
    memory = io.BytesIO()
    torch.save({"net": net.state_dict(), "opt": opt.state_dict()}, memory)
    memory.seek(0)
    saved = torch.load(memory, weights_only=True)
    again = pair()
    other = build(again)
    again.load_state_dict(saved["net"])
    other.load_state_dict(saved["opt"])
    clone, third = copy.deepcopy((net, opt))
    for module, optimizer in ((net, opt), (again, other), (clone, third)):
        fit(module, optimizer, 8)
    for p, q, r in zip(net.parameters(), again.parameters(), clone.parameters(), strict=True):
        assert torch.equal(p, q) and torch.equal(p, r)
    plain = opt_row.torch_cls(Pair().parameters(), lr=opt_row.lr, **opt_row.options)
    plain.load_state_dict(saved["opt"])
    back = build(again)
    back.load_state_dict(plain.state_dict())
    fit(again, back, 2)
    assert all(bool(p.isfinite().all()) for p in again.parameters())


def test_fold_makes_tied_weights_one_parameter():
    net = pair()
    opt = symopt.AdamW(net, lr=2e-2)
    fit(net, opt, 20)
    assert not torch.equal(net.a.weight, net.b.weight)
    small = symopt.fold(net, randn((3, 10)).float())
    assert small.a.weight is small.b.weight and small.a.bias is small.b.bias
    assert small.fold_config["parameters"] == {"before": 53, "after": 29}
    fit(net, opt, 700)
    assert torch.equal(net.a.weight, net.b.weight) and torch.equal(net.a.bias, net.b.bias)
    x = randn((9, 10)).float()
    assert torch.equal(symopt.fold(net)(x), net(x))
    rows = {row.name: row for row in symopt.report(net, opt).rows}
    assert rows["a.weight"].violation == 0 and rows["a.weight"].strength > 0 and rows["b.bias"].live == 0


def test_tied_weights_that_start_equal_stay_equal():
    net = Pair()
    net.b.load_state_dict(net.a.state_dict())
    symopt.constrain(net, KEYS)
    opt = symopt.Adam(net, lr=1e-2)
    for _ in range(20):
        fit(net, opt, 1)
        assert torch.equal(net.a.weight, net.b.weight) and torch.equal(net.a.bias, net.b.bias)


def test_a_member_without_a_gradient_moves_with_the_others():
    net = pair()
    opt = symopt.SGD(net, lr=0.1, strength=1.0)
    net.b.requires_grad_(False)
    before = net.b.weight.clone()
    fit(net, opt, 1)
    assert not torch.equal(net.b.weight, before)


def test_half_precision_reaches_the_plane():
    net = symopt.constrain(Pair().bfloat16(), KEYS)
    opt = symopt.AdamW(net, lr=2e-2)
    x = randn((30, 10), 7).bfloat16()
    for _ in range(600):
        opt.zero_grad()
        (net(x) - 1).square().mean().backward()
        opt.step()
    assert torch.equal(net.a.weight, net.b.weight)
    assert opt.state[net.a.weight]["exp_avg"].dtype == torch.float32
    assert torch.equal(opt.state[net.a.weight]["master"], opt.state[net.b.weight]["master"])


def test_released_members_train_apart():
    net = pair()
    opt = symopt.AdamW(net, lr=1e-2)
    fit(net, opt, 5)
    symopt.release(net)
    fit(net, opt, 3)
    states = [opt.state[p] for p in net.parameters()]
    assert all(float(state["step"]) == 8 for state in states)
    assert all(state["exp_avg_sq"].shape == p.shape for state, p in zip(states, net.parameters(), strict=True))
    assert not torch.equal(net.a.weight, net.b.weight)


# -- errors ----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_tied_says_so():
    def bind(module, key, constraint, **options):
        return symopt.constrain(module, {key: constraint}, **options)

    linear = torch.nn.Linear
    both = torch.nn.Sequential(linear(3, 4), linear(4, 3))
    one = ("0.weight", "1.weight")
    for error, match, call in [
        (ValueError, r"views=\[None, 'T'\]", lambda: bind(both, one, symopt.Tied())),
        (ValueError, "two or more", lambda: bind(both, "0.weight", symopt.Tied())),
        (ValueError, "overlap", lambda: bind(both, "0.weight", symopt.Tied(views=[slice(0, 2), slice(1, 3)]))),
        (ValueError, "3 views for 2", lambda: bind(both, one, symopt.Tied(views=[None, "T", None]))),
        (
            TypeError,
            "must return a view",
            lambda: bind(both, "0.weight", symopt.Tied(views=[lambda w: 2 * w + 40, None])),
        ),
        (TypeError, "must return a view", lambda: bind(both, "0.weight", symopt.Tied(views=[lambda w: w / 2, None]))),
        (ValueError, "empty", lambda: bind(both, "0.weight", symopt.Tied(views=[slice(0), slice(0)]))),
        (TypeError, "a view must be", lambda: symopt.Tied(views=["t", None])),
        (TypeError, "must be a list", lambda: symopt.Tied(views="T")),
        (ValueError, "'joint' or 'elementwise'", lambda: symopt.Tied(mode="pairs")),
        (ValueError, "square", lambda: bind(both, "0.weight", symopt.Symmetric())),
        (ValueError, "square", lambda: bind(both, "0.bias", symopt.Circulant())),
        (ValueError, "no dimension", lambda: bind(both, "0.weight", symopt.ZeroMean(dim=2))),
        (TypeError, "dim must be", lambda: symopt.ZeroMean(dim="out")),
        (ValueError, "no permutation", lambda: symopt.Equivariant([[0, 2]])),
        (TypeError, "integers", lambda: symopt.Equivariant([[0.5, 1.0]])),
        (TypeError, "list of generators", lambda: symopt.Equivariant("flip")),
        (ValueError, "empty", lambda: symopt.Equivariant([])),
        (ValueError, "pair", lambda: symopt.Equivariant([([0], [0], [0])])),
        (ValueError, "does not fit dimension 1", lambda: bind(both, "0.weight", symopt.Equivariant([[0, 1, 2, 3]]))),
        (ValueError, "leave it out", lambda: bind(both, "0.bias", symopt.Equivariant([(None, [1, 0])]))),
        (TypeError, "either project", lambda: symopt.Mirror()),
        (TypeError, "basis=", lambda: symopt.Mirror(torch.eye(3))),
        (ValueError, "needs coordinates", lambda: symopt.Mirror(abs, form="coordinates")),
        (ValueError, "'gate' or 'coordinates'", lambda: symopt.Mirror(abs, form="pairs")),
        (TypeError, "floating-point", lambda: symopt.Mirror(basis=torch.eye(3).long())),
        (ValueError, r"\(weights, k\)", lambda: symopt.Mirror(basis=torch.ones(3))),
        (ValueError, "qr", lambda: symopt.Mirror(basis=torch.ones(3, 1))),
        (ValueError, "3 rows, the weights are 12", lambda: bind(both, "0.weight", symopt.Mirror(basis=torch.eye(3)))),
        (ValueError, "not linear", lambda: bind(both, "0.weight", symopt.Mirror(lambda w: w.abs()))),
        (ValueError, "no projection", lambda: bind(both, "0.weight", symopt.Mirror(lambda w: w / 2))),
        (ValueError, "not orthogonal", lambda: bind(both, "0.bias", symopt.Mirror(lambda b: b[0] * torch.ones(4)))),
        (ValueError, "nothing to constrain", lambda: bind(both, "0.weight", symopt.Mirror(lambda w: w))),
        (ValueError, "shapes", lambda: bind(both, "0.weight", symopt.Mirror(lambda w: w.T))),
        (TypeError, "return a tensor", lambda: bind(both, "0.weight", symopt.Mirror(lambda w: None))),
        (ValueError, "automatic", lambda: bind(linear(3, 3), "weight", symopt.Symmetric(), mode="explicit")),
        (
            ValueError,
            "no gauge",
            lambda: bind(linear(3, 3), "weight", symopt.Symmetric(1.0), mode="explicit", init="gates"),
        ),
        (ValueError, "give .* a strength", lambda: symopt.constrain(Pair(), KEYS, mode="explicit")),
    ]:
        with pytest.raises(error, match=match):
            call()
    assert symopt.constraints(both) == {}
    shared = torch.nn.Sequential(linear(3, 3), linear(3, 3))
    shared[1].weight = shared[0].weight
    with pytest.raises(ValueError, match="same tensor already"):
        bind(shared, "*.weight", symopt.Tied())
    mixed = torch.nn.Sequential(linear(3, 3), linear(3, 3).double())
    with pytest.raises(ValueError, match="needs one of each"):
        bind(mixed, "*.weight", symopt.Tied())


def test_members_belong_together():
    net = pair()
    with pytest.raises(ValueError, match=r"a.weight shares a constraint with b.weight.*param_groups"):
        symopt.AdamW([net.a.weight, net.out.weight])
    with pytest.raises(ValueError, match="not in its param group"):
        symopt.AdamW([{"params": list(net.a.parameters())}, {"params": list(net.b.parameters())}])
    with pytest.raises(ValueError, match="release the module that holds both"):
        symopt.release(net.a)
    with pytest.raises(ValueError, match="outside of this module"):
        symopt.fold(net.a)
    with pytest.raises(ValueError, match="shares a constraint"):
        symopt.AdamW(copy.deepcopy(net.a))
    assert len(symopt.param_groups(net)) == 3
    opt = symopt.AdamW(symopt.param_groups(net), lr=1e-2)
    fit(net, opt, 2)
