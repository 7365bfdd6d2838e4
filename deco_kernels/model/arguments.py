"""Argument checks shared by all models."""

import operator
from typing import Any

import torch


def require_tensors(**arguments: Any) -> None:
    """Raise TypeError that names the argument unless every argument is a tensor."""
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}; pass a tensor")


def require_sizes(**arguments: Any) -> None:
    """Raise TypeError or ValueError that names the argument unless every argument is an integer of at least 1."""
    for name, value in arguments.items():
        try:
            size = None if isinstance(value, bool) else operator.index(value)
        except TypeError:
            size = None
        if size is None:
            raise TypeError(f"{name}: expected an int, got {value!r} ({type(value).__name__}); pass an integer")
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}; pass 1 or more")
