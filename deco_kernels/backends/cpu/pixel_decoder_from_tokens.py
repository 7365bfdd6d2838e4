"""pixel_decoder_from_tokens on the CPU: csrc/cpu/pixel_decoder_from_tokens.cpp. The backward recomputes cond in chunks
and runs csrc/cpu/pixel_decoder_backward.cpp on each."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deco_kernels import native
from deco_kernels.backends import arguments
from deco_kernels.backends.upsample import UpsampleGradients, chunk_tokens, image_chunks
from deco_kernels.signatures import DecoderWeights, UpsampleWeights


def forward(
    image: torch.Tensor,
    tokens: torch.Tensor,
    up: UpsampleWeights,
    weights: DecoderWeights,
    patch_size: int,
    eps: float,
) -> torch.Tensor:
    """velocity [B, C, H, W] in the dtype of tokens."""
    tokens = arguments.readable_rows(tokens)
    up, weights = arguments.contiguous(up), arguments.contiguous(weights)
    pixels, width = weights.pixel_table.shape
    velocity = torch.empty(image.shape, dtype=tokens.dtype)
    native.cpu().pixel_decoder_from_tokens_forward(
        arguments.decoder_sizes(image, weights, patch_size),
        arguments.image(image),
        arguments.upsample_sizes(tokens, pixels, width),
        arguments.rows(tokens),
        arguments.arrays(up),
        arguments.arrays(weights),
        arguments.image(velocity),
        eps,
        torch.get_num_threads(),
    )
    return velocity


def backward(
    grad_velocity: torch.Tensor,
    image: torch.Tensor,
    tokens: torch.Tensor,
    up: UpsampleWeights,
    weights: DecoderWeights,
    patch_size: int,
    eps: float,
    needs: Sequence[bool],
) -> arguments.Gradients:
    """Gradients of (image, tokens, upsample weights, decoder weights); None where `needs` is False."""
    weights = arguments.contiguous(weights)
    pixels, width = weights.pixel_table.shape
    grad_image = torch.empty(image.shape, dtype=image.dtype) if needs[0] else None
    upsample = UpsampleGradients(tokens, up, needs[1:4])
    totals = arguments.zero_totals(weights, needs[4:])
    first = 0
    for images, lines in image_chunks(image.shape, patch_size, chunk_tokens(up)):
        image_chunk = image[images, :, lines]
        count = image_chunk[:, 0].numel() // pixels
        cond = upsample.cond(first, first + count).view(count, pixels, width)
        grad_cond = upsample.new_grad_cond(count, pixels)
        grads = arguments.empty_parts(totals)
        native.cpu().pixel_decoder_backward(
            arguments.decoder_sizes(image_chunk, weights, patch_size),
            arguments.image(grad_velocity[images, :, lines]),
            arguments.image(image_chunk),
            arguments.pixel_rows(cond),
            arguments.arrays(weights),
            arguments.image(None if grad_image is None else grad_image[images, :, lines]),
            arguments.pixel_rows(grad_cond),
            arguments.arrays(grads),
            eps,
            torch.get_num_threads(),
        )
        arguments.add_gradients(totals, grads)
        upsample.add(first, grad_cond)
        first += count
    return (grad_image, *upsample.results(), *arguments.cast_gradients(totals, weights))
