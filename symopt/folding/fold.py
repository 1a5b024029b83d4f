"""Remove what a sparse network no longer uses: dead neurons and channels go, the function stays."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar, final

from torch import Tensor, nn

from symopt.folding.analysis import Opaque, Shapes, Traced, analyse, same_graph, shapes_of, trace
from symopt.folding.budgets import Excess, described
from symopt.folding.compare import Examples, Inputs, check_equal, deterministic_outputs, examples_of
from symopt.folding.enforce import enforce
from symopt.folding.resize import config_of
from symopt.folding.statistics import settle_means
from symopt.folding.surgery import carry_out, sizes_of
from symopt.folding.thin import split_layers

__all__ = ["Folded", "fold", "folded"]

M = TypeVar("M", bound=nn.Module)


def fold(
    model: M,
    example_inputs: Tensor | Inputs | Mapping[str, object] | None = (),
    example_kwargs: Mapping[str, object] | None = None,
    strict: bool = False,
) -> M:
    """A new, plain, physically smaller module that computes what ``model.eval()`` computes.

    Constraints are enforced exactly and removed; tied weights become one shared Parameter.  Where more lives than a
    budget allows (training stopped before the commit, or the weights are an average), the smallest live units become
    zero, and one warning says of how many weights, how many units and which share of the squared weight.  Then fold
    removes every
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

    Weights that ``torch.nn.utils.prune`` or the hooks of the old ``weight_norm`` and ``spectral_norm`` compute anew in
    every forward, and constrained ones that were parametrized later, become plain Parameters of the present value.
    A dead channel of a constrained layer in front of a BatchNorm is its bias, which the running mean follows late: fold
    sets the running mean to it, so that eval mode gives what the statistics of a batch give.

    The original is not touched.  Training mode, ``requires_grad``, dtypes and devices carry over; parameters are new
    objects, so the result needs a new optimizer.  No symopt class remains in it: it can be pickled, exported and
    trained where symopt is not installed.  Its attribute ``fold_config``, a dict fit for JSON, lists under ``"layers"``
    the type and sizes of each layer before and after, under ``"parameters"`` their number, under ``"cut"`` how many
    nonzero weights (singular values) were over each budget (0 where it was met), under ``"running_mean"`` the
    BatchNorms whose running mean was behind and in how many channels, under ``"ranks"`` the layers that became two and
    their rank, and under ``"kept"`` the layers that kept their shape and why; :func:`resize` and a ``state_dict``
    rebuild the result with it.

    Args:
        model: any module.
        example_inputs: a tensor, or a tuple of positional arguments.  If given, shapes come from running the model, and
            the outputs of the result are compared with those of ``model``.  Otherwise the inputs are taken to have a
            batch dimension, and a BatchNorm1d after a linear layer of its size to normalise features.  A dict is the
            keyword arguments if all of its keys are names of arguments of ``forward``, else the one argument.
        example_kwargs: keyword arguments of ``forward``.  Of both, numbers, strings and None count as fixed: the
            result is right for calls that repeat them.
        strict: raise where a budget is not met, instead of meeting it with a warning.

    Raises:
        TypeError: if ``model`` is no Module, or ``example_inputs`` or ``example_kwargs`` are no arguments.
        ValueError: if ``model`` cannot run on ``example_inputs``, has uninitialised lazy parameters, a constrained one
            that is gone, or a budget for one on the meta device; with ``strict``, if a budget is not met.
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
    made = folded("fold", model, example_inputs, example_kwargs)
    if made.missed:
        message = described(made.missed)
        if strict:
            raise ValueError(f"fold: {message}\nWith strict=True nothing is folded.  {_ADVICE}")
        warnings.warn(f"fold: {message}\n{_ADVICE}  fold(..., strict=True) raises instead.", stacklevel=2)
    return made.module


_ADVICE = (
    "Train with a symopt optimizer, past the commit of the budget, and fold the weights that were trained: in an "
    "average of them (EMA, SWA) those that die are never exactly zero."
)


@final
@dataclass(frozen=True)
class Folded(Generic[M]):
    """What :func:`folded` returns."""

    module: M
    missed: list[Excess]
    """The budgets that were not met."""


def folded(
    owner: str,
    model: M,
    example_inputs: Tensor | Inputs | Mapping[str, object] | None,
    example_kwargs: Mapping[str, object] | None,
) -> Folded[M]:
    """:func:`fold` for a caller of ``owner``, which says itself what is over budget."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{owner}: model must be a torch.nn.Module, got {type(model).__name__}")
    if any(map(nn.parameter.is_lazy, model.parameters())):
        raise ValueError(f"{owner}: model has parameters that are not initialised; run the lazy modules once first")
    examples = examples_of(owner, model, example_inputs, example_kwargs)
    made = enforce(model)
    plain = made.module
    expected = None if examples is None else deterministic_outputs(owner, plain, examples)
    settled: dict[str, int] = {}
    try:
        traced = trace(plain, examples)
        if not same_graph(traced, trace(plain, examples, training=True), values=False):
            raise Opaque("forward differs between training and evaluation")
        shapes = shapes_of(traced, examples)
        settled = settle_means(plain, traced, shapes, made.constrained)
        small, kept = _smaller(plain, examples, traced, shapes)
    except Opaque as why:
        small, kept = plain, [f"model: {why}, nothing removed"]
    config = config_of(plain, small, made.parameters, vars(model).get("fold_config"))
    config |= {"kept": kept, "cut": made.cut}
    if settled:
        config["running_mean"] = settled
    if made.thin:
        config["ranks"], whole = split_layers(small, made.thin)
        kept += whole
        config["parameters"]["after"] = sum(p.numel() for p in small.parameters())
    if examples is not None and expected is not None:
        if settled:
            expected = deterministic_outputs(owner, plain, examples)
        if isinstance(expected, str):
            kept.append(f"model: {expected}, so they were not compared")
        else:
            check_equal(expected, small, examples)
    vars(small)["fold_config"] = config
    return Folded(small, made.missed)


def _smaller(plain: M, examples: Examples | None, traced: Traced, shapes: Shapes) -> tuple[M, list[str]]:
    fixed: dict[str, str] = {}
    while True:
        plan = analyse(traced, shapes, fixed)
        small = copy.deepcopy(plain)
        carry_out(plan, small)
        # A forward that computes with the size of a layer would now compute something else.
        suspects = _readers_of_sizes(plain, small, traced, examples)
        if not suspects:
            return small, [f"{name}: {note}" for name, note in plan.notes.items()]
        fixed |= dict.fromkeys(suspects, "has a size that forward reads")


def _readers_of_sizes(plain: nn.Module, small: nn.Module, traced: Traced, examples: Examples | None) -> list[str]:
    """Names of resized modules whose size changes the trace."""

    def changed(candidate: nn.Module) -> bool:
        try:
            return not same_graph(trace(candidate, examples), traced, values=True)
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
