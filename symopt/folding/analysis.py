"""The two passes over a network's graph: forwards for constant units, backwards for units that no layer needs."""

from __future__ import annotations

import contextlib
import copy
import io
import textwrap
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.utils.parametrize import is_parametrized

from symopt.folding.compare import Examples
from symopt.folding.rules import IN_PLACE, SIZED, SOURCES, VIEWS, rule_of, rule_of_module
from symopt.folding.units import Axis, Call, KeepShape, Layer

__all__ = [
    "FoldPlan",
    "Opaque",
    "Shapes",
    "Traced",
    "analyse",
    "is_hooked",
    "obstacles_of",
    "same_graph",
    "shapes_of",
    "trace",
]

Traced = tuple[nn.Module, fx.Graph]
Shapes = dict[fx.Node, tuple[int, ...]]


class Opaque(Exception):
    """The forward pass as a whole cannot be analysed; the message says why."""


@dataclass
class FoldPlan:
    """Which units every layer keeps, and by module name why a shape was kept."""

    layers: list[Layer] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)


# -- tracing -----------------------------------------------------------------------------------------------------------


def is_hooked(module: nn.Module) -> bool:
    """Whether calling it runs other code than its class's ``forward``."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" in vars(module) or any(getattr(module, name) for name in hooks)


class _Proxy(fx.Proxy):
    """Records ``x += 1`` as the in-place operation it is, where torch.fx would record ``x = x + 1``."""


def _augmented(function: Callable[..., object]) -> Callable[[_Proxy, object], fx.Proxy]:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _function in IN_PLACE:
    setattr(_Proxy, f"__{_function.__name__}__", _augmented(_function))


class _Tracer(fx.Tracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # Hooks are code that must not run on proxies: the module becomes a leaf of which nothing is known.
        return is_hooked(m) or rule_of_module(m) is not None or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module, examples: Examples | None = None, *, training: bool = False) -> Traced:
    """A copy of ``model`` that shares its parameters, and the graph of its forward: user code runs on the copy.

    What ``examples`` give (or leave at its default) that is a number, a string or None is fixed in the graph.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise Opaque("a ScriptModule cannot be traced")
    copied = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    copied.train(training)
    try:
        return copied, _Tracer().trace(copied, _fixed(copied, examples))
    except Exception as error:
        reason = textwrap.shorten(str(error), 120, placeholder=" ...") or type(error).__name__
        raise Opaque(f"torch.fx cannot trace forward ({reason})") from error


def _fixed(model: nn.Module, examples: Examples | None) -> dict[str, object] | None:
    given = None if examples is None else examples.arguments(model)
    plain = (bool, int, float, str)
    return {name: x for name, x in given.items() if x is None or type(x) in plain} if given else None


def same_graph(one: Traced, two: Traced, *, values: bool) -> bool:
    """Whether two traces run the same operations on the same tensors, and with the same numbers if ``values``."""

    def described(model: nn.Module, graph: fx.Graph) -> list[str]:
        rows = [f"{n.op} {n.target} {n.all_input_nodes} {(n.args, n.kwargs) if values else ''}" for n in graph.nodes]
        made = {str(n.target) for n in graph.nodes if n.op == "get_attr" and "_tensor_constant" in str(n.target)}
        return rows + [str(getattr(model, name).tolist()) for name in sorted(made) if values]

    return described(*one) == described(*two)


def shapes_of(traced: Traced, examples: Examples | None) -> Shapes:
    """The shape of every tensor in the graph, from running it once; of no tensor without examples."""
    if examples is None:
        return {}
    ran = fx.GraphModule(*traced)
    given = examples.arguments(traced[0])
    if given is None:
        raise Opaque("forward takes any keyword arguments")
    inputs: list[object] = []
    for name, value in given.items():
        inputs += value if name.startswith("*") and isinstance(value, tuple) else [value]
    try:
        # torch prints the traceback of what fails.
        with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
            ShapeProp(ran).run(*inputs, enable_io_processing=False)
    except Exception as error:
        reason = textwrap.shorten(str(error.__cause__ or error), 120, placeholder=" ...")
        raise Opaque(f"its torch.fx trace does not run ({reason})") from error
    metas = [(n, m.meta.get("tensor_meta")) for n, m in zip(traced[1].nodes, ran.graph.nodes, strict=True)]
    return {node: tuple(meta.shape) for node, meta in metas if hasattr(meta, "shape")}


# -- the two passes ----------------------------------------------------------------------------------------------------


def analyse(traced: Traced, shapes: Shapes, fixed: dict[str, str]) -> FoldPlan:
    """Which units every layer may lose in eval mode; modules in ``fixed`` keep their shape, for the reason given."""
    model, graph = traced
    modules = dict(model.named_modules())
    obstacles = _obstacles(modules, graph) | fixed
    plan = FoldPlan(notes={name: f"{why}, shape kept" for name, why in obstacles.items()})
    axes: dict[fx.Node, Axis] = {}
    for node in graph.nodes:
        if _in_place(node, modules) and _shared(node, modules, axes):
            raise Opaque(f"`{node.name}` works in place on a tensor that is also used elsewhere")
        call = Call(node, node.name, None, [axes[n] for n in node.all_input_nodes if n in axes])
        if node.op == "call_module":
            call.name, call.module = str(node.target), modules[str(node.target)]
        try:
            axis = _step(call, modules, obstacles, shapes)
        except KeepShape as why:
            call.pin(why)
            if call.module is not None and rule_of_module(call.module) is None and _has_parameters(call.module):
                plan.notes.setdefault(call.name, f"no rule for {type(call.module).__name__}, shape kept")
            continue
        if axis is not None:
            axes[node] = axis
            if all(axis.layer is not other.layer for other in call.inputs):
                plan.layers.append(axis.layer)
    _find_unused(plan)
    plan.notes = {name or "model": plan.notes[name] for name in modules if name in plan.notes}
    return plan


def _step(call: Call, modules: dict[str, nn.Module], obstacles: dict[str, str], shapes: Shapes) -> Axis | None:
    rule = rule_of(call.node, modules)
    if call.module is not None and call.name in obstacles:
        raise KeepShape(f"which {obstacles[call.name]}")
    if rule is None:
        raise KeepShape
    axis = rule(call) if call.inputs or rule in SOURCES else None
    if axis is None or call.node not in shapes:
        return axis
    shape = shapes[call.node]
    return replace(axis.sized(shape[axis.dim] if len(shape) >= -axis.dim else 0), ndim=len(shape))


def _find_unused(plan: FoldPlan) -> None:
    # Readers come after what they read, so one pass from the end sees whole chains of dead units.
    for layer in reversed(plan.layers):
        if not layer.readers and not layer.pinned:
            layer.pinned = "output is not used"
        if layer.pinned:
            plan.notes[layer.name] = f"{layer.pinned}, shape kept"
            continue
        layer.used = torch.zeros_like(layer.used)
        for reader in layer.readers:
            assert reader.source is not None
            needed = reader.needed()
            layer.used |= needed.view(layer.units, -1).any(1)
            padded = (needed & reader.source.const.isfinite()).view(layer.units, -1).any(1)
            if count := int(padded.sum()):
                plan.notes[layer.name] = f"{count} constant channels kept, because `{reader.name}` pads with zeros"
        if not layer.used.any():
            plan.notes[layer.name] = "every unit is dead, one kept because torch layers need a width of at least 1"


# -- layers that must keep their shape ---------------------------------------------------------------------------------


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def obstacles_of(traced: Traced) -> dict[str, str]:
    """By name of a layer, why it must keep its shape."""
    return _obstacles(dict(traced[0].named_modules()), traced[1])


def _obstacles(modules: dict[str, nn.Module], graph: fx.Graph) -> dict[str, str]:
    """By name of a module that has a rule, why it must keep its shape."""
    calls, owners, touched = Counter[int](), Counter[int](), set[str]()
    for node in graph.nodes:
        if node.op == "call_module":
            module = modules[str(node.target)]
            calls.update(map(id, [module] if rule_of_module(module) else module.modules()))
        elif node.op == "get_attr" and not all(_reads_kind(user) for user in node.users):
            touched.add(str(node.target).rpartition(".")[0])
    for module in modules.values():
        owners.update(id(p) for p in module._parameters.values() if p is not None)
    return {
        name: why
        for name, module in modules.items()
        if rule_of_module(module) is not None
        and (why := _obstacle(module, calls[id(module)], name in touched, owners) if name else "is the model itself")
    }


def _reads_kind(node: fx.Node) -> bool:
    return node.target is getattr and node.args[1] in ("device", "dtype")


def _obstacle(module: nn.Module, calls: int, touched: bool, owners: Counter[int]) -> str | None:
    parameters = [p for p in module._parameters.values() if p is not None]
    buffers = [b for b in module._buffers.values() if b is not None]
    plain = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    if is_hooked(module):
        return "has hooks or a replaced forward"
    if rule_of_module(module) not in SIZED:
        return None
    if calls != 1:
        return "is called more than once" if calls else "is not called by forward"
    if touched:
        return "has parameters that forward reads directly"
    if is_parametrized(module):
        return "has parametrizations"
    if any(owners[id(p)] > 1 for p in parameters):
        return "shares a parameter with another module"
    if not plain.issuperset([*module._parameters, *module._buffers]) or next(module.children(), None) is not None:
        return "has state of its own"
    if not all(type(p) is nn.Parameter and p.is_floating_point() for p in parameters) or any(
        x.is_meta for x in parameters + buffers
    ):
        return "has a weight that is not a plain floating point Parameter with data"
    if getattr(module, "groups", 1) not in (1, getattr(module, "in_channels", 1)):
        return "is a grouped convolution that is not depthwise"
    return None


def _in_place(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    named = name.endswith("_") and not name.endswith("__")
    return named or node.target in IN_PLACE or node.kwargs.get("inplace") is True


def _shared(node: fx.Node, modules: dict[str, nn.Module], axes: dict[fx.Node, Axis]) -> bool:
    """Whether ``node`` may write to units that other operations read, for which the constants would then be wrong."""

    def new_memory(n: fx.Node) -> bool:
        rule = rule_of(n, modules)
        if n.op == "call_module" and rule is None:
            return _has_parameters(modules[str(n.target)])
        return rule is not None and rule not in VIEWS and not _in_place(n, modules)

    # An in-place operation writes to its first argument only; an unknown one may return a view of any argument.
    read = node.all_input_nodes[: 1 if _in_place(node, modules) else None]
    return any((n in axes and len(n.users) > 1) or (not new_memory(n) and _shared(n, modules, axes)) for n in read)
