"""The sizes of a folded network as plain data, and how to give them to a network that is built anew."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TypedDict, TypeVar

from torch import nn

from symopt.folding.surgery import cut_to, sizes_of
from symopt.folding.thin import make_thin
from symopt.module.constrain import release

__all__ = ["FoldConfig", "LayerSizes", "config_of", "resize"]

M = TypeVar("M", bound=nn.Module)


class LayerSizes(TypedDict):
    """One layer of a folded network."""

    type: str
    before: dict[str, int]
    after: dict[str, int]


class FoldConfig(TypedDict, total=False):
    """The attribute ``fold_config`` of a folded network."""

    layers: dict[str, LayerSizes]
    parameters: dict[str, int]
    kept: list[str]
    cut: dict[str, int]
    running_mean: dict[str, int]
    ranks: dict[str, int]


def resize(module: M, config: Mapping[str, object]) -> M:
    """Give a freshly built module the layer sizes of a folded one, so that its ``state_dict`` loads.

    Works in place and returns ``module``, without constraints.  Weights are cut, not chosen: load a ``state_dict``
    next.

    Args:
        module: the architecture that was folded, in its original size; may be on the meta device.
        config: ``fold_config`` of the folded module, perhaps by way of JSON.

    Raises:
        TypeError: if ``module`` is no Module or ``config`` no mapping.
        ValueError: if ``config`` is no ``fold_config``, or of another architecture; ``module`` is then unchanged.

    Example:
        >>> import torch
        >>> from symopt import fold, resize
        >>> build = lambda: torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> net = build()
        >>> with torch.no_grad():
        ...     _ = net[0].weight[1].zero_()
        >>> small = fold(net)
        >>> resize(build(), small.fold_config).load_state_dict(small.state_dict())
        <All keys matched successfully>
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"resize: module must be a torch.nn.Module, got {type(module).__name__}")
    if not isinstance(config, Mapping):
        raise TypeError(f"resize: config must be the dict fold_config of a folded module, got {type(config).__name__}")
    layers, ranks = config.get("layers"), config.get("ranks", {})
    if not isinstance(layers, Mapping) or not isinstance(ranks, Mapping):
        raise ValueError("resize: config has no dict 'layers'; pass the attribute fold_config of a folded module")
    modules = dict(module.named_modules())
    for name, entry in layers.items():
        _check_entry(name, entry, modules.get(name))
    for name, rank in ranks.items():
        if name not in layers or isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"resize: config['ranks'][{name!r}] must be the rank of one of its layers, got {rank!r}")
    for name, entry in layers.items():
        if entry["before"] != entry["after"]:
            cut_to(modules[name], entry["after"])
    for name, rank in ranks.items():
        make_thin(module, name, rank)
    vars(release(module))["fold_config"] = copy.deepcopy(dict(config))
    return module


def config_of(model: nn.Module, small: nn.Module, parameters: int, earlier: FoldConfig | None) -> FoldConfig:
    """The sizes of ``model`` before folding and of ``small`` after it.

    Args:
        model: before.
        small: after.
        parameters: their number before.
        earlier: the configuration of ``model`` itself, if that is a folded one.
    """
    before = {name: sizes_of(m) for name, m in model.named_modules()}
    layers: dict[str, LayerSizes] = {
        name: {"type": type(m).__name__, "before": before[name], "after": sizes_of(m)}
        for name, m in small.named_modules()
        if sizes_of(m)
    }
    numbers = {"before": parameters, "after": sum(p.numel() for p in small.parameters())}
    if earlier and {n: e["after"] for n, e in earlier["layers"].items()} == {n: before[n] for n in layers}:
        # The configuration still starts from the architecture as it is built.
        numbers["before"] = earlier["parameters"]["before"]
        for name, entry in layers.items():
            entry["before"] = dict(earlier["layers"][name]["before"])
    return {"layers": layers, "parameters": numbers}


def _check_entry(name: str, entry: object, module: nn.Module | None) -> None:
    if module is None:
        raise ValueError(
            f"resize: module lacks layer {name!r}, which config names; build the architecture of fold's model"
        )
    if not isinstance(entry, Mapping) or not all(isinstance(entry.get(key), Mapping) for key in ("before", "after")):
        raise ValueError(f"resize: config['layers'][{name!r}] must have 'type', 'before' and 'after'")
    if entry.get("type") != type(module).__name__:
        raise ValueError(f"resize: layer {name!r} is a {type(module).__name__}, in config it is a {entry.get('type')}")
    before, after = entry["before"], entry["after"]
    if before != sizes_of(module):
        raise ValueError(
            f"resize: layer {name!r} has sizes {sizes_of(module)}, but config starts from {dict(before)}; pass the "
            "architecture as it was before fold"
        )
    if after.keys() != before.keys() or not all(
        type(n) is type(before[key]) and (isinstance(n, bool) or 1 <= n <= before[key]) for key, n in after.items()
    ):
        raise ValueError(f"resize: config shrinks layer {name!r} from {dict(before)} to {dict(after)}: impossible")
