"""What :func:`symopt.constrain` refuses or warns of because of what a parameter is, not because of its shape."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from symopt.constraints import Constraint, GroupSparse
from symopt.module.annotation import Annotation
from symopt.module.roles import (
    Named,
    component,
    grouped,
    is_conv1d,
    is_embedding,
    is_matrix,
    is_recurrent,
    unit_dims,
)
from symopt.optim.callers import callers_level

__all__ = ["check_layout", "listed", "notes", "warn"]

_PACKED_BY_HEAD = ("query_key_value",)
"""Layers of GPT-NeoX, BLOOM, Persimmon and others that are (heads, 3, d)."""

_ATTENTION = {"q", "k", "v", "wq", "wk", "wv", "query", "key", "value", "queries", "keys", "values"}
"""Words in the names of projections whose heads belong together."""

_MOST = 8


def listed(names: Iterable[str]) -> str:
    """Names, the first few of many."""
    found = list(dict.fromkeys(names))
    return ", ".join(found[:_MOST]) + (f" and {len(found) - _MOST} more" if len(found) > _MOST else "")


def check_layout(full: str, sub: nn.Module, name: str, p: nn.Parameter, constraint: Constraint, *, told: bool) -> None:
    """Raise where named groups cannot mean what they say; ``told``: the key is the parameter's own name."""
    for part, kind in grouped(constraint):
        label, rows = f"{type(part).__name__}({kind!r})", p.shape[0]
        if isinstance(sub, nn.modules.conv._ConvTransposeNd):
            raise ValueError(
                f"constrain: {full} belongs to a transposed convolution, whose weight is stored (in, out, ...), so "
                f"the groups of {part} would be ambiguous; give GroupSparse an index tensor"
            )
        if is_conv1d(sub) and not told:
            raise ValueError(
                f"constrain: {full} belongs to a Conv1D, whose weight is stored (in, out), so {label} by a wildcard "
                f"would take its inputs for outputs; name it in full ({{{full!r}: ...}}, 'in' being its outputs), give "
                "GroupSparse a function, lambda w: torch.arange(w.shape[1]).expand(w.shape), or leave it out, with "
                f"{{{full!r}: None}} first"
            )
        if isinstance(part, GroupSparse) and part.scope == "flops" and is_embedding(sub):
            raise ValueError(
                f"constrain: {full} belongs to an embedding, which looks rows up and multiplies nothing, so "
                f"scope='flops' has nothing to count; leave it out, with {{{full!r}: None}} as the first pattern"
            )
        if kind.startswith("head:") and component(full, name) in _PACKED_BY_HEAD and rows == 3 * p[0].numel():
            heads = int(kind[len("head:") :])
            fix = f"GroupSparse(torch.arange({heads}).repeat_interleave({rows // heads}))"
            raise ValueError(
                f"constrain: {full} packs queries, keys and values head by head, (heads, 3, d), and {label} reads "
                f"(3, heads, d), so it would zero no head; give the head of every row, {fix}"
            )


def notes(
    parameters: list[Named],
    kept: dict[str, str],
    wild: dict[str, Constraint],
    found: list[Annotation],
    keys: list[str],
    named: set[str],
) -> list[str]:
    """What to warn of.

    Args:
        parameters: of the module.
        kept: what a wildcard would have made units of, and what these are; no other key binds it.
        wild: what wildcards bind.
        found: everything that is bound.
        keys: wildcards that bind what is called ``weight``.
        named: what any key fits.
    """
    return [*_kept_free(kept), *_missed(parameters, keys, named), *_gates(parameters, wild), *_independent_heads(found)]


def warn(texts: list[str]) -> None:
    """One warning, at the line that called ``constrain``."""
    if texts:
        warnings.warn("constrain: " + "\n".join(texts), stacklevel=callers_level())


def _kept_free(kept: dict[str, str]) -> list[str]:
    if not kept:
        return []
    shown = listed(f"{name} ({what})" for name, what in kept.items())
    first, names = next(iter(kept)), tuple(kept)
    free = repr(names if 1 < len(names) <= _MOST else first)
    return [
        f"a wildcard makes no units of outputs of the model or of a vocabulary, so these are left free: {shown}; to "
        f"bind one name it in full, {{{first!r}: ...}}; {{{free}: None}} as the first pattern says they shall be free"
    ]


def _missed(parameters: list[Named], keys: list[str], named: set[str]) -> list[str]:
    texts = []
    for key in keys:
        start = key[: -len("weight")]
        missed = {
            full: f"{start}{name}"
            for full, _, name, p in parameters
            if full not in named and "weight" in name and is_matrix(p) and fnmatchcase(full, f"{start}{name}")
        }
        if missed:
            texts.append(
                f"{key!r} misses matrices that are not called 'weight': {listed(missed)}; to bind them add "
                f"{listed(map(repr, missed.values()))} to the key, as a tuple, or give these None"
            )
    return texts


def _gates(parameters: list[Named], wild: dict[str, Constraint]) -> list[str]:
    owners = {full: (sub, name) for full, sub, name, _ in parameters}
    gates, packed = [], {}
    for full, constraint in wild.items():
        sub, name = owners[full]
        if 0 in unit_dims(constraint) and is_recurrent(sub):
            gates.append(full)
        if isinstance(sub, nn.MultiheadAttention) and name == "in_proj_weight" and _by_rows(constraint):
            packed[full] = sub.num_heads
    texts = []
    if gates:
        texts.append(
            f"rows of {listed(gates)} are gates or read each other, so a row alone makes no hidden unit removable; "
            "give GroupSparse a mapping {pattern: (dim, index)} for units of several rows, or leave these out with None"
        )
    if packed:
        first, heads = next(iter(packed.items()))
        texts.append(
            f"rows of {listed(packed)} are those of queries, keys and values, chosen one by one, so that none can be "
            f"removed; write {{{first!r}: GroupSparse('head:{heads}')}} first, or leave it out with None"
        )
    return texts


def _by_rows(constraint: Constraint) -> bool:
    return any(kind == "out" for _, kind in grouped(constraint))


def _independent_heads(found: list[Annotation]) -> list[str]:
    """Weights of one attention layer whose heads are chosen by each for itself."""
    layers: dict[str, list[tuple[str, int, int]]] = {}
    for bound in found:
        heads = [int(kind[len("head:") :]) for _, kind in grouped(bound.constraint) if kind.startswith("head:")]
        w = bound.parameter(0)
        words = set(re.split(r"[_\d]+", component(bound.names[0], bound.attributes[0]).lower()))
        if heads and w is not None and words & _ATTENTION:
            path, attribute = bound.names[0].rpartition(".")[0], bound.attributes[0]
            layer = path.rpartition(".")[0] if attribute == "weight" else path
            layers.setdefault(layer, []).append((bound.names[0], heads[0], w.shape[0]))
    several = [rows for rows in layers.values() if len(rows) > 1]
    if not several:
        return []
    names = [name for rows in several for name, _, _ in rows]
    least = min(heads for _, heads, _ in several[0])
    units = ", ".join(
        f"{name!r}: (0, torch.arange({least}).repeat_interleave({rows // least}))" for name, _, rows in several[0]
    )
    key = ", ".join(repr(name) for name, _, _ in several[0])
    return [
        f"{listed(names)} choose their heads independently of each other, so that a head which dies in one lives in "
        f"another and cannot be removed; bind those of a layer as one, {{({key}): GroupSparse({{{units}}})}}"
    ]
