"""Optimizers side by side: with an oracle, and on several backends, step by step.

Gradients are functions of the weight and the step, so that an error is fed back instead of forgotten.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import symopt
from support.oracles import STRENGTH, Explicit
from support.table import CONSTRAINTS, OPTIMIZERS, ConstraintRow, OptimizerRow, constrained_parameter
from support.tolerances import tolerance

Run = tuple[nn.Module, Any]

STEPS = 20
HALF = [torch.bfloat16, torch.float16]
ROWS = [*CONSTRAINTS, ConstraintRow("sparse-free", lambda k: symopt.Sparse(strength=k, gauge="free"), (6, 5))]
SOME = [row for row in ROWS if row.id in ("sparse", "group-in-conv", "group-index", "sparse-free")]
FEW = [row for row in OPTIMIZERS if row.id in ("sgd-nesterov", "adam-amsgrad", "adamw")]
KINDS: dict[str, Callable[[], symopt.Constraint]] = {
    "sparse": lambda: symopt.Sparse(strength=0.3),
    "free": lambda: symopt.Sparse(strength=0.3, gauge="free"),
    "out": lambda: symopt.GroupSparse("out", strength=0.3),
    "in": lambda: symopt.GroupSparse("in", strength=0.3),
    "block": lambda: symopt.GroupSparse("block:1x2", strength=0.3),
    "index": lambda: symopt.GroupSparse(lambda w: torch.arange(w.numel()).reshape(w.shape) % 5, strength=0.3),
}


def stepped(run: Run, steps: int = 3) -> Run:
    for t in range(steps):
        step(run, t)
    return run


def gradient(p: Tensor, t: int) -> Tensor:
    """Both signs, over several decades; laid out like ``p``."""
    noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
    g = torch.sin(3 * p.detach().double().contiguous() + t) + 0.3 * noise
    g.view(-1)[:: 3 + t % 2] *= 1e-3
    return torch.empty_like(p.detach()).copy_(g)


def start(row: ConstraintRow, opt_row: OptimizerRow, dtype: torch.dtype = torch.float64, **options: Any) -> Run:
    module = constrained_parameter(row, dtype=dtype)
    return module, optimizer(module, opt_row, **options)


def both(row: ConstraintRow, opt_row: OptimizerRow, dtype: torch.dtype = torch.float64, **options: Any) -> list[Run]:
    """The same weight on the two backends, native first."""
    return [start(row, opt_row, dtype, backend=backend, **options) for backend in ("native", "reference")]


def step(run: Run, t: int) -> None:
    module, opt = run
    for p in module.parameters():
        p.grad = gradient(p, t)
    opt.step()


def take(runs: list[Run], grads: list[Tensor]) -> None:
    for module, opt in runs:
        for p, g in zip(module.parameters(), grads, strict=True):
            p.grad = g.to(p.device, copy=True)
        opt.step()


def step_alike(runs: list[Run], t: int) -> None:
    """All take the gradient of the first: a last bit of a half-precision weight would make a large difference of it."""
    take(runs, [gradient(p.cpu(), t) for p in runs[0][0].parameters()])


def tensors(run: Run) -> dict[str, Tensor]:
    module, opt = run
    found = {}
    for name, p in module.named_parameters():
        found[name] = p.detach()
        found |= {f"{name}.{key}": v for key, v in opt.state[p].items() if isinstance(v, Tensor)}
    return found


def close(run: Run, other: Run, kind: str = "backends") -> None:
    have, want = (ordered({key: value.cpu() for key, value in tensors(r).items()}) for r in (run, other))
    assert have.keys() == want.keys()
    for key, value in want.items():
        assert (have[key].shape, have[key].dtype) == (value.shape, value.dtype), key
        if value.dtype in HALF:
            continue  # follows from its master, or from its factors
        tol = tolerance(kind)
        torch.testing.assert_close(have[key], value, rtol=tol, atol=tol, msg=lambda m, key=key: f"{key}: {m}")


def ordered(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Two factors by size: a step that a long way would overshoot makes them equal, and either may then be zeroed."""
    for key in [key for key in found if key.endswith("factor_0")]:
        pair = torch.stack([found.pop(key), found.pop(key[:-1] + "1")]).abs()
        found |= {f"{key}.small": pair.amin(0), f"{key}.large": pair.amax(0)}
    return found


def kind_of(row: ConstraintRow) -> str:
    return "backends, snapped" if row.id in ("sparse", "sparse-1d") else "backends"


def equal(run: Run, other: Run) -> bool:
    have, want = tensors(run), tensors(other)
    return have.keys() == want.keys() and all(torch.equal(have[key], want[key]) for key in want)


def optimizer(module: torch.nn.Module, opt_row: OptimizerRow, **options) -> torch.optim.Optimizer:
    return opt_row.cls(module, **{"lr": opt_row.lr, **opt_row.options, **options})


def gradients(shape: tuple[int, ...], steps: int, seed: int = 1) -> Tensor:
    """Both signs; the second half leans one way, so that momentum and second moments build up too."""
    g = torch.randn(steps, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    g[steps // 2 :] += 0.5
    return g


def follow(
    row: ConstraintRow,
    opt_row: OptimizerRow,
    time_scale: str,
    imbalance: float,
    steps: int = 6,
    backend: str = "native",
) -> None:
    """Run the library and the oracle side by side and compare after every step."""
    module = constrained_parameter(row, strength=STRENGTH)
    p = module.weight
    opt = optimizer(module, opt_row, time_scale=time_scale, imbalance=imbalance, backend=backend)
    oracle = Explicit(row, opt_row, p, time_scale=time_scale, imbalance=imbalance)
    for g in gradients(row.shape, steps):
        p.grad = g
        opt.step()
        oracle.step(g)
        oracle.compare(p, opt)


def made(shape: tuple[int, ...], constraint: symopt.Constraint, place: Any = None, dtype: Any = torch.float64) -> Any:
    """A module with a constrained ``weight`` and an unconstrained ``bias``."""
    module = nn.Module()
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    module.weight = nn.Parameter(value if place is None else place(value))
    module.bias = nn.Parameter(torch.ones(3, dtype=dtype))
    return symopt.constrain(module, {"weight": constraint})
