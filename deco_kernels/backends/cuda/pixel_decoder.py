"""pixel_decoder on CUDA devices: csrc/cuda/pixel_decoder.cu and pixel_decoder_backward.cu."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deco_kernels.backends.cpu import arguments
from deco_kernels.backends.cuda import calls

CHUNK_PIXELS = 1 << 19
"""Pixels that the backward takes at a time; its workspace holds 2·D·(N + 2) bytes for each of them."""


def forward(image: torch.Tensor, cond: torch.Tensor, *rest) -> torch.Tensor:
    """velocity [B, C, H, W] in cond's dtype; `rest` is the twelve weights, patch_size and eps."""
    *weights, patch_size, eps = rest
    module = calls.module_for(cond)
    cond = calls.readable_pixel_rows(cond)
    weights = arguments.contiguous(weights)
    shape = _shape(image, weights, patch_size)
    velocity = torch.empty(image.shape, dtype=cond.dtype, device=cond.device)
    calls.launch(
        module.pixel_decoder_forward,
        module.pixel_decoder_forward_workspace(shape),
        cond,
        shape,
        arguments.image(image),
        arguments.pixel_rows(cond),
        arguments.arrays(weights),
        velocity.data_ptr(),
        eps,
    )
    return velocity


def backward(grad_velocity: torch.Tensor, image: torch.Tensor, cond: torch.Tensor, *rest) -> tuple:
    """Gradients of (image, cond, the twelve weights) where `needs` asks; `rest` ends with patch_size, eps, needs."""
    *weights, patch_size, eps, needs = rest
    module = calls.module_for(cond)
    grads = calls.empty_gradients((image, cond, *weights), needs)
    if image.numel() == 0:
        return tuple(None if grad is None else grad.zero_() for grad in grads)
    cond = calls.readable_pixel_rows(cond)
    weights = arguments.contiguous(weights)
    shape = _shape(image, weights, patch_size)
    calls.launch(
        module.pixel_decoder_backward,
        module.pixel_decoder_backward_workspace(cond.device.index or 0, shape, CHUNK_PIXELS),
        cond,
        shape,
        arguments.image(grad_velocity),
        arguments.image(image),
        arguments.pixel_rows(cond),
        arguments.arrays(weights),
        arguments.image(grads[0]),
        0 if grads[1] is None else grads[1].data_ptr(),
        arguments.arrays(grads[2:]),
        eps,
        CHUNK_PIXELS,
    )
    return tuple(grads)


def _shape(image: torch.Tensor, weights: Sequence[torch.Tensor], patch_size: int) -> tuple[int, ...]:
    """(B, C, H, W, patch_size, D, N)"""
    depth, width = weights[2].shape
    return (*image.shape, patch_size, width, depth)
