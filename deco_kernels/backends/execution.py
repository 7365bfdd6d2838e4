"""Whether operations are executed at once, or compiled, traced or transformed."""

from __future__ import annotations

from typing import Any

import torch

# PyTorch has no public function for this.
_is_wrapped: Any = getattr(getattr(torch._C, "_functorch", None), "is_functorch_wrapped_tensor", None)


def is_executed(tensor: torch.Tensor) -> bool:
    """Whether operations on the tensor run at once: nothing is compiled or traced, and it is no subclass or wrapper.

    Always False if this PyTorch does not tell wrappers of functional transforms from tensors.
    """
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if type(tensor) is not torch.Tensor or tracing or _is_wrapped is None or _is_wrapped(tensor):
        return False
    try:
        tensor.data_ptr()
    except RuntimeError:  # torch.autograd.grad(is_grads_batched=True) has wrappers of its own
        return False
    return True
