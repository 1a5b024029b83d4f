"""Remove what a sparse network no longer uses: dead neurons and channels go, the function stays."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import Tensor, nn

from symopt.folding.analysis import Opaque, Traced, analyse, same_graph, shapes_of, trace
from symopt.folding.compare import Inputs, check_equal, copied, deterministic_outputs, outputs_of
from symopt.folding.enforce import enforce
from symopt.folding.resize import config_of
from symopt.folding.surgery import carry_out, sizes_of
from symopt.folding.thin import split_layers

__all__ = ["fold"]

M = TypeVar("M", bound=nn.Module)


def fold(model: M, example_inputs: Tensor | Inputs | None = None) -> M:
    """A new, plain, physically smaller module that computes what ``model.eval()`` computes.

    Constraints are enforced exactly and removed; tied weights become one shared Parameter.  Then fold removes every
    unit (output feature of a linear layer, channel of a convolution) that is *constant*, because all its incoming
    weights or its BatchNorm scale are zero, or *unused*, because all its outgoing weights are zero.  It removes the
    unit's bias, its BatchNorm channels and the matching inputs of the layers that read it, and adds the constant to the
    biases of those.  All other weights stay as they are bit for bit, exact zeros included.  A Linear or Conv whose
    weight :class:`symopt.LowRank` binds becomes a Sequential of two thin layers (a Conv and one of kernel size 1),
    where these have fewer parameters.

    A ``torch.fx`` trace of ``forward`` tells which layer reads which, through Linear, Conv1d-3d (depthwise too),
    BatchNorm, activations, pooling, flatten, dropout and identity.  Layers keep their shape wherever the trace does not
    tell (residual sums, concatenation, layers that are shared, hooked or parametrized, sizes written into ``forward``,
    ...), at the model's outputs, and everywhere if ``forward`` cannot be traced.

    The original is not touched.  Training mode, ``requires_grad``, dtypes and devices carry over; parameters are new
    objects, so the result needs a new optimizer.  No symopt class remains in it: it can be pickled, exported and
    trained where symopt is not installed.  Its attribute ``fold_config``, a dict fit for JSON, lists under ``"layers"``
    the type and sizes of each layer before and after, under ``"parameters"`` their number, under ``"cut"`` how many
    nonzero weights (singular values) were over each budget (0 once :class:`symopt.Anneal` has committed), under
    ``"ranks"`` the layers that became two and their rank, and under ``"kept"`` the layers that kept their shape and
    why; :func:`resize` and a ``state_dict`` rebuild the result with it.

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
        >>> from symopt import fold
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
    made = enforce(model)
    plain = made.module
    expected = None if example_inputs is None else deterministic_outputs(plain, example_inputs)
    try:
        small, kept = _smaller(plain, example_inputs)
    except Opaque as why:
        small, kept = plain, [f"model: {why}, nothing removed"]
    config = config_of(plain, small, made.parameters, vars(model).get("fold_config"))
    config |= {"kept": kept, "cut": made.cut}
    if made.thin:
        config["ranks"], whole = split_layers(small, made.thin)
        kept += whole
        config["parameters"]["after"] = sum(p.numel() for p in small.parameters())
    if example_inputs is not None and expected is not None:
        check_equal(expected, outputs_of(small, example_inputs))
    elif example_inputs is not None:
        kept.append("model: outputs are random even in eval mode, so they were not compared")
    vars(small)["fold_config"] = config
    return small


def _smaller(plain: M, inputs: Inputs | None) -> tuple[M, list[str]]:
    traced = trace(plain)
    if not same_graph(traced, trace(plain, training=True), values=False):
        raise Opaque("forward differs between training and evaluation")
    shapes = {} if inputs is None else shapes_of(traced, copied(inputs))
    fixed: dict[str, str] = {}
    while True:
        plan = analyse(traced, shapes, fixed)
        small = copy.deepcopy(plain)
        carry_out(plan, small)
        # A forward that computes with the size of a layer would now compute something else.
        suspects = _readers_of_sizes(plain, small, traced)
        if not suspects:
            return small, [f"{name}: {note}" for name, note in plan.notes.items()]
        fixed |= dict.fromkeys(suspects, "has a size that forward reads")


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
