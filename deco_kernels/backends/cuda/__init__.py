"""Backend "cuda": CUDA C++ kernels (csrc/cuda) through the native module _native_cuda, for NVIDIA GPUs from sm_80 on.

bfloat16 and float16 activations; products run on the tensor cores with float32 accumulation. It is used by name only.
"""

from __future__ import annotations

import functools

import torch

from deco_kernels import native

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WIDTHS = (16, 32, 64)
_MAX_DEPTH = 8
_PATCH_SIZES = (1, 2, 4, 8, 16)
_CHANNELS = (1, 3, 4)


@functools.cache
def unavailable_reason(device: torch.device) -> str | None:
    """Why no kernel of this backend can run on `device`, with the remedy, or None."""
    if device.type != "cuda" or torch.version.hip:
        return f"its kernels are for NVIDIA GPUs, the tensors are on {device}; choose another backend"
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


def unsupported_reason(request) -> str | None:
    """Why this call (a `deco_kernels.ops.registry.Request`) has no kernel; None if it has one."""
    remedy = "; use backend='triton', backend='reference' or leave the choice automatic"
    activation, *others = request.dtypes
    if activation not in (torch.bfloat16, torch.float16):
        return f"its activations (pred of a loss) are bfloat16 or float16, not {activation}{remedy}"
    for dtype in others:
        if dtype not in _DTYPES:
            return f"it has no kernel for images of {dtype}, only for float32, bfloat16 and float16{remedy}"
    if request.op == "flow_matching_loss":
        return None
    if request.width not in _WIDTHS:
        return f"it has kernels for a width D of 16, 32 and 64, not {request.width}{remedy}"
    if request.op == "adaln_block":
        return None
    if request.patch_size not in _PATCH_SIZES:
        return f"it has kernels for a patch size of 1, 2, 4, 8 and 16, not {request.patch_size}{remedy}"
    if request.op == "upsample_modulate":
        return None
    if not 1 <= request.depth <= _MAX_DEPTH:
        return f"it has kernels for 1 to {_MAX_DEPTH} blocks, not {request.depth}{remedy}"
    if request.channels not in _CHANNELS:
        return f"it has kernels for 1, 3 and 4 image channels, not {request.channels}{remedy}"
    return None
