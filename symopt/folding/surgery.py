"""Cut layers to size.  Works on any module, constrained or not; deciding what to cut is not done here."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from symopt.folding.analysis import FoldPlan

__all__ = ["carry_out", "cut_to", "sizes_of"]

_OUT = ("out_features", "out_channels", "num_features", "num_parameters")
_IN = ("in_features", "in_channels")


def sizes_of(module: nn.Module) -> dict[str, int]:
    """The attributes of a layer that fix the shapes of its parameters, by their own names."""
    sizes = {key: vars(module)[key] for key in (*_IN, *_OUT, "groups") if isinstance(vars(module).get(key), int)}
    return sizes | ({"bias": module._parameters["bias"] is not None} if sizes and "bias" in module._parameters else {})


def carry_out(plan: FoldPlan, small: nn.Module) -> None:
    """Cut every layer of ``small``, and the modules with parameters per unit, to the units that ``plan`` keeps."""
    for layer in plan.layers:
        module, source = small.get_submodule(layer.name), layer.source
        keep = None if source is None else source.layer.keep.repeat_interleave(source.repeat)
        extra = None if keep is None else layer.contribution(~keep)[layer.keep]
        _shrink(module, layer.keep.nonzero().squeeze(1), None if keep is None else keep.nonzero().squeeze(1))
        if extra is not None and extra.any():
            _add_to_bias(module, extra)
        for name, repeat in layer.channelwise:
            _shrink(small.get_submodule(name), layer.keep.repeat_interleave(repeat).nonzero().squeeze(1), None)


def cut_to(module: nn.Module, sizes: Mapping[str, int]) -> None:
    """Cut a layer to ``sizes``; the first outputs and inputs stay."""
    depthwise = sizes.get("groups", 1) > 1
    rows = next(torch.arange(sizes[key]) for key in _OUT if key in sizes)
    cols = next((torch.arange(sizes[key]) for key in _IN if key in sizes and not depthwise), None)
    _shrink(module, rows, cols)
    for key in sizes.keys() - {"bias"}:
        setattr(module, key, sizes[key])
    if sizes.get("bias") and module._parameters["bias"] is None:
        _add_to_bias(module, torch.zeros(len(rows)))


def _shrink(module: nn.Module, rows: Tensor, cols: Tensor | None) -> None:
    """Keep ``rows`` of every parameter and buffer of ``module``, and of its weight the inputs ``cols``."""

    def cut(name: str, old: Tensor) -> Tensor:
        new = old.detach()[rows.to(old.device)]
        return new if name != "weight" or cols is None else new[:, cols.to(old.device)].contiguous()

    for name, p in module._parameters.items():
        if p is not None:
            module._parameters[name] = nn.Parameter(cut(name, p), requires_grad=p.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None and buffer.dim() > 0:
            module._buffers[name] = cut(name, buffer)
    sizes = sizes_of(module)
    new_sizes = {key: len(rows) for key in _OUT} | {key: len(cols) for key in _IN if cols is not None}
    if sizes.get("groups", 1) > 1:
        new_sizes |= dict.fromkeys(("in_channels", "groups"), len(rows) * sizes["groups"] // sizes["out_channels"])
    for key in sizes.keys() & new_sizes.keys():
        setattr(module, key, new_sizes[key])


def _add_to_bias(module: nn.Module, extra: Tensor) -> None:
    weight, bias = module.get_parameter("weight"), module._parameters["bias"]
    total = extra if bias is None else bias.detach().double().cpu() + extra
    wants_grad = weight.requires_grad if bias is None else bias.requires_grad
    module._parameters["bias"] = nn.Parameter(total.to(weight), requires_grad=wants_grad)
