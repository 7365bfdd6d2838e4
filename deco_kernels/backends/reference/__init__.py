"""Backend "reference": the formulas in plain PyTorch, the reference of the tests and the fallback on any device.

Every op is a `formula` on tensors of one dtype, float64 for float64 inputs and float32 otherwise. Matmul weights are
first rounded to the activation dtype, as in eager autocast. Results are rounded once.
"""

import torch


def unavailable_reason(device: torch.device) -> str | None:
    return None


def unsupported_reason(request: object) -> str | None:
    return None
