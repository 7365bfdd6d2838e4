"""Checks and measurements that need a GPU, for `make gpu-check`."""
