"""Machine code of the fused steps, compiled for GPUs that need not be there: ``make sass``.

Every variant is compiled for sm_80, sm_90, sm_100 and gfx942; for NVIDIA's the code is disassembled by the
``cuobjdump`` in Triton's own wheel and counted.  Only weights, gradients and state are read or written in 128 bits.
Accesses of a block stand in the code once, so their number times 16 bytes over the weights of a thread is what a
weight moves.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from symopt_kernels.triton import launch as triton_launch

__all__ = ["TARGETS", "VARIANTS", "Code", "Variant", "build", "traffic"]

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")

_POINTERS = {
    **dict.fromkeys(("table", "per_step", "zeros"), "*i64"),
    **dict.fromkeys(("owners", "arrived", "ticket", "counters"), "*i32"),
    **dict.fromkeys(("partial", "scratch", "gates"), "*fp32"),
}


@dataclass(frozen=True)
class Variant:
    """One launch of a bucket: what ``triton_launch`` specialises a kernel by."""

    direction: str
    retraction: str
    dtype: str = "float32"
    master: bool = False
    momentum: bool = True
    peak: bool = False
    budgeted: bool = False
    form: tuple[Any, ...] = (2,)
    stochastic: bool = False
    kernel: str | None = None
    """Which of several launches."""

    @property
    def key(self) -> tuple[Any, ...]:
        flags = (self.master, self.peak, self.momentum, self.budgeted)
        return (self.retraction, self.dtype, *flags, self.form)

    @property
    def aligned(self) -> bool:
        """Whether all its accesses are of 128 bits."""
        if self.retraction == "units":
            return all(aligned and not unbound for *_, unbound, aligned in self.form)
        return bool(self.form[-1])

    def __str__(self) -> str:
        """As a row of the table."""
        words = [self.direction if self.momentum else "sgd, no momentum", self.retraction]
        if self.retraction == "group":
            words.append("x".join(map(str, self.form[:2])) + f" by {self.form[2]}")
        elif self.retraction == "orbit":
            two_copies, gate_per_orbit, automatic, gathered, _ = self.form
            words.append("gathered" if gathered else "two copies" if two_copies else "more copies")
            words += ["elementwise"] * gate_per_orbit + ["automatic"] * automatic + [str(self.kernel)]
        elif self.retraction in ("centred", "basis"):
            words += ["x".join(map(str, self.form[:2])) + f" by {self.form[2]}"] * (self.retraction == "centred")
            words.append(str(self.kernel))
        elif self.retraction == "units":
            (r, c, p, unbound, _), *_ = self.form
            words += [f"{r}x{c} by {p}"] * (self.kernel != "combine_units") + ["some without a unit"] * unbound
            words.append(str(self.kernel))
        elif self.form != (2,):
            words.append(str(self.form[0]))
        words += [self.dtype + "+master" * self.master + "+stochastic" * self.stochastic]
        return ", ".join(words + ["amsgrad"] * self.peak + ["budget"] * self.budgeted)


# Two copies, a gate each, automatic, gathered, aligned.
_TIE = (True, False, True, False, True)
_MANY, _EACH, _EACH_AUTOMATIC = (False, *_TIE[1:]), (True, True, False, False, True), (True, True, True, False, True)
_GATHERED, _GATHERED_EACH = (False, False, True, True, False), (False, True, True, True, False)


def _ties() -> Iterator[Variant]:
    for direction in ("sgd", "adam", "adamw"):
        for kernel in ("survey_orbits", "move_orbits"):
            yield Variant(direction, "orbit", form=_TIE, kernel=kernel)
        yield Variant(direction, "orbit", form=_EACH, kernel="move_orbits")
    yield Variant("adamw", "orbit", form=_TIE, kernel="snap_orbits")
    for kernel in ("survey_orbits", "move_orbits"):
        yield Variant("adamw", "orbit", peak=True, form=_TIE, kernel=kernel)
        yield Variant("adamw", "orbit", form=_MANY, kernel=kernel)
        yield Variant("adam", "orbit", form=_GATHERED, kernel=kernel)
        yield Variant("adam", "orbit", "bfloat16", master=True, form=_TIE, kernel=kernel)
    for form in (_EACH_AUTOMATIC, _GATHERED_EACH):
        yield Variant("adam", "orbit", form=form, kernel="move_orbits")
    for form in (_EACH, (False, *_EACH[1:])):
        yield Variant("adam", "orbit", "bfloat16", master=True, form=form, kernel="move_orbits")


def _coordinates() -> Iterator[Variant]:
    for direction in ("sgd", "adam", "adamw"):
        row = (*triton_launch.tile(1, 4096), 1, True, True)
        for kernel in ("survey_means", "combine_coordinates", "move_means"):
            yield Variant(direction, "centred", form=row, kernel=kernel)
        for kernel in ("survey_basis", "combine_coordinates", "move_basis"):
            yield Variant(direction, "basis", form=(2, 1024, True, True), kernel=kernel)
    column = (*triton_launch.tile(4096, 1), 32, True, True)
    for kernel in ("survey_means", "combine_coordinates", "move_means"):
        yield Variant("adamw", "centred", peak=kernel == "combine_coordinates", form=column, kernel=kernel)
        yield Variant("adamw", "centred", "bfloat16", master=True, form=row, kernel=kernel)


def _tiles() -> Iterator[tuple[Any, ...]]:
    for rows, run in ((4096, 1), (512, 9), (1, 100), (1, 1000), (1, 4096)):
        yield (*triton_launch.tile(rows, run), True)


def _units() -> Iterator[Variant]:
    row, column = ((*triton_launch.tile(*shape), False, True) for shape in ((1, 4096), (4096, 1)))
    for direction in ("sgd", "adam", "adamw"):
        for kernel in ("survey_units", "combine_units", "move_units"):
            yield Variant(direction, "units", form=(row,), kernel=kernel)
    unbound = ((*row[:3], True, False),)
    yield Variant("adam", "units", peak=True, form=(row,), kernel="combine_units")
    yield Variant("adam", "units", "bfloat16", master=True, peak=True, form=unbound, kernel="survey_units")
    yield Variant("adamw", "units", budgeted=True, form=(row,), kernel="combine_units")
    for kernel in ("survey_units", "move_units"):
        yield Variant("adamw", "units", form=(column,), kernel=kernel)
        yield Variant("adamw", "units", "bfloat16", master=True, form=(row,), kernel=kernel)
        yield Variant("adamw", "units", form=((*triton_launch.tile(1, 1), True, False),), kernel=kernel)
        yield Variant("adamw", "units", form=unbound, kernel=kernel)


VARIANTS = (
    *(Variant(d, r) for d in ("sgd", "adam", "adamw") for r in ("plain", "sparse", "sparse_free")),
    *(Variant("lion", r) for r in ("plain", "sparse")),
    Variant("lion", "nm", budgeted=True, form=(4,)),
    Variant("sgd", "sparse", momentum=False),
    Variant("adamw", "sparse", peak=True),
    Variant("adamw", "sparse", budgeted=True),
    Variant("adamw", "nm", budgeted=True, form=(4,)),
    Variant("adamw", "sparse_deep", form=(3,)),
    Variant("adamw", "sparse_deep", form=(4,)),
    *(Variant("adamw", "sparse", dtype, master=m) for dtype in ("bfloat16", "float16") for m in (True, False)),
    Variant("adamw", "sparse", "bfloat16", stochastic=True),
    Variant("adamw", "plain", "bfloat16"),
    *(Variant("adamw", "group", form=form) for form in _tiles()),
    *(Variant(d, "group", form=(*triton_launch.tile(1, 4096), True)) for d in ("sgd", "adam")),
    Variant("adamw", "group", "bfloat16", master=True, form=(*triton_launch.tile(1, 4096), True)),
    *_ties(),
    *_coordinates(),
    *_units(),
)


@dataclass(frozen=True)
class Code:
    """What a kernel compiled to.  Bytes are per weight; None where the target is not disassembled."""

    registers: int | None
    stack: int | None
    calls: int
    doubles: int
    read: float | None
    written: float | None
    instructions: int

    @property
    def resident(self) -> int | None:
        """Threads that the registers of an NVIDIA multiprocessor (64 K of them) have room for, of 2048."""
        return None if self.registers is None else min(2048, 65536 // (-(-self.registers // 8) * 8) // 256 * 256)


def traffic(v: Variant) -> tuple[int, int]:
    """Bytes that the formulas must read and write per weight.

    The code of groups holds both ways to step one and counts both: in one pass, and summed first, then moved, which
    reads weight and first moment again.
    """
    size = 4 if v.dtype == "float32" else 2
    state = 0 if not v.momentum else 4
    if v.retraction == "orbit":  # of two copies, which share a second moment
        weight, second = size + 4 * v.master, 0 if v.direction == "sgd" else 2
        moments = state + second * (1 + v.peak)
        if v.kernel == "snap_orbits":
            return weight, weight
        if v.kernel == "survey_orbits":
            return weight + size + moments, moments
        if v.form[1]:
            return weight + size + moments, weight + moments
        return weight + (state or size) + second, weight
    if v.retraction in ("centred", "basis"):  # one second moment for many; of the basis one direction
        weight, basis = size + 4 * v.master, 4 * (v.retraction == "basis")
        if v.kernel == "combine_coordinates":
            return 0, 0
        if str(v.kernel).startswith("survey"):
            return weight + size + state + basis, state
        return weight + (state or size) + basis, weight
    if v.retraction == "units":  # one second moment for many
        weight = size + 4 * v.master
        if v.kernel == "combine_units":
            return 0, 0
        return (weight + size + state, state) if v.kernel == "survey_units" else (weight + (state or size), weight)
    if v.direction not in ("sgd", "lion") and v.retraction != "group":
        state += 4 + 4 * v.peak
    factors = 8 if v.retraction == "sparse_free" else 0
    own = size + 4 * v.master + state + factors
    if v.retraction != "group":
        return own + size, own
    return 2 * (own + size) + (own if v.momentum else own + size), 2 * own


def build(v: Variant, target: str) -> Code:
    """Compile a variant and count its instructions."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from symopt_kernels.triton.constants import ADDRESSES, LaunchSettings

    launches = triton_launch.launches(v.key, v.direction, stochastic=v.stochastic)
    launch = next(one for one in launches if v.kernel in (None, one.kernel.__name__))
    kernel, fixed, options = launch.kernel, launch.fixed, dict(launch.options)
    signature: dict[str, Any] = {}
    constant: dict[Any, Any] = dict(fixed)
    hints: dict[tuple[int, ...], Any] = {}
    for i, name in enumerate(kernel.arg_names):
        if name in _POINTERS:
            signature[name], hints[(i,)] = _POINTERS[name], [["tt.divisibility", 16]]
        elif name in ("seed", "programs"):
            signature[name] = "i32"
        elif name == "given":
            signature[name] = LaunchSettings(
                *["constexpr"] * ADDRESSES, *["fp32"] * (len(LaunchSettings._fields) - ADDRESSES)
            )
            constant |= {(i, j): None for j in range(ADDRESSES)}
        else:
            signature[name] = "constexpr"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constant, attrs=hints)
    if target.startswith("gfx"):
        options.pop("maxnreg", None)
        text = triton.compile(source, target=GPUTarget("hip", target, 64), options=options).asm["amdgcn"]
        return _amd(text)
    made = triton.compile(source, target=GPUTarget("cuda", int(target.removeprefix("sm_")), 32), options=options)
    size = fixed["BLOCK"] if "BLOCK" in fixed else fixed.get("R", 1) * fixed.get("C", 1)
    if v.retraction == "orbit":
        size *= 2
    return _nvidia(made.asm["cubin"], size / (32 * options["num_warps"]))


def _amd(text: str) -> Code:
    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s*(\d+)", text)
        return int(found[1]) if found else 0

    ops = re.findall(r"^\s+([vs]_\w+|global_\w+|flat_\w+|scratch_\w+|buffer_\w+|ds_\w+)", text, re.M)
    calls = sum(op.startswith("s_swappc") for op in ops)
    doubles = sum(bool(re.match(r"v_(?!cvt)\w*_f64", op)) for op in ops)
    spills = number("vgpr_spill_count") + number("sgpr_spill_count") + number("private_segment_fixed_size")
    return Code(number("vgpr_count"), spills, calls, doubles, None, None, len(ops))


def _nvidia(cubin: bytes, per_thread: float) -> Code:
    import triton

    tool = str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def dump(option: str) -> str:
            return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout

        usage, text = dump("-res-usage"), dump("-sass")
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    ops = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)", text, re.M))

    def total(pattern: str) -> int:
        return sum(n for op, n in ops.items() if re.match(pattern, op))

    # A subroutine returns; ptxas also writes calls to the next instruction, which do not.
    # Partial sums and counters are STRONG or narrow.
    read, written = total(r"LDG\.E\.128$"), total(r"STG\.E\.128$")
    return Code(
        registers=int(found[1]),
        stack=int(found[2]) + total(r"STL|LDL"),
        calls=total(r"RET\.REL"),
        doubles=total(r"D(ADD|MUL|FMA|SETP|MNMX)|F2F.*F64"),
        read=read * 16 / per_thread,
        written=written * 16 / per_thread,
        instructions=sum(ops.values()),
    )


def main(arguments: Sequence[str]) -> None:
    """Print the table as Markdown; words select the rows that contain them all."""
    heads = "step,target,registers,spills,calls,fp64,bytes read,written,threads per SM,instructions".split(",")
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for v in VARIANTS:
        if not all(word in str(v) for word in arguments):
            continue
        for target in TARGETS:
            code = build(v, target)
            cells = [code.registers, code.stack, code.calls, code.doubles, code.read, code.written]
            shown = ["" if x is None else f"{x:g}" for x in cells]
            resident = "" if target.startswith("gfx") else str(code.resident)
            print(f"| {v} | {target} | {' | '.join(shown)} | {resident} | {code.instructions} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
