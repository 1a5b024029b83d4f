"""The data model of folding: the units of a layer, the axis of an activation they lie along, a call of an operation."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

__all__ = ["Axis", "Call", "KeepShape", "Layer", "bias_of", "foldable_constants"]


class KeepShape(Exception):
    """Raised by a rule: the layers whose units this operation reads keep their shape; the message, if any, says why."""


@dataclass(frozen=True, eq=False)
class Axis:
    """The dimension of an activation along which the units of ``layer`` lie."""

    layer: Layer
    dim: int
    """Counted from the end, so that it holds with and without a batch dimension."""
    const: Tensor
    """Per position (those of a unit are adjacent) its value, NaN where that depends on the input; float64, CPU."""
    ndim: int | None
    """Dimensions of the activation; None if unknown."""
    batch: fx.Node | None = None
    """The model input whose dimension 0 is dimension 0 here, if known."""
    size_unknown: bool = False
    """Whether a flatten multiplied the positions by a factor that is unknown until an operation states its size."""

    @property
    def repeat(self) -> int:
        """Positions per unit."""
        return len(self.const) // self.layer.units

    def sized(self, size: int) -> Axis:
        """The same axis, known to have ``size`` positions."""
        factor, rest = divmod(size, len(self.const))
        if rest or factor == 0 or (factor > 1 and not self.size_unknown):
            raise KeepShape(f"which takes {size} features")
        return replace(self, const=self.const.repeat_interleave(factor), size_unknown=False)


class Layer:
    """A linear layer or ungrouped convolution: its units, the layers that read them, the inputs it does not need."""

    def __init__(self, name: str, module: nn.Module, source: Axis | None) -> None:
        weight = module.get_parameter("weight").detach()
        self.name, self.source = name, source
        self.units = weight.shape[0]
        self.used = torch.ones(self.units, dtype=torch.bool)
        """Which units some reader needs."""
        self.pinned = ""
        """Why all units stay; empty if they need not."""
        self.readers: list[Layer] = []
        self.channelwise: list[tuple[str, int]] = []
        """Modules with parameters per channel of the output, and how many channels of theirs a unit is."""
        self._weight = weight.reshape(*weight.shape[:2], -1)
        """Outputs x inputs x kernel positions."""
        self._reads = (self._weight != 0).any(2).cpu()
        const = torch.full(weight.shape[1:2], torch.nan, dtype=torch.float64) if source is None else source.const
        self.given = foldable_constants(module, const)
        """Per input its value if that is a constant which the bias can replace; NaN for all others."""
        value = bias_of(module) + self.contribution(torch.ones_like(self.given, dtype=torch.bool))
        varies = (self._reads & self.given.isnan()).any(1)
        # Rounded as the new bias will be, so that folding twice takes the same decisions.
        self.const = torch.where(varies, torch.nan, value.to(weight.dtype).double())

    @property
    def keep(self) -> Tensor:
        """The units that stay: those in use, or else one, because torch layers need a width of at least 1."""
        first = torch.arange(self.units) == 0
        return self.used if self.used.any() else first

    def contribution(self, positions: Tensor) -> Tensor:
        """What the constant inputs at ``positions`` add to every unit."""
        chosen = positions & (self.given.nan_to_num() != 0)
        weight = self._weight[:, chosen.to(self._weight.device)].double().sum(2).cpu()
        return weight @ self.given[chosen]

    def needed(self) -> Tensor:
        """The input positions that units in use read and that the bias cannot replace."""
        return self._reads[self.used].any(0) & self.given.isnan()


@dataclass
class Call:
    """One node of the graph.  Its rule runs if ``inputs`` is not empty or the rule makes a layer."""

    node: fx.Node
    name: str
    module: nn.Module | None
    inputs: list[Axis]

    def only(self) -> Axis:
        """The axis of the one tensor this operation reads."""
        if len(self.node.all_input_nodes) != 1:
            raise KeepShape("together with another tensor")
        return self.inputs[0]

    def option(self, name: str, position: int, default: object = None) -> object:
        """A setting of the operation: an attribute of the module, or an argument of the function or method."""
        if self.module is not None:
            return getattr(self.module, name, default)
        args = self.node.args
        return self.node.kwargs.get(name, args[position] if len(args) > position else default)

    def dimension(self, name: str, position: int, default: int) -> int:
        """A setting that is the number of a dimension."""
        value = self.option(name, position, default)
        if not isinstance(value, int):
            raise KeepShape("along a dimension that forward computes")
        return value

    def pin(self, why: KeepShape) -> None:
        """Keep the shape of every layer whose units this operation reads."""
        used = f"output is used by `{self.name}`" + (f", {why}" if str(why) else "")
        for axis in self.inputs:
            axis.layer.pinned = axis.layer.pinned or ("is the model's output" if self.node.op == "output" else used)


def bias_of(module: nn.Module) -> Tensor:
    """The bias, or zeros, as float64 on the CPU."""
    bias, weight = module._parameters.get("bias"), module.get_parameter("weight")
    return torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias.detach().double().cpu()


def foldable_constants(module: nn.Module, const: Tensor) -> Tensor:
    """Those constants that a bias can replace, NaN elsewhere: under zero padding the border would need another bias."""
    padding = getattr(module, "padding", ())
    if isinstance(padding, str):
        padding = [k - 1 for k in getattr(module, "kernel_size", ()) if padding == "same"]
    padded = getattr(module, "padding_mode", "zeros") == "zeros" and any(padding)
    return torch.where(const.isfinite() & ((const == 0) | (not padded)), const, torch.nan)
