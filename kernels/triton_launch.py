"""The fused step on GPUs: tables of addresses in front of the kernels of :mod:`symopt_kernels.triton_step`.

The interface is ``native``'s.  Tensors that share a dtype and a retraction form a bucket, and a bucket is one launch,
however many they are.  Addresses of weights and state lie in a table on the device that is made once; what changes
from step to step, the gradients and the strengths, follows by one asynchronous copy, and only if it did change.
Nothing is ever read back.  Triton itself is imported by the first step.
"""

from __future__ import annotations

import math
import os
import struct
from array import array
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from symopt_kernels.groups import Groups
from symopt_kernels.native import layout

__all__ = ["DTYPES", "INTERPRETED", "PATTERNS", "UNAVAILABLE", "Entry", "constants", "fill", "step", "tile"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's interpreter runs the kernels on CPU tensors: for tests, thousands of times slower."""

UNAVAILABLE = None if find_spec("triton") else "triton is not installed"
"""Why the Triton step cannot run here, or None."""

BLOCK = 2048  # weights of a program: 8 to each of 256 threads, which are 128 bits in half precision
WIDTHS = (1, 16, 128, 1024, 4096)  # columns that one group may take up in a tile
SHARE = 16  # lines that one program sums before it moves them; more are cut into parts
PATTERNS = (2, 4, 8, 16)
SAMPLE = 1024  # units from which the imbalance takes its quantile, at least
RESIDENT = 2048  # programs that run at a time on a large GPU, about: so far ahead of the moves do the sums go

_STATE = {"peak": "max_exp_avg_sq", "second": "exp_avg_sq"}
_STATE |= {k: k for k in ("master", "factor_0", "factor_1", "imbalance", "metric_scale", "step", "trim")}


class Entry:
    """One tensor and its state: addresses, shape, and what the last step left."""

    def __init__(self) -> None:
        self.fields: dict[str, int] = {}
        self.key: tuple[Any, ...] = ()
        self.grad = 0
        self.inside: float | Tensor = 0.0
        self.plan: Plan | None = None
        self.counted: tuple[Tensor, int] | None = None
        self.device = torch.device("cpu")
        self.seen: Tensor | None = None

    @property
    def zeros(self) -> int:
        """Exact zeros after the step; waits for it."""
        assert self.counted is not None
        counts, i = self.counted
        return int(counts[i])


def fill(
    entry: Entry,
    weight: Tensor,
    state: Mapping[str, Tensor],
    retraction: str,
    groups: Groups | None = None,
    *,
    depth: int = 2,
    pattern: tuple[int, int] | None = None,
    fresh: bool = False,
) -> None:
    """Point ``entry`` at a weight and its state, as ``native.fill``.

    ``depth`` is that of ``sparse``; ``pattern`` is N:M.  ``fresh`` says that ``momentum_buffer`` holds nothing yet,
    which the kernel itself remembers from then on: a step that ``found_inf`` skips leaves it so.
    """
    shape = layout(weight, groups)
    assert shape is not None
    bands, rows, count, run = shape
    first = state.get("exp_avg", state.get("momentum_buffer"))
    places = {name: state[key].data_ptr() if key in state else 0 for name, key in _STATE.items()}
    places |= {"weight": weight.data_ptr(), "first": 0 if first is None else first.data_ptr()}
    if fresh:
        entry.seen = torch.zeros((), dtype=torch.int32, device=weight.device)
    f = entry.fields = {**places, "seen": 0 if entry.seen is None else entry.seen.data_ptr(), "numel": weight.numel()}
    f |= {"rows": rows, "groups": count, "run": run, "keep": pattern[0] if pattern else 0}
    f |= dict.fromkeys(("begin", "units", "parts", "lines", "lag", "room", "marks"), 0)
    wide = 16 // weight.element_size()
    streams = [f[name] for name in ("weight", "master", "first", "factor_0", "factor_1")]
    streams += [f["second"], f["peak"]] if groups is None else []
    f["aligned"] = int(all(place % 16 == 0 for place in streams))
    form: tuple[int, ...] = (depth,)
    f["count"] = -(-weight.numel() // BLOCK)
    if retraction == "group":
        r, c, p = form = tile(rows, run)
        f["aligned"] &= int((count if p == 1 else run) % wide == 0)
        f["units"] = bands * -(-count // (c // p))
        f["lines"] = -(-rows // r) * -(-run // p)
        f["parts"] = 1 if f["lines"] <= SHARE else -(-f["lines"] // SHARE)
        f["count"] = f["units"] * (1 if f["parts"] == 1 else 2 * f["parts"])
        f["lag"] = max(1, min(f["units"], -(-RESIDENT // f["parts"])))
    elif pattern is not None:
        retraction, form = "nm", (pattern[1],)
    elif retraction == "sparse" and depth > 2:
        retraction = "sparse_deep"
    units = weight.numel() if groups is None else bands * count
    f["stride"] = max(1, units // SAMPLE)
    f["samples"] = -(-units // f["stride"])
    flags = (bool(f["master"]), bool(f["peak"]), bool(f["first"]), bool(f["trim"]))
    entry.key = (retraction, str(weight.dtype).removeprefix("torch."), *flags, form)
    entry.device, entry.plan = weight.device, None


def tile(rows: int, run: int) -> tuple[int, int, int]:
    """``(R, C, P)``: a tile has R rows and C columns, P of which belong to one group."""
    p = next((width for width in WIDTHS if run <= width), WIDTHS[-1])
    size = max(BLOCK, p)
    r = 1 if rows == 1 else max(1, min(16, size // max(p, BLOCK // 16)))
    return r, size // r, p


def constants(
    key: tuple[Any, ...],
    direction: str,
    *,
    nesterov: bool = False,
    maximize: bool = False,
    saturated: bool = True,
    weight_decay: bool = False,
    stochastic: bool = False,
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The kernel of a bucket, its compile-time arguments and its launch options."""
    import triton.language as tl

    from symopt_kernels import triton_groups, triton_rules, triton_step

    retraction, dtype, master, peak, first, trimmed, form = key
    adaptive = direction != "sgd"
    shared: dict[str, Any] = {
        "DTYPE": getattr(tl, dtype),
        "MASTER": master,
        "PEAK": peak,
        "ADAPTIVE": adaptive,
        "MOMENTUM": first and not adaptive,
        "NESTEROV": nesterov and first and not adaptive,
        "MAXIMIZE": maximize,
        "TRIMMED": trimmed,
        "COUPLED": direction == "adam" and not trimmed,  # a budget's strengths are AdamW's
        "SATURATED": saturated,
        "STOCHASTIC": stochastic and dtype == "bfloat16" and not master,
    }
    # FMA contraction is on: fewer roundings.  Its default differs between Triton's versions.
    options = {"num_warps": max(1, BLOCK // 256), "enable_fp_fusion": True}
    if retraction == "group":
        r, c, p, aligned = form
        options["num_warps"] = max(1, min(8, r * c // 256))
        if torch.version.hip is None:
            options["maxnreg"] = 128  # ptxas 12.9 otherwise sometimes spills 8 bytes to get by with 64
        lead = triton_rules.adam_lead if adaptive else triton_rules.sgd_lead
        return triton_groups.groups, {"LEAD": lead, **shared, "R": r, "C": c, "P": p, "ALIGNED": aligned}, options
    own = {
        "DIRECTION": triton_rules.adam if adaptive else triton_rules.sgd,
        "RETRACTION": getattr(triton_rules, retraction),
        "DECOUPLED": direction == "adamw",
        "CONSTRAINED": retraction != "plain",
        "LAW": retraction in ("sparse", "nm"),
        "DECAYS": retraction == "plain" and weight_decay and direction != "adamw",
        "DEPTH": form[0],
        "BLOCK": BLOCK,
    }
    return triton_step.singles, {**shared, **own}, options


class Bucket:
    """The tables of one launch."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        from symopt_kernels.triton_rules import FIELDS

        self.entries, device = entries, entries[0].device
        rows, owners, marks, room = array("q"), array("i"), 0, 0
        self.programs = 0
        for i, entry in enumerate(entries):
            f = entry.fields | {"begin": self.programs}
            if f["parts"] > 1:
                _, c, p = entry.key[-1]
                f |= {"marks": marks, "room": room}
                marks, room = marks + f["units"], room + f["units"] * (4 * f["parts"] + 2) * (c // p)
            rows.extend(f[name] for name in FIELDS)
            owners.extend([i] * f["count"])
            self.programs += f["count"]

        def put(values: array[int], dtype: torch.dtype) -> Tensor:
            return torch.frombuffer(values, dtype=dtype).to(device, copy=True)

        self.table, self.owners = put(rows, torch.int64), put(owners, torch.int32)
        self.arrived = torch.zeros(len(entries), dtype=torch.int32, device=device)
        self.zeros = torch.zeros(len(entries), dtype=torch.int64, device=device)
        self.partial = torch.empty(3 * self.programs, dtype=torch.float32, device=device)
        self.ticket = torch.zeros(1, dtype=torch.int32, device=device)
        self.room = torch.empty(max(1, room), dtype=torch.float32, device=device)
        self.marks = torch.zeros(max(1, marks), dtype=torch.int32, device=device)
        self.live = torch.zeros(3 * len(entries), dtype=torch.int64, device=device)
        self._sent: array[int] | None = None
        self._host: Tensor | None = None

    def send(self) -> None:
        """Gradients and strengths to the device, if they differ from what lies there."""
        values = array("q")
        for entry in self.entries:
            given = isinstance(entry.inside, Tensor)
            bits = 0 if given else struct.unpack("<i", struct.pack("<f", entry.inside))[0]
            values.extend((entry.grad, bits, entry.inside.data_ptr() if given else 0))  # type: ignore[union-attr]
        if values == self._sent:
            return
        self._sent = values
        host = torch.frombuffer(values, dtype=torch.int64)
        # torch's pinned allocator reuses memory only once the copies out of it are done.  A captured graph copies from
        # it at every replay, so it is kept.
        self._host = host if self.live.device.type == "cpu" else host.pin_memory()
        self.live.copy_(self._host, non_blocking=True)


def straight(entries: Sequence[Entry]) -> list[bool]:
    """Which gradients lie at multiples of 16 bytes."""
    return [entry.grad % 16 == 0 for entry in entries]


class Plan:
    """Which launches a list of entries makes."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries, self.straight = list(entries), straight(entries)
        found: dict[Any, list[Entry]] = {}
        for entry in entries:
            *key, form = entry.key
            if key[0] == "group":
                form = (*form, bool(entry.fields["aligned"]) and entry.grad % 16 == 0)
            found.setdefault((entry.device, (*key, form)), []).append(entry)
        self.buckets = [(key, Bucket(members)) for (_, key), members in found.items()]
        for _, bucket in self.buckets:
            for i, entry in enumerate(bucket.entries):
                entry.counted = bucket.zeros, i


def step(
    entries: Sequence[Entry],
    direction: str,
    *,
    lr: float | Tensor,
    beta1: float = 0.0,
    beta2: float = 0.0,
    eps: float = 0.0,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    maximize: bool = False,
    saturated: bool = True,
    imbalance_decay: float | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    seed: int | None = None,
) -> None:
    """``native.step`` on the device: one launch per bucket, and the host waits for nothing.

    ``lr`` and an entry's strength (``inside``) may be fp32 tensors on the device, read when the kernel runs.  With a
    ``seed``, bf16 weights without an fp32 copy are rounded stochastically; give every step another one.
    """
    plan = entries[0].plan
    if plan is None or plan.entries != list(entries) or plan.straight != straight(entries):
        plan = entries[0].plan = Plan(entries)
    lr_at = lr if isinstance(lr, Tensor) else None
    numbers = {
        "lr": 0.0 if lr_at is not None else float(lr),
        "fresh1": 1 - beta1,
        "beta2": beta2,
        "fresh2": 1 - beta2,
        "log1": math.log(beta1) if beta1 else -math.inf,
        "log2": math.log(beta2) if beta2 else -math.inf,
        "eps": eps,
        "momentum": momentum,
        "undamped": 1 - dampening,
        "weight_decay": weight_decay,
        "imbalance_decay": -1.0 if imbalance_decay is None else imbalance_decay,
    }
    for key, bucket in plan.buckets:
        kernel, fixed, options = constants(
            key,
            direction,
            nesterov=nesterov,
            maximize=maximize,
            saturated=saturated,
            weight_decay=weight_decay != 0,
            stochastic=seed is not None,
        )
        given = {name: float(value) for name, value in numbers.items()}
        amplified = direction == "sgd" and key[4]
        given["amplify"] = float((1 - dampening) / (1 - momentum)) if amplified else 1.0
        tensors = {k: getattr(bucket, k) for k in ("table", "live", "owners", "arrived", "partial", "zeros")}
        if key[0] == "group":
            tensors |= {"ticket": bucket.ticket, "room": bucket.room, "marks": bucket.marks}
            del given["weight_decay"]
        bucket.send()
        kernel[(bucket.programs,)](
            **tensors,
            **given,
            **fixed,
            lr_at=lr_at,
            found_inf=found_inf,
            grad_scale=grad_scale,
            seed=0 if seed is None else seed,
            programs=bucket.programs,
            **options,
        )
