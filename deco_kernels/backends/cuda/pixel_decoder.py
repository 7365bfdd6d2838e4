"""pixel_decoder on CUDA devices: csrc/cuda/pixel_decoder.cu and pixel_decoder_backward.cu."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deco_kernels.backends import arguments, chunk_sizes
from deco_kernels.backends.cuda import calls
from deco_kernels.signatures import DecoderWeights

_ROWS = 256  # as padded_rows of csrc/include/deco/cuda/pixel_decoder.h; the module may not exist


def activation_shape(pixels: int, depth: int, width: int) -> tuple[int, int, int]:
    """Of what the backward otherwise computes again: the inputs of the blocks and of the head, then SiLU(cond), each
    [rows, D] in the order of the kernels' registers."""
    return depth + 2, -(-pixels // _ROWS) * _ROWS, width


def forward(
    image: torch.Tensor,
    cond: torch.Tensor,
    weights: DecoderWeights,
    query: torch.Tensor | None,
    patch_size: int,
    head_norm: str,
    eps: float,
    activations: torch.Tensor | None = None,
) -> torch.Tensor:
    """velocity [B, C, H, W] in the dtype of cond; writes `activations` of `activation_shape` if they are given."""
    velocity = torch.empty(image.shape, dtype=cond.dtype, device=cond.device)
    cond, weights = calls.readable_pixel_rows(cond), arguments.contiguous(weights)
    inputs = (image, cond, weights, calls.readable_query(query))
    run_forward(*inputs, velocity, patch_size, head_norm, eps, activations)
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
    activations: torch.Tensor | None = None,
) -> arguments.Gradients:
    """Gradients of (image, cond, weights, query); None where `needs` is False.

    `activations` are those that the forward has written; None if they are computed again.
    """
    grads = arguments.empty_gradients((image, cond, weights, query), needs)
    if image.numel() == 0:
        return arguments.zeroed(grads)
    cond, weights = calls.readable_pixel_rows(cond), arguments.contiguous(weights)
    run_backward(grad_velocity, image, cond, weights, query, grads, patch_size, head_norm, eps, activations)
    return grads


def run_forward(
    image: torch.Tensor,
    cond: torch.Tensor,
    weights: DecoderWeights,
    query: torch.Tensor | None,
    velocity: torch.Tensor,
    patch_size: int,
    head_norm: str,
    eps: float,
    activations: torch.Tensor | None = None,
) -> None:
    """Write velocity, any strides, and `activations`; cond and query must come from `readable_pixel_rows`."""
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
        arguments.pixel_rows(query),
        arguments.arrays(weights),
        arguments.image(velocity),
        arguments.HEAD_NORMS.index(head_norm),
        eps,
        *arguments.addresses([activations]),
    )


def run_backward(
    grad_velocity: torch.Tensor,
    image: torch.Tensor,
    cond: torch.Tensor,
    weights: DecoderWeights,
    query: torch.Tensor | None,
    grads: arguments.Gradients,
    patch_size: int,
    head_norm: str,
    eps: float,
    activations: torch.Tensor | None = None,
) -> None:
    """Write those of `grads`, of (image, cond, weights, query), that are not None: that of image with any strides, the
    others contiguous. cond must come from `readable_pixel_rows`; with `activations`, which contain it, query is not
    read."""
    grad_image, grad_cond, *grad_weights, grad_query = grads
    module = calls.module_for(cond)
    shape = arguments.decoder_sizes(image, weights, patch_size)
    image, grad_velocity = calls.readable_image(image, cond.dtype), grad_velocity.to(cond.dtype)
    query = calls.readable_query(query if activations is None else None)
    if activations is not None:
        activations = calls.aligned(activations)
    description: tuple[int | float | tuple[int, ...], ...] = (
        shape,
        arguments.image(grad_velocity),
        arguments.image(image),
        arguments.pixel_rows(cond),
        arguments.pixel_rows(query),
        arguments.arrays(weights),
        arguments.image(grad_image),
        arguments.pixel_rows(grad_cond),
        arguments.pixel_rows(grad_query),
        arguments.arrays(grad_weights),
        arguments.HEAD_NORMS.index(head_norm),
        eps,
        *arguments.addresses([activations]),
        backward_chunk_pixels(*shape[-2:]),
    )
    workspace = module.pixel_decoder_backward_workspace(cond.device.index or 0, *description)
    calls.launch(module.pixel_decoder_backward, workspace, cond, *description)


def backward_chunk_pixels(width: int, depth: int, velocity_bytes: int = 0) -> int:
    """Pixels per chunk of the backward: its kernels hand on 2·D·(N + 2) bytes per pixel and `velocity_bytes`."""
    return chunk_sizes.chunk_pixels(2 * width * (depth + 2) + velocity_bytes)
