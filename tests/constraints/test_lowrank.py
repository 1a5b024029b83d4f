"""LowRank against explicit factors, closed forms, an independent convex solver, and its own promises about state."""

import copy
import io
import math

import pytest
import torch
from torch import Tensor, nn

import symopt
from support.cases import cases
from support.directions import Units
from support.runs import gradients, optimizer
from support.table import EVERY_OPTIMIZER, MATRICES, OPTIMIZERS, constrained_parameter, taken
from support.tolerances import tolerance
from symopt.optim.lowrank import step as stepper
from symopt_kernels.reference import lowrank as kernel


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a, b, kind="identity", scale=1.0):
    torch.testing.assert_close(a, b, rtol=tolerance(kind), atol=tolerance(kind) * float(scale), check_dtype=False)


def parameter(w: Tensor, constraint) -> nn.Module:
    module = nn.Module()
    module.weight = nn.Parameter(w.clone())
    return symopt.constrain(module, {"weight": constraint})


def live(opt, p) -> int:
    return opt.state[p]["factor_u"].shape[1]


# -- factors -----------------------------------------------------------------------------------------------------------


@cases(c=[0.0, 0.3, 50.0], row=MATRICES)
def test_split_undoes_compose_in_the_gauge_asked_for(row, c):
    constraint, w = row.make(None), randn(*row.shape)
    u, v = constraint.split(w, c)
    close(constraint.compose((u, v)), w, scale=10)
    flat = v.flatten(0, -2)
    close(u.T @ u - flat.T @ flat, c * torch.eye(u.shape[1], dtype=u.dtype), scale=100)


@cases(row=MATRICES)
def test_pullback_penalty_and_mirror(row):
    constraint = row.make(None)
    factors = tuple(randn(*f.shape, seed=i).requires_grad_() for i, f in enumerate(constraint.split(randn(*row.shape))))
    grad = randn(*row.shape, seed=7)
    w = constraint.compose(factors)
    for mine, theirs in zip(constraint.pullback(factors, grad), torch.autograd.grad(w, factors, grad), strict=True):
        close(mine.detach(), theirs, scale=10)
    factors, w = tuple(f.detach() for f in factors), w.detach()
    close(constraint.compose(constraint.mirror(factors)), w, scale=10)
    squares = sum(f.square().sum() for f in factors) / 2
    balanced = sum(f.square().sum() for f in constraint.split(w)) / 2
    close(balanced, constraint.penalty(w))
    close(constraint.penalty(w), torch.linalg.matrix_norm(w.flatten(1), "nuc"))
    assert bool(constraint.penalty(w) < squares)


def test_alignment_changes_the_gauge_and_nothing_else():
    u, v = kernel.factorize(randn(9, 6))
    turn = torch.linalg.qr(randn(6, 6, seed=3))[0]
    new_u, new_v, turn_u, turn_v = kernel.align(3 * u @ turn, v @ turn / 3)
    close(new_u @ new_v.T, u @ v.T, scale=10)
    close(kernel.column_norms(new_u), kernel.column_norms(new_v))
    close(3 * u @ turn @ turn_u, new_u, scale=10)
    close(v @ turn / 3 @ turn_v, new_v, scale=10)
    for _ in range(3):  # exact at once if U^T U = V^T V
        new_u, new_v, *_ = kernel.align(new_u, new_v)
    close(kernel.column_sizes(new_u, new_v), torch.linalg.svdvals(u @ v.T), scale=10)


# -- the step ----------------------------------------------------------------------------------------------------------


class Explicit:
    """The step written out with the factors of the state as they are, the row's formula, and no code of the library."""

    def __init__(self, opt_row, opt, p, strength, lr):
        self.row, self.opt, self.p, self.strength, self.lr = opt_row, opt, p, strength, lr
        self.moments = ({}, {})

    def direction(self, g, state):
        """Rows are units; a decoupled strength is one per coordinate of the matrix."""
        rows = Units(tuple(g.shape), lambda x: x.mean(1, keepdim=True))
        update, number = self.row.direction(g, state, rows)
        per_coordinate = (math.sqrt(self.p.shape[0]) + math.sqrt(self.p[0].numel())) / 2
        return update, number * per_coordinate if self.row.decoupled else number

    def step(self, grad, factors, scale, saturated):
        g = grad.flatten(1)
        u, v = factors
        metric = u.square().sum(0) + v.square().sum(0)
        a, b = (f.norm() / f.shape[1] ** 0.5 for f in (u, v))
        (du, own_u), (dv, own_v) = (
            self.direction(x, s) for x, s in zip((g @ v / b, g.T @ u / a), self.moments, strict=True)
        )
        du, dv = self.lr * b * du, self.lr * a * dv
        assert self.lr * self.strength * torch.as_tensor(own_u).max() < scale  # no row needs slowing down here
        t = 1.0
        if saturated:
            decay = self.lr * self.strength * max(torch.as_tensor(own).max() for own in (own_u, own_v))
            if isinstance(own_u, Tensor):
                decay = self.lr * self.strength * max(own_u.max(), own_v.max())
            reach = decay + torch.maximum(du.norm(dim=0), dv.norm(dim=0)) / (metric / 2).sqrt()
            t = 1 / torch.maximum(torch.maximum(metric, reach), scale)
        rho = [1 - t * self.lr * self.strength * own for own in (own_u, own_v)]
        return rho[0] * u - t * du, rho[1] * v - t * dv


def follow(row, opt_row, time_scale):
    module = constrained_parameter(row, strength=0.02)
    p = module.weight
    opt = optimizer(module, opt_row, time_scale=time_scale)
    lr = opt.param_groups[0]["lr"]
    oracle = Explicit(opt_row, opt, p, 0.02, lr)
    scale = 2 * torch.linalg.svdvals(p.detach().flatten(1)).square().mean().sqrt()
    factors = kernel.factorize(p.detach().flatten(1))
    for g in gradients(row.shape, 6) * 0.3:
        p.grad = g
        opt.step()
        factors = oracle.step(g, factors, scale, time_scale == "saturated")
        close(p.detach(), (factors[0] @ factors[1].T).reshape(p.shape), "factor step")
    for side, mine in zip("uv", factors, strict=True):
        close(opt.state[p][f"factor_{side}"], mine, "factor step")


@cases(taken, row=MATRICES, opt_row=EVERY_OPTIMIZER, time_scale=["none", "saturated"])
def test_steps_are_those_of_explicit_factors(row, opt_row, time_scale):
    follow(row, opt_row, time_scale)


def test_the_suite_notices_a_wrong_step(monkeypatch):
    original = kernel.lowrank

    def wrong(*args, **kwargs):
        u, v = original(*args, **kwargs)
        return u * (1 + 1e-9), v

    monkeypatch.setattr(kernel, "lowrank", wrong)
    with pytest.raises(AssertionError, match="not close"):
        follow(MATRICES[0], OPTIMIZERS[0], "saturated")


@cases(row=MATRICES)
def test_without_time_scale_and_momentum_the_trajectory_is_explicit_mode(row):
    """Over several alignments, which must not show."""
    w, target, x = randn(*row.shape), randn(*row.shape, seed=1), randn(row.shape[-1], 9, seed=2)
    weights = []
    for mode in ("optimizer", "explicit"):
        module = nn.Module()
        module.weight = nn.Parameter(w.clone())
        symopt.constrain(module, {"weight": row.make(0.2)}, mode=mode, init="balanced")
        if mode == "optimizer":
            opt = symopt.SGD(module, lr=0.02, time_scale="none")
        else:
            opt = torch.optim.SGD(symopt.param_groups(module), lr=0.02)
        for _ in range(3 * stepper.EVERY):
            opt.zero_grad()
            ((module.weight - target) @ x).tanh().square().sum().mul(0.1).backward()
            opt.step()
        weights.append(module.weight.detach())
    close(*weights, "factor step", scale=10)


@cases(opt_row=OPTIMIZERS)
def test_the_step_cannot_see_a_rotation_of_the_factors(opt_row):
    """Without the time scale, which is fixed to the gauge, W moves alike whatever the rotation, moments included."""
    ends = []
    for turned in (False, True):
        module = parameter(randn(7, 5), symopt.LowRank(strength=0.02))
        p = module.weight
        opt = optimizer(module, opt_row, time_scale="none")
        for k, g in enumerate(gradients((7, 5), 6) * 0.3):
            p.grad = g
            opt.step()
            if turned and k == 2:
                turn = torch.linalg.qr(randn(5, 5, seed=5))[0]
                state = opt.state[p]
                for key, value in state.items():
                    if key.startswith("factor_") and value.dim() == 2:
                        state[key] = value @ turn
        ends.append(p.detach())
    close(*ends, "factor step", scale=10)


# -- optima ------------------------------------------------------------------------------------------------------------


def kkt(w: Tensor, grad: Tensor, strength: float) -> float:
    """How far ``grad`` is from minus strength times a subgradient of the nuclear norm, relative to the strength."""
    left, size, right = torch.linalg.svd(w, full_matrices=False)
    alive = size > 1e-6 * size[0]
    left, right = left[:, alive], right[alive]
    on = torch.cat([left.T @ grad + strength * right, (grad @ right.T + strength * left).T], 1).abs().max()
    off = grad - left @ left.T @ grad
    off = off - off @ right.T @ right
    return max(float(on), float(torch.linalg.matrix_norm(off, 2)) - strength, 0.0) / strength


@cases(name=["sgd", "momentum", "adam"])
def test_denoising_is_the_soft_thresholded_svd(name):
    a, strength = randn(12, 8) + 3 * randn(12, 1, seed=1) @ randn(1, 8, seed=2), 2.0
    module = parameter(randn(12, 8, seed=3), symopt.LowRank(strength=strength))
    p = module.weight
    opt = {
        "sgd": lambda: symopt.SGD(module, lr=0.3),
        "momentum": lambda: symopt.SGD(module, lr=0.1, momentum=0.8),
        "adam": lambda: symopt.Adam(module, lr=0.3, betas=(0.5, 0.999)),
    }[name]()
    for _ in range(1500):
        p.grad = p.detach() - a
        opt.step()
    left, size, right = torch.linalg.svd(a, full_matrices=False)
    expected = left @ torch.diag((size - strength).clamp(min=0)) @ right
    assert live(opt, p) == int((size > strength).sum()) < 8
    close(p.detach(), expected, "stationary", scale=100)
    assert kkt(p.detach(), p.detach() - a, strength) < tolerance("stationary") * 100


def soft_impute(a, mask, strength, steps=500):
    """Proximal gradient with Nesterov's acceleration and restarts; for a mask the step is 1."""
    w = y = torch.zeros_like(a)
    k = 1.0
    for _ in range(steps):
        left, size, right = torch.linalg.svd(y - mask * (y - a), full_matrices=False)
        new = left @ torch.diag((size - strength).clamp(min=0)) @ right
        k = 1.0 if float(((y - new) * (new - w)).sum()) > 0 else (1 + math.sqrt(1 + 4 * k * k)) / 2
        y, w = new + (k - 1) / (k + 2) * (new - w), new
    return w


@cases(name=["sgd", "adam"])
def test_matrix_completion_ends_where_a_proximal_solver_does(name):
    truth = randn(12, 2) @ randn(2, 9, seed=1)
    mask = (torch.rand(12, 9, generator=torch.Generator().manual_seed(2)) < 0.6).double()
    a, strength = mask * (truth + 0.3 * randn(12, 9, seed=3)), 1.0

    def objective(w):
        return float((mask * (w - a)).square().sum() / 2 + strength * torch.linalg.svdvals(w).sum())

    best = soft_impute(a, mask, strength)
    assert kkt(best, mask * (best - a), strength) < 1e-6
    module = parameter(randn(12, 9, seed=4), symopt.LowRank(strength=strength))
    p = module.weight
    opt = symopt.SGD(module, lr=1.0) if name == "sgd" else symopt.Adam(module, lr=0.5, betas=(0.5, 0.999))
    for _ in range(900):
        p.grad = mask * (p.detach() - a)
        opt.step()
    assert objective(p.detach()) - objective(best) < tolerance("convex gap") * objective(best)
    assert live(opt, p) == int((torch.linalg.svdvals(best) > 1e-6).sum()) < 9


def test_rows_and_columns_without_a_gradient_do_not_blow_up():
    """Adam's preconditioner is 1 / eps there, so that they are decayed to zero at once, and nothing else is slowed."""
    a = randn(10, 8)
    a[2], a[:, 5] = 0, 0
    mask = (a != 0).double()
    module = parameter(randn(10, 8, seed=1), symopt.LowRank(strength=0.05))
    p = module.weight
    opt = symopt.Adam(module, lr=0.05)
    for _ in range(400):
        p.grad = mask * (p.detach() - a)
        opt.step()
    p = p.detach()
    assert float(p[2].abs().max()) < 1e-6
    assert float(p[:, 5].abs().max()) < 1e-6
    assert float((mask * (p.detach() - a)).norm()) < 0.2 * float(a.norm())


def test_adamw_keeps_signal_and_drops_noise():
    """A rank-one signal of signal-to-noise ratio r per coordinate lives above the strength and dies below it."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.ones(40, 30, dtype=torch.float64)
    for ratio, ranks in ((0.6, {1, 2}), (0.02, {0})):
        module = parameter(0.1 * randn(40, 30, seed=2), symopt.LowRank(strength=0.3))
        p = module.weight
        opt = symopt.AdamW(module, lr=2e-2, betas=(0.9, 0.99))
        for _ in range(600):
            noise = torch.randn(40, 30, generator=generator, dtype=torch.float64)
            p.grad = noise - ratio * direction
            opt.step()
        assert live(opt, p) in ranks, ratio
        assert (live(opt, p) == 0) == (int(p.detach().count_nonzero()) == 0)


# -- deflation and budgets ---------------------------------------------------------------------------------------------


def train(module, opt, steps, seed=0):
    p = module.weight
    target = randn(*p.shape, seed=seed + 50).to(p)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        noise = torch.randn(p.shape, generator=generator).to(p)
        p.grad = p.detach() - target + 0.1 * noise
        opt.step()


@pytest.mark.filterwarnings("ignore:.*too few to ramp")
@cases(row=MATRICES, opt_row=OPTIMIZERS)
def test_a_budget_is_met_exactly(row, opt_row):
    module = nn.Module()
    module.weight = nn.Parameter(randn(*row.shape))
    symopt.constrain(module, {"weight": symopt.LowRank(rank=2)})
    p, opt = module.weight, optimizer(module, opt_row)
    opt.reschedule(40)
    train(module, opt, 40)
    assert live(opt, p) == 2
    assert int(torch.linalg.matrix_rank(p.detach().flatten(1))) == 2
    found = symopt.report(module, opt).rows[0]
    assert found.live == 2 and found.committed
    assert symopt.fold(module).fold_config["cut"] == {"weight": 0}


def test_a_training_that_is_long_enough_begins_to_impose_its_budget():
    module = parameter(randn(6, 5), symopt.LowRank(rank=2))
    opt = symopt.AdamW(module, lr=0.1, total_steps=10_000)
    train(module, opt, 1)  # whether it is long enough is asked again after the first step
    assert float(opt.state[module.weight]["budget"][1]) > 0 and live(opt, module.weight) == 5


def test_without_a_length_a_budget_is_refused():
    module = parameter(randn(5, 4), symopt.LowRank(rank=2))
    opt = symopt.AdamW(module)
    module.weight.grad = randn(5, 4)
    with pytest.raises(ValueError, match=r"total_steps=N"):
        opt.step()


def test_max_rank_holds_from_the_first_step():
    module = parameter(randn(9, 7), symopt.LowRank(strength=1e-3, max_rank=3))
    opt = symopt.AdamW(module, lr=1e-3)
    train(module, opt, 1)
    assert live(opt, module.weight) == 3 == int(torch.linalg.matrix_rank(module.weight.detach()))
    train(module, opt, 50)
    assert live(opt, module.weight) == 3 == int(torch.linalg.matrix_rank(module.weight.detach()))


def test_the_state_shrinks_with_the_rank_and_zero_is_absorbing():
    module = parameter(randn(12, 9), symopt.LowRank(strength=50.0))
    p, opt = module.weight, symopt.SGD(module, lr=0.05, momentum=0.5)
    train(module, opt, 400)
    assert live(opt, p) == 0 and int(p.detach().count_nonzero()) == 0
    assert opt.state[p]["factor_u_momentum_buffer"].shape == (12, 0)
    train(module, opt, 30)
    assert int(p.detach().count_nonzero()) == 0


# -- state -------------------------------------------------------------------------------------------------------------


@cases(opt_row=OPTIMIZERS)
def test_saving_and_loading_in_between_changes_no_bit(opt_row):
    def make():
        module = parameter(randn(8, 6), symopt.LowRank(strength=0.05))
        return module, optimizer(module, opt_row)

    straight, opt = make()
    train(straight, opt, 25)
    mid = copy.deepcopy(straight.state_dict()), opt.state_dict()
    buffer = io.BytesIO()
    torch.save(mid, buffer)
    train(straight, opt, 30, seed=1)
    resumed, again = make()
    weights, state = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    resumed.load_state_dict(weights)
    again.load_state_dict(state)
    train(resumed, again, 30, seed=1)
    assert torch.equal(straight.weight, resumed.weight)
    for key, value in opt.state[straight.weight].items():
        assert torch.equal(value, again.state[resumed.weight][key]), key


def test_a_deep_copy_goes_on_alike():
    module = parameter(randn(8, 6), symopt.LowRank(strength=0.05))
    opt = symopt.AdamW(module, lr=1e-2)
    train(module, opt, 10)
    twin, other = copy.deepcopy((module, opt))
    train(module, opt, 20, seed=1)
    train(twin, other, 20, seed=1)
    assert torch.equal(module.weight, twin.weight)


def test_torchs_checkpoints_load_and_ours_load_there():
    w = randn(8, 6)
    plain = nn.Module()
    plain.weight = nn.Parameter(w.clone())
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    train(plain, theirs, 10)
    module = parameter(plain.weight.detach(), symopt.LowRank(strength=0.05))
    opt = symopt.AdamW(module, lr=1e-2)
    opt.load_state_dict(theirs.state_dict())
    opt.param_groups[0]["lr"] = 0.0
    train(module, opt, 1)
    state = opt.state[module.weight]
    assert float(state["step"]) == 11 and "exp_avg" not in state
    back = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    back.load_state_dict(opt.state_dict())
    assert back.state[plain.weight]["exp_avg_sq"].shape == (8, 6)
    train(plain, back, 3)
    assert bool(plain.weight.isfinite().all())
    # the first moment survives the round trip through the factors' frames, as all directions are still there
    fresh = parameter(plain.weight.detach(), symopt.LowRank(strength=0.05))
    once = symopt.AdamW(fresh, lr=0.0, betas=(1 - 1e-12, 0.999))
    once.load_state_dict(theirs.state_dict())
    once.param_groups[0].update(lr=0.0, betas=(1 - 1e-12, 0.999))
    train(fresh, once, 1)
    close(once.state_dict()["state"][0]["exp_avg"], theirs.state[plain.weight]["exp_avg"], "stationary")


def test_release_leaves_a_plain_state():
    module = parameter(randn(8, 6), symopt.LowRank(strength=0.05))
    opt = symopt.AdamW(module, lr=1e-2)
    train(module, opt, 5)
    symopt.release(module)
    assert sorted(opt.state[module.weight]) == ["exp_avg", "exp_avg_sq", "step"]
    train(module, opt, 5)


@cases(change=["load_state_dict", "data", "one entry", "swap"], dtype=[torch.float32, torch.bfloat16])
def test_a_weight_changed_from_outside_is_noticed(change, dtype):
    module = parameter(randn(8, 6).to(dtype), symopt.LowRank(strength=1e-3))
    p, opt = module.weight, symopt.AdamW(module, lr=1e-3)
    train(module, opt, 5)
    new = randn(8, 6, seed=9).to(dtype)
    if change == "load_state_dict":
        module.load_state_dict({"weight": new})
    elif change == "data":
        p.data.copy_(new)
    elif change == "one entry":
        new = p.detach().clone()
        new[3, 2] += 0.5
        p.data[3, 2] += 0.5
    else:
        p.data = new.clone()
    p.grad = torch.zeros_like(p)
    opt.step()
    error = float((p.detach() - new).float().norm() / new.float().norm())
    assert error < 0.02  # one step of lr 1e-3 with what is left of the moments; the change itself is .1 or more
    made = opt.state[p]["factor_u"] @ opt.state[p]["factor_v"].T
    close(made.to(dtype), p.detach(), "backends, fp32")


@pytest.mark.filterwarnings("ignore:.*too few to ramp")
def test_a_change_does_not_undo_a_committed_rank():
    module = parameter(randn(8, 6), symopt.LowRank(rank=2))
    opt = symopt.AdamW(module, lr=0.05, total_steps=30)
    train(module, opt, 30)
    module.load_state_dict({"weight": randn(8, 6, seed=3)})
    with pytest.warns(UserWarning, match=r"weight: more lives .* \(rank 6, the budget is 2\)"):
        train(module, opt, 1)
    assert live(opt, module.weight) == 2 == int(torch.linalg.matrix_rank(module.weight.detach()))


def test_half_precision_keeps_fp32_factors():
    module = parameter(randn(12, 9).bfloat16(), symopt.LowRank(strength=20.0))
    p, opt = module.weight, symopt.SGD(module, lr=0.05)
    train(module, opt, 300)
    assert opt.state[p]["factor_u"].dtype == torch.float32
    assert live(opt, p) == 0 and int(p.detach().count_nonzero()) == 0


# -- fold --------------------------------------------------------------------------------------------------------------


def test_fold_makes_two_thin_layers_and_resize_rebuilds_them():
    torch.manual_seed(0)

    def build():
        return nn.Sequential(
            *(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten()),
            *(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10)),
        ).double()

    net, x = build(), randn(5, 3, 8, 8)
    patterns = {
        "0.weight": symopt.LowRank(max_rank=2),
        "3.weight": symopt.LowRank(max_rank=4),
        "5.weight": symopt.LowRank(),
    }
    symopt.constrain(net, patterns)
    opt = symopt.AdamW(net, lr=1e-3)
    for _ in range(3):
        opt.zero_grad()
        net(x).square().mean().backward()
        opt.step()
    small = symopt.fold(net, x)
    shapes = {name: tuple(p.shape) for name, p in small.named_parameters()}
    assert shapes["0.0.weight"] == (2, 3, 3, 3) and shapes["0.1.weight"] == (16, 2, 1, 1)
    assert shapes["3.0.weight"] == (4, 256) and shapes["3.1.weight"] == (64, 4) and shapes["5.weight"] == (10, 64)
    close(small(x), net(x), "stationary", scale=10)
    config = small.fold_config
    assert config["ranks"] == {"0": 2, "3": 4}
    assert config["parameters"]["after"] == sum(p.numel() for p in small.parameters())
    assert any("no fewer parameters" in note for note in config["kept"])
    again = symopt.resize(build(), config)
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(x), small(x))


def test_fold_keeps_layers_whose_weight_forward_reads():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(20, 20), nn.Linear(20, 4)

        def forward(self, x):
            return self.second(nn.functional.linear(x, self.first.weight))

    net, x = Net(), torch.randn(3, 20)
    symopt.constrain(net, {"first.weight": symopt.LowRank(max_rank=2)})
    with pytest.warns(UserWarning, match=r"first\.weight: 20 singular values live, the budget is 2"):
        small = symopt.fold(net, x)
    assert "ranks" in small.fold_config and small.fold_config["ranks"] == {}
    assert any(note.startswith("first:") and "not split in two" in note for note in small.fold_config["kept"])


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"rank": 0}, ValueError, "rank must be >= 1"),
        ({"rank": 2.0}, TypeError, "rank must be an integer"),
        ({"max_rank": True}, TypeError, "max_rank must be an integer"),
        ({"rank": 5, "max_rank": 3}, ValueError, "raise max_rank"),
        ({"strength": -1.0}, ValueError, "strength must be finite"),
    ],
)
def test_bad_arguments_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        symopt.LowRank(**options)


def test_weights_that_cannot_be_factored_are_refused():
    with pytest.raises(ValueError, match="zero everywhere"):
        parameter(torch.zeros(4, 3), symopt.LowRank())
    with pytest.raises(ValueError, match="is no matrix"):
        parameter(torch.ones(4), symopt.LowRank())
    with pytest.raises(ValueError, match="at most 3 anyway"):
        parameter(torch.ones(4, 3), symopt.LowRank(rank=4))
    module = parameter(torch.ones(4, 3), symopt.LowRank())
    opt = symopt.AdamW(module)
    module.weight.data.zero_()
    module.weight.grad = torch.ones(4, 3)
    with pytest.raises(ValueError, match="zero everywhere"):
        opt.step()


@cases(init=["gates", "independent", "matched"])
def test_explicit_inits_that_fit_no_matrix_are_refused(init):
    module = nn.Linear(4, 3)
    with pytest.raises(ValueError, match="LowRank"):
        symopt.constrain(module, {"weight": symopt.LowRank()}, mode="explicit", init=init)
