"""pixel_decoder_from_tokens on the CPU: csrc/cpu/pixel_decoder_from_tokens.cpp; the backward rebuilds cond in chunks
and runs csrc/cpu/pixel_decoder_backward.cpp on each."""

from __future__ import annotations

import torch

from deco_kernels import native
from deco_kernels.backends import arguments
from deco_kernels.backends.cpu.pixel_decoder import sizes
from deco_kernels.backends.upsample import UpsampleGradients, chunk_tokens, image_chunks


def forward(image: torch.Tensor, tokens: torch.Tensor, *rest) -> torch.Tensor:
    """velocity [B, C, H, W] in the dtype of tokens; `rest` is up_weight, up_bias, the twelve weights of the decoder,
    patch_size and eps."""
    *weights, patch_size, eps = rest
    tokens = arguments.readable_rows(tokens)
    up, decoder = arguments.contiguous(weights[:2]), arguments.contiguous(weights[2:])
    pixels, width = decoder[1].shape
    velocity = torch.empty(image.shape, dtype=tokens.dtype)
    native.cpu().pixel_decoder_from_tokens_forward(
        sizes(image, decoder, patch_size),
        arguments.image(image),
        arguments.upsample_sizes(tokens, pixels, width),
        arguments.rows(tokens),
        arguments.arrays(up),
        arguments.arrays(decoder),
        arguments.image(velocity),
        eps,
        torch.get_num_threads(),
    )
    return velocity


def backward(grad_velocity: torch.Tensor, image: torch.Tensor, tokens: torch.Tensor, *rest) -> tuple:
    """Gradients of (image, tokens, up_weight, up_bias, the twelve weights) where `needs` asks; `rest` is the weights,
    patch_size, eps, needs."""
    *weights, patch_size, eps, needs = rest
    up, decoder = weights[:2], arguments.contiguous(weights[2:])
    pixels, width = decoder[1].shape
    grad_image = torch.empty(image.shape, dtype=image.dtype) if needs[0] else None
    upsample = UpsampleGradients(tokens, *up, needs[1:4])
    totals = [
        torch.zeros(weight.shape, dtype=torch.float32) if need else None
        for weight, need in zip(decoder, needs[4:], strict=True)
    ]
    first = 0
    for images, lines in image_chunks(image.shape, patch_size, chunk_tokens(up[0])):
        image_chunk = image[images, :, lines]
        count = image_chunk[:, 0].numel() // pixels
        cond = upsample.cond(first, first + count).view(count, pixels, width)
        grad_cond = upsample.new_grad_cond(count, pixels)
        grads = [None if total is None else torch.empty_like(total) for total in totals]
        native.cpu().pixel_decoder_backward(
            sizes(image_chunk, decoder, patch_size),
            arguments.image(grad_velocity[images, :, lines]),
            arguments.image(image_chunk),
            arguments.pixel_rows(cond),
            arguments.arrays(decoder),
            arguments.image(None if grad_image is None else grad_image[images, :, lines]),
            arguments.pixel_rows(grad_cond),
            arguments.arrays(grads),
            eps,
            torch.get_num_threads(),
        )
        arguments.add_gradients(totals, grads)
        upsample.add(first, grad_cond)
        first += count
    return (grad_image, *upsample.results(), *arguments.cast_gradients(totals, decoder))
