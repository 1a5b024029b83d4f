"""Packages, their folders and the optional C++ extension; everything else stands in pyproject.toml."""

import os
import shlex
from glob import glob

from setuptools import Extension, find_packages, setup

native = Extension(
    "symopt_kernels.native._native",
    ["kernels/native/native.cpp"],
    depends=sorted(glob("kernels/native/*.h")),
    # -fopenmp-simd only lets the loops be vectorized; no OpenMP runtime is linked, for torch has brought one.
    extra_compile_args=[
        *("-std=c++17", "-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
        *("-fvisibility=hidden", "-g0", "-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"),
        *shlex.split(os.environ.get("SYMOPT_CXXFLAGS", "")),
    ],
    language="c++",
    optional=True,  # without a compiler the package installs and says so
    py_limited_api=True,
)

KERNELS = ["symopt_kernels", *(f"symopt_kernels.{name}" for name in find_packages("kernels"))]

setup(
    packages=[*find_packages(include=["symopt", "symopt.*"]), *KERNELS],
    # Top-level `kernels` is another distribution's import name, hence folder and package differ.
    package_dir={"symopt_kernels": "kernels"},
    include_package_data=False,
    package_data={"symopt": ["py.typed"], "symopt_kernels": ["py.typed"]},
    ext_modules=[native],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
