"""Cost of the step of a tie, against torch's fused AdamW on the same two tensors without a constraint.

    python -m benchmarks.plane_step [--size 1024]

Prints nothing unless the tied weights are equal bit for bit after the steps.  "on the way": the weights differ; "on the
plane": they are equal.
"""

from __future__ import annotations

import argparse
import time

import torch

import symopt


def build(size: int, *, equal: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(size, size, bias=False), torch.nn.Linear(size, size, bias=False))
    if equal:
        net[1].load_state_dict(net[0].state_dict())
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    return net


def best(step: object, rounds: int = 7, repeats: int = 5) -> float:
    """Milliseconds per step, best of ``rounds``."""
    assert callable(step)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(repeats):
            step()
        times.append((time.perf_counter() - start) / repeats)
    return 1000 * min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024)
    size = parser.parse_args().size
    plain = torch.optim.AdamW(build(size, equal=False).parameters(), lr=1e-3, fused=True)
    rows = []
    for mode in ("joint", "elementwise"):
        for equal in (False, True):
            net = symopt.constrain(build(size, equal=equal), {"*.weight": symopt.Tied(mode=mode)})
            opt = symopt.AdamW(net, lr=1e-3)
            mine, theirs = best(opt.step), best(plain.step)
            if equal and not torch.equal(net[0].weight, net[1].weight):
                raise SystemExit("tied weights that were equal are not; no timing is worth printing")
            where = "on the plane" if equal else "on the way"
            rows.append(f"| {mode} | {where} | {mine:.2f} | {theirs:.2f} | {mine / theirs:.2f} |")
    print(f"two {size} x {size} fp32 weights, {torch.get_num_threads()} threads\n")
    print("| Tied | | symopt, ms | torch fused, no constraint, ms | ratio |\n|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
