"""What a budget adds to a whole training step: the same network with ``Sparse(strength)`` and with ``Sparse(density)``.

python -m benchmarks.budget_cost        a minute; the table in docs/budgets.md
"""

from __future__ import annotations

import warnings
from typing import Any

import symopt
from benchmarks import timing
from benchmarks.training import NETS, Trainer

BUDGETS: dict[str, dict[str, Any]] = {
    "density 5 %, per tensor": {"density": 0.05},
    "density 5 %, global": {"density": 0.05, "scope": "global"},
    "2:4": {"pattern": "2:4"},
}
STEPS = 20
"""To a block: one selection is among them."""


class _Annealed(Trainer):
    def __init__(self, net: str, constraint: symopt.Constraint) -> None:
        super().__init__("symopt", NETS[net], {"fused": True})
        names = tuple(n for n in symopt.constraints(self.net) if self.net.get_parameter(n).shape[1] % 4 == 0)
        symopt.constrain(symopt.release(self.net), {names: constraint})
        self.opt = symopt.AdamW(self.net, lr=1e-3, fused=True)
        self.anneal = symopt.Anneal(self.opt, 10**6)

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.backward()
            self.opt.step()
            self.anneal.step()


def main() -> None:
    warnings.simplefilter("ignore")
    print("| network | budget | without, ms | with, ms | with / without |\n|---|---|---|---|---|")
    for net in NETS:
        for name, options in BUDGETS.items():
            ours, plain = _Annealed(net, symopt.Sparse(**options)), _Annealed(net, symopt.Sparse(0.1))
            a, b = timing.interleave(
                (lambda: None, lambda t=ours: t.steps(STEPS)), (lambda: None, lambda t=plain: t.steps(STEPS)), 21, 6.0
            )
            ratio = timing.summarize([x / y for x, y in zip(a, b, strict=True)])
            one, two = (timing.summarize([x / STEPS for x in times]).median for times in (a, b))
            print(
                f"| {net} | {name} | {two:.2f} | {one:.2f} | {ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f}) |",
                flush=True,
            )


if __name__ == "__main__":
    main()
