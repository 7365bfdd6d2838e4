"""Backend "cuda_emulated": the modules of backends/cuda on CPU tensors, with kernels run by csrc/emulation."""

import torch

from deco_kernels.backends.cuda import unsupported_reason  # noqa: F401


def unavailable_reason(device: torch.device) -> str | None:
    return None if device.type == "cpu" else "the emulator runs on CPU tensors"
