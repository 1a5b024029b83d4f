"""Two thin layers in place of one whose weight has low rank, where they have fewer parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from symopt.folding.analysis import Opaque, obstacles_of, trace

__all__ = ["Thin", "make_thin", "split_layers"]

Thin = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Weight -> U (m x r) and V (n x r) with ``weight.flatten(1) = U V^T``."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def split_layers(model: nn.Module, weights: Mapping[str, Thin]) -> tuple[dict[str, int], list[str]]:
    """Replace, in place, what can be replaced; returns the rank of each new pair and why others stayed one layer.

    Args:
        model: a plain module.
        weights: parameter name -> how it factors.
    """
    if not weights:
        return {}, []
    try:
        obstacles = obstacles_of(trace(model))
    except Opaque as opaque:
        return {}, [f"{name.rpartition('.')[0] or 'model'}: {opaque}, not split in two" for name in weights]
    ranks: dict[str, int] = {}
    kept: list[str] = []
    for full, thin in weights.items():
        name, _, own = full.rpartition(".")
        layer = model.get_submodule(name)
        why = "is the model itself" if not name else obstacles.get(name) or _unsuitable(layer, own)
        if why is not None:
            kept.append(f"{name or 'model'}: {why}, not split in two")
            continue
        weight = layer.get_parameter(own).detach()
        u, v = thin(weight)
        rank, size = u.shape[1], u.shape[0] + v.shape[0]
        if rank == 0 or rank * size >= weight.numel():
            kept.append(f"{name}: two layers of rank {rank} would have no fewer parameters than one, not split in two")
            continue
        make_thin(model, name, rank)
        pair = model.get_submodule(name)
        with torch.no_grad():
            pair.get_parameter("0.weight").copy_(v.mT.reshape(pair.get_parameter("0.weight").shape))
            pair.get_parameter("1.weight").copy_(u.reshape(pair.get_parameter("1.weight").shape))
            if layer.bias is not None:
                pair.get_parameter("1.bias").copy_(layer.get_parameter("bias"))
        ranks[name] = rank
    return ranks, kept


def make_thin(model: nn.Module, name: str, rank: int) -> None:
    """Put an uninitialised pair of layers of this rank in the place of layer ``name``."""
    layer = model.get_submodule(name)
    weight = layer.get_parameter("weight")
    at, kind = weight.device, weight.dtype
    bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        pair = nn.Sequential(
            nn.Linear(layer.in_features, rank, bias=False, device=at, dtype=kind),
            nn.Linear(rank, layer.out_features, bias=bias, device=at, dtype=kind),
        )
    else:
        assert isinstance(layer, _CONVOLUTIONS)
        convolution: Callable[..., nn.Module] = type(layer)
        shape = {key: getattr(layer, key) for key in ("stride", "padding", "dilation", "padding_mode")}
        pair = nn.Sequential(
            convolution(layer.in_channels, rank, layer.kernel_size, bias=False, device=at, dtype=kind, **shape),
            convolution(rank, layer.out_channels, 1, bias=bias, device=at, dtype=kind),
        )
    for p in pair.parameters():
        p.requires_grad_(weight.requires_grad)
    if bias:
        pair.get_parameter("1.bias").requires_grad_(layer.get_parameter("bias").requires_grad)
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent)._modules[child] = pair.train(layer.training)


def _unsuitable(layer: nn.Module, own: str) -> str | None:
    if own != "weight" or type(layer) not in (nn.Linear, *_CONVOLUTIONS):
        return f"{own!r} of {type(layer).__name__} is not the weight of a Linear or Conv"
    if getattr(layer, "groups", 1) != 1:
        return "is a grouped convolution"
    return None
