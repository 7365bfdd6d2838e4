"""Backend "cpu": C++ kernels (csrc/cpu) through the native module, for CPU tensors.

The kernels read float32, bfloat16 and float16 and compute in float32. With AMX or AVX512-BF16 and bfloat16
activations, matmuls take bfloat16 inputs and accumulate in float32.
"""

from __future__ import annotations

import torch

from deco_kernels import native
from deco_kernels.backends.support import Support

SUPPORT = Support(
    "CPU tensors; portable C++, AVX2, AVX-512, AVX-512-BF16, AMX, NEON, NEON with bfloat16 chosen at run time"
)
unsupported_reason = SUPPORT.refusal


def unavailable_reason(device: torch.device) -> str | None:
    """Reason, with remedy, why this backend cannot run on `device`, or None."""
    if device.type != "cpu":
        return f"it runs on CPU tensors, got tensors on {device}; move them with .cpu() or choose another backend"
    return native.cpu_unavailable_reason()
