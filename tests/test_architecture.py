"""The shape of the code: imports point downward, files stay short, classes are abstract or final, names documented."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re
import statistics
import subprocess
import sys
from abc import ABC
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import symopt
import symopt_kernels
from support.cases import cases

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (symopt, symopt_kernels)

# Lowest first; every file may import from lines above its own, and from its own line's package.
LAYERS = (
    "symopt_kernels",
    "symopt.constraints",
    "symopt.backends symopt.budgets.selection symopt.budgets",
    "symopt.optim",
    "symopt.module",
    "symopt.recipes",
    "symopt.folding",
    "symopt.report symopt.certify",
    "symopt",
)
TOP = "module recipes folding report certify"
KNOW_MODULES = [f"symopt.{name}" for name in TOP.split()]
REQUIRED = "constrain release Sparse GroupSparse SGD Adam AdamW fold resize report".split()


def sources() -> dict[str, Path]:
    """Qualified module name -> file, of both packages, as installed."""
    found = {}
    for package in PACKAGES:
        folder = Path(package.__path__[0])
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package.__name__, *(p for p in parts if p != "__init__")))] = path
    return found


SOURCES = sources()


def tree(name: str) -> ast.Module:
    return ast.parse(SOURCES[name].read_text(encoding="utf-8"))


def imported(name: str) -> Iterator[str]:
    """Everything a file imports anywhere, as the longest qualified name that is a file of ours, else as written."""
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                ours = node.module is not None and node.module.split(".")[0] in ("symopt", "symopt_kernels")
                yield full if full in SOURCES or not ours else str(node.module)


def ours(name: str) -> set[str]:
    return {target for target in imported(name) if target.split(".")[0] in ("symopt", "symopt_kernels")}


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def layer(name: str) -> int:
    if name == "symopt":
        return len(LAYERS) - 1
    for rank, line in enumerate(LAYERS[:-1]):
        if any(within(name, package) for package in line.split()):
            return rank
    raise AssertionError(f"{name} is in no layer; give it its place in LAYERS")


# ------------------------------------------------------------------------------------------------------------ imports


def test_all_sources_are_seen() -> None:
    assert {"symopt", "symopt.optim.base", "symopt.constraints.sparse", "symopt_kernels.reference"} <= SOURCES.keys()
    assert "symopt.optim.registry" in ours("symopt.optim.base") and "symopt.optim.base" in ours("symopt.optim.adam")


@cases(name=SOURCES)
def test_imports_point_downward(name: str) -> None:
    for target in ours(name):
        assert layer(target) <= layer(name), f"{name} imports {target} from above"
        assert target != "symopt", f"{name} imports the package's public names, which are above it"


def test_imports_have_no_cycles() -> None:
    # Layers order packages; inside one, and between a package and its __init__, order is absence of cycles.
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"cycle: {' -> '.join((*path, name))}"
        if name not in done:
            for target in ours(name) - {name}:
                visit(target, (*path, name))
            done.add(name)

    for name in SOURCES:
        visit(name, ())
    assert done == SOURCES.keys()


@cases(name=SOURCES)
def test_only_the_top_knows_modules(name: str) -> None:
    if any(within(name, top) for top in KNOW_MODULES):
        return
    for target in imported(name):
        assert not within(target, "torch.nn"), f"{name} imports {target}"
    for node in ast.walk(tree(name)):
        used = isinstance(node, ast.Attribute) and node.attr == "nn"
        assert not (used and isinstance(node.value, ast.Name) and node.value.id == "torch"), f"{name} uses torch.nn"


def parameters(name: str) -> Iterator[tuple[str, str, str]]:
    """Function, parameter and annotation of every parameter in a file."""
    for node in ast.walk(tree(name)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
                yield node.name, arg.arg, "" if arg.annotation is None else ast.unparse(arg.annotation)


OPTIMIZER, CONSTRAINT = ("optimizer", "opt"), ("constraint", "constraints")


def test_nothing_below_the_optimizers_is_handed_one() -> None:
    """A call up is an import up that the imports do not show."""
    below = [name for name in SOURCES if layer(name) < layer("symopt.optim") and name != "symopt.backends"]
    assert [(name, *p) for name in below for p in parameters(name) if p[1] in OPTIMIZER] == []
    assert any(p[1] in OPTIMIZER for p in parameters("symopt.report"))


def test_optimizers_and_constraints_have_a_type() -> None:
    found = [(name, *p) for name in SOURCES for p in parameters(name) if p[1] in OPTIMIZER + CONSTRAINT]
    assert [entry for entry in found if "Any" in entry[3]] == []
    assert len(found) > 20


MOST_ANY, MOST_IGNORES = 59, 10


def test_few_types_are_left_open() -> None:
    names = [node for name in SOURCES for node in ast.walk(tree(name)) if isinstance(node, ast.Name)]
    assert sum(node.id == "Any" for node in names) <= MOST_ANY
    texts = [path.read_text(encoding="utf-8") for path in SOURCES.values()]
    assert sum(text.count("# type: ignore") for text in texts) <= MOST_IGNORES


@cases(name=[n for n in SOURCES if within(n, "symopt_kernels")])
def test_kernels_know_tensors_and_numbers_only(name: str) -> None:
    allowed = set(sys.stdlib_module_names) | {"torch", "triton", "symopt_kernels"}
    assert {target.split(".")[0] for target in imported(name)} <= allowed
    assert not any(within(target, part) for target in imported(name) for part in ("torch.nn", "torch.optim"))


def test_importing_symopt_needs_only_torch() -> None:
    program = "import sys, symopt; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    run = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    assert "symopt" in loaded and not loaded & {"matplotlib", "rich", "mlxtend", "sklearn", "pytest", "hypothesis"}


# ------------------------------------------------------------------------------------------------------------- sizes


def library() -> dict[str, str]:
    """What both packages are made of, in both languages."""
    folders = [ROOT / name for name in ("symopt", "kernels")]
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".cpp", ".h")]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sorted(files)}


def test_files_are_short() -> None:
    lengths = {name: len(text.splitlines()) for name, text in library().items()}
    assert {name: n for name, n in lengths.items() if n > 450} == {}
    assert statistics.median(lengths.values()) <= 150


# ----------------------------------------------------------------------------------------------------------- classes


def all_modules() -> list[ModuleType]:
    # Not triton's: it needs triton; its classes would show up where it is installed.
    return [importlib.import_module(name) for name in SOURCES if "triton" not in name]


def classes() -> dict[str, type]:
    return {
        f"{module.__name__}.{name}": cls
        for module in all_modules()
        for name, cls in vars(module).items()
        if inspect.isclass(cls) and cls.__module__ == module.__name__
    }


def is_final(cls: type) -> bool:
    """Before Python 3.11 ``final`` leaves no mark on what it decorates."""
    return "@final" in inspect.getsource(cls).partition("class ")[0].split()


def test_classes_are_abstract_or_final() -> None:
    hierarchies = {name: cls for name, cls in classes().items() if issubclass(cls, ABC)}
    assert {"symopt.constraints.base.Constraint", "symopt.optim.sgd.SGD"} <= hierarchies.keys()
    for name, cls in hierarchies.items():
        final = is_final(cls)
        assert inspect.isabstract(cls) != final, f"{name} is {'both' if final else 'neither'} abstract and final"


def test_final_classes_have_no_subclasses() -> None:
    for name, cls in classes().items():
        for base in cls.__mro__[1:]:
            ours = base.__module__.startswith("symopt")
            assert not (ours and is_final(base)), f"{name} derives from {base.__name__}, which is final"


# ------------------------------------------------------------------------------------------------------ public names


def test_init_has_no_logic() -> None:
    first, *rest = tree("symopt").body
    assert isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    assigned = []
    for node in rest:
        if isinstance(node, ast.Assign):
            (target,) = node.targets
            assert isinstance(target, ast.Name)
            ast.literal_eval(node.value)
            assigned.append(target.id)
        else:
            assert isinstance(node, ast.ImportFrom), ast.unparse(node)
    assert sorted(assigned) == ["__all__", "__version__"]


def test_all_is_complete_and_public() -> None:
    assert len(set(symopt.__all__)) == len(symopt.__all__)
    imports = {a.name for node in tree("symopt").body if isinstance(node, ast.ImportFrom) for a in node.names}
    assert set(symopt.__all__) == imports
    assert set(REQUIRED) <= imports
    assert [name for name in symopt.__all__ if name.startswith("_")] == []


@cases(name=SOURCES)
def test_every_module_says_what_it_is_for(name: str) -> None:
    assert ast.get_docstring(tree(name))
    module = importlib.import_module(name)
    assert [n for n in getattr(module, "__all__", []) if not hasattr(module, n)] == []


def callables() -> list[str]:
    """What users call: every public function, and every public class they can make an instance of."""
    public = {name: getattr(symopt, name) for name in symopt.__all__}
    return [n for n, x in public.items() if inspect.isfunction(x) or (inspect.isclass(x) and not inspect.isabstract(x))]


@cases(name=sorted({*REQUIRED, *callables()}))
def test_public_names_are_documented_with_an_example(name: str) -> None:
    thing = getattr(symopt, name)
    assert callable(thing), f"symopt.{name} is a {type(thing).__name__}"
    doc = inspect.getdoc(thing) or ""
    assert doc and doc.splitlines()[0].rstrip().endswith((".", ":")), "starts with a sentence"
    examples = doctest.DocTestParser().get_examples(doc)
    assert any(name in example.source for example in examples) and any(example.want for example in examples)
    assert "Example:" in doc


@cases(name=[n for n in symopt.__all__ if not inspect.ismodule(getattr(symopt, n))])
def test_public_names_come_from_where_they_are_public(name: str) -> None:
    thing = getattr(symopt, name)
    assert thing.__doc__ and thing.__module__.startswith("symopt.")
    assert name in importlib.import_module(thing.__module__).__all__


# ----------------------------------------------------------------------------------------------------------- the tree


def test_version_is_said_once() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'^dynamic = \["version"\]$', project, re.M)
    assert re.search(r'^version = \{ attr = "symopt.__version__" \}$', project, re.M)
    (name,) = re.findall(r'^name = "(.*)"$', project, re.M)
    assert version(name) == symopt.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", symopt.__version__)


def tracked() -> dict[str, str]:
    listed = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    texts = {}
    for name in listed.stdout.decode().split("\0"):
        path = ROOT / name
        if name and path.is_file() and b"\0" not in (data := path.read_bytes()):
            texts[name] = data.decode("utf-8")
    return texts


TRACKED = tracked()


def lines_with(pattern: str) -> list[str]:
    wanted = re.compile(pattern)
    return [f"{f}:{i}: {line}" for f, text in TRACKED.items() for i, line in enumerate(text.splitlines(), 1)
            if wanted.search(line)]  # fmt: skip


def test_nothing_is_left_to_do() -> None:
    assert {"pyproject.toml", "symopt/__init__.py", "tests/test_architecture.py"} <= TRACKED.keys()
    assert lines_with(r"\b(TO" r"DO|FIX" r"ME|XX" r"X|HA" r"CK)\b") == []


SLASH = "/"


def test_no_path_of_one_machine() -> None:
    # After a letter, dot or slash it is the end of a relative path or of an address.
    pattern = r"(?<![\w.~/*-])/(home|root|work|Users|tmp|mnt|scratch|private|var/folders)/\w|\b[A-Z]:\\(Users|work)"
    # Put together here, so that this file is not a finding itself; the formatter joins adjacent literals.
    samples = (f"open('{SLASH}home/me')", f"cd {SLASH}work/x", f"C:{chr(92)}Users")
    assert all(re.search(pattern, text) for text in samples)
    assert lines_with(pattern) == []


def test_text_files_are_clean() -> None:
    assert lines_with(r"[ \t]+$|\r$|^(<{7}|>{7}|={7}$)") == []
    assert [name for name, text in TRACKED.items() if text and not text.endswith("\n")] == []


def test_the_readme_of_the_tests_has_every_file() -> None:
    text = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.py)`", text)
    files = {
        name.removeprefix("tests/") for name in TRACKED if re.match(r"tests/(.*/)?test_\w+\.py|tests/support/", name)
    }
    assert set(named) == files - {"support/__init__.py"} and len(named) == len(set(named))


def test_tests_share_through_support_only() -> None:
    for name, text in TRACKED.items():
        if name.startswith("tests/") and name.endswith(".py"):
            modules = re.findall(r"^(?:from|import) ([\w.]+)", text, re.M)
            assert not [
                m for m in modules if m.startswith(("test_", "tests", "triton_")) or "_cases" in m.split(".")[0]
            ]
