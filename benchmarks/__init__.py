"""Benchmarks of the fused ops: `python -m benchmarks --help`."""
