"""Compiled kernels: resource usage, modeled times, budgets, and measured times on a GPU."""
