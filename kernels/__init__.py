"""Numerical kernels of symopt: tensors and numbers only, no modules, no optimizers.

``reference`` is the readable definition of every step; anything faster is tested against it.
"""
