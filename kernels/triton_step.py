"""The two generic kernels behind every fused step on GPUs, and what ends a tensor's step.

``singles`` steps weights that are units of their own, one block of BLOCK to a program.  ``groups`` (in
``triton_groups``) steps groups: tiles of R rows by C columns are summed and moved by one program where they fit, and
otherwise cut into parts that are summed by some programs and then moved by others.  Its programs take their tasks in
the order of a ticket and wait only for tasks with earlier tickets, so there is no deadlock however few of them run at
a time.  Whichever program finishes a tensor last advances its step count and its imbalance: no second launch, and
nothing for the host to wait for.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call, attr-defined"

from __future__ import annotations

import triton
import triton.language as tl

from symopt_kernels.triton_rules import FIELDS, SNAP, TINY, WIDTH, address, get, put

__all__ = ["singles"]

WEIGHT = tl.constexpr(FIELDS.index("weight"))
MASTER_ = tl.constexpr(FIELDS.index("master"))
FIRST = tl.constexpr(FIELDS.index("first"))
SECOND = tl.constexpr(FIELDS.index("second"))
PEAK_ = tl.constexpr(FIELDS.index("peak"))
IMBALANCE = tl.constexpr(FIELDS.index("imbalance"))
SCALE = tl.constexpr(FIELDS.index("metric_scale"))
STEP = tl.constexpr(FIELDS.index("step"))
TRIM = tl.constexpr(FIELDS.index("trim"))
SEEN = tl.constexpr(FIELDS.index("seen"))
NUMEL = tl.constexpr(FIELDS.index("numel"))
ROWS = tl.constexpr(FIELDS.index("rows"))
GROUPS = tl.constexpr(FIELDS.index("groups"))
RUN = tl.constexpr(FIELDS.index("run"))
ALIGNED = tl.constexpr(FIELDS.index("aligned"))
BEGIN = tl.constexpr(FIELDS.index("begin"))
COUNT = tl.constexpr(FIELDS.index("count"))
STRIDE = tl.constexpr(FIELDS.index("stride"))
SAMPLES = tl.constexpr(FIELDS.index("samples"))
UNITS = tl.constexpr(FIELDS.index("units"))

FASTEST = tl.constexpr(0.98)
SAMPLE = tl.constexpr(1024)  # as in reference.py; triton_launch counts the strides


@triton.jit
def field(table, entry, NAME: tl.constexpr):
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
def scalar(table, entry, NAME: tl.constexpr):
    return tl.load(address(table, entry, NAME, tl.float32, False))


@triton.jit
def unbias(step, log_beta):
    """``1 / (1 - beta**step)``: by the series of expm1, because 1 - beta loses its digits in fp32."""
    x = step * log_beta
    y = 1 + x / 12
    for i in tl.static_range(10):
        y = 1 + x * y / (11 - i)
    return 1 / tl.where(x > -1, -x * y, 1 - tl.exp(x))


@triton.jit
def settings(
    table, live, entry, lr_at, grad_scale,
    lr, fresh1, beta2, fresh2, log1, log2, eps, momentum, undamped, amplify, weight_decay, imbalance_decay,
    ADAPTIVE: tl.constexpr, MOMENTUM: tl.constexpr, CONSTRAINED: tl.constexpr, DECOUPLED: tl.constexpr,
    MAXIMIZE: tl.constexpr, TRIMMED: tl.constexpr,
):  # fmt: skip
    """What the weights of a tensor share: numbers of the direction, of the retraction, and the gradient's factor."""
    if lr_at is not None:
        lr = tl.load(lr_at)
    new, count, unbias1, unbias2 = 0, 0.0, 1.0, 1.0
    if MOMENTUM and not ADAPTIVE:
        seen = field(table, entry, SEEN)
        if seen != 0:
            new = (tl.load(seen.to(tl.pointer_type(tl.int32))) == 0).to(tl.int32)
    if ADAPTIVE:
        count = scalar(table, entry, STEP) + 1
        unbias1, unbias2 = unbias(count, log1), unbias(count, log2)
    numbers = (momentum, undamped, new, fresh1, beta2, fresh2, eps, unbias1, unbias2, count)
    inside, outside, threshold, keep, c, scale = 0.0, 0.0, -1.0, imbalance_decay, 0.0, 1.0
    if CONSTRAINED:
        c, scale = scalar(table, entry, IMBALANCE), scalar(table, entry, SCALE)
        if TRIMMED:
            trim = field(table, entry, TRIM)
            inside, outside = narrow_double(trim), narrow_double(trim + 8)
            threshold, keep = narrow_double(trim + 16), narrow_double(trim + 24)
        else:
            inside = tl.load(live + 3 * entry + 1).to(tl.int32).to(tl.float32, bitcast=True)
            place = tl.load(live + 3 * entry + 2)
            if place != 0:
                inside = tl.load(place.to(tl.pointer_type(tl.float32)))
        inside, outside = lr * inside * amplify, lr * outside * amplify
    elif DECOUPLED:
        inside = lr * weight_decay
    factor = -1.0 if MAXIMIZE else 1.0
    if grad_scale is not None:
        factor = factor / tl.load(grad_scale)
    most = tl.where(threshold < 0, float("inf"), threshold) if TRIMMED else float("inf")
    return numbers, (lr, inside, outside, threshold, c, scale, keep, most), factor


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
    p = tl.load(live + 3 * entry).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        p = tl.multiple_of(p, 16)
    g = factor * get(p, at, mask)
    return g + weight_decay * w if DECAYS else g


@triton.jit
def low_decile(key, samples):
    """The ``1 + samples // 10``-th smallest of non-negative floats given by their bits, found bit by bit."""
    found = 0
    for i in range(31):
        higher = found | (1 << (30 - i))
        below = tl.sum((key < higher).to(tl.int32), 0)
        found = tl.where(below <= samples // 10, higher, found)
    return found.to(tl.float32, bitcast=True)


@triton.jit
def finish(
    table, entry, partial, zeros, arrived, law, numbers, programs, gain,
    LAW: tl.constexpr, COUPLED: tl.constexpr, PEAK: tl.constexpr, ADAPTIVE: tl.constexpr, MOMENTUM: tl.constexpr,
    TALLY: tl.constexpr, SATURATED: tl.constexpr,
):  # fmt: skip
    """Runs once per tensor, in whichever program is its last: zeros, ``reference.imbalance_law``, the step count."""
    begin, count = narrow(table, entry, BEGIN), narrow(table, entry, COUNT)
    lane = tl.arange(0, SAMPLE)
    if TALLY:
        sums, squares = tl.zeros((SAMPLE,), tl.float32), tl.zeros((SAMPLE,), tl.float32)
        none = tl.zeros((SAMPLE,), tl.int64)
        for i in range(0, count, SAMPLE):
            at, mask = begin + i + lane, i + lane < count
            sums += tl.load(partial + at, mask=mask, other=0.0, cache_modifier=".cg")
            squares += tl.load(partial + programs + at, mask=mask, other=0.0, cache_modifier=".cg")
            none += tl.load(partial + 2 * programs + at, mask=mask, other=0.0, cache_modifier=".cg").to(tl.int64)
        tl.store(zeros + entry, tl.sum(none, 0))
        if LAW:
            c, scale, keep = law[4], law[5], law[6]
            if keep < 0:
                decay = law[1] * gain
                if COUPLED:
                    source = address(table, entry, PEAK_ if PEAK else SECOND, tl.float32, False)
                    stride, samples = field(table, entry, STRIDE), narrow(table, entry, SAMPLES)
                    which = tl.arange(0, 2 * SAMPLE)
                    v = tl.load(source + which * stride, mask=which < samples, other=0.0, cache_modifier=".cg")
                    key = law[1] / (tl.sqrt(v * numbers[8]) + numbers[6])
                    key = tl.where(key >= 0, key, float("inf"))  # as kthvalue: NaN comes last
                    key = tl.where(which < samples, key.to(tl.int32, bitcast=True), 0x7FFFFFFF)
                    decay = low_decile(key, samples)
                if SATURATED:
                    typical = 2 * tl.sum(squares, 0) / tl.maximum(tl.sum(sums, 0), TINY)
                    decay = decay / tl.maximum(scale, typical)
                rho = tl.maximum(1 - decay, 0.0)
                keep = tl.maximum(rho * rho * (rho * rho), FASTEST)
            c = c * keep
            c = tl.where(c <= SNAP * scale, 0.0, c)
            tl.store(address(table, entry, IMBALANCE, tl.float32, False), c)
    if ADAPTIVE:
        tl.store(address(table, entry, STEP, tl.float32, False), numbers[9])
    elif MOMENTUM:
        seen = field(table, entry, SEEN)
        if seen != 0:
            tl.store(seen.to(tl.pointer_type(tl.int32)), 1)
    tl.store(arrived + entry, 0)


@triton.jit
def finite(size):
    return tl.where(size < float("inf"), size, 0.0)


@triton.jit
def block(
    table, live, entry, first, numel, numbers, law, factor, weight_decay, seed, number,
    DIRECTION: tl.constexpr, RETRACTION: tl.constexpr, DTYPE: tl.constexpr, MASTER: tl.constexpr, PEAK: tl.constexpr,
    MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, TRIMMED: tl.constexpr, COUPLED: tl.constexpr,
    SATURATED: tl.constexpr, DECAYS: tl.constexpr, STOCHASTIC: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """One block of weights; returns the sums of their sizes and squares and how many are zero."""
    lane = tl.arange(0, BLOCK)
    at = first + lane
    mask = None if ALIGNED else at < numel
    w = load_weight(table, entry, at, mask, DTYPE, MASTER, ALIGNED)
    g = load_grad(table, live, entry, at, mask, w, factor, weight_decay, DTYPE, DECAYS, ALIGNED)
    update, gain = DIRECTION(table, entry, at, mask, g, numbers, MOMENTUM, NESTEROV, PEAK, ALIGNED)
    new = RETRACTION(
        table, entry, at, mask, w, update, gain, law, DTYPE, TRIMMED, COUPLED, SATURATED, DEPTH, ALIGNED
    )  # fmt: skip
    stored = store_weight(table, entry, at, mask, new, seed, number + lane, DTYPE, MASTER, STOCHASTIC, ALIGNED)
    size = finite(tl.abs(new))
    gone = stored == 0
    if not ALIGNED:
        size = tl.where(mask, size, 0.0)
        gone = gone & mask
    return tl.sum(size, 0), tl.sum(size * size, 0), tl.sum(gone.to(tl.float32), 0)


@triton.jit(do_not_specialize=["seed", "programs"])
def singles(
    table, live, owners, arrived, partial, zeros, lr_at, found_inf, grad_scale,
    lr, fresh1, beta2, fresh2, log1, log2, eps, momentum, undamped, amplify, weight_decay, imbalance_decay,
    seed, programs,
    DIRECTION: tl.constexpr, RETRACTION: tl.constexpr, DTYPE: tl.constexpr, MASTER: tl.constexpr, PEAK: tl.constexpr,
    ADAPTIVE: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, DECOUPLED: tl.constexpr,
    MAXIMIZE: tl.constexpr, CONSTRAINED: tl.constexpr, LAW: tl.constexpr, TRIMMED: tl.constexpr,
    COUPLED: tl.constexpr, SATURATED: tl.constexpr, DECAYS: tl.constexpr, STOCHASTIC: tl.constexpr,
    DEPTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """See the module."""
    if found_inf is not None:  # noqa: SIM102 (Triton must not look at None)
        if tl.load(found_inf) != 0:
            return
    program = tl.program_id(0)
    entry = tl.load(owners + program)
    numel = field(table, entry, NUMEL)
    first = (program - field(table, entry, BEGIN)) * BLOCK
    numbers, law, factor = settings(
        table, live, entry, lr_at, grad_scale,
        lr, fresh1, beta2, fresh2, log1, log2, eps, momentum, undamped, amplify, weight_decay, imbalance_decay,
        ADAPTIVE, MOMENTUM, CONSTRAINED, DECOUPLED, MAXIMIZE, TRIMMED,
    )  # fmt: skip
    number = program.to(tl.int64) * BLOCK
    whole = (field(table, entry, ALIGNED) != 0) & (tl.load(live + 3 * entry) % 16 == 0) & (first + BLOCK <= numel)
    if whole:
        size, square, gone = block(
            table, live, entry, first, numel, numbers, law, factor, weight_decay, seed, number,
            DIRECTION, RETRACTION, DTYPE, MASTER, PEAK, MOMENTUM, NESTEROV, TRIMMED, COUPLED, SATURATED, DECAYS,
            STOCHASTIC, DEPTH, BLOCK, True,
        )  # fmt: skip
    else:
        size, square, gone = block(
            table, live, entry, first, numel, numbers, law, factor, weight_decay, seed, number,
            DIRECTION, RETRACTION, DTYPE, MASTER, PEAK, MOMENTUM, NESTEROV, TRIMMED, COUPLED, SATURATED, DECAYS,
            STOCHASTIC, DEPTH, BLOCK, False,
        )  # fmt: skip
    if CONSTRAINED or ADAPTIVE or MOMENTUM:
        if CONSTRAINED:
            tl.store(partial + program, size)
            tl.store(partial + programs + program, square)
            tl.store(partial + 2 * programs + program, gone)
        tl.debug_barrier()
        before = tl.atomic_add(arrived + entry, 1, sem="acq_rel")
        if before == narrow(table, entry, COUNT) - 1:
            tl.debug_barrier()
            numbers, law, _ = settings(  # anew, so that they need no registers until here
                table, live, entry, lr_at, grad_scale,
                lr, fresh1, beta2, fresh2, log1, log2, eps, momentum, undamped, amplify, weight_decay, imbalance_decay,
                ADAPTIVE, MOMENTUM, CONSTRAINED, DECOUPLED, MAXIMIZE, TRIMMED,
            )  # fmt: skip
            finish(
                table, entry, partial, zeros, arrived, law, numbers, programs, 1.0,
                LAW, COUPLED, PEAK, ADAPTIVE, MOMENTUM, CONSTRAINED, SATURATED,
            )  # fmt: skip
