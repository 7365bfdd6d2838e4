"""pixel_decoder on the CPU: csrc/cpu/pixel_decoder.cpp and pixel_decoder_backward.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deco_kernels import native
from deco_kernels.backends import arguments
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
    cond, query = arguments.readable_pixel_rows(cond), arguments.readable_query(query)
    weights = arguments.contiguous(weights)
    velocity = torch.empty_like(image, dtype=cond.dtype, memory_format=torch.contiguous_format)
    native.cpu().pixel_decoder_forward(
        arguments.decoder_sizes(image, weights, patch_size),
        arguments.image(image),
        arguments.pixel_rows(cond),
        arguments.pixel_rows(query),
        arguments.arrays(weights),
        arguments.image(velocity),
        arguments.HEAD_NORMS.index(head_norm),
        eps,
        torch.get_num_threads(),
    )
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
    cond, query = arguments.readable_pixel_rows(cond), arguments.readable_query(query)
    weights = arguments.contiguous(weights)
    native.cpu().pixel_decoder_backward(
        arguments.decoder_sizes(image, weights, patch_size),
        arguments.image(grad_velocity),
        arguments.image(image),
        arguments.pixel_rows(cond),
        arguments.pixel_rows(query),
        arguments.arrays(weights),
        arguments.image(grads[0]),
        arguments.pixel_rows(grads[1]),
        arguments.pixel_rows(grads[-1]),
        arguments.arrays(grads[2:-1]),
        arguments.HEAD_NORMS.index(head_norm),
        eps,
        torch.get_num_threads(),
    )
    return grads
