"""pixel_decoder on the CPU: csrc/cpu/pixel_decoder.cpp; the backward differentiates the reference formula."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deco_kernels import native
from deco_kernels.backends.cpu import arguments
from deco_kernels.backends.reference.pixel_decoder import backward

__all__ = ["forward", "backward"]


def forward(image: torch.Tensor, cond: torch.Tensor, *rest) -> torch.Tensor:
    """velocity [B, C, H, W] in cond's dtype; `rest` is the twelve weights, patch_size and eps."""
    *weights, patch_size, eps = rest
    cond = arguments.readable_rows(cond)
    weights = arguments.contiguous(weights)
    velocity = torch.empty(image.shape, dtype=cond.dtype)
    native.cpu().pixel_decoder_forward(
        _shape(image, weights, patch_size),
        arguments.image(image),
        arguments.rows(cond),
        arguments.arrays(weights),
        arguments.image(velocity),
        eps,
        torch.get_num_threads(),
    )
    return velocity


def _shape(image: torch.Tensor, weights: Sequence[torch.Tensor], patch_size: int) -> tuple[int, ...]:
    """(B, C, H, W, patch_size, D, N)"""
    depth, width = weights[2].shape
    return (*image.shape, patch_size, width, depth)
