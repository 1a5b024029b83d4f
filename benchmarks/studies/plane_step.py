"""Cost of the step of a fixed plane, against torch's fused step of the same tensors without a constraint.

    python -m benchmarks.studies.plane_step [--size 1024] [--seconds 3] [--threads 2 1] [--only Tied]

Steps are taken in turns; what is printed is the least of each, because whatever else the machine does only adds time,
and in brackets the ratio of the medians.
Prints nothing unless weights that were on the plane still are, bit for bit for ties.  "before collapse": the weights
are off the plane; "after collapse": they lie on it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

import symopt
from benchmarks.studies import program
from benchmarks.timing import interleave, summarize, threads


def basis(size: int, columns: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(size * size, columns, generator=random, dtype=torch.float64)).Q


PLANES: dict[str, tuple[int, Callable[[int], symopt.Constraint]]] = {
    "`Tied()`": (2, lambda n: symopt.Tied()),
    "`Tied()`, four copies": (4, lambda n: symopt.Tied()),
    '`Tied(mode="elementwise")`': (2, lambda n: symopt.Tied(mode="elementwise")),
    '`Tied(views=[None, "T"])`': (2, lambda n: symopt.Tied(views=[None, "T"])),
    "`Symmetric()`": (1, lambda n: symopt.Symmetric()),
    "`Circulant()`": (1, lambda n: symopt.Circulant()),
    "`ZeroMean()`": (1, lambda n: symopt.ZeroMean()),
    "`ZeroMean(dim=0)`": (1, lambda n: symopt.ZeroMean(dim=0)),
    "`Mirror(basis=O)`, one column": (1, lambda n: symopt.Mirror(basis=basis(n, 1))),
    "`Mirror(basis=O)`, eight columns": (1, lambda n: symopt.Mirror(basis=basis(n, 8))),
    "`Mirror(project)`, the mean": (1, lambda n: symopt.Mirror(lambda w: w - w.mean())),
}
"""How many square weights are bound together, and by what."""

ALL_OPTIMIZERS = ("Tied", "Symmetric", "ZeroMean")
"""Of others only AdamW is measured."""

OPTIMIZERS = {
    "AdamW": (symopt.AdamW, torch.optim.AdamW, {}),
    "Adam": (symopt.Adam, torch.optim.Adam, {}),
    "SGD, momentum": (symopt.SGD, torch.optim.SGD, {"momentum": 0.9}),
}


def build(size: int, copies: int) -> torch.nn.Module:
    torch.manual_seed(0)
    net = torch.nn.Sequential(*(torch.nn.Linear(size, size, bias=False) for _ in range(copies)))
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    return net


def row(size: int, name: str, optimizer: str, *, on_plane: bool, seconds: float) -> str:
    copies, make = PLANES[name]
    mine_cls, torch_cls, options = OPTIMIZERS[optimizer]
    plain = torch_cls(build(size, copies).parameters(), lr=1e-7, fused=True, **options)
    net = symopt.constrain(build(size, copies), {"*.weight": make(size)})
    opt = mine_cls(net, lr=1e-7, **options)
    constraint = symopt.constraints(net)["0.weight"]
    if on_plane:
        with torch.no_grad():
            flat = torch.cat([p.flatten() for p in net.parameters()])
            folded = constraint.fold(flat if copies > 1 else net[0].weight)
            for p, part in zip(net.parameters(), folded.flatten().chunk(copies), strict=True):
                p.copy_(part.reshape(p.shape))
    times = interleave((lambda: None, opt.step), (lambda: None, plain.step), 10_000, seconds)
    flat = torch.cat([p.detach().flatten() for p in net.parameters()])
    weight = flat if copies > 1 else flat.reshape(size, size)
    if (float(constraint.violation(weight)) <= constraint.rounding(weight)) != on_plane:
        raise SystemExit(f"{name}: not where it should be; no timing is worth printing")
    (mine, theirs), medians = map(min, times), [summarize(t).median for t in times]
    where, backend = "after collapse" if on_plane else "before collapse", next(iter(opt.backends()))[1]
    ratio = f"{mine / theirs:.2f} ({medians[0] / medians[1]:.2f})"
    return f"| {name} | {optimizer} | {backend} | {where} | {mine:.2f} | {theirs:.2f} | {ratio} |"


def main() -> None:
    parser = program(__spec__, __doc__)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=3.0, help="per row")
    parser.add_argument("--only", default="", help="a part of a constraint's name")
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    arguments = parser.parse_args()
    for count in arguments.threads:
        with threads(count):
            print(f"{arguments.size} x {arguments.size} fp32 weights, threads: {count}\n")
            print("| constraint | optimizer | backend | | symopt, ms | torch fused, no constraint, ms | ratio |")
            print("|---|---|---|---|---|---|---|")
            for name in PLANES:
                for optimizer in OPTIMIZERS if any(kind in name for kind in ALL_OPTIMIZERS) else ("AdamW",):
                    for on_plane in (False, True) if arguments.only in name else ():
                        given = {"on_plane": on_plane, "seconds": arguments.seconds}
                        print(row(arguments.size, name, optimizer, **given), flush=True)
            print()


if __name__ == "__main__":
    main()
