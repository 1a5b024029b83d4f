"""Remove what a sparse network no longer uses: dead neurons and channels go, the function stays."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from symopt.budgets.pools import BudgetedWeight, pools
from symopt.constraints.planes.plane import flat, parts
from symopt.folding.analysis import Opaque, Traced, analyse, same_graph, shapes_of, trace
from symopt.folding.surgery import carry_out, cut_to, sizes_of
from symopt.folding.thin import Thin, make_thin, split_layers
from symopt.module.constrain import bindings, release

__all__ = ["fold", "resize"]

M = TypeVar("M", bound=nn.Module)


def fold(model: M, example_inputs: Tensor | tuple[Any, ...] | None = None) -> M:
    """A new, plain, physically smaller module that computes what ``model.eval()`` computes.

    Constraints are enforced exactly and removed; tied weights become one shared Parameter.  Then every unit (output
    feature of a linear layer, channel of a convolution) goes that is *constant*, because all its incoming weights or
    its BatchNorm scale are zero, or that *nobody reads*, because all its outgoing weights are zero; with it go its
    bias, BatchNorm channels and the matching inputs of the layers that read it, whose biases take over its constant.
    What survives keeps its weights bit for bit, exact zeros included.  A Linear or Conv whose weight
    :class:`symopt.LowRank` binds becomes a Sequential of two thin layers (a Conv and one of kernel size 1), where these
    have fewer parameters.  Who reads what is established by a ``torch.fx`` trace of ``forward`` through Linear,
    Conv1d-3d (depthwise too), BatchNorm, activations, pooling, flatten, dropout and identity.  Wherever it cannot be
    established (residual sums, concatenation, layers that are shared, hooked or parametrized, sizes written into
    ``forward``, ...), for the model's own outputs, and for all layers if ``forward`` cannot be traced, shapes are kept.

    The original is not touched.  Training mode, ``requires_grad``, dtypes and devices carry over; parameters are new
    objects, so the result needs a new optimizer.  No symopt class remains in it: it can be pickled, exported and
    trained where symopt is not installed.  Its attribute ``fold_config``, a dict fit for JSON, lists under ``"layers"``
    the type and sizes of each layer before and after, under ``"parameters"`` their number, under ``"cut"`` how many
    nonzero weights (singular values) of each budget had to go (0 once :class:`symopt.Anneal` has committed), under
    ``"ranks"`` which layers became two of that rank, and under ``"kept"`` which layers kept their shape and why; with
    it :func:`resize` and a ``state_dict`` rebuild the result.

    Args:
        model: any module.
        example_inputs: a tensor or a tuple of positional arguments.  If given, shapes come from running the model, and
            the outputs of the result are compared with those of ``model``.  Otherwise the inputs are taken to have a
            batch dimension, and a BatchNorm1d after a linear layer of its size to normalise features.

    Raises:
        TypeError: if ``model`` is no Module, or ``example_inputs`` neither a tensor nor a tuple.
        ValueError: if ``model`` cannot run on ``example_inputs``, or has uninitialised lazy parameters.
        RuntimeError: if the comparison of outputs fails; a wrong network is never returned.

    Limits: equality holds in eval mode (in training mode, a BatchNorm maps a constant channel to its bias, and dropout
    scales constants), up to rounding, and for finite activations.  Code outside of ``forward`` that uses the layers is
    not seen.

    Example:
        >>> import torch
        >>> from symopt.fold import fold
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Sigmoid(), torch.nn.Linear(3, 2))
        >>> with torch.no_grad():
        ...     _ = net[0].weight[1].zero_()
        >>> small = fold(net, torch.randn(5, 4))
        >>> small
        Sequential(
          (0): Linear(in_features=4, out_features=2, bias=True)
          (1): Sigmoid()
          (2): Linear(in_features=2, out_features=2, bias=True)
        )
        >>> small.fold_config["parameters"], small.fold_config["kept"]
        ({'before': 23, 'after': 16}, ["2: is the model's output, shape kept"])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fold: model must be a torch.nn.Module, got {type(model).__name__}")
    if any(map(nn.parameter.is_lazy, model.parameters())):
        raise ValueError("fold: model has parameters that are not initialised; run the lazy modules once first")
    if isinstance(example_inputs, Tensor):
        example_inputs = (example_inputs,)
    if example_inputs is not None and not isinstance(example_inputs, tuple):
        raise TypeError(
            f"fold: example_inputs must be a tensor or a tuple of the arguments of forward, got "
            f"{type(example_inputs).__name__}"
        )
    plain, cut, low, count = _plain(model)
    expected = None if example_inputs is None else _expected(plain, example_inputs)
    try:
        small, kept = _smaller(plain, example_inputs)
    except Opaque as why:
        small, kept = plain, [f"model: {why}, nothing removed"]
    config = _config(model, plain, small, kept, count) | {"cut": cut}
    if low:
        config["ranks"], whole = split_layers(small, low)
        kept += whole
        config["parameters"]["after"] = sum(p.numel() for p in small.parameters())
    if example_inputs is not None and expected is not None:
        _compare(expected, _outputs(small, example_inputs))
    elif example_inputs is not None:
        kept.append("model: outputs are random even in eval mode, so they were not compared")
    vars(small)["fold_config"] = config
    return small


def resize(module: M, config: Mapping[str, Any]) -> M:
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
        >>> from symopt.fold import fold, resize
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
    if not isinstance(config.get("layers"), Mapping):
        raise ValueError("resize: config has no dict 'layers'; pass the attribute fold_config of a folded module")
    modules = dict(module.named_modules())
    for name, entry in config["layers"].items():
        _check_entry(name, entry, modules.get(name))
    ranks = config.get("ranks", {})
    for name, rank in ranks.items():
        if name not in config["layers"] or isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"resize: config['ranks'][{name!r}] must be the rank of one of its layers, got {rank!r}")
    for name, entry in config["layers"].items():
        if entry["before"] != entry["after"]:
            cut_to(modules[name], entry["after"])
    for name, rank in ranks.items():
        make_thin(module, name, rank)
    vars(release(module))["fold_config"] = copy.deepcopy(dict(config))
    return module


# -- making the smaller module -----------------------------------------------------------------------------------------


def _plain(model: M) -> tuple[M, dict[str, int], dict[str, Thin], int]:
    """The model without constraints but with their structure exact, what budgets had to cut, the low-rank weights, and
    the number of parameters before tied ones were shared.

    A budget of zeros cuts weights, one of ranks singular values; both are counted where they were not zero.
    """
    plain = copy.deepcopy(model)
    bound = bindings(plain)
    release(plain)
    cut: dict[str, int] = {}
    with torch.no_grad():
        count = sum(p.numel() for p in plain.parameters())
        for names, constraint in bound:
            weights = [plain.get_parameter(name).detach() for name in names]
            if constraint.is_matrix and constraint.budget is not None:
                live = int((constraint.size(weights[0]) > 0).sum())
                cut[names[0]] = max(0, live - int(constraint.budget.amount))
            for w, part in zip(weights, parts(constraint.fold(flat(weights)), weights), strict=True):
                w.copy_(part)
            if constraint.parameters_identical:
                for name in names[1:]:
                    parent, _, child = name.rpartition(".")
                    plain.get_submodule(parent).register_parameter(child, plain.get_parameter(names[0]))
        low: dict[str, Thin] = {names[0]: c.thin for names, c in bound if c.is_matrix}
        single = [
            (names[0], plain.get_parameter(names[0]).detach(), c)
            for names, c in bound
            if c.budget is not None and names[0] not in low
        ]
        for pool in pools(BudgetedWeight(n, w, c, c.partition(w)) for n, w, c in single):
            for m, outside in zip(pool.weights, pool.pruned(), strict=True):
                gone = m.constraint.units(outside, m.w, m.groups)
                cut[m.name] = int((gone & (m.w != 0)).sum())
                m.w.masked_fill_(gone, 0.0)
    return plain, cut, low, count


def _smaller(plain: M, inputs: tuple[Any, ...] | None) -> tuple[M, list[str]]:
    traced = trace(plain)
    if not same_graph(traced, trace(plain, training=True), values=False):
        raise Opaque("forward differs between training and evaluation")
    shapes = {} if inputs is None else shapes_of(traced, _copied(inputs))
    barred: dict[str, str] = {}
    while True:
        plan = analyse(traced, shapes, barred)
        small = copy.deepcopy(plain)
        carry_out(plan, small)
        # A forward that computes with the size of a layer would now compute something else.
        suspects = _readers_of_sizes(plain, small, traced)
        if not suspects:
            return small, [f"{name}: {note}" for name, note in plan.notes.items()]
        barred |= dict.fromkeys(suspects, "has a size that forward reads")


def _readers_of_sizes(plain: nn.Module, small: nn.Module, traced: Traced) -> list[str]:
    """Names of resized modules whose size changes the trace."""

    def changed(candidate: nn.Module) -> bool:
        try:
            return not same_graph(trace(candidate), traced, values=True)
        except Opaque:
            return True

    def alone(name: str) -> nn.Module:
        candidate = copy.deepcopy(plain, {id(p): p for p in plain.parameters()})
        parent, _, child = name.rpartition(".")
        candidate.get_submodule(parent)._modules[child] = small.get_submodule(name)
        return candidate

    if not changed(small):
        return []
    names = [name for name, m in plain.named_modules() if sizes_of(m) != sizes_of(small.get_submodule(name))]
    return [name for name in names if changed(alone(name))] or names


# -- configuration -----------------------------------------------------------------------------------------------------


def _config(model: nn.Module, plain: nn.Module, small: nn.Module, kept: list[str], count: int) -> dict[str, Any]:
    before = {name: sizes_of(m) for name, m in plain.named_modules()}
    layers = {
        name: {"type": type(m).__name__, "before": before[name], "after": sizes_of(m)}
        for name, m in small.named_modules()
        if sizes_of(m)
    }
    numbers = {"before": count, "after": sum(p.numel() for p in small.parameters())}
    earlier = vars(model).get("fold_config")
    if earlier is not None and {n: e["after"] for n, e in earlier["layers"].items()} == {n: before[n] for n in layers}:
        # Folded again: the configuration still starts from the architecture as it is built.
        numbers["before"] = earlier["parameters"]["before"]
        for name, entry in layers.items():
            entry["before"] = dict(earlier["layers"][name]["before"])
    return {"layers": layers, "parameters": numbers, "kept": kept}


def _check_entry(name: str, entry: Any, module: nn.Module | None) -> None:
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


# -- checking ----------------------------------------------------------------------------------------------------------


def _copied(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, inputs))


def _outputs(module: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    with torch.no_grad():
        outputs = copy.deepcopy(module).eval()(*_copied(inputs))
    return [out for out in pytree.tree_leaves(outputs) if isinstance(out, Tensor)]


def _expected(plain: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor] | None:
    """The outputs to reproduce; None if they are random."""
    with torch.random.fork_rng(devices=[]):
        try:
            one, two = _outputs(plain, inputs), _outputs(plain, inputs)
        except Exception as error:
            raise ValueError(f"fold: model(*example_inputs) failed: {error}") from error
    return one if all(map(_close, one, two)) else None


def _compare(expected: list[Tensor], outputs: list[Tensor]) -> None:
    if len(expected) != len(outputs) or not all(map(_close, expected, outputs)):
        raise RuntimeError(
            "fold: the smaller network does not reproduce the outputs on example_inputs, so it is not returned; please "
            "report this with the model's forward"
        )


def _close(one: Tensor, two: Tensor) -> bool:
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    if not (one.is_floating_point() or one.is_complex()):
        return torch.equal(one, two)
    # On CUDA, float32 convolutions round like TF32, and differently for every shape.
    eps = max(torch.finfo(one.dtype).eps, 2**-11 if one.is_cuda and one.dtype == torch.float32 else 0)
    scale = one.abs().nan_to_num(posinf=0).max().item() if one.numel() else 0.0
    return torch.allclose(one, two, rtol=0, atol=eps**0.5 * max(scale, 1), equal_nan=True)
