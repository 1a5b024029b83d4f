"""Accelerate: build Anneal on the optimizer itself, then prepare; register it, and checkpoints hold it too."""

import torch
from accelerate import Accelerator
from torch import nn

import symopt


def main(folder, steps=100, stop=None, resume=False):
    """Train for ``steps`` in all; ``stop`` earlier and save, or ``resume`` from there."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    x, net = torch.randn(64, 20), nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 1))
    symopt.constrain(net, {"0.weight": symopt.Sparse(density=0.1)})
    opt = symopt.AdamW(net, lr=0.02)
    anneal = symopt.Anneal(opt, total_steps=steps)
    model, prepared = accelerator.prepare(net, opt)
    accelerator.register_for_checkpointing(anneal)
    if resume:
        accelerator.load_state(folder)
    while anneal.last_step < (stop or steps):
        for half in x.chunk(2):
            with accelerator.accumulate(model):
                accelerator.backward((model(half)[:, 0] - half[:, 0]).square().mean())
                prepared.step()
                prepared.zero_grad()
            if accelerator.sync_gradients:
                anneal.step()
    if stop:
        accelerator.save_state(folder)
    return net


if __name__ == "__main__":
    print(symopt.report(main("out/accelerate")))
