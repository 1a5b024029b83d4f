"""Fixed planes: the projection, the factors and the step.

The oracle of every row is the matrix of its equations, written in the table without the library: its pseudo-inverse
gives the projection, the pattern of that the orbits, and explicit factors ``(base, gate, direction)`` the step.
"""

import pytest
import torch

from support.cases import cases, pairs
from support.planes import F64, ExplicitPlane, bound, close, matrix, orbits, randn
from support.table import EVERY_OPTIMIZER, OPTIMIZERS, PLANES, ids, taken
from support.tolerances import tolerance
from symopt.constraints.planes.plane import flat
from symopt_kernels.reference import plane as kernel

every_plane = pytest.mark.parametrize("row", PLANES, ids=ids)


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


def follow(row, opt_row, time_scale, imbalance=1.0, steps=12, backend=None):
    module, params, constraint = bound(row)
    options = {"time_scale": time_scale, "imbalance": imbalance, "backend": backend, **opt_row.options}
    opt = opt_row.cls(module, lr=opt_row.lr, **options)
    oracle = ExplicitPlane(row, constraint, opt_row)
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


@pairs(taken, row=PLANES, opt_row=EVERY_OPTIMIZER, time_scale=["none", "saturated"])
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
