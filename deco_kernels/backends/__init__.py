"""Implementations of the ops, one package per backend, one module per op; loaded by `deco_kernels.ops.registry`."""
