"""Markdown and plots from results alone; needs no PyTorch."""
