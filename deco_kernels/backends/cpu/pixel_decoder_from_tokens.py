"""pixel_decoder_from_tokens on the CPU: csrc/cpu/pixel_decoder_from_tokens.cpp; the backward differentiates the
reference formula."""

from __future__ import annotations

import torch

from deco_kernels import native
from deco_kernels.backends.cpu import arguments
from deco_kernels.backends.cpu.pixel_decoder import _shape
from deco_kernels.backends.reference.pixel_decoder_from_tokens import backward

__all__ = ["forward", "backward"]


def forward(image: torch.Tensor, tokens: torch.Tensor, *rest) -> torch.Tensor:
    """velocity [B, C, H, W] in the dtype of tokens; `rest` is up_weight, up_bias, the twelve weights of the decoder,
    patch_size and eps."""
    *weights, patch_size, eps = rest
    tokens = arguments.readable_rows(tokens)
    up, decoder = arguments.contiguous(weights[:2]), arguments.contiguous(weights[2:])
    pixels, width = decoder[1].shape
    velocity = torch.empty(image.shape, dtype=tokens.dtype)
    native.cpu().pixel_decoder_from_tokens_forward(
        _shape(image, decoder, patch_size),
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
