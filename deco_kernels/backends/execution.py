"""Whether operations are executed at once, or compiled, traced or transformed."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

# PyTorch has no public function for this.
transforms_are_active: Any = getattr(torch._C, "_are_functorch_transforms_active", None)
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def requires_grad_tells() -> bool:
    """Whether `requires_grad` says if a derivative is wanted: no functional transform and no level of forward mode is
    active, which hide it.

    Always False if this PyTorch does not tell.
    """
    if transforms_are_active is None or transforms_are_active():
        return False
    return bool(getattr(forward_ad, "_current_level", 0) < 0)


def is_executed(tensor: torch.Tensor) -> bool:
    """Whether operations on the tensor run at once, on its own data: nothing is compiled, traced by torch.jit or inside
    a functional transform, and it is no subclass but a parameter, and no wrapper.

    Always False if this PyTorch does not tell whether a functional transform is active.
    """
    if type(tensor) not in _PLAIN or torch.compiler.is_compiling():
        return False
    if torch.jit.is_tracing() or transforms_are_active is None:  # type: ignore[attr-defined, no-untyped-call]
        return False
    if transforms_are_active():
        return False
    try:
        tensor.data_ptr()
    except RuntimeError:  # torch.autograd.grad(is_grads_batched=True) has wrappers of its own
        return False
    return True
