"""One meaning, one word: names that were given up stay away, in every language of the repository."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from support.cases import cases

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("symopt", "kernels", "tests", "benchmarks")

# Word -> what it is called now.  As a whole identifier; `Tensor.narrow`, `itertools.product` and the like are others'.
RETIRED = {
    "here": "native_slots",
    "there": "triton_slots",
    "held": "binding, parameters",
    "members": "parameters",
    "together": "binding",
    "inside": "strength_kept",
    "outside": "strength_pruned",
    "keep": "imbalance_factor, pattern_n",
    "of": "pattern_m",
    "losers": "nm_pruned_mask",
    "GENTLE": "MAX_RELATIVE_DECAY",
    "SMALL": "LARGE_BUDGET",
    "FASTEST": "MIN_IMBALANCE_FACTOR",
    "MARGIN": "AUTO_STRENGTH_MARGIN",
    "MEMORY": "CRITICAL_EMA",
    "FLOOR": "CRITICAL_FLOOR",
    "Law": "StepConstants",
    "law": "StepConstants",
    "straight": "gradients_aligned",
    "narrow": "field_i32",
    "turn_over": "transpose",
    "speed": "step_scale",
    "forth": "the direction in full",
    "lost": "shrink",
    "mirror": "plane_step, reflect",
    "cut": "partition",
    "breathe": "cpu_relax",
    "each": "gate_per_orbit, one gate per index",
    "fixed": "is_plane",
    "joint": "binds_many",
    "Plan": "BudgetPlan, LaunchPlan, FoldPlan",
}
# In any identifier, between underscores or capitals.
NOWHERE = {
    "bond": "binding",
    "bundles": "bindings",
    "trim": "budget",
    "trimmed": "budget",
    "mourn": "warn_dead_tensors",
    "spread": "sqrt_dim_per_gate",
    "pace": "gate_decay",
    "charge": "strength_multiplier",
    "loudness": "per_coordinate_factor",
}
# English words, public arguments and other libraries' names, where they mean what they say.
ALLOWED = {
    "keep": ("symopt/", "tests/", "benchmarks/"),  # GroupSparse(keep=...), and what a selection keeps
    "law": ("tests/", "benchmarks/"),  # a formula of the docs
    "cut": ("symopt/folding/", "symopt/optim/lowrank/", "tests/", "benchmarks/"),  # parameters and ranks are
    "inside": ("symopt/module/", "tests/"),
    "outside": ("tests/",),
    "mirror": ("symopt/constraints/", "tests/"),  # the constraint's verb
    "members": ("symopt/constraints/", "tests/"),  # of an orbit
    "fixed": ("symopt/folding/", "kernels/triton/", "tests/"),  # sizes, arguments
    "trim": ("benchmarks/",),  # malloc_trim
    "each": ("tests/", "benchmarks/"),
    "held": ("benchmarks/",),
    "spread": ("tests/", "benchmarks/"),
    "SMALL": ("tests/", "benchmarks/"),
    "there": ("tests/",),
    "straight": ("tests/",),
    "together": ("tests/",),
    "lost": ("tests/",),
    "of": ("symopt/", "kernels/native/", "kernels/triton/", "kernels/orbits.py", "tests/", "benchmarks/"),
}


def in_python(text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, (ast.arg, ast.keyword)) and node.arg:
            yield node.arg
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name


def in_cpp(text: str) -> Iterator[str]:
    code = re.sub(r"//[^\n]*|/\*.*?\*/|\"(\\.|[^\"\\\n])*\"|^\s*#\s*include[^\n]*", " ", text, flags=re.S | re.M)
    return iter(re.findall(r"[A-Za-z_]\w*", code))


def retired(path: str, names: Iterator[str]) -> set[str]:
    found = set()
    for name in names:
        parts = re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])", name)
        words = {name} & RETIRED.keys() | {part.lower() for part in parts} & NOWHERE.keys()
        found |= {word for word in words if not path.startswith(ALLOWED.get(word, ("-",)))}
    return found


def offences() -> dict[str, set[str]]:
    found = {}
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*")):
            read = {".py": in_python, ".cpp": in_cpp, ".h": in_cpp}.get(file.suffix)
            if read is not None:
                path = file.relative_to(ROOT).as_posix()
                found[path] = retired(path, read(file.read_text(encoding="utf-8")))
    assert len(found) > 100
    return found


def test_retired_words_stay_away() -> None:
    found = {
        path: {word: (RETIRED | NOWHERE)[word] for word in sorted(words)} for path, words in offences().items() if words
    }
    assert found == {}


@cases(text=["held = 1", "x.held", "f(held=1)", "def held(): pass", "class held: pass", "def f(held): pass"])
def test_a_retired_word_is_noticed_in_python(text: str) -> None:
    assert retired("symopt/x.py", in_python(text)) == {"held"}
    assert retired("symopt/x.py", in_python(text.replace("held", "binding"))) == set()
    assert retired("symopt/x.py", in_python(text.replace("held", "_TrimEntry"))) == {"trim"}


def test_a_retired_word_is_noticed_in_cpp() -> None:
    assert retired("kernels/x.h", in_cpp("float lost = 0;")) == {"lost"}
    assert retired("kernels/x.h", in_cpp('int x; // lost\n/* law */ "there"')) == set()


def test_exceptions_are_of_words_in_the_list() -> None:
    assert ALLOWED.keys() <= RETIRED.keys() | NOWHERE.keys()
