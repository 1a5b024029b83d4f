"""Lightning: return the optimizer with the number of steps that Lightning knows; log zeros like any metric."""

import lightning
import torch
from torch import nn

import symopt


class Net(lightning.LightningModule):
    """Reads one of 20 numbers, with a quarter of its hidden neurons."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 1))
        symopt.constrain(self, {"net.0.weight": symopt.GroupSparse("out", keep=0.25)})

    def training_step(self, batch, number):
        self.log("zeros", float((self.net[0].weight == 0).sum()))
        return (self.net(batch)[:, 0] - batch[:, 0]).square().mean()

    def configure_optimizers(self):
        return symopt.AdamW(self, lr=0.02, total_steps=self.trainer.estimated_stepping_batches)


def main(folder, steps=100, resume=None, **options):
    """Train for ``steps`` in all with clipping and checkpoints; ``resume`` from one of them."""
    keep = lightning.pytorch.callbacks.ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=40)
    trainer = lightning.Trainer("cpu", max_steps=steps, gradient_clip_val=1.0, callbacks=[keep], **options)
    x = torch.randn(64, 20, generator=torch.Generator().manual_seed(0))
    trainer.fit(Net(), torch.utils.data.DataLoader(list(x), batch_size=8), ckpt_path=resume)
    return trainer


if __name__ == "__main__":
    print(symopt.report(main("out/lightning").lightning_module))
