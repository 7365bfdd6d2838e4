"""Backend "cuda": CUDA C++ kernels (csrc/cuda) through the native module _native_cuda, for NVIDIA GPUs from sm_80 on.

Activations are bfloat16 or float16; matmuls run on tensor cores with float32 accumulation.
"""

from __future__ import annotations

import functools

import torch

from deco_kernels import native
from deco_kernels.backends.support import Support

SUPPORT = Support(
    "NVIDIA GPUs from sm_80, where the CUDA module was built",
    activations=(torch.bfloat16, torch.float16),
)
unsupported_reason = SUPPORT.refusal


@functools.cache
def unavailable_reason(device: torch.device) -> str | None:
    """Reason, with remedy, why no kernel of this backend can run on `device`, or None."""
    if device.type != "cuda" or torch.version.hip:
        return f"its kernels run on NVIDIA GPUs, got tensors on {device}; choose another backend"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return (
            f"it needs compute capability 8.0 or later, {torch.cuda.get_device_name(device)} has "
            f"{capability[0]}.{capability[1]}; use backend='reference'"
        )
    reason = native.cuda_unavailable_reason()
    if reason is not None:
        return reason
    problem = native.cuda(device).problem(device.index or 0)
    if problem is None:
        return None
    return (
        f"its kernels cannot run on {torch.cuda.get_device_name(device)}: {problem}. If the build lacks this "
        f"architecture, build again with DECO_KERNELS_CUDA_ARCHS={capability[0]}{capability[1]}"
    )
