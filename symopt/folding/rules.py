"""What each operation of a network does to the units of the layer before it; a new operation is one line in RULES.

A rule returns the axis of a call's output, or None if no units lie along that; or it raises :class:`KeepShape`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from symopt.folding.units import Axis, Call, KeepShape, Layer, bias_of, foldable_constants

__all__ = ["IN_PLACE", "RULES", "SIZED", "SOURCES", "VIEWS", "Rule", "rule_of", "rule_of_module"]

Rule = Callable[[Call], "Axis | None"]


# -- layers, and modules with parameters per channel -------------------------------------------------------------------


def _layer(call: Call) -> Axis | None:
    assert call.module is not None
    weight = call.module.get_parameter("weight")
    dim = 1 - weight.dim()
    if getattr(call.module, "groups", 1) > 1:
        return _depthwise(call, dim)
    source, batch = None, None
    if call.inputs:
        try:
            source = call.only()
            if source.dim != dim:
                raise KeepShape("along another dimension")
            source, batch = source.sized(weight.shape[1]), source.batch
        except KeepShape as why:
            call.pin(why)
            source = None
    elif call.node.args and isinstance(first := call.node.args[0], fx.Node) and first.op == "placeholder":
        batch = first
    layer = Layer(call.name, call.module, source)
    if source is not None:
        source.layer.readers.append(layer)
    # Without shapes, a convolution is assumed to have a batch dimension; a linear layer may have any dimensions.
    ndim = source.ndim if source is not None else weight.dim() if weight.dim() > 2 else None
    return Axis(layer, dim, layer.const, ndim, batch)


def _depthwise(call: Call, dim: int) -> Axis | None:
    assert call.module is not None
    weight = call.module.get_parameter("weight")
    groups, fan_out = getattr(call.module, "groups", 1), len(weight)
    if not call.inputs:
        return None
    axis = call.only()
    if axis.dim != dim:
        raise KeepShape("along another dimension")
    axis = axis.sized(groups)
    given = foldable_constants(call.module, axis.const).repeat_interleave(fan_out // len(axis.const))
    taps = weight.detach().flatten(1)
    dead = (taps == 0).all(1).cpu()
    const = bias_of(call.module) + torch.where(dead, 0.0, given * taps.double().sum(1).cpu())
    return _channelwise(call, replace(axis, const=const))


def _channelwise(call: Call, axis: Axis) -> Axis:
    """The module of ``call`` has parameters per channel, which go with the units."""
    axis.layer.channelwise.append((call.name, axis.repeat))
    return axis


def _channels(call: Call, size: int) -> Axis:
    """The axis, if it is dimension 1, where normalisation and PReLU have their channels."""
    axis = call.only()
    # Without shapes, a norm with as many channels as the layer has units is assumed to see two dimensions.
    if axis.dim != 1 - (axis.ndim or 2):
        raise KeepShape("along another dimension")
    return axis.sized(size)


def _norm(call: Call) -> Axis:
    norm = call.module
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    axis = _channels(call, norm.num_features)
    none = torch.zeros(norm.num_features, dtype=torch.float64)
    mean, var, weight, bias = (
        none if t is None else t.detach().double().cpu()
        for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    if norm.running_mean is None or norm.running_var is None:
        const = axis.const * 0  # normalised by the batch, of which it is the mean
    else:
        const = (axis.const - mean) / (var + norm.eps).sqrt()
    if norm.weight is not None:
        const = torch.where(weight == 0, 0.0, const * weight)
    return _channelwise(call, replace(axis, const=const + bias))


def _prelu(call: Call) -> Axis:
    module = call.module
    assert isinstance(module, nn.PReLU)
    slope = module.weight.detach().double().cpu()
    axis = _channels(call, module.num_parameters) if module.num_parameters > 1 else call.only()
    axis = replace(axis, const=torch.where(axis.const < 0, axis.const * slope, axis.const))
    return _channelwise(call, axis) if module.num_parameters > 1 else axis


# -- operations without parameters -------------------------------------------------------------------------------------


def _same(call: Call) -> Axis:
    return call.only()


def _elementwise(call: Call) -> Axis:
    node, first = call.node, call.inputs[0]
    where = {(axis.layer, axis.dim, len(axis.const), axis.size_unknown) for axis in call.inputs}
    if len(where) > 1 or len(call.inputs) != len(node.all_input_nodes):
        raise KeepShape
    values = dict(zip(node.all_input_nodes, (axis.const for axis in call.inputs), strict=True))
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n].clone())
    target = call.module or (getattr(torch.Tensor, node.target) if isinstance(node.target, str) else node.target)
    assert callable(target)
    with torch.no_grad():
        const = target(*args, **kwargs)
    if not isinstance(const, Tensor) or const.shape != first.const.shape:
        raise KeepShape
    # Not every function returns NaN for NaN (threshold does not), and no bias can be infinite.
    known = torch.stack([value.isfinite() for value in (const, *values.values())]).all(0)
    return replace(first, const=torch.where(known, const.double(), torch.nan))


def _dropout(call: Call) -> Axis:
    axis = call.only()
    return replace(axis, const=axis.const * torch.nan) if call.option("training", 2, True) else axis


def _window(dims: int, average: bool = False) -> Rule:
    """Pooling over the last ``dims`` dimensions."""

    def rule(call: Call) -> Axis:
        axis = call.only()
        if axis.dim >= -dims:
            raise KeepShape("along the same dimension")
        if call.option("return_indices", 99, False):
            raise KeepShape
        if not average:
            return axis
        padding, divisor = call.option("padding", 3, 0), call.option("divisor_override", 6)
        mixed = call.option("count_include_pad", 5, True) and padding != 0 and padding != (0,) * dims
        exact = torch.full_like(axis.const, not mixed and divisor is None).bool() | (axis.const == 0)
        return replace(axis, const=torch.where(exact, axis.const, torch.nan))

    return rule


def _from_end(dim: int, axis: Axis) -> int:
    if dim >= 0 and axis.ndim is None:
        raise KeepShape("along a dimension that is only known with example_inputs")
    return dim - (axis.ndim or 0) if dim >= 0 else dim


def _reduce(call: Call) -> Axis:
    axis, given, keep = call.only(), call.option("dim", 1), call.option("keepdim", 2, False)
    given = given if isinstance(given, (tuple, list)) else (given,)
    dims = {_from_end(d, axis) for d in given if isinstance(d, int)}
    if not dims or len(dims) < len(given) or min(dims) <= axis.dim:
        raise KeepShape
    dropped = 0 if keep else len(dims)
    return replace(axis, dim=axis.dim + dropped, ndim=axis.ndim and axis.ndim - dropped)


def _flattened(axis: Axis, start: int, end: int) -> Axis:
    if axis.dim == -1 and axis.ndim is None and (start, end) == (1, -1):
        # Either nothing happens, or the reader's size will not match.
        return replace(axis, ndim=2)
    start, end = _from_end(start, axis), _from_end(end, axis)
    if start < axis.dim or end != -1:
        raise KeepShape
    merged = -1 - start
    moved = replace(axis, dim=min(axis.dim + merged, -1), ndim=axis.ndim and axis.ndim - merged)
    return replace(moved, size_unknown=axis.size_unknown or (start == axis.dim and merged > 0))


def _flatten(call: Call) -> Axis:
    return _flattened(call.only(), call.dimension("start_dim", 1, 0), call.dimension("end_dim", 2, -1))


def _length_of(node: object) -> object:
    """The tensor whose size of dimension 0 is the value of ``node``; None if it is no such size."""
    if not isinstance(node, fx.Node):
        return None
    if node.op == "call_method" and node.target == "size":
        return node.args[0] if node.args[1:] == (0,) else None
    shape = node.args[0] if node.target is operator.getitem and node.args[1] == 0 else None
    return shape.args[0] if isinstance(shape, fx.Node) and _is_shape(shape) else None


def _is_shape(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target == "size" and len(node.args) + len(node.kwargs) == 1
    return node.target is getattr and node.args[1] == "shape"


def _view(call: Call) -> Axis:
    axis, (tensor, *shape) = call.inputs[0], call.node.args
    sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], Sequence) else shape
    if len(sizes) != 2 or sizes[1] != -1 or _length_of(sizes[0]) not in (tensor, axis.batch or tensor):
        raise KeepShape("which may fix a size")
    return _flattened(axis, 1, -1)


def _read(call: Call) -> None:
    """Attributes and sizes of a tensor: only the size of the batch dimension is sure not to change."""
    node = call.node
    harmless = node.target is getattr and node.args[1] in ("device", "dtype", "ndim", "requires_grad")
    lengths = _is_shape(node) and all(_length_of(user) is node.args[0] for user in node.users)
    if not (harmless or lengths or _length_of(node) is not None):
        raise KeepShape("which may read its size")


# -- the registry ------------------------------------------------------------------------------------------------------

RULES: dict[Hashable, Rule] = {
    **dict.fromkeys((nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d), _layer),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), _norm),
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.Identity), _same),
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, torch.dropout), _dropout),
    **dict.fromkeys((torch.mean, torch.amax, torch.amin, "mean", "amax", "amin"), _reduce),
    **dict.fromkeys((nn.Flatten, torch.flatten, "flatten"), _flatten),
    **dict.fromkeys((torch.reshape, "view", "reshape"), _view),
    **dict.fromkeys(("contiguous", "detach", "clone"), _same),
    **dict.fromkeys((getattr, "size"), _read),
    nn.PReLU: _prelu,
}
"""By module class, function, or name of a tensor method."""

for _dims in (1, 2, 3):
    for _kind in ("max", "adaptive_max", "avg", "adaptive_avg"):
        _rule = _window(_dims, average=_kind == "avg")
        RULES[getattr(nn, "".join(word.capitalize() for word in _kind.split("_")) + f"Pool{_dims}d")] = _rule
        for _space in (torch, F):
            if hasattr(_space, f"{_kind}_pool{_dims}d"):
                RULES[getattr(_space, f"{_kind}_pool{_dims}d")] = _rule

for _class in """ReLU ReLU6 LeakyReLU ELU SELU CELU GELU SiLU Mish Sigmoid LogSigmoid Tanh Softplus Softsign Softshrink
        Hardshrink Hardtanh Hardsigmoid Hardswish Tanhshrink Threshold""".split():
    RULES[getattr(nn, _class)] = _elementwise
for _name in """relu relu6 leaky_relu elu selu celu gelu silu mish sigmoid logsigmoid tanh softplus softsign softshrink
        hardshrink hardtanh hardsigmoid hardswish tanhshrink threshold exp expm1 log log1p sqrt rsqrt square abs neg sin
        cos erf pow clamp clip add sub mul div truediv maximum minimum""".split():
    for _name_or_in_place in (_name, f"{_name}_"):
        RULES[_name_or_in_place] = _elementwise
        for _space in (torch, F, operator):
            if hasattr(_space, _name_or_in_place):
                RULES[getattr(_space, _name_or_in_place)] = _elementwise

IN_PLACE = frozenset(
    getattr(operator, f"i{name}") for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
)
"""What augmented assignments call; functions and methods whose names end in an underscore are in place, too."""
RULES |= dict.fromkeys(IN_PLACE, _elementwise)
SOURCES = frozenset({_layer})
"""Rules of operations that start a new axis."""
SIZED = frozenset({_layer, _norm, _prelu})
"""Rules of modules that have parameters per unit."""
VIEWS = frozenset({_same, _flatten, _view, _read, _dropout})
"""Rules of operations whose output may share memory with their input."""


def rule_of_module(module: nn.Module) -> Rule | None:
    """The rule of the class whose ``forward`` the module runs."""
    known = next((cls for cls in type(module).__mro__ if cls in RULES), None)
    return RULES[known] if known is not None and type(module).forward is getattr(known, "forward", None) else None


def rule_of(node: fx.Node, modules: dict[str, nn.Module]) -> Rule | None:
    """The rule of a node, if there is one."""
    if node.op == "call_module":
        return rule_of_module(modules[str(node.target)])
    return RULES.get(node.target) if node.op in ("call_function", "call_method") else None
