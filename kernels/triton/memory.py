"""Where a tensor and its state lie: the table that the Triton kernels read, and access to what it points at."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call, attr-defined"

from __future__ import annotations

import triton
import triton.language as tl

from symopt_kernels.triton.table import FIELDS

__all__ = [
    "address",
    "field",
    "field_f32",
    "field_i32",
    "grad_address",
    "load_f32",
    "load_f64_as_f32",
    "load_grad",
    "load_weight",
    "scalar",
    "store",
    "store_weight",
    "strength",
]

WEIGHT = tl.constexpr(FIELDS.index("weight"))
MASTER_ = tl.constexpr(FIELDS.index("master"))
FIRST = tl.constexpr(FIELDS.index("first"))
SECOND = tl.constexpr(FIELDS.index("second"))
PEAK_ = tl.constexpr(FIELDS.index("peak"))
FACTOR_0 = tl.constexpr(FIELDS.index("factor_0"))
FACTOR_1 = tl.constexpr(FIELDS.index("factor_1"))
IMBALANCE = tl.constexpr(FIELDS.index("imbalance"))
METRIC_SCALE = tl.constexpr(FIELDS.index("metric_scale"))
STEP = tl.constexpr(FIELDS.index("step"))
BUDGET = tl.constexpr(FIELDS.index("budget"))
HAS_MOMENTUM = tl.constexpr(FIELDS.index("has_momentum"))
NUMEL = tl.constexpr(FIELDS.index("numel"))
ROWS = tl.constexpr(FIELDS.index("rows"))
GROUPS = tl.constexpr(FIELDS.index("groups"))
RUN = tl.constexpr(FIELDS.index("run"))
PATTERN_N = tl.constexpr(FIELDS.index("pattern_n"))
ALIGNED = tl.constexpr(FIELDS.index("aligned"))
BEGIN = tl.constexpr(FIELDS.index("begin"))
COUNT = tl.constexpr(FIELDS.index("count"))
STRIDE = tl.constexpr(FIELDS.index("stride"))
SAMPLES = tl.constexpr(FIELDS.index("samples"))
TILES = tl.constexpr(FIELDS.index("tiles"))
PARTS = tl.constexpr(FIELDS.index("parts"))
LINES = tl.constexpr(FIELDS.index("lines"))
LAG = tl.constexpr(FIELDS.index("lag"))
SCRATCH = tl.constexpr(FIELDS.index("scratch"))
COUNTERS = tl.constexpr(FIELDS.index("counters"))
CRITICAL = tl.constexpr(FIELDS.index("critical"))
SQRT_DIM = tl.constexpr(FIELDS.index("sqrt_dim"))
WEIGHTS = tl.constexpr(FIELDS.index("weights"))
MAIN = tl.constexpr(FIELDS.index("main"))
TENSORS = tl.constexpr(FIELDS.index("tensors"))
PLACES = tl.constexpr(FIELDS.index("places"))
FIRST_ORBIT = tl.constexpr(FIELDS.index("first_orbit"))
UNITS = tl.constexpr(FIELDS.index("units"))
PARAMETERS = tl.constexpr(FIELDS.index("parameters"))
UNIT_OF = tl.constexpr(FIELDS.index("unit_of"))
UNIT_BEGINS = tl.constexpr(FIELDS.index("unit_begins"))
UNIT_SLICES = tl.constexpr(FIELDS.index("unit_slices"))
UNIT_SIZES = tl.constexpr(FIELDS.index("unit_sizes"))
UNIT_SUMS = tl.constexpr(FIELDS.index("unit_sums"))
FACTOR_SQUARED = tl.constexpr(FIELDS.index("factor_squared"))
FIRST_UNBOUND = tl.constexpr(FIELDS.index("first_unbound"))
UNBOUND_SLICES = tl.constexpr(FIELDS.index("unbound_slices"))
LAW_GAIN = tl.constexpr(FIELDS.index("law_gain"))
COMBINE_BEGIN = tl.constexpr(FIELDS.index("combine_begin"))
COMBINE_COUNT = tl.constexpr(FIELDS.index("combine_count"))
WIDTH = tl.constexpr(len(FIELDS))

# Three numbers per row follow in every step: the address of the gradient, the bits of the strength or its address.
PER_STEP = tl.constexpr(3)
STRENGTH = tl.constexpr(1)
STRENGTH_ADDRESS = tl.constexpr(2)


@triton.jit
def address(table, row, FIELD: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to a tensor of a row of the table.  The hint must follow the cast: before it, it is lost."""
    p = tl.load(table + row * WIDTH + FIELD).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(p, 16) if ALIGNED else p


@triton.jit
def load_f32(p, at, mask):
    """In fp32; ``mask=None`` reads everything."""
    if mask is None:
        x = tl.load(p + at)
    else:
        x = tl.load(p + at, mask=mask, other=0.0)
    return x.to(tl.float32)


@triton.jit
def store(p, at, x, mask):
    """Write ``x``, converted to what ``p`` points at; ``mask=None`` writes everything."""
    if mask is None:
        tl.store(p + at, x)
    else:
        tl.store(p + at, x, mask=mask)


@triton.jit
def field(table, row, FIELD: tl.constexpr):
    """A number of a row of the table."""
    return tl.load(table + row * WIDTH + FIELD)


@triton.jit
def field_i32(table, row, FIELD: tl.constexpr):
    """A field that fits in 32 bits, whose divisions are then no calls."""
    return tl.load(table + row * WIDTH + FIELD).to(tl.int32)


@triton.jit
def field_f32(table, row, FIELD: tl.constexpr):
    """A field that is an fp32 number by its bits."""
    return tl.load(table + row * WIDTH + FIELD).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def scalar(table, row, FIELD: tl.constexpr):
    """The fp32 number that a field points at."""
    return tl.load(address(table, row, FIELD, tl.float32, False))


@triton.jit
def load_f64_as_f32(p):
    """An fp64 number as fp32, by its bits: some GPUs have next to no fp64."""
    bits = tl.load(p.to(tl.pointer_type(tl.int64)))
    size = ((bits & 0x7FFFFFFFFFFFFFFF) + (1 << 28)) >> 29  # exponent and 23 bits of the mantissa, rounded
    near = (size - (896 << 23)).to(tl.int32).to(tl.float32, bitcast=True)
    near = tl.where(size < (897 << 23), 0.0, tl.where(size >= (1151 << 23), float("inf"), near))
    return tl.where(bits < 0, -near, near)


@triton.jit
def strength(per_step, row):
    """The strength of a row in this step: a number, or what an address points at."""
    value = tl.load(per_step + PER_STEP * row + STRENGTH).to(tl.int32).to(tl.float32, bitcast=True)
    place = tl.load(per_step + PER_STEP * row + STRENGTH_ADDRESS)
    if place != 0:
        value = tl.load(place.to(tl.pointer_type(tl.float32)))
    return value


@triton.jit
def grad_address(per_step, row):
    """Where the gradient of a row lies in this step."""
    return tl.load(per_step + PER_STEP * row)


@triton.jit
def load_weight(table, row, at, mask, DTYPE: tl.constexpr, MASTER: tl.constexpr, ALIGNED: tl.constexpr):
    """In fp32; the copy counts where it still rounds to the weight, elsewhere somebody changed the weight."""
    w = load_f32(address(table, row, WEIGHT, DTYPE, ALIGNED), at, mask)
    if MASTER:
        master = load_f32(address(table, row, MASTER_, tl.float32, ALIGNED), at, mask)
        w = tl.where(master.to(DTYPE).to(tl.float32) == w, master, w)
    return w


@triton.jit
def store_weight(
    table, row, at, mask, new, seed, draw,
    DTYPE: tl.constexpr, MASTER: tl.constexpr, STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Writes and returns what was written, in the weight's format; ``draw`` numbers the random numbers of ``seed``."""
    if STOCHASTIC:
        # The 16 bits that bf16 drops carry into those it keeps with their own probability.
        noise = (tl.randint(seed, draw) & 0xFFFF).to(tl.int32)
        bits = (new.to(tl.int32, bitcast=True) + noise) & -65536
        finite = tl.abs(new) < float("inf")
        new = tl.where(finite, bits.to(tl.float32, bitcast=True), new)
    stored = new.to(DTYPE)
    store(address(table, row, WEIGHT, DTYPE, ALIGNED), at, stored, mask)
    if MASTER:
        store(address(table, row, MASTER_, tl.float32, ALIGNED), at, new, mask)
    return stored.to(tl.float32)


@triton.jit
def load_grad(
    table, per_step, row, at, mask, w, grad_factor, weight_decay,
    DTYPE: tl.constexpr, DECAYS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """In fp32, unscaled; torch's coupled weight decay where there is one."""
    p = grad_address(per_step, row).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        p = tl.multiple_of(p, 16)
    g = grad_factor * load_f32(p, at, mask)
    return g + weight_decay * w if DECAYS else g
