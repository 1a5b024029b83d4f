"""The data model of folding: layers own units, an axis is where they lie in an activation, a call is one operation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

__all__ = ["Axis", "Call", "Keep", "Layer", "absorbable", "bias_of"]


class Keep(Exception):
    """Raised by a rule: the units that reach this operation must stay; the message, if any, says why."""


@dataclass(frozen=True, eq=False)
class Axis:
    """The dimension of an activation along which the units of ``layer`` lie."""

    layer: Layer
    dim: int
    """Counted from the end, so that it holds with and without a batch dimension."""
    const: Tensor
    """Per position (those of a unit are adjacent) its value, NaN where that depends on the input; float64, CPU."""
    ndim: int | None
    batch: fx.Node | None = None
    """The model input whose dimension 0 is dimension 0 here, if known."""
    loose: bool = False
    """Flattened by an unknown factor, which the next operation that knows its own size settles."""

    @property
    def repeat(self) -> int:
        """Positions per unit."""
        return len(self.const) // self.layer.units

    def sized(self, size: int) -> Axis:
        """The same axis, known to have ``size`` positions."""
        factor, rest = divmod(size, len(self.const))
        if rest or factor == 0 or (factor > 1 and not self.loose):
            raise Keep(f"which takes {size} features")
        return replace(self, const=self.const.repeat_interleave(factor), loose=False)


class Layer:
    """A linear layer or ungrouped convolution: its units, who reads them, and which inputs it can do without."""

    def __init__(self, name: str, module: nn.Module, source: Axis | None) -> None:
        weight = module.get_parameter("weight").detach()
        self.name, self.source = name, source
        self.units = weight.shape[0]
        self.alive = torch.ones(self.units, dtype=torch.bool)
        self.pinned = ""
        self.readers: list[Layer] = []
        self.riders: list[tuple[str, int]] = []
        """Modules whose channels are these units, and how many channels each unit has there."""
        self._taps = weight.reshape(*weight.shape[:2], -1)
        self._reads = (self._taps != 0).any(2).cpu()
        const = torch.full(weight.shape[1:2], torch.nan, dtype=torch.float64) if source is None else source.const
        self.given = absorbable(module, const)
        """Inputs that are constants which the bias can take over; NaN for all others."""
        value = bias_of(module) + self.contribution(torch.ones_like(self.given, dtype=torch.bool))
        varies = (self._reads & self.given.isnan()).any(1)
        # Rounded as the folded bias will be, so that folding twice takes the same decisions.
        self.const = torch.where(varies, torch.nan, value.to(weight.dtype).double())

    @property
    def keep(self) -> Tensor:
        """The units that stay: those alive, or else one, because torch layers need a width of at least 1."""
        first = torch.arange(self.units) == 0
        return self.alive if self.alive.any() else first

    def contribution(self, positions: Tensor) -> Tensor:
        """What those of the given inputs that are at ``positions`` add to every unit."""
        chosen = positions & (self.given.nan_to_num() != 0)
        weight = self._taps[:, chosen.to(self._taps.device)].double().sum(2).cpu()
        return weight @ self.given[chosen]

    def needed(self) -> Tensor:
        """The input positions that living units read and the bias cannot take over."""
        return self._reads[self.alive].any(0) & self.given.isnan()


@dataclass
class Call:
    """One node of the graph, as a rule sees it; rules run only if ``inputs`` is not empty or they make a layer."""

    node: fx.Node
    name: str
    module: nn.Module | None
    inputs: list[Axis]

    def only(self) -> Axis:
        """The axis of the one tensor this operation reads."""
        if len(self.node.all_input_nodes) != 1:
            raise Keep("together with another tensor")
        return self.inputs[0]

    def option(self, name: str, position: int, default: Any = None) -> Any:
        """A setting of the operation: an attribute of the module, or an argument of the function or method."""
        if self.module is not None:
            return getattr(self.module, name, default)
        args = self.node.args
        return self.node.kwargs.get(name, args[position] if len(args) > position else default)

    def pin(self, why: Keep) -> None:
        """Let the layers whose units reach this operation keep their shape."""
        used = f"output is used by `{self.name}`" + (f", {why}" if str(why) else "")
        for axis in self.inputs:
            axis.layer.pinned = axis.layer.pinned or ("is the model's output" if self.node.op == "output" else used)


def bias_of(module: nn.Module) -> Tensor:
    """The bias, or zeros, as float64 on the CPU."""
    bias, weight = module._parameters.get("bias"), module.get_parameter("weight")
    return torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias.detach().double().cpu()


def absorbable(module: nn.Module, const: Tensor) -> Tensor:
    """Those constants that a bias can replace, NaN elsewhere: under zero padding the border would need another bias."""
    padding: Any = getattr(module, "padding", ())
    if isinstance(padding, str):
        padding = [k - 1 for k in getattr(module, "kernel_size", ()) if padding == "same"]
    padded = getattr(module, "padding_mode", "zeros") == "zeros" and any(padding)
    return torch.where(const.isfinite() & ((const == 0) | (not padded)), const, torch.nan)
