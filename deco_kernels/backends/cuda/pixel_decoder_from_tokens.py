"""pixel_decoder_from_tokens on CUDA devices: PyTorch's matmul and the kernels of pixel_decoder, chunk by chunk of
tokens; a chunk's conditions stay in the cache of a data-centre GPU between the two."""

from __future__ import annotations

import torch

from deco_kernels.backends import arguments
from deco_kernels.backends.cuda import calls, pixel_decoder
from deco_kernels.backends.upsample import UpsampleGradients, image_chunks


def forward(image: torch.Tensor, tokens: torch.Tensor, *rest) -> torch.Tensor:
    """velocity [B, C, H, W] in the dtype of tokens; `rest` is up_weight, up_bias, the twelve weights of the decoder,
    patch_size and eps."""
    *weights, patch_size, eps = rest
    upsample = UpsampleGradients(tokens, *weights[:2], needs=(False, False, False))
    decoder = arguments.contiguous(weights[2:])
    velocity = torch.empty(image.shape, dtype=tokens.dtype, device=tokens.device)
    for part, first, last in _chunks(image.shape, patch_size):
        cond = upsample.cond(first, last).view(last - first, *decoder[1].shape)
        pixel_decoder.run_forward(image[part], cond, decoder, velocity[part], patch_size, eps)
    return velocity


def backward(grad_velocity: torch.Tensor, image: torch.Tensor, tokens: torch.Tensor, *rest) -> tuple:
    """Gradients of (image, tokens, up_weight, up_bias, the twelve weights) where `needs` asks; `rest` is the weights,
    patch_size, eps, needs."""
    *weights, patch_size, eps, needs = rest
    upsample = UpsampleGradients(tokens, *weights[:2], needs=needs[1:4])
    decoder = arguments.contiguous(weights[2:])
    totals = calls.gradient_totals(decoder, needs[4:])
    grad_image = torch.empty(image.shape, dtype=image.dtype, device=image.device) if needs[0] else None
    for part, first, last in _chunks(image.shape, patch_size):
        cond = upsample.cond(first, last).view(last - first, *decoder[1].shape)
        grad_cond = torch.empty_like(cond) if upsample.wanted else None
        grads = [None if total is None else torch.empty_like(total) for total in totals]
        pixel_decoder.run_backward(
            grad_velocity[part],
            image[part],
            cond,
            decoder,
            None if grad_image is None else grad_image[part],
            grad_cond,
            grads,
            patch_size,
            eps,
        )
        arguments.add_gradients(totals, grads)
        upsample.add(first, grad_cond)
    return (grad_image, *upsample.results(), *arguments.cast_gradients(totals, decoder))


def _chunks(shape: torch.Size, patch_size: int):
    """(index into [B, C, H, W], first and last token) of consecutive pieces of the batch."""
    first = 0
    for images, lines in image_chunks(shape, patch_size, max(1, pixel_decoder.CHUNK_PIXELS // patch_size**2)):
        height = len(range(shape[2])[lines])
        last = first + len(range(shape[0])[images]) * (height // patch_size) * (shape[3] // patch_size)
        if last > first:
            yield (images, slice(None), lines), first, last
        first = last
