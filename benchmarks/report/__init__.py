"""Markdown and plots from result files; needs no PyTorch."""
