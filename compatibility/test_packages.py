"""What users install: sdist and wheel in clean environments, outside the repository, with a compiler and without."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILT = shutil.ignore_patterns(".*", "build", "dist", "out", "*.egg-info", "__pycache__", "*.so", "symopt_kernels")
NO_COMPILER = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}
STRICT = ("-I", "-W", "error", "-W", "ignore:Failed to initialize NumPy")  # torch says so where there is no NumPy
BLOCK = re.compile(r"```python\n(import torch, symopt\n.*?)```", re.S)
BATCHES = "import torch; batches = [(torch.randn(32, 784), torch.randint(10, (32,))) for _ in range(20)]\n"
STEP = """
import json, platform
net = symopt.constrain(nn.Linear(64, 64), {"weight": symopt.Sparse()})
opt = symopt.AdamW(net, backend=%r)
net(torch.ones(2, 64)).sum().backward()
opt.step()
try:
    from numpy import __version__ as numpy
    torch.ones(2).numpy()
except ImportError:
    numpy = "none"
print(json.dumps({"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy,
                  "file": symopt.__file__, "explain": symopt.explain(opt)}))
"""


def call(*command: Any, cwd: Path, **environment: str) -> str:
    """What a command prints; the environment is this one's without what points Python elsewhere."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=kept | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def environment(folder: Path, interpreter: str = sys.executable) -> Path:
    """The interpreter of a new, empty environment."""
    call(interpreter, "-m", "venv", folder, cwd=folder.parent)
    return folder / "bin" / "python"


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel made of it, both in build's own isolated environments."""
    folder = tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT, folder / "source", ignore=BUILT)
    call(sys.executable, "-m", "build", "--outdir", folder, folder / "source", cwd=folder)
    return folder


def one(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def test_the_sdist_has_sources_and_nothing_built(built: Path) -> None:
    with tarfile.open(one(built, "*.tar.gz")) as file:
        names = file.getnames()
    inside = {name.split("/", 1)[1] for name in names if "/" in name}
    assert {"kernels/native/native.cpp", "kernels/native/types.h", "docs/migration.md", "Makefile"} <= inside
    assert "tests/support/table.py" in inside
    assert not [name for name in inside if name.endswith((".so", ".pyc", ".o"))]


def test_one_wheel_serves_every_python_from_3_10_on(built: Path) -> None:
    wheel = one(built, "*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "-cp310-abi3-" in wheel.name
    assert {"symopt/py.typed", "symopt_kernels/py.typed", "symopt_kernels/native/_native.abi3.so"} <= set(names)
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"symopt", "symopt_kernels"}


CASES = {
    "wheel, no compiler, NumPy 2": ("*.whl", NO_COMPILER, "2", "native"),
    "wheel, no compiler, NumPy 1": ("*.whl", NO_COMPILER, "1", "native"),
    "wheel, no compiler, without NumPy": ("*.whl", NO_COMPILER, None, "native"),
    "sdist, compiler, NumPy 2": ("*.tar.gz", {}, "2", "native"),
    "sdist, no compiler, NumPy 1": ("*.tar.gz", NO_COMPILER, "1", "reference"),
}


@pytest.mark.parametrize("case", CASES)
def test_installed(case: str, built: Path, tmp_path: Path, request: Any, record_property: Any) -> None:
    """README's quickstart and a step, warnings being errors; then what it saved, with symopt gone."""
    pattern, compiler, numpy, backend = CASES[case]
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("numpy")]
    if (release := request.config.getoption("torch")) is not None:
        pins = [f"torch=={release}" if line.startswith("torch==") else line for line in pins]
    (tmp_path / "pins.txt").write_text("\n".join([*pins, "numpy>=1.26,<2" if numpy == "1" else "numpy>=2"]))
    python = environment(tmp_path / "venv")
    wanted = [one(built, pattern), *(["numpy"] if numpy else [])]
    call(python, "-m", "pip", "install", "-q", "-c", "pins.txt", *wanted, cwd=tmp_path, **compiler)

    (quickstart,) = BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    (tmp_path / "train.py").write_text(BATCHES + quickstart + STEP % backend, encoding="utf-8")
    said = json.loads(call(python, *STRICT, "train.py", cwd=tmp_path).splitlines()[-1])
    assert Path(said["file"]).is_relative_to(tmp_path / "venv")
    assert said["numpy"].split(".")[0] == (numpy or "none")
    missing = "weight  reference  native: the C++ extension is not built (no compiler when symopt was installed?)"
    assert (missing in said["explain"]) == (backend == "reference")
    what = (
        f"{case} ({said['numpy']}), Python {said['python']}, torch {said['torch']}: README's quickstart, {backend} step"
    )
    record_property("what", what.replace(" (none)", ""))

    call(python, "-m", "pip", "uninstall", "-q", "-y", "symopt-torch", cwd=tmp_path)
    load = "import torch; print(torch.load('small.pt', weights_only=False)(torch.ones(1, 784)).shape)"
    assert "10" in call(python, *STRICT, "-c", load, cwd=tmp_path)
    shutil.rmtree(tmp_path / "venv")


LOAD = """
import compileall, ctypes, pathlib, platform, sysconfig
site = pathlib.Path(sysconfig.get_path("purelib"))
assert all(compileall.compile_dir(site / name, quiet=1, force=True) for name in ("symopt", "symopt_kernels"))
library = ctypes.CDLL(str(site / "symopt_kernels" / "native" / "_native.abi3.so"))
print(platform.python_version(), library.symopt_instructions())
"""


def test_built_by(interpreter: str, built: Path, tmp_path: Path, record_property: Any) -> None:
    """Another Python, without torch: the sdist builds there, its compiler reads every file, both extensions load."""
    python = environment(tmp_path / "venv", interpreter)
    call(python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, one(built, "*.tar.gz"), cwd=tmp_path)
    said = []
    for wheel in (one(built, "*.whl"), one(tmp_path, "*.whl")):
        call(python, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", wheel, cwd=tmp_path)
        said.append(call(python, *STRICT, "-c", LOAD, cwd=tmp_path).split())
    assert said[0] == said[1]
    what = "the sdist builds, its extension and the wheel's load, every file compiles; nothing else, without torch"
    record_property("what", f"Python {said[0][0]}: {what}")
