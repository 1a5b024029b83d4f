"""Packages, their folders and the optional C++ extension; everything else stands in pyproject.toml."""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

MORE_FLAGS = shlex.split(os.environ.get("SYMOPT_CXXFLAGS", ""))

native = Extension(
    "symopt_kernels.native._native",
    sorted(glob("kernels/native/*.cpp")),
    depends=sorted(glob("kernels/native/*.h")),
    # -fopenmp-simd only lets the loops be vectorized; no OpenMP runtime is linked, for torch has brought one.
    extra_compile_args=[
        *("-std=c++17", "-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
        *("-fvisibility=hidden", "-g0", "-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"),
        *MORE_FLAGS,
    ],
    extra_link_args=MORE_FLAGS,
    language="c++",
    optional=True,  # without a compiler the package installs and says so
    py_limited_api=True,
)


class Build(build_ext):
    """Compiles sources side by side, and not at all what the folder ``build/native`` has from an earlier time."""

    def build_extension(self, ext):
        built = Path(self.get_ext_fullpath(ext.name))
        built.unlink(missing_ok=True)  # it may be of other sources or flags, and compiling fail
        kept = Path("build", "native", self.fingerprint(ext), built.name)
        if not kept.exists():
            self.compiler.compile = side_by_side(self.compiler.compile)
            super().build_extension(ext)
            kept.parent.mkdir(parents=True, exist_ok=True)
            part = kept.with_suffix(f".{os.getpid()}")  # whoever builds at the same time sees all of it or nothing
            shutil.copy2(built, part)
            part.replace(kept)
        built.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(kept, built)

    def fingerprint(self, ext):
        """Of everything that goes into the library: sources, headers, flags and compiler."""
        commands = [getattr(self.compiler, name, None) for name in ("compiler_so", "compiler_so_cxx", "linker_so_cxx")]
        known = [platform.platform(), commands, ext.extra_compile_args, ext.extra_link_args]
        for command in commands:
            try:
                known.append(subprocess.run([command[0], "--version"], capture_output=True, check=True).stdout)
            except (OSError, TypeError, subprocess.CalledProcessError):
                known.append(None)
        known += [(path, Path(path).read_bytes()) for path in sorted([*ext.sources, *ext.depends])]
        return hashlib.sha256(repr(known).encode()).hexdigest()[:16]


def side_by_side(compile_all):
    """A compiler's method that takes one source per processor at a time."""

    def compile_each(sources, **options):
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda source: compile_all([source], **options), sources))
        return [name for names in objects for name in names]

    return compile_each


KERNELS = ["symopt_kernels", *(f"symopt_kernels.{name}" for name in find_packages("kernels"))]

setup(
    packages=[*find_packages(include=["symopt", "symopt.*"]), *KERNELS],
    # Top-level `kernels` is another distribution's import name, hence folder and package differ.
    package_dir={"symopt_kernels": "kernels"},
    include_package_data=False,
    package_data={"symopt": ["py.typed"], "symopt_kernels": ["py.typed"]},
    ext_modules=[native],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
