"""Any weight, layout, dtype, options and constraint: the step that is chosen is the reference's on a contiguous copy.

500 fixed cases here; ``make fuzz`` tries 10 000 new ones.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import symopt
from support.cases import cases
from support.runs import ordered
from support.table import ANY_SHAPE, OPTIMIZERS, OptimizerRow
from support.tolerances import tolerance

FUZZ = os.environ.get("SYMOPT_FUZZ")
many = settings(
    max_examples=int(FUZZ or 500),
    derandomize=FUZZ is None,
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)

STEPS = 3
Run = tuple[nn.Module, Any]
SHAPES = [(1,), (7,), (1, 1), (1, 6), (6, 1), (6, 5), (2, 700), (700, 3), (4, 3, 3, 2), (4, 1, 3, 1)]
KINDS = {
    "sparse": lambda k: symopt.Sparse(strength=k),
    "free": lambda k: symopt.Sparse(strength=k, gauge="free"),
    "deep": lambda k: symopt.Sparse(strength=k, depth=3),
    "out": lambda k: symopt.GroupSparse("out", strength=k),
    "in": lambda k: symopt.GroupSparse("in", strength=k),
    "block": lambda k: symopt.GroupSparse("block:2x1", strength=k),
    "index": lambda k: symopt.GroupSparse(lambda w: torch.arange(w.numel()).reshape(w.shape) % 3, strength=k),
    "deep groups": lambda k: symopt.GroupSparse("out", strength=k, depth=3),
}
LAYOUTS = {
    "contiguous": lambda w: w,
    "transposed": lambda w: w.permute(*reversed(range(w.dim()))).contiguous().permute(*reversed(range(w.dim()))),
    "channels last": lambda w: w.contiguous(memory_format=torch.channels_last) if w.dim() == 4 else w,
    "sliced": lambda w: torch.stack([w, w], -1)[..., 0],
    "offset": lambda w: torch.cat([w.flatten()[:1], w.flatten()])[1:].view(w.shape),
}
HALF = (torch.bfloat16, torch.float16)


def fits(kind: str, shape: tuple[int, ...]) -> bool:
    try:
        KINDS[kind](None).bind("weight", torch.ones(shape))
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class Case:
    where: tuple[str, tuple[int, ...]]
    layout: str
    dtype: torch.dtype
    opt: OptimizerRow
    lr: float
    strength: float | None
    override: float | None
    imbalance: float
    time_scale: str
    maximize: bool
    saved: int
    seed: int

    def noise(self, t: int, shape: tuple[int, ...]) -> Tensor:
        """Numbers of both signs over several decades, and zeros."""
        generator = torch.Generator().manual_seed(self.seed + t)
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        x *= 10.0 ** torch.randint(-4, 1, shape, generator=generator)
        return (x * (torch.rand(shape, generator=generator) > 0.2)).to(self.dtype)

    def build(self, layout: str, backend: str | None) -> Run:
        kind, shape = self.where
        module, weight = nn.Module(), self.noise(-1, shape)
        weight.view(-1)[-1] = 0.5  # a tensor of zeros is refused where there is no imbalance
        module.weight = nn.Parameter(LAYOUTS[layout](weight))
        module.bias = nn.Parameter(self.noise(-2, (5,)))
        module.scale = nn.Parameter(self.noise(-3, ()))
        module.nothing = nn.Parameter(torch.empty(0, 3, dtype=self.dtype))
        symopt.constrain(module, {"weight": KINDS[kind](self.strength)})
        # Factor steps to the letter multiply large weights by 1 + delta**2, which overflows fp16 at an lr of 1.
        lr = self.lr if self.time_scale == "saturated" else min(self.lr, 0.05)
        options = {**self.opt.options, "maximize": self.maximize, "lr": lr, "strength": self.override}
        own: dict[str, Any] = {"imbalance": self.imbalance, "time_scale": self.time_scale, "backend": backend}
        groups = [{"params": [module.weight, module.nothing]}, {"params": [module.bias, module.scale], "lr": 1e-3}]
        return module, self.opt.cls(groups, **options, **own)


any_case = st.builds(
    Case,
    where=st.sampled_from([(kind, shape) for kind in KINDS for shape in SHAPES if fits(kind, shape)]),
    layout=st.sampled_from(list(LAYOUTS)),
    dtype=st.sampled_from([torch.float64, torch.float32, *HALF]),
    opt=st.sampled_from(ANY_SHAPE),
    lr=st.sampled_from([0.0, 1e-8, 1e-3, 0.05, 1.0]),
    strength=st.sampled_from([None, 0.0, 1e-3, 0.3, 30.0]),
    override=st.sampled_from([None, None, 0.0, 0.2]),
    imbalance=st.sampled_from([0.0, 1e-5, 0.1, 1.0, 10.0]),
    time_scale=st.sampled_from(["saturated", "saturated", "none"]),
    maximize=st.booleans(),
    saved=st.integers(0, STEPS - 1),
    seed=st.integers(0, 2**32),
)


def idle(module: nn.Module) -> Tensor:
    """The weights of units that are zero."""
    w, constraint = module.weight.detach().double().contiguous(), symopt.constraints(module)["weight"]
    groups = constraint.partition(w, constraint.index(w))
    zero = constraint.size(w, groups) == 0
    return (zero if groups is None else groups.expand(zero)).reshape(w.shape)


def copied(case: Case, run: Run) -> Run:
    """Through files, as a run that goes on in another process."""
    file = io.BytesIO()
    torch.save([each.state_dict() for each in run], file)
    file.seek(0)
    module, opt = case.build(case.layout, None)
    for each, state in zip((module, opt), torch.load(file, weights_only=True), strict=True):
        each.load_state_dict(state)
    return module, opt


def numbers(run: Run) -> dict[str, Tensor]:
    module, opt = run
    found = {name: p.detach() for name, p in module.named_parameters()}
    for name, p in module.named_parameters():
        found |= {f"{name}.{key}": value for key, value in opt.state[p].items() if isinstance(value, Tensor)}
    return found


def close(case: Case, run: Run, other: Run) -> None:
    kind = "backends, snapped" if case.dtype == torch.float64 else "backends, fp32"
    have, want = (ordered(numbers(each)) for each in (run, other))
    assert have.keys() == want.keys()
    for key, value in want.items():
        if value.dtype in HALF and key == "weight":
            continue  # follows from its master, or from its factors
        plain = not key.startswith("weight")
        tol = tolerance("exact" if plain else kind)
        atol = tol if plain or not value.numel() else tol * max(1.0, float(value.abs().max()))
        torch.testing.assert_close(
            have[key], value, rtol=tol, atol=atol, equal_nan=plain, msg=lambda m, key=key: f"{key}: {m}"
        )


@many
@given(case=any_case)
def test_any_step(case: Case) -> None:
    run, oracle, resumed = case.build(case.layout, None), case.build("contiguous", "reference"), None
    module = run[0]
    start, resting = module.weight.detach().clone(), idle(module)
    for t in range(STEPS):
        if t == case.saved:
            resumed = copied(case, run)
        grads = [case.noise(10 * t + k, p.shape) for k, p in enumerate(module.parameters())]
        if case.imbalance:
            grads[0][resting] = 0  # without imbalance any gradient leaves them at rest, with it only none
        for each, optimizer in filter(None, (run, oracle, resumed)):
            for p, g in zip(each.parameters(), grads, strict=True):
                p.grad = None if p is each.bias and t == 1 else g.clone()
            optimizer.step()
    assert resumed is not None
    assert not module.weight[resting].any()
    bound = {key: value for key, value in numbers(run).items() if key.startswith("weight")}  # others are torch's affair
    assert all(value.isfinite().all() for value in bound.values())
    assert case.lr or torch.equal(module.weight, start)
    close(case, run, oracle)
    have = {key: value for key, value in numbers(resumed).items() if key.startswith("weight")}
    assert have.keys() == bound.keys() and all(torch.equal(have[key], bound[key]) for key in bound)
    if "weight.master" in bound:
        assert torch.equal(module.weight, bound["weight.master"].to(case.dtype))


@cases(shape=[(), (0,), (2, 0)], kind=KINDS)
def test_nothing_cannot_be_constrained(kind: str, shape: tuple[int, ...]) -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.empty(shape))
    with pytest.raises(ValueError, match="weight"):
        symopt.constrain(module, {"weight": KINDS[kind](None)})


@cases(kind=KINDS, row=OPTIMIZERS)
def test_weights_that_share_memory_are_refused_as_in_torch(kind: str, row: OptimizerRow) -> None:
    errors = []
    for constrained in (False, True):
        module = nn.Module()
        module.weight = nn.Parameter(torch.ones(1, 5).expand(4, 5))
        if constrained:
            symopt.constrain(module, {"weight": KINDS[kind](None)})
        opt = (row.cls if constrained else row.torch_cls)(module.parameters(), lr=row.lr, foreach=False)
        module.weight.grad = torch.ones(4, 5)
        with pytest.raises(RuntimeError, match="single memory location") as error:
            opt.step()
        errors.append(str(error.value))
    assert errors[0] == errors[1]
    assert torch.equal(module.weight, torch.ones(4, 5))
