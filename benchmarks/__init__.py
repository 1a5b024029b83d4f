"""Benchmarks of symopt's native CPU kernels: ``python -m benchmarks --help``; what is measured and how: README.md."""
