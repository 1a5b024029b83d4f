"""Pictures of training: how the weights thin out, and which ones are left."""

from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
from torch import Tensor, nn

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # the backend without a screen must be chosen first


@dataclass
class Run:
    """A trained network and what was seen of it after every epoch."""

    name: str
    net: nn.Module
    accuracy: list[float] = field(default_factory=list)
    alive: list[float] = field(default_factory=list)


def matrices(net: nn.Module) -> list[Tensor]:
    """Weight matrices of the linear layers, first to last."""
    return [module.weight.detach() for module in net.modules() if isinstance(module, nn.Linear)]


def fields(weight: Tensor, side: int = 6) -> Tensor:
    """Tile the incoming weights of the strongest neurons, each a 28 × 28 image, into one square."""
    strongest = weight.norm(dim=1).topk(side * side).indices
    tiles = nn.functional.pad(weight[strongest].view(side, side, 28, 28), (1, 1, 1, 1))
    return tiles.permute(0, 2, 1, 3).reshape(30 * side, 30 * side)


def draw(dense: Run, sparse: Run, few: Run, path: Path) -> None:
    """Draw the training curves and what is left of the first two layers."""
    figure, axes = plt.subplot_mosaic(
        [["alive", "correct", "pixels", "fields"], ["sparse 0", "sparse 1", "few 0", "few 1"]],
        figsize=(16, 8),
        layout="constrained",
    )
    for run, colour in ((dense, "0.6"), (sparse, "tab:blue"), (few, "tab:orange")):
        epochs = range(1, len(run.alive) + 1)
        axes["alive"].plot(epochs, [100 * share for share in run.alive], color=colour, label=run.name)
        axes["correct"].plot(epochs, [100 * share for share in run.accuracy], color=colour, label=run.name)
    axes["alive"].set(title="weights alive, %", xlabel="epoch", yscale="log", ylim=(None, 130))
    axes["correct"].set(title="test accuracy, %", xlabel="epoch")
    axes["alive"].legend()

    image = axes["pixels"].imshow((matrices(sparse.net)[0] != 0).sum(0).view(28, 28), cmap="viridis", vmin=0)
    axes["pixels"].set(title="sparse: weights left per pixel", xticks=[], yticks=[])
    figure.colorbar(image, ax=axes["pixels"], shrink=0.8)
    tiles = fields(matrices(few.net)[0])
    limit = tiles.abs().max().item()
    axes["fields"].imshow(tiles, cmap="RdBu", vmin=-limit, vmax=limit)
    axes["fields"].set(title="few neurons: strongest of layer 1", xticks=[], yticks=[])

    for key, run in (("sparse", sparse), ("few", few)):
        for layer, weight in enumerate(matrices(run.net)[:2]):
            mask, (rows, columns) = (weight != 0).float(), weight.shape
            title = f"{run.name}: layer {layer + 1}, {rows} × {columns}, {mask.mean():.1%} alive"
            axes[f"{key} {layer}"].imshow(mask, cmap="Greys", aspect="auto", vmin=0, vmax=1)
            axes[f"{key} {layer}"].set_title(title, fontsize="medium")
            axes[f"{key} {layer}"].set(xlabel="input", ylabel="neuron")
    figure.savefig(path, dpi=110)
    plt.close(figure)
