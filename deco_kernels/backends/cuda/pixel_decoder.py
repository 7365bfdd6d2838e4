"""pixel_decoder on CUDA devices: csrc/cuda/pixel_decoder.cu and pixel_decoder_backward.cu."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deco_kernels import native
from deco_kernels.backends import arguments, l2_cache
from deco_kernels.backends.cuda import calls
from deco_kernels.signatures import DecoderWeights


def forward(
    image: torch.Tensor,
    cond: torch.Tensor,
    weights: DecoderWeights,
    query: torch.Tensor | None,
    patch_size: int,
    head_norm: str,
    eps: float,
) -> torch.Tensor:
    """velocity [B, C, H, W] in the dtype of cond."""
    velocity = torch.empty(image.shape, dtype=cond.dtype, device=cond.device)
    cond, weights = calls.readable_pixel_rows(cond), arguments.contiguous(weights)
    run_forward(image, cond, weights, velocity, patch_size, eps)
    return velocity


def backward(
    grad_velocity: torch.Tensor,
    image: torch.Tensor,
    cond: torch.Tensor,
    weights: DecoderWeights,
    query: torch.Tensor | None,
    patch_size: int,
    head_norm: str,
    eps: float,
    needs: Sequence[bool],
) -> arguments.Gradients:
    """Gradients of (image, cond, weights, query); None where `needs` is False."""
    grads = arguments.empty_gradients((image, cond, weights, query), needs)
    if image.numel() == 0:
        return arguments.zeroed(grads)
    cond, weights = calls.readable_pixel_rows(cond), arguments.contiguous(weights)
    run_backward(grad_velocity, image, cond, weights, grads[0], grads[1], grads[2:-1], patch_size, eps)
    return grads


def run_forward(
    image: torch.Tensor,
    cond: torch.Tensor,
    weights: DecoderWeights,
    velocity: torch.Tensor,
    patch_size: int,
    eps: float,
) -> None:
    """Write velocity, any strides with unit stride in W; cond must come from `readable_pixel_rows`."""
    module = calls.module_for(cond)
    shape = arguments.decoder_sizes(image, weights, patch_size)
    image = calls.readable_image(image, cond.dtype)
    calls.launch(
        module.pixel_decoder_forward,
        module.pixel_decoder_forward_workspace(shape),
        cond,
        shape,
        arguments.image(image),
        arguments.pixel_rows(cond),
        arguments.pixel_rows(None),
        arguments.arrays(weights),
        arguments.image(velocity),
        0,
        eps,
    )


def run_backward(
    grad_velocity: torch.Tensor,
    image: torch.Tensor,
    cond: torch.Tensor,
    weights: DecoderWeights,
    grad_image: torch.Tensor | None,
    grad_cond: torch.Tensor | None,
    grad_weights: arguments.Gradients,
    patch_size: int,
    eps: float,
) -> None:
    """Write the gradients that are not None: grad_image with any strides, grad_cond and grad_weights contiguous."""
    module = calls.module_for(cond)
    shape = arguments.decoder_sizes(image, weights, patch_size)
    image, grad_velocity = calls.readable_image(image, cond.dtype), grad_velocity.to(cond.dtype)
    chunk_pixels = backward_chunk_pixels(cond.device, *shape[-2:])
    calls.launch(
        module.pixel_decoder_backward,
        module.pixel_decoder_backward_workspace(cond.device.index or 0, shape, chunk_pixels),
        cond,
        shape,
        arguments.image(grad_velocity),
        arguments.image(image),
        arguments.pixel_rows(cond),
        arguments.pixel_rows(None),
        arguments.arrays(weights),
        arguments.image(grad_image),
        arguments.pixel_rows(grad_cond),
        arguments.pixel_rows(None),
        arguments.arrays(grad_weights),
        0,
        eps,
        chunk_pixels,
    )


def backward_chunk_pixels(
    device: torch.device, width: int, depth: int, velocity_bytes: int = 0, share: float = l2_cache.SHARE
) -> int:
    """Pixels per chunk of the backward, whose kernels hand on 2·D·(N + 2) bytes per pixel, and those of the velocity.

    At least two tiles for every thread block of the recompute kernel, which has the largest tiles.
    """
    multiprocessors, _ = native.cuda(device).device_limits(device.index or 0)
    tile = 256 if width <= 32 else 128  # kBlockPixels of csrc/cuda/warp_pixels.h
    bytes_per_pixel = 2 * width * (depth + 2) + velocity_bytes
    return l2_cache.chunk_pixels(device, bytes_per_pixel, least=2 * tile * multiprocessors, share=share)
