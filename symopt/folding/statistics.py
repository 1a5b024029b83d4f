"""Running means of dead channels, which lag behind what the channels are."""

from __future__ import annotations

from collections import Counter

import torch
from torch import fx, nn

from symopt.folding.analysis import Shapes, Traced, is_hooked
from symopt.folding.rules import SOURCES, rule_of_module
from symopt.folding.units import bias_of

__all__ = ["settle_means"]


@torch.no_grad()
def settle_means(plain: nn.Module, traced: Traced, shapes: Shapes, constrained: frozenset[str]) -> dict[str, int]:
    """Set running means of dead channels, in place, to what these are; by BatchNorm how many were wrong.

    A channel whose weights are zero is its bias, exactly, whatever the input.  By statistics of a batch, as in
    training, BatchNorm maps it to its own bias (0 if affine=False).  In eval mode it does the same if its running mean
    is that constant; but the bias moved while the channel died and after it, the mean followed late, and the running
    variance has gone to 0, so that the eps of BatchNorm multiplies the difference by up to 300.

    Only channels of weights that a constraint binds are touched (others were zeroed by hand, after training), and no
    BatchNorm that was frozen in training.
    """
    model, graph = traced
    modules = dict(model.named_modules())
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    found: dict[str, int] = {}
    for node in graph.nodes:
        pair = _layer_and_norm(node, modules, shapes, constrained)
        if pair is None or calls[pair[1]] > 1 or any(map(is_hooked, map(modules.__getitem__, pair))):
            continue
        layer, norm = modules[pair[0]], plain.get_submodule(pair[1])
        frozen = plain.training and not norm.training
        mean, scale = norm._buffers["running_mean"], norm._parameters["weight"]
        weight = layer.get_parameter("weight").detach()
        if frozen or mean is None or mean.is_meta or weight.is_meta or (scale is not None and not scale.requires_grad):
            continue
        new = torch.where((weight.flatten(1) == 0).all(1), bias_of(layer).to(mean), mean)
        if changed := int((new != mean).sum()):
            found[pair[1]] = changed
            for holder in (norm, modules[pair[1]]):
                holder.get_buffer("running_mean").copy_(new)
    return found


def _layer_and_norm(
    node: fx.Node, modules: dict[str, nn.Module], shapes: Shapes, constrained: frozenset[str]
) -> tuple[str, str] | None:
    """Names of a BatchNorm and of the constrained layer right before it, whose units are its channels."""
    before = node.all_input_nodes[0] if len(node.all_input_nodes) == 1 else None
    if node.op != "call_module" or before is None or before.op != "call_module" or len(before.users) > 1:
        return None
    layer, norm = modules[str(before.target)], modules[str(node.target)]
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or rule_of_module(layer) not in SOURCES:
        return None
    if f"{before.target}.weight" not in constrained:
        return None
    weight = layer.get_parameter("weight")
    # In other dimensions, BatchNorm normalises tokens, or there is no batch.
    known = len(shapes.get(before, weight.shape)) == weight.dim()
    return (str(before.target), str(node.target)) if known and norm.num_features == len(weight) else None
