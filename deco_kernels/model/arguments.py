"""The check that all models make of their arguments before any other."""

from typing import Any

import torch


def require_tensors(**arguments: Any) -> None:
    """Raise TypeError, naming the argument, unless all are tensors."""
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}; pass a tensor")
