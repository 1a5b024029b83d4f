"""What a budget adds to a whole training step: one network with ``Sparse(strength=)`` and with ``Sparse(density=)``.

    python -m benchmarks.studies.budget_cost [--nets transformer] [--trainings 7]

Both train in turns, 20 steps each.  "until the cut": with over without, of such blocks while the budget is imposed, the
first one left out; "whole training": of the sums, the first block, the cut and what follows it included.  Medians and
quartiles.
"""

from __future__ import annotations

import statistics
import warnings
from typing import Any

import symopt
from benchmarks import timing
from benchmarks.steps.training import NETS, Trainer
from benchmarks.studies import program
from symopt.constraints.budget import BudgetPlan

BUDGETS: dict[str, dict[str, Any]] = {
    "density 5 %, per tensor": {"density": 0.05},
    "density 5 %, global": {"density": 0.05, "scope": "global"},
    "2:4": {"pattern": "2:4"},
}
STEPS, BLOCKS = 20, 30
"""To a block, one selection being among them, and blocks to a training."""


class _Scheduled(Trainer):
    def __init__(self, net: str, constraint: symopt.Constraint) -> None:
        super().__init__("symopt", NETS[net], {"fused": True})
        names = tuple(n for n in symopt.constraints(self.net) if self.net.get_parameter(n).shape[1] % 4 == 0)
        symopt.constrain(symopt.release(self.net), {names: constraint})
        self.opt = symopt.AdamW(self.net, lr=1e-3, fused=True, total_steps=STEPS * BLOCKS)

    def steps(self) -> None:
        for _ in range(STEPS):
            self.backward()
            self.opt.step()


def training(net: str, options: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Milliseconds of each block of one training with a budget and one without, in turns."""
    ours, plain = _Scheduled(net, symopt.Sparse(**options)), _Scheduled(net, symopt.Sparse(strength=0.1))
    return timing.interleave((lambda: None, ours.steps), (lambda: None, plain.steps), BLOCKS, float("inf"), warm=0)


def main() -> None:
    parser = program(__spec__, __doc__)
    parser.add_argument("--nets", default="MLP", help="a part of their names")
    parser.add_argument("--trainings", type=int, default=7)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    print("| network | budget | without, ms | until the cut | whole training |\n|---|---|---|---|---|")
    for net in (name for name in NETS if args.nets in name):
        for name, options in BUDGETS.items():
            training(net, options)  # to warm up
            runs = [training(net, options) for _ in range(args.trainings)]
            cut = int(BudgetPlan().commit * BLOCKS)
            blocks = [x / y for a, b in runs for x, y in zip(a[1:cut], b[1:cut], strict=True)]
            early, whole = timing.summarize(blocks), timing.summarize([sum(a) / sum(b) for a, b in runs])
            each = statistics.median(time / STEPS for _, b in runs for time in b)
            cells = [f"{x.median:.2f} ({x.low:.2f}-{x.high:.2f})" for x in (early, whole)]
            print(f"| {net} | {name} | {each:.2f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
