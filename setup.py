"""Packages and their folders; everything else stands in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["symopt", "symopt.*"]), "symopt_kernels"],
    # Top-level `kernels` is another distribution's import name, hence folder and package differ.
    package_dir={"symopt_kernels": "kernels"},
    package_data={"symopt": ["py.typed"], "symopt_kernels": ["py.typed", "*.cpp"]},
)
