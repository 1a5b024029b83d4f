"""Units that span several parameters, written out without the library: a gate and directions, unit by unit.

``w_t[slice_t(g)] = a_t s_g d_t[slice_t(g)]`` with one gate per unit for all of its slices in all parameters; weights in
no unit take the plain step.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from support.directions import Units
from support.oracles import SNAP, STRENGTH
from support.table import OptimizerRow, UnitsRow
from support.tolerances import tolerance


def gradients_of(module: nn.Module, t: int) -> list[Tensor]:
    """Of both signs, in the order of the parameters."""
    generator, found = torch.Generator().manual_seed(t), []
    for p in module.parameters():
        g = torch.randn(p.shape, generator=generator, dtype=torch.float64) + 0.3 * (t % 2)
        found.append(g.to(p.dtype))
    return found


def units_of(row: UnitsRow) -> tuple[list[list[int]], int]:
    """Unit of every weight, one list per parameter in row-major order; those without one are numbered on from there."""
    names = sorted({unit for index in row.indices for unit in index if unit >= 0})
    found, free = [], itertools.count(len(names))
    for shape, dim, index in zip(row.shapes, row.dims, row.indices, strict=True):
        places = itertools.product(*map(range, shape))
        found.append([names.index(index[i[dim]]) if index[i[dim]] >= 0 else next(free) for i in places])
    return found, len(names)


class ExplicitUnits:
    """Weights over their factors a, in one flat vector; a unit has a gate and a direction for the length of a step."""

    def __init__(
        self,
        row: UnitsRow,
        opt_row: OptimizerRow,
        module: nn.Module,
        *,
        strength: float = STRENGTH,
        imbalance: float = 1.0,
        time_scale: str = "saturated",
    ) -> None:
        units, self.count = units_of(row)
        self.unit = torch.tensor([u for part in units for u in part])
        factors = [[a] * len(part) for part, a in zip(units, row.factors, strict=True)]
        self.a = torch.tensor([a for part in factors for a in part], dtype=torch.float64)
        self.v = torch.cat([p.detach().flatten() for p in module.parameters()]) / self.a
        self.row, self.lr = opt_row, opt_row.lr
        self.strength, self.saturated = strength, time_scale == "saturated"
        self.of = [(self.unit == u).nonzero().flatten() for u in range(int(self.unit.max()) + 1)]
        self.counts = torch.tensor([len(of) for of in self.of]).double()
        self.shared = Units(tuple(self.v.shape), self.means, lambda x: x[self.unit])
        sizes = self.sizes()
        c = imbalance * sizes.square().mean().sqrt()
        self.state: dict[str, Any] = {"imbalance": c, "metric_scale": (c * c + 4 * sizes.square()).mean().sqrt()}

    def sizes(self) -> Tensor:
        return torch.stack([self.v[self.of[u]].norm() for u in range(self.count)])

    def means(self, x: Tensor) -> Tensor:
        return torch.stack([x[of].mean() for of in self.of])

    def step(self, grads: list[Tensor]) -> None:
        g = torch.cat([x.flatten() for x in grads])
        bound = self.unit < self.count
        # A weight without a unit is its own.
        update, number = self.row.direction(torch.where(bound, self.a * g, g), self.state, self.shared)
        gain = self.row.gain(number, self.counts)
        c, scale = self.state["imbalance"], self.state["metric_scale"]
        decays = self.lr * self.strength * gain[: self.count]
        self.v = torch.where(bound, self.v, self.v - self.lr * update / self.a)
        for of, decay in zip(self.of, decays, strict=False):
            v, delta = self.v[of], self.lr * update[of]
            metric = (c * c + 4 * v.square().sum()).sqrt()
            most = decay + 2 * delta.norm()
            t = 1 / torch.stack([metric, scale, most]).max() if self.saturated else 1 / decay.clamp(min=1)
            s = ((c + metric) / 2).sqrt()
            d = v / s if s > 0 else torch.zeros_like(v)
            rho = 1 - t * decay
            s_new, d_new = rho * s - t * (delta * d).sum(), rho * d - t * s * delta
            new = s_new * d_new
            snaps = new.norm() <= SNAP * scale and delta.norm() < decay
            self.v[of] = 0 if snaps else new
        sizes, slow = self.sizes(), decays.sort().values[self.count // 10]
        if self.saturated:
            slow = slow / torch.maximum(scale, 2 * sizes.square().sum() / sizes.sum().clamp(min=1e-300))
        c = c * ((1 - slow).clamp(min=0) ** 4).clamp(min=0.98)
        self.state["imbalance"] = torch.where(c <= SNAP * scale, 0.0, c)

    def compare(self, module: nn.Module, opt: torch.optim.Optimizer) -> None:
        tol = {"rtol": tolerance("factor step"), "atol": tolerance("factor step"), "check_dtype": False}
        params = list(module.parameters())
        sizes = [p.numel() for p in params]
        a = torch.where(self.unit < self.count, self.a, 1.0).split(sizes)
        for p, w in zip(params, (self.a * self.v).split(sizes), strict=True):
            torch.testing.assert_close(p.detach().flatten(), w, **tol)
            assert torch.equal(p.detach().flatten() == 0, w == 0)
        for i, p in enumerate(params):
            state = opt.state[p]
            assert set(state) - {"progress"} == set(self.state)
            for key, value in self.state.items():
                if torch.as_tensor(value).shape == self.v.shape:  # the library keeps that of the weight
                    assert state[key].shape == p.shape
                    value = value.split(sizes)[i] / a[i]
                else:
                    assert state[key] is opt.state[params[0]][key]
                value = torch.as_tensor(value).double().flatten()
                torch.testing.assert_close(state[key].flatten(), value, **tol, msg=lambda m, k=key: f"{k}: {m}")
