"""Accelerate: prepare the optimizer like any other; its checkpoints hold the schedule."""

import torch
from accelerate import Accelerator
from torch import nn

import symopt


def main(folder, steps=100, first=0, stop=None):
    """Train for ``steps`` in all; ``stop`` earlier and save, and go on from there with ``first``."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    x, net = torch.randn(64, 20), nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 1))
    symopt.constrain(net, {"0.weight": symopt.Sparse(density=0.1)})
    model, opt = accelerator.prepare(net, symopt.AdamW(net, lr=0.02, total_steps=steps))
    if first:
        accelerator.load_state(folder)
    for _ in range(first, stop or steps):
        for half in x.chunk(2):
            with accelerator.accumulate(model):
                accelerator.backward((model(half)[:, 0] - half[:, 0]).square().mean())
                opt.step()
                opt.zero_grad()
    if stop:
        accelerator.save_state(folder)
    return net


if __name__ == "__main__":
    print(symopt.report(main("out/accelerate")))
