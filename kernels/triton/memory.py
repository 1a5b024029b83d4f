"""Where a tensor and its state lie: the table that the Triton kernels read, and access to what it points at."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call, attr-defined"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "FIELDS",
    "address",
    "field",
    "get",
    "load_grad",
    "load_weight",
    "narrow",
    "narrow_double",
    "number",
    "put",
    "scalar",
    "store_weight",
]

FIELDS = (
    *("weight", "master", "first", "second", "peak", "factor_0", "factor_1", "imbalance", "metric_scale", "step"),
    *("budget", "seen", "numel", "rows", "groups", "run", "keep", "aligned", "begin", "count"),
    *("stride", "samples", "units", "parts", "lines", "lag", "room", "marks", "critical", "spread"),
    *("weights", "main", "of", "places", "skip"),
)
"""Columns of the table of tensors, all int64: addresses, the shape of its groups as ``native.layout`` has it, and how
programs share the work: ``count`` of them from ``begin`` on; groups in ``units`` tiles of ``lines`` blocks, each cut
into ``parts``; ``room`` and ``marks`` are where their partial sums and counters lie.  The imbalance's law looks at
``samples`` units, ``stride`` apart.  A tie of ``weights`` in all has a row for each of its tensors; ``spread`` is an
fp32 number by its bits.  Where its orbits are gathered, each segment, ``numel`` orbits of ``rows`` copies, has a row,
too: the first tensor's is ``main``, and the addresses are those of a ``segments.Segment`` whose first is ``skip``."""

WEIGHT = tl.constexpr(FIELDS.index("weight"))
MASTER_ = tl.constexpr(FIELDS.index("master"))
FIRST = tl.constexpr(FIELDS.index("first"))
SECOND = tl.constexpr(FIELDS.index("second"))
PEAK_ = tl.constexpr(FIELDS.index("peak"))
FACTOR_0 = tl.constexpr(FIELDS.index("factor_0"))
FACTOR_1 = tl.constexpr(FIELDS.index("factor_1"))
IMBALANCE = tl.constexpr(FIELDS.index("imbalance"))
SCALE = tl.constexpr(FIELDS.index("metric_scale"))
STEP = tl.constexpr(FIELDS.index("step"))
TRIM = tl.constexpr(FIELDS.index("budget"))
SEEN = tl.constexpr(FIELDS.index("seen"))
NUMEL = tl.constexpr(FIELDS.index("numel"))
ROWS = tl.constexpr(FIELDS.index("rows"))
GROUPS = tl.constexpr(FIELDS.index("groups"))
RUN = tl.constexpr(FIELDS.index("run"))
KEEP = tl.constexpr(FIELDS.index("keep"))
ALIGNED = tl.constexpr(FIELDS.index("aligned"))
BEGIN = tl.constexpr(FIELDS.index("begin"))
COUNT = tl.constexpr(FIELDS.index("count"))
STRIDE = tl.constexpr(FIELDS.index("stride"))
SAMPLES = tl.constexpr(FIELDS.index("samples"))
UNITS = tl.constexpr(FIELDS.index("units"))
PARTS = tl.constexpr(FIELDS.index("parts"))
LINES = tl.constexpr(FIELDS.index("lines"))
LAG = tl.constexpr(FIELDS.index("lag"))
ROOM = tl.constexpr(FIELDS.index("room"))
MARKS = tl.constexpr(FIELDS.index("marks"))
CRITICAL = tl.constexpr(FIELDS.index("critical"))
SPREAD = tl.constexpr(FIELDS.index("spread"))
WEIGHTS = tl.constexpr(FIELDS.index("weights"))
MAIN = tl.constexpr(FIELDS.index("main"))
OF = tl.constexpr(FIELDS.index("of"))
PLACES = tl.constexpr(FIELDS.index("places"))
SKIP = tl.constexpr(FIELDS.index("skip"))
WIDTH = tl.constexpr(len(FIELDS))
# Constants stand on the right of a product: before Triton 3.9 its interpreter has none of a constexpr and a tensor.
SNAP = tl.constexpr(1e-6)
TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def address(table, entry, field: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to a tensor of a row of the table.  The hint must follow the cast: before it, it is lost."""
    p = tl.load(table + entry * WIDTH + field).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(p, 16) if ALIGNED else p


@triton.jit
def get(p, at, mask):
    """In fp32; ``mask=None`` reads everything."""
    if mask is None:
        x = tl.load(p + at)
    else:
        x = tl.load(p + at, mask=mask, other=0.0)
    return x.to(tl.float32)


@triton.jit
def put(p, at, x, mask):
    """The other way."""
    if mask is None:
        tl.store(p + at, x)
    else:
        tl.store(p + at, x, mask=mask)


@triton.jit
def field(table, entry, NAME: tl.constexpr):
    """A number of a row of the table."""
    return tl.load(table + entry * WIDTH + NAME)


@triton.jit
def narrow(table, entry, NAME: tl.constexpr):
    """A field that fits in 32 bits, whose divisions are then no calls."""
    return tl.load(table + entry * WIDTH + NAME).to(tl.int32)


@triton.jit
def narrow_double(p):
    """An fp64 number as fp32, by its bits: some GPUs have next to no fp64."""
    bits = tl.load(p.to(tl.pointer_type(tl.int64)))
    size = ((bits & 0x7FFFFFFFFFFFFFFF) + (1 << 28)) >> 29  # exponent and 23 bits of the mantissa, rounded
    near = (size - (896 << 23)).to(tl.int32).to(tl.float32, bitcast=True)
    near = tl.where(size < (897 << 23), 0.0, tl.where(size >= (1151 << 23), float("inf"), near))
    return tl.where(bits < 0, -near, near)


@triton.jit
def number(table, entry, NAME: tl.constexpr):
    """A field that is an fp32 number by its bits."""
    return tl.load(table + entry * WIDTH + NAME).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def scalar(table, entry, NAME: tl.constexpr):
    """The fp32 number that a field points at."""
    return tl.load(address(table, entry, NAME, tl.float32, False))


@triton.jit
def load_weight(table, entry, at, mask, DTYPE: tl.constexpr, MASTER: tl.constexpr, ALIGNED: tl.constexpr):
    """In fp32; the copy counts where it still rounds to the weight, elsewhere somebody changed the weight."""
    w = get(address(table, entry, WEIGHT, DTYPE, ALIGNED), at, mask)
    if MASTER:
        master = get(address(table, entry, MASTER_, tl.float32, ALIGNED), at, mask)
        w = tl.where(master.to(DTYPE).to(tl.float32) == w, master, w)
    return w


@triton.jit
def store_weight(
    table, entry, at, mask, new, seed, number,
    DTYPE: tl.constexpr, MASTER: tl.constexpr, STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Writes and returns what was written, in the weight's format."""
    if STOCHASTIC:
        # The 16 bits that bf16 drops carry into those it keeps with their own probability.
        noise = (tl.randint(seed, number) & 0xFFFF).to(tl.int32)
        bits = (new.to(tl.int32, bitcast=True) + noise) & -65536
        finite = tl.abs(new) < float("inf")
        new = tl.where(finite, bits.to(tl.float32, bitcast=True), new)
    stored = new.to(DTYPE)
    put(address(table, entry, WEIGHT, DTYPE, ALIGNED), at, stored, mask)
    if MASTER:
        put(address(table, entry, MASTER_, tl.float32, ALIGNED), at, new, mask)
    return stored.to(tl.float32)


@triton.jit
def load_grad(
    table, live, entry, at, mask, w, factor, weight_decay,
    DTYPE: tl.constexpr, DECAYS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """In fp32, unscaled; torch's coupled weight decay where there is one."""
    p = tl.load(live + 3 * entry).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        p = tl.multiple_of(p, 16)
    g = factor * get(p, at, mask)
    return g + weight_decay * w if DECAYS else g
