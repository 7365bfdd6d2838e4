"""Product of a bfloat16 tensor and a float32 number on CUDA devices: csrc/cuda/scaled_product.cu.

PyTorch's kernel for these two dtypes accesses one number at a time.
"""

from __future__ import annotations

import torch

from deco_kernels.backends.cuda import calls, unavailable_reason

_ALIGNMENT = 16  # bytes of one memory access


def supported(values: torch.Tensor, factor: torch.Tensor) -> bool:
    """Whether `product` can compute values * factor."""
    return (
        unavailable_reason(values.device) is None
        and factor.device == values.device
        and (values.dtype, factor.dtype) == (torch.bfloat16, torch.float32)
        and values.is_contiguous()
        and values.data_ptr() % _ALIGNMENT == 0
    )


def product(values: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """values * factor, a scalar, multiplied in float32 and rounded once."""
    result = torch.empty_like(values)
    module = calls.module_for(values)
    description = (values.numel(), values.data_ptr(), factor.data_ptr(), result.data_ptr())
    calls.launch(module.scaled_product, 0, values, *description)
    return result
