"""Mirror: any plane, given by an orthogonal projection or an orthonormal basis of what shall vanish."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch import Tensor

from symopt.constraints.base import Constraint, Factors, Outs
from symopt.constraints.gauge import heavy_factor, light_factor
from symopt.constraints.planes.derived import derived
from symopt.constraints.planes.plane import Plane, flat
from symopt_kernels.groups import Groups
from symopt_kernels.reference import elementwise

__all__ = ["Mirror"]

_PROBES = 8
_TRACE_EXACT = 256  # up to so many weights the codimension is counted, above it estimated
_TOLERANCE = 1e-5  # of a projection given in single precision, on random vectors


@final
@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Mirror(Plane):
    """The weights end up on a plane, exactly: ``project(w) = w``, or ``basis.T @ w = 0``.

    The symmetry is the mirror itself, ``w -> 2 P w - w``.  Everything the key of :func:`symopt.constrain` matches is
    bound into one plane, one weight or several.  What lies on the plane moves as under the plain optimizer and is never
    shrunk; only what is off it decays.  With ``g`` the gradient at the minimum on the plane, the constraint holds
    exactly for every strength above

    - ``||(I - P) g||_2`` in gate form (penalty ``||(I - P) w||_2``: everything off the plane vanishes together),
    - ``max |basis.T g|`` in coordinate form (penalty ``||basis.T w||_1``: every coordinate for itself),

    globally for a convex loss, locally otherwise.  Exact means: up to rounding of the projection.

    Args:
        project: the orthogonal projection onto the plane, a function of as many tensors as are bound that returns as
            many of the same shapes (one tensor for one).  It must be linear, symmetric and idempotent, which is checked
            on random vectors when it is bound.
        strength: kappa, in the loss's units with SGD and Adam, per coordinate and dimensionless with AdamW.  None:
            automatic, twice a running estimate of what the steps before needed, so that nothing needs tuning.
        basis: instead of ``project``, an orthonormal basis of what shall vanish: ``(weights, k)``, the weights of all
            tensors flattened one after the other.
        form: ``"gate"`` or ``"coordinates"`` (needs ``basis``).

    One second moment serves the whole plane, because a preconditioner has to commute with the projection.  Ties, which
    keep one per orbit, are better served by :class:`symopt.Tied` and its kind.

    Raises:
        TypeError, ValueError: if neither or both of ``project`` and ``basis`` are given, if one does not fit the
            weights, is no orthogonal projection or not orthonormal, or for a bad ``strength``.

    Source: L. Ziyin, ICML 2024 (arXiv 2309.16932), Section 4 and Theorem 1.

    Example:
        >>> import torch, symopt
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Linear(3, 1, bias=False)
        >>> mean_free = symopt.Mirror(lambda w: w - w.mean())
        >>> net = symopt.constrain(net, {"weight": mean_free})
        >>> opt = symopt.Adam(net, lr=1e-2)
        >>> for _ in range(2000):
        ...     opt.zero_grad()
        ...     (net(torch.eye(3)).squeeze(1) - torch.tensor([1.0, 2.0, 6.0])).square().sum().backward()
        ...     opt.step()
        >>> net.weight.detach().round(decimals=1)
        tensor([[-2., -1.,  3.]])
    """

    binds_many = True

    @property
    def retraction(self) -> str:
        """By what the plane is given as, and by form."""
        if self.basis is None:
            return "plane"
        return "basis" if self._gate else "coordinates"

    project: Callable[..., Any] | None = field(default=None, kw_only=False)
    strength: float | None = None
    basis: Tensor | None = None
    form: str = "gate"
    shapes: tuple[tuple[int, ...], ...] = field(default=(), repr=False)
    directions: float = field(default=0.0, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.project is None) == (self.basis is None):
            raise TypeError("Mirror: give either project, a function, or basis, a tensor")
        if self.project is not None and not callable(self.project):
            raise TypeError(
                f"Mirror: project must be a function of the weights, got {type(self.project).__name__}; an orthonormal "
                "basis of what shall vanish goes to basis="
            )
        if self.form not in ("gate", "coordinates"):
            raise ValueError(f"Mirror: form must be 'gate' or 'coordinates', got {self.form!r}")
        if self.basis is None:
            if self.form == "coordinates":
                raise ValueError("Mirror: form='coordinates' needs coordinates; give basis instead of project")
            return
        given: Any = self.basis
        if not isinstance(given, Tensor) or not given.is_floating_point():
            raise TypeError("Mirror: basis must be a floating-point tensor")
        if self.basis.dim() != 2 or not 1 <= self.basis.shape[1] <= self.basis.shape[0]:
            raise ValueError(f"Mirror: basis must have shape (weights, k), got {tuple(self.basis.shape)}")
        wide = self.basis.detach().double()
        gram = wide.T @ wide - torch.eye(wide.shape[1], dtype=wide.dtype, device=wide.device)
        if not bool(gram.abs().max() <= _TOLERANCE):
            raise ValueError("Mirror: the columns of basis must be orthonormal; pass torch.linalg.qr(basis.double()).Q")

    def __repr__(self) -> str:
        """The call that makes it."""
        name = getattr(self.project, "__name__", type(self.project).__name__)
        given = name if self.basis is None else f"basis={'x'.join(map(str, self.basis.shape))} tensor"
        own = "" if self.strength is None else f", strength={self.strength}"
        return f"Mirror({given}{own}{', form=' + repr(self.form) if self.form != 'gate' else ''})"

    # -- binding -----------------------------------------------------------------------------------------------------

    def bind_all(self, names: tuple[str, ...], weights: tuple[Tensor, ...]) -> Constraint:
        bound = replace(self, shapes=tuple(tuple(w.shape) for w in weights))
        owner, n = f"Mirror on {', '.join(names)}", sum(w.numel() for w in weights)
        if self.basis is not None:
            if self.basis.shape[0] != n:
                raise ValueError(f"{owner}: basis has {self.basis.shape[0]} rows, the weights are {n}")
            return replace(bound, directions=float(self.basis.shape[1]))
        like: Any = {"dtype": torch.promote_types(weights[0].dtype, torch.float32), "device": weights[0].device}
        if weights[0].device.type == "meta":
            raise ValueError(f"{owner}: project can be checked on weights that have data only; materialise them first")
        random = torch.Generator(like["device"]).manual_seed(0)
        probes = [torch.randn(n, generator=random, **like) for _ in range(_PROBES)]
        images = [bound._called(owner, x) for x in probes]
        scale = _TOLERANCE * math.sqrt(n) * 10

        def differ(a: Tensor, b: Tensor) -> bool:
            return not bool((a - b).norm() <= scale)

        x, y = probes[0], probes[1]
        if differ(bound._called(owner, 2 * x - 3 * y), 2 * images[0] - 3 * images[1]):
            raise ValueError(f"{owner}: project is not linear, so what it leaves fixed is no plane through 0")
        for p, image in zip(probes, images, strict=True):
            if differ(bound._called(owner, image), image):
                raise ValueError(f"{owner}: project is no projection: applied twice it is not what it is applied once")
            pairs = zip(probes, images, strict=True)
            if not all(abs(float(p @ other - q @ image)) <= scale * math.sqrt(n) for q, other in pairs):
                raise ValueError(f"{owner}: project is not orthogonal: <P x, y> is not <x, P y>")
        if not any(differ(image, p) for p, image in zip(probes, images, strict=True)):
            raise ValueError(f"{owner}: project leaves every weight as it is, so there is nothing to constrain")
        return replace(bound, directions=bound._trace(owner, n, like))

    def _called(self, owner: str, x: Tensor) -> Tensor:
        assert self.project is not None
        shapes = self.shapes or (tuple(x.shape),)
        pieces = x.flatten().split([math.prod(shape) for shape in shapes])
        out = self.project(*(piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True)))
        images = (out,) if isinstance(out, Tensor) else out
        if not isinstance(images, (tuple, list)) or not all(isinstance(image, Tensor) for image in images):
            raise TypeError(f"{owner}: project must return a tensor or a tuple of them, got {type(out).__name__}")
        if [tuple(image.shape) for image in images] != list(shapes):
            got = ", ".join(str(tuple(image.shape)) for image in images)
            raise ValueError(f"{owner}: project must return tensors of the weights' shapes {shapes}, got {got}")
        return flat([image.to(x.dtype) for image in images]).flatten()

    def _trace(self, owner: str, n: int, like: dict[str, Any]) -> float:
        """Codimension of the plane, trace(I - P); estimated for large ones, where it only sets AdamW's unit."""
        random = torch.Generator(like["device"]).manual_seed(1)
        if n <= _TRACE_EXACT:
            probes = list(torch.eye(n, **like))
        else:
            signs = [torch.randint(0, 2, (n,), generator=random, device=like["device"]) for _ in range(64)]
            probes = [(2 * s - 1).to(like["dtype"]) for s in signs]
        total = sum(float(x @ (x - self._called(owner, x))) for x in probes)
        return max(1.0, round(total if n <= _TRACE_EXACT else total / len(probes)))

    # -- the plane ---------------------------------------------------------------------------------------------------

    def codimension(self, w: Tensor) -> float:
        return self.directions

    def onto(self, x: Tensor) -> Tensor:
        return self._called("Mirror", x).reshape(x.shape) if self.basis is None else super().onto(x)

    def off(self, x: Tensor) -> Tensor:
        z = self.coordinates(x)
        return x - self.onto(x) if z is None else self.lift(z, x)

    def _orthonormal(self, x: Tensor) -> Tensor:
        def make() -> Tensor:
            rows = self.rows(x)
            assert rows is not None
            return rows.contiguous()

        return derived(self, ("orthonormal", x.device, x.dtype), make)

    def coordinates(self, x: Tensor) -> Tensor | None:
        return None if self.basis is None else self._orthonormal(x) @ x.flatten()

    def lift(self, z: Tensor, like: Tensor) -> Tensor:
        return (self._orthonormal(like).T @ z).reshape(like.shape)

    def rows(self, like: Tensor) -> Tensor | None:
        return None if self.basis is None else self.basis.detach().T.to(like)

    def _coordinates(self, x: Tensor) -> Tensor:
        z = self.coordinates(x)
        assert z is not None
        return z

    # -- coordinate form: Sparse on the coordinates off the plane ------------------------------------------------------

    @property
    def _gate(self) -> bool:
        return self.form == "gate"

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        return super().inner(x, y) if self._gate else self._coordinates(x) * self._coordinates(y)

    def sqrt_dim_per_gate(self, w: Tensor) -> Tensor | float:
        return super().sqrt_dim_per_gate(w) if self._gate else 1.0

    def per_unit(self, rate: Tensor, w: Tensor) -> Tensor:
        return rate

    def size(self, w: Tensor, groups: Groups | None = None) -> Tensor:
        return super().size(w) if self._gate else self._coordinates(w).abs()

    def compose(self, factors: Factors, out: Tensor | None = None) -> Tensor:
        if self._gate:
            return super().compose(factors)
        base, u, v = factors
        return self.onto(base) + self.lift(u * v, base)

    def split(self, w: Tensor, imbalance: Tensor | float = 0.0) -> Factors:
        if self._gate:
            return super().split(w, imbalance)
        z = self._coordinates(w)
        heavy = heavy_factor(z.abs(), imbalance, 2)
        return self.onto(w), heavy, light_factor(z, heavy, 2)

    def pullback(self, factors: Factors, grad: Tensor, out: Outs | None = None) -> Factors:
        if self._gate:
            return super().pullback(factors, grad)
        _, u, v = factors
        z = self._coordinates(grad)
        return self.onto(grad), z * v, z * u

    def retract(
        self,
        w: Tensor,
        delta: Tensor,
        decay: Tensor | float,
        imbalance: Tensor,
        metric_scale: Tensor,
        groups: Groups | None,
        *,
        saturated: bool = True,
        snaps: Tensor | bool = True,
    ) -> Tensor:
        if self._gate:
            return super().retract(w, delta, decay, imbalance, metric_scale, groups, saturated=saturated, snaps=snaps)
        z, d = self._coordinates(w), self._coordinates(delta)
        decay = decay.reshape(()) if isinstance(decay, Tensor) else decay
        new = elementwise.sparse(z, d, decay, imbalance, metric_scale, saturated=saturated, snaps=snaps)
        return w - delta + self.lift(new - z + d, w)
