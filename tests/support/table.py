"""The one table behind the tests: a row per constraint and per optimizer, and every tolerance with its reason.

A public constraint or optimizer without a row fails ``test_table.py``; a new row runs through every law by itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import symopt
from support import directions
from support.directions import Formula, State, Units
from symopt.constraints import Constraint
from symopt.optim import ConstrainedOptimizer

CPU_BACKENDS = tuple(backend for backend in symopt.backends.BACKENDS if backend != "triton")
"""Those that step tensors on the CPU; the third is interpreted in a process of its own (test_triton.py)."""


@dataclass(frozen=True)
class ConstraintRow:
    id: str
    make: Callable[[float | None], Constraint]
    """strength -> constraint"""
    shape: tuple[int, ...]
    unit: Callable[[tuple[int, ...]], object] | None = None
    """Place of a weight -> name of its unit, said without the library; ``Sparse`` and ``GroupSparse`` need none."""


@dataclass(frozen=True)
class PlaneRow:
    id: str
    make: Callable[[float | None], Constraint]
    shapes: tuple[tuple[int, ...], ...]
    """Of the parameters, bound together where the constraint is joint."""
    equations: Callable[[torch.Tensor], list[torch.Tensor]]
    """Coordinates of a weight -> rows of A, whose plane A w = 0 is, said without the library.  The argument is the
    identity: row i of it is the gradient of the i-th coordinate of the flat weight."""


@dataclass(frozen=True)
class UnitsRow:
    """Units that span several parameters."""

    id: str
    shapes: tuple[tuple[int, ...], ...]
    dims: tuple[int, ...]
    """Along which each parameter is cut into slices."""
    indices: tuple[tuple[int, ...], ...]
    """Unit of every slice, -1 for none."""
    factors: tuple[float, ...]

    def make(self, strength: float | None, keep: float | int | None = None) -> Constraint:
        """The constraint."""
        indices = [None if index == (0, 1, 2, 3) else list(index) for index in self.indices]
        groups = {f"w{i}": pair for i, pair in enumerate(zip(self.dims, indices, strict=True))}
        factors = {f"w{i}": factor for i, factor in enumerate(self.factors)}
        return symopt.GroupSparse(groups, strength=strength, keep=keep, factors=factors)


@dataclass(frozen=True)
class OptimizerRow:
    id: str
    cls: type[ConstrainedOptimizer]
    torch_cls: type[torch.optim.Optimizer]
    """torch's own, or, where torch has none, :func:`support.directions.plain` of the formula."""
    lr: float
    options: dict[str, Any] = field(default_factory=dict)
    formula: Formula = field(kw_only=True)
    """Its direction, written out without the library; every oracle steps with it."""
    decoupled: bool = field(kw_only=True)
    """Whether the strength is dimensionless, so that the formula's number is a typical update (AdamW, Lion, Muon)."""
    fused: tuple[str, ...] = field(default=(), kw_only=True)
    """The fused backends that step its unconstrained parameters, and at least some of its constraints."""
    takes: frozenset[str] | None = field(default=None, kw_only=True)
    """Ids of the constraints' rows that it takes; None: all.  The others it refuses by name."""

    @property
    def plain_cls(self) -> type[torch.optim.Optimizer]:
        """What steps its unconstrained parameters with the same bits."""
        return self.torch_cls if issubclass(self.cls, self.torch_cls) else self.cls

    def moments(self, role: str) -> set[str]:
        """Names of moments, by what :class:`symopt.optim.direction.Moment` calls their role."""
        return {moment.key for moment in self.cls.direction.table if moment.role == role}

    @property
    def settings(self) -> dict[str, Any]:
        """All of its options, defaults included, as its counterpart has them."""
        p = torch.nn.Parameter(torch.zeros(1, 1))
        return {**self.torch_cls([p], lr=self.lr).defaults, **self.options}

    def direction(self, g: torch.Tensor, state: State, units: Units) -> tuple[torch.Tensor, torch.Tensor | float]:
        """The formula's update and number."""
        return self.formula(-g if self.settings.get("maximize") else g, state, self.settings, units)

    def gain(self, number: torch.Tensor | float, size: torch.Tensor) -> torch.Tensor:
        """What multiplies the strength of units of these sizes, by the formula's ``number``."""
        return number * size.sqrt() if self.decoupled else number * torch.ones_like(size)

    @property
    def one_by_one(self) -> dict[str, Any]:
        """What makes its counterpart step tensor by tensor."""
        return {"foreach": False} if "foreach" in inspect.signature(self.torch_cls).parameters else {}


def _checkerboard(w: torch.Tensor) -> torch.Tensor:
    return torch.arange(w.numel()).reshape(w.shape) % 3


Row = ConstraintRow | PlaneRow | UnitsRow

CONSTRAINTS = [
    ConstraintRow("sparse", lambda k: symopt.Sparse(strength=k), (6, 5)),
    ConstraintRow("sparse-1d", lambda k: symopt.Sparse(strength=k), (7,)),
    ConstraintRow("group-out", lambda k: symopt.GroupSparse("out", strength=k), (6, 5)),
    ConstraintRow("group-in", lambda k: symopt.GroupSparse("in", strength=k), (6, 5)),
    ConstraintRow("group-out-conv", lambda k: symopt.GroupSparse("out", strength=k), (4, 3, 3, 2)),
    ConstraintRow("group-in-conv", lambda k: symopt.GroupSparse("in", strength=k), (4, 3, 3, 2)),
    ConstraintRow("group-head", lambda k: symopt.GroupSparse("head:2", strength=k), (8, 6)),
    ConstraintRow("group-head-packed", lambda k: symopt.GroupSparse("head:2", strength=k), (12, 4)),
    ConstraintRow("group-block", lambda k: symopt.GroupSparse("block:2x3", strength=k), (4, 6)),
    ConstraintRow("group-index", lambda k: symopt.GroupSparse(torch.tensor([0, 2, 2, 0, 5, 5]), strength=k), (6, 5)),
    ConstraintRow("group-callable", lambda k: symopt.GroupSparse(_checkerboard, strength=k), (6, 5)),
]
"""Two factors: each unit, a weight or a group of weights, is one gate times one direction."""


DEEP = [
    ConstraintRow("sparse-depth-3", lambda k: symopt.Sparse(strength=k, depth=3), (6, 5)),
    ConstraintRow("sparse-depth-4", lambda k: symopt.Sparse(strength=k, depth=4), (7,)),
    ConstraintRow("sparse-depth-5", lambda k: symopt.Sparse(strength=k, depth=5), (6, 5)),
    ConstraintRow("group-depth-3", lambda k: symopt.GroupSparse("out", strength=k, depth=3), (6, 5)),
    ConstraintRow("group-in-conv-depth-4", lambda k: symopt.GroupSparse("in", strength=k, depth=4), (4, 3, 3, 2)),
    ConstraintRow("group-index-depth-5", lambda k: symopt.GroupSparse(_checkerboard, strength=k, depth=5), (6, 5)),
]


FREE = [
    ConstraintRow("sparse-free", lambda k: symopt.Sparse(strength=k, gauge="free"), (6, 5)),
    ConstraintRow("sparse-free-depth-3", lambda k: symopt.Sparse(strength=k, depth=3, gauge="free"), (6, 5)),
    ConstraintRow("sparse-free-depth-4", lambda k: symopt.Sparse(strength=k, depth=4, gauge="free"), (7,)),
]


def _equal(a: torch.Tensor, b: torch.Tensor) -> list[torch.Tensor]:
    return list((a - b).reshape(-1, a.shape[-1]))


def _rolled(e: torch.Tensor, n: int) -> list[torch.Tensor]:
    """Every w[i, j] equals w[i + 1, j + 1]."""
    e = e.reshape(n, n, n * n)
    return [e[i, j] - e[(i + 1) % n, (j + 1) % n] for i in range(n) for j in range(n)]


_ROTATION = ([1, 2, 0, 4, 5, 3], [2, 3, 0, 1])  # two cycles of three outputs, a shift of four inputs by two
_BASIS = torch.linalg.qr(torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q


def _off_basis(*weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
    flat = torch.cat([w.flatten() for w in weights])
    basis = _BASIS.to(flat.dtype)
    parts = (flat - basis @ (basis.T @ flat)).split([w.numel() for w in weights])
    return tuple(part.reshape(w.shape) for part, w in zip(parts, weights, strict=True))


PLANES = [
    PlaneRow("tied", lambda k: symopt.Tied(strength=k), ((3, 4), (3, 4)), lambda e: _equal(e[:12], e[12:])),
    PlaneRow(
        "tied-three",
        lambda k: symopt.Tied(strength=k),
        ((5,),) * 3,
        lambda e: [*_equal(e[:5], e[5:10]), *_equal(e[:5], e[10:])],
    ),
    PlaneRow(
        "tied-elementwise-pair",
        lambda k: symopt.Tied(strength=k, mode="elementwise"),
        ((3, 4), (3, 4)),
        lambda e: _equal(e[:12], e[12:]),
    ),
    PlaneRow(
        "tied-elementwise",
        lambda k: symopt.Tied(strength=k, mode="elementwise"),
        ((3, 4),) * 3,
        lambda e: [*_equal(e[:12], e[12:24]), *_equal(e[:12], e[24:])],
    ),
    PlaneRow(
        "tied-transposed",
        lambda k: symopt.Tied(strength=k, views=[None, "T"]),
        ((2, 3), (3, 2)),
        lambda e: _equal(e[:6].reshape(2, 3, 12), e[6:].reshape(3, 2, 12).transpose(0, 1)),
    ),
    PlaneRow(
        "tied-slices",
        lambda k: symopt.Tied(strength=k, views=[slice(0, 2), (slice(3, 5), slice(None))]),
        ((5, 3),),
        lambda e: _equal(e[:6], e[9:]),
    ),
    PlaneRow(
        "tied-slices-elementwise",
        lambda k: symopt.Tied(strength=k, mode="elementwise", views=[lambda w: w[:, 0], lambda w: w[:, 2]]),
        ((4, 3),),
        lambda e: _equal(e.reshape(4, 3, 12)[:, 0], e.reshape(4, 3, 12)[:, 2]),
    ),
    PlaneRow(
        "symmetric",
        lambda k: symopt.Symmetric(strength=k),
        ((4, 4),),
        lambda e: _equal(e.reshape(4, 4, 16), e.reshape(4, 4, 16).transpose(0, 1)),
    ),
    PlaneRow("circulant", lambda k: symopt.Circulant(strength=k), ((4, 4),), lambda e: _rolled(e, 4)),
    PlaneRow(
        "equivariant",
        lambda k: symopt.Equivariant([_ROTATION], strength=k),
        ((6, 4),),
        lambda e: _equal(e.reshape(6, 4, 24)[_ROTATION[0]][:, _ROTATION[1]], e.reshape(6, 4, 24)),
    ),
    PlaneRow(
        "equivariant-bias",
        lambda k: symopt.Equivariant([_ROTATION], strength=k),
        ((6,),),
        lambda e: _equal(e[_ROTATION[0]], e),
    ),
    PlaneRow(
        "zero-mean", lambda k: symopt.ZeroMean(strength=k), ((3, 2, 2),), lambda e: list(e.reshape(3, 4, 12).sum(1))
    ),
    PlaneRow(
        "zero-mean-in",
        lambda k: symopt.ZeroMean(strength=k, dim=0),
        ((3, 4),),
        lambda e: list(e.reshape(3, 4, 12).sum(0)),
    ),
    PlaneRow(
        "zero-mean-two",
        lambda k: symopt.ZeroMean(strength=k, dim=(0, 2)),
        ((2, 3, 2),),
        lambda e: list(e.reshape(2, 3, 2, 12).sum((0, 2))),
    ),
    PlaneRow("mirror", lambda k: symopt.Mirror(_off_basis, strength=k), ((2, 3), (6,)), lambda e: list(_BASIS.T @ e)),
    PlaneRow(
        "mirror-basis", lambda k: symopt.Mirror(basis=_BASIS, strength=k), ((3, 4),), lambda e: list(_BASIS.T @ e)
    ),
    PlaneRow(
        "mirror-basis-two",
        lambda k: symopt.Mirror(basis=_BASIS, strength=k),
        ((2, 3), (6,)),
        lambda e: list(_BASIS.T @ e),
    ),
    PlaneRow(
        "mirror-coordinates",
        lambda k: symopt.Mirror(basis=_BASIS, strength=k, form="coordinates"),
        ((2, 3), (6,)),
        lambda e: list(_BASIS.T @ e),
    ),
]

MATRICES = [
    ConstraintRow("lowrank", lambda k: symopt.LowRank(strength=k), (6, 5)),
    ConstraintRow("lowrank-wide", lambda k: symopt.LowRank(strength=k), (4, 9)),
    ConstraintRow("lowrank-conv", lambda k: symopt.LowRank(strength=k), (5, 2, 3, 2)),
]
"""Constraints that see a weight as a matrix; their units are not weights or groups of them (test_lowrank.py)."""

UNITS = [
    # What writes the channels of a convolution with its norm, and an embedding that writes the same ones.
    UnitsRow(
        "units-channels",
        ((4, 3, 2, 2), (4,), (4,), (5, 4)),
        (0, 0, 0, 1),
        ((0, 1, 2, 3), (0, 1, 2, 3), (0, 1, 2, 3), (2, 0, 3, 1)),
        (1.0, 0.5, 3.0, 0.7),
    ),
    # Units of several slices, in any order, and slices of no unit, the first and the last among them.
    UnitsRow(
        "units-free-weights",
        ((7, 3), (2, 6, 2), (5,)),
        (0, 1, 0),
        ((-1, 2, 0, -1, 1, 2, -1), (0, -1, 2, 1, 1, 0), (-1, 0, 2, 1, -1)),
        (2.0, 1.0, 0.3),
    ),
    UnitsRow("units-alone", ((6, 5),), (1,), ((3, -1, 0, 3, 7),), (0.25,)),
]

OWN_FACTORS = [
    ConstraintRow("bridge-out", lambda k: symopt.GroupBridge("out", strength=k), (6, 5), lambda place: place[0]),
    ConstraintRow(
        "bridge-in-conv", lambda k: symopt.GroupBridge("in", strength=k), (4, 3, 3, 2), lambda place: place[1]
    ),
    ConstraintRow(
        "bridge-head", lambda k: symopt.GroupBridge("head:2", strength=k), (8, 3), lambda place: place[0] // 4
    ),
]
"""Constraints whose factors are not one gate and one direction per unit: each needs an oracle of its own.  The row of
such a constraint stands here (``CONSTRAINTS`` has the others)."""

EVERY: list[Row] = [*CONSTRAINTS, *DEEP, *FREE, *PLANES, *MATRICES, *UNITS, *OWN_FACTORS]

_BOTH = ("native", "triton")
_SGD: dict[str, Any] = {"formula": directions.sgd, "decoupled": False, "fused": _BOTH}
_ADAM: dict[str, Any] = {"formula": directions.adam, "decoupled": False, "fused": _BOTH}
_ADAMW: dict[str, Any] = {"formula": directions.adamw, "decoupled": True, "fused": _BOTH}

OPTIMIZERS = [
    OptimizerRow("sgd", symopt.SGD, torch.optim.SGD, 0.05, **_SGD),
    OptimizerRow("sgd-momentum", symopt.SGD, torch.optim.SGD, 0.01, {"momentum": 0.9}, **_SGD),
    OptimizerRow("sgd-nesterov", symopt.SGD, torch.optim.SGD, 0.01, {"momentum": 0.9, "nesterov": True}, **_SGD),
    OptimizerRow("sgd-dampening", symopt.SGD, torch.optim.SGD, 0.02, {"momentum": 0.8, "dampening": 0.3}, **_SGD),
    OptimizerRow("sgd-maximize", symopt.SGD, torch.optim.SGD, 0.05, {"maximize": True}, **_SGD),
    OptimizerRow("adam", symopt.Adam, torch.optim.Adam, 0.01, **_ADAM),
    OptimizerRow("adam-amsgrad", symopt.Adam, torch.optim.Adam, 0.01, {"amsgrad": True}, **_ADAM),
    OptimizerRow("adamw", symopt.AdamW, torch.optim.AdamW, 0.01, **_ADAMW),
    OptimizerRow(
        "adamw-amsgrad", symopt.AdamW, torch.optim.AdamW, 0.01, {"amsgrad": True, "betas": (0.8, 0.95)}, **_ADAMW
    ),
    OptimizerRow("adamw-maximize", symopt.AdamW, torch.optim.AdamW, 0.01, {"maximize": True}, **_ADAMW),
]
"""torch's SGD, Adam and AdamW with all of their switches (``foreach``, ``fused``, ``capturable``, ...)."""

Lion = directions.plain(directions.lion, betas=(0.9, 0.99))
_LION: dict[str, Any] = {"formula": directions.lion, "decoupled": True, "fused": _BOTH}

OTHERS = [
    OptimizerRow("lion", symopt.Lion, Lion, 3e-3, **_LION),
    OptimizerRow("lion-maximize", symopt.Lion, Lion, 3e-3, {"maximize": True, "betas": (0.8, 0.95)}, **_LION),
]
"""Optimizers without these switches; the row of a new optimizer stands here."""

_ROTATABLE = "group-out group-in group-head group-head-packed group-depth-3 zero-mean-in"
_MUON: dict[str, Any] = {"formula": directions.muon, "decoupled": True, "takes": frozenset(_ROTATABLE.split())}

MUONS = [
    OptimizerRow("muon", symopt.Muon, torch.optim.Muon, 0.01, **_MUON),
    OptimizerRow("muon-rms", symopt.Muon, torch.optim.Muon, 0.01, {"adjust_lr_fn": "match_rms_adamw"}, **_MUON),
    OptimizerRow("muon-plain", symopt.Muon, torch.optim.Muon, 0.01, {"nesterov": False, "momentum": 0.8}, **_MUON),
]
"""For matrices, and not under every constraint: where mirrors multiply the matrix from one side."""

ANY_SHAPE = [*OPTIMIZERS, *OTHERS]
"""They take every constraint and tensors of every shape."""

EVERY_OPTIMIZER = [*ANY_SHAPE, *MUONS]


def ids(row: Any) -> str:
    return str(row.id)


def plane_module(
    row: PlaneRow | UnitsRow, strength: float | None = 0.3, *, dtype: torch.dtype = torch.float64
) -> torch.nn.Module:
    """A module whose parameters ``w0``, ``w1``, ... obey the row's constraint together."""
    generator, module = torch.Generator().manual_seed(0), torch.nn.Module()
    for i, shape in enumerate(row.shapes):
        w = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        module.register_parameter(f"w{i}", torch.nn.Parameter(w))
    return symopt.constrain(module, {tuple(f"w{i}" for i in range(len(row.shapes))): row.make(strength)})


def constrained_parameter(
    row: ConstraintRow, *, strength: float | None = 0.3, dtype: torch.dtype = torch.float64, seed: int = 0
) -> torch.nn.Module:
    """A module whose only parameter ``weight`` obeys the row's constraint; entries of both signs."""
    generator = torch.Generator().manual_seed(seed)
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.randn(row.shape, generator=generator, dtype=torch.float64).to(dtype))
    return symopt.constrain(module, {"weight": row.make(strength)})


def bound_module(row: Row, strength: float | None = 0.3, *, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    """A module whose parameters obey the row's constraint."""
    if isinstance(row, (PlaneRow, UnitsRow)):
        return plane_module(row, strength, dtype=dtype)
    return constrained_parameter(row, strength=strength, dtype=dtype)


_reasons: dict[tuple[str, str], dict[str, str | None]] = {}


def _found(opt_row: OptimizerRow, row: Row) -> dict[str, str | None]:
    """Per backend why it cannot step a constraint, or None."""
    if (key := (opt_row.id, row.id)) not in _reasons:
        opt = opt_row.cls(bound_module(row), lr=opt_row.lr, **opt_row.options)
        _reasons[key] = next(found for _, _, found in opt.backends())
    return _reasons[key]


def taken(row: Row, opt_row: OptimizerRow, **_: Any) -> bool:
    """Whether the optimizer takes the constraint; what it does not is refused by name (test_table.py)."""
    return opt_row.takes is None or row.id in opt_row.takes


def available(row: Row, opt_row: OptimizerRow, backend: str | None, **_: Any) -> bool:
    """The same on a backend, which may lack the pair; what it lacks is refused by name."""
    return taken(row, opt_row) and (backend is None or _found(opt_row, row)[backend] is None)


def claimed(opt_row: OptimizerRow, backend: str = "native", **_: Any) -> bool:
    """Whether a fused backend steps parameters of this optimizer that have no constraint."""
    return backend in opt_row.fused
