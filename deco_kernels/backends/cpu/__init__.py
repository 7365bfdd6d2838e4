"""Backend "cpu": C++ kernels (csrc/cpu) through the native module, for CPU tensors.

The kernels read float32, bfloat16 and float16 and compute in float32, or in bfloat16 products accumulated in float32
where the processor has them (AVX512-BF16) and the activation is bfloat16.
"""

from __future__ import annotations

import torch

from deco_kernels import native

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (16, 32, 64)
MAX_DEPTH = 8
PATCH_SIZES = (1, 2, 4, 8, 16)
CHANNELS = (1, 3, 4)


def unavailable_reason(device: torch.device) -> str | None:
    """Why this backend cannot run on `device` at all, with the remedy, or None."""
    if device.type != "cpu":
        return f"it computes on CPU tensors, these are on {device}; move them with .cpu() or choose another backend"
    return native.cpu_unavailable_reason()


def unsupported_reason(request) -> str | None:
    """Why this backend cannot serve the call that `request` describes, or None."""
    for dtype in request.dtypes:
        if dtype not in DTYPES:
            return f"dtype {dtype} is not supported; use float32, bfloat16, float16 or the reference backend"
    if request.op == "flow_matching_loss":
        return None
    if request.width not in WIDTHS:
        return f"width D must be one of {WIDTHS}, got {request.width}; use the reference backend"
    if not 1 <= request.depth <= MAX_DEPTH:
        return f"depth N must be 1 to {MAX_DEPTH}, got {request.depth}; use the reference backend"
    if request.op != "adaln_block" and request.patch_size not in PATCH_SIZES:
        return f"patch_size must be one of {PATCH_SIZES}, got {request.patch_size}; use the reference backend"
    if request.op.startswith("pixel_decoder") and request.channels not in CHANNELS:
        return f"channels C must be one of {CHANNELS}, got {request.channels}; use the reference backend"
    return None
