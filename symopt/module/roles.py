"""What slices of a parameter are: outputs of the model, words of a vocabulary, gates; as far as no graph is needed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import final

from torch import nn

from symopt.constraints import Composed, Constraint, GroupBridge, GroupSparse

__all__ = [
    "Named",
    "axes",
    "component",
    "grouped",
    "is_conv1d",
    "is_embedding",
    "is_matrix",
    "is_recurrent",
    "unit_dims",
]

Named = tuple[str, nn.Module, str, nn.Parameter]
"""A parameter: qualified name, the module that owns it, its name there, itself."""

Axis = tuple[int, int]
"""A parameter by its ``id``, and a dimension of it."""

OUTPUT, VOCABULARY = "an output of the model", "a vocabulary"

_PIECES = 4
"""So many layers may be concatenated, or be packed in one, for their sizes to be told from those of an output."""


def is_matrix(p: nn.Parameter) -> bool:
    """Whether a wildcard binds it."""
    return isinstance(p, nn.parameter.UninitializedParameter) or p.dim() >= 2


def is_embedding(sub: nn.Module) -> bool:
    """Whether its weight is a table of vectors, one for each word (or position) of a vocabulary."""
    return isinstance(sub, (nn.Embedding, nn.EmbeddingBag)) or hasattr(sub, "num_embeddings")


def is_conv1d(sub: nn.Module) -> bool:
    """Whether it is Hugging Face's ``Conv1D``, a Linear whose weight is stored (in, out)."""
    return type(sub).__name__ == "Conv1D" and hasattr(sub, "nf")


def is_recurrent(sub: nn.Module) -> bool:
    """Whether the rows of its weights are gates, or hidden units that it reads itself."""
    return isinstance(sub, (nn.RNNBase, nn.RNNCellBase))


def grouped(constraint: Constraint) -> Iterator[tuple[GroupSparse | GroupBridge, str]]:
    """The constraint, or those of a list, whose groups are named, and the name."""
    for part in constraint.parts if isinstance(constraint, Composed) else (constraint,):
        if isinstance(part, (GroupSparse, GroupBridge)) and isinstance(part.groups, str):
            yield part, part.groups


def unit_dims(constraint: Constraint | None) -> set[int]:
    """Along which dimensions whole slices die."""
    kinds = () if constraint is None else [kind for _, kind in grouped(constraint)]
    return {1 if kind == "in" else 0 for kind in kinds if not kind.startswith("block:")}


def component(full: str, name: str) -> str:
    """What a parameter is called where it is used: its module's name if it is the ``weight``, else its own."""
    return full.split(".")[-2] if name == "weight" and "." in full else name


def axes(module: nn.Module, parameters: list[Named]) -> dict[Axis, str]:
    """Which slices are outputs of the model or words: those that no wildcard makes units of.

    Outputs are those of the module that owns a matrix and was defined last, of what Hugging Face's models call their
    output embeddings, and of layers whose number of outputs no other layer can take as inputs.  A tensor that is also
    an embedding's has words, whatever its name.
    """
    known = [row for row in parameters if not isinstance(row[3], nn.parameter.UninitializedParameter)]
    found = {(id(p), 0): VOCABULARY for _, sub, _, p in known if is_embedding(sub) and p.dim() >= 2}
    layers = [row for row in known if row[3].dim() >= 2 and not is_embedding(row[1])]
    owners = {id(layers[-1][1])} if layers else set()
    for sub in module.modules():
        owners |= {id(head) for head in (_output_embeddings(sub),) if head is not None}
    read = _Read(known, layers)
    for full, sub, _, p in layers:
        if id(sub) in owners or read.misses(full, sub, p):
            found.setdefault((id(p), _out_dim(sub)), OUTPUT)
    return found


def _out_dim(sub: nn.Module) -> int:
    return 1 if is_conv1d(sub) or isinstance(sub, nn.modules.conv._ConvTransposeNd) else 0


def _sizes(sub: nn.Module, p: nn.Parameter) -> tuple[int, int]:
    """Number of inputs and of outputs of a layer."""
    out = _out_dim(sub)
    sizes = [p.shape[1 - out], p.shape[out]]
    if isinstance(sub, nn.modules.conv._ConvNd):
        sizes[1 if out else 0] *= sub.groups
    return sizes[0], sizes[1]


def _output_embeddings(sub: nn.Module) -> nn.Module | None:
    get = getattr(sub, "get_output_embeddings", None)
    try:
        found = get() if callable(get) else None
    except (AttributeError, NotImplementedError, TypeError):  # not every model has some
        return None
    return found if isinstance(found, nn.Module) else None


def _is_layer(sub: nn.Module) -> bool:
    return isinstance(sub, (nn.Linear, nn.modules.conv._ConvNd)) or is_conv1d(sub)


@final
class _Read:
    """Which numbers of inputs there are in a model, counted once."""

    def __init__(self, known: list[Named], layers: list[Named]) -> None:
        self.by_size: dict[int, set[int]] = {}
        """Number of inputs -> the modules that have so many."""
        self.alike = Counter(
            (full.rpartition(".")[0].rpartition(".")[0], *_sizes(sub, p)) for full, sub, _, p in layers
        )
        owners = {id(sub) for _, sub, _, _ in layers}
        for _, sub, _, p in known:
            if layers and sub is layers[0][1]:
                continue  # it reads the model's inputs
            if p.dim() >= 2:
                sizes = (_sizes(sub, p)[0],) if _is_layer(sub) else tuple(p.shape)[1 if is_embedding(sub) else 0 :]
            else:  # of a normalisation, not a bias
                sizes = () if id(sub) in owners else (p.numel(),)
            for size in sizes:
                self.by_size.setdefault(size, set()).add(id(sub))

    def misses(self, full: str, sub: nn.Module, p: nn.Parameter) -> bool:
        """Whether no size in the model fits what a layer puts out, so that it can only leave the model.

        Layers of a stack are left out, whose outputs may be cut into pieces of unlike sizes, and layers beside equal
        ones, whose outputs may be multiplied with each other.
        """
        if not _is_layer(sub) or re.search(r"\.\d+\..*\.", f".{full}"):
            return False
        inputs, out = _sizes(sub, p)
        if self.alike[full.rpartition(".")[0].rpartition(".")[0], inputs, out] > 1:
            return False
        conv = isinstance(sub, nn.modules.conv._ConvNd)
        for size, readers in self.by_size.items():
            fits = out % size == 0 or (size % out == 0 and (conv or size <= _PIECES * out))
            if fits and readers != {id(sub)}:
                return False
        return True
