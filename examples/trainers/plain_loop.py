"""A plain loop: accumulation, clipping, mixed precision, checkpoints that a crash cannot spoil."""

import tempfile
from pathlib import Path

import torch
from atomic_save import load, save
from torch import nn

import symopt


def main(folder: Path, steps: int = 100, stop: int | None = None) -> nn.Module:
    """Train for ``steps`` in all, from the checkpoint in ``folder`` if there is one; ``stop`` plays the crash."""
    torch.manual_seed(0)
    x, net = torch.randn(64, 20), nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 2))
    symopt.constrain(net, {"0.weight": symopt.GroupSparse("out", keep=0.25)})
    opt, scaler = symopt.AdamW(net, lr=0.02, total_steps=steps), torch.amp.GradScaler("cpu")
    load(folder / "last.pt", net=net, opt=opt, scaler=scaler)
    taken = int(opt.state.get(net[0].weight, {}).get("progress", 0))
    for step in range(taken, steps if stop is None else stop):
        for half in x.chunk(2):
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(net(half).float(), (half[:, 0] > 0).long()) / 2
            scaler.scale(loss).backward()
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        if step % 10 == 9:
            save(folder / "last.pt", net=net, opt=opt, scaler=scaler)
    return net


if __name__ == "__main__":
    print(symopt.fold(main(Path(tempfile.mkdtemp()))))
