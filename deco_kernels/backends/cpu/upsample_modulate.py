"""upsample_modulate on the CPU: csrc/cpu/upsample_modulate.cpp; the backward differentiates the reference formula."""

from __future__ import annotations

import torch

from deco_kernels import native
from deco_kernels.backends.cpu import arguments
from deco_kernels.backends.reference.upsample_modulate import backward

__all__ = ["forward", "backward"]


def forward(h: torch.Tensor, tokens: torch.Tensor, *rest) -> tuple[torch.Tensor, torch.Tensor]:
    """(modulated, gate) like h; `rest` is up_weight, up_bias, the four weights of the modulation and eps."""
    *weights, eps = rest
    h, tokens = arguments.readable_pixel_rows(h), arguments.readable_rows(tokens)
    weights = arguments.contiguous(weights)
    modulated, gate = torch.empty(h.shape, dtype=h.dtype), torch.empty(h.shape, dtype=h.dtype)
    native.cpu().upsample_modulate_forward(
        arguments.upsample_sizes(tokens, *h.shape[-2:]),
        arguments.rows(tokens),
        arguments.arrays(weights[:2]),
        arguments.pixel_rows(h),
        arguments.arrays(weights[2:]),
        arguments.pixel_rows(modulated),
        arguments.pixel_rows(gate),
        eps,
        torch.get_num_threads(),
    )
    return modulated, gate
