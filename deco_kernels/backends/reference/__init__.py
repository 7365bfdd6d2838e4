"""Plain PyTorch, line by line the formulas: the oracle of the tests and the fallback on any device.

Every op is a `formula` on tensors of one dtype, float64 when the inputs are float64, else float32: activations are
widened, matmul weights are first rounded to the activation dtype as eager autocast would. Results are rounded once.
"""

import torch


def unavailable_reason(device: torch.device) -> str | None:
    return None


def unsupported_reason(request: object) -> str | None:
    return None
