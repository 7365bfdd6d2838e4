"""pixel_decoder_from_tokens on CUDA devices: PyTorch's matmul and the kernels of pixel_decoder, in chunks of tokens.

Every chunk of the backward reads and writes the sum of up_weight's gradients. The decoder splits it into chunks of its
own. With activations that are kept there is one chunk.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deco_kernels.backends import arguments, chunk_sizes
from deco_kernels.backends.cuda import calls, pixel_decoder
from deco_kernels.backends.cuda.pixel_decoder import activation_shape as activation_shape
from deco_kernels.backends.query import ChunkedQuery
from deco_kernels.backends.upsample import UpsampleGradients, forward_chunk_pixels, upsample_chunks
from deco_kernels.signatures import DecoderWeights, Query, UpsampleWeights


def forward(
    image: torch.Tensor,
    tokens: torch.Tensor,
    up: UpsampleWeights,
    weights: DecoderWeights,
    query: Query,
    patch_size: int,
    head_norm: str,
    eps: float,
    cond: torch.Tensor | None = None,
    activations: torch.Tensor | None = None,
) -> torch.Tensor:
    """velocity [B, C, H, W] in the dtype of tokens.

    Writes the conditions to `cond` [..., P, D] if it is given, and `activations` of `activation_shape`.
    """
    upsample = UpsampleGradients(tokens, up, needs=(False, False, False))
    weights = arguments.contiguous(weights)
    queries = ChunkedQuery(query, weights.pixel_table.shape, needs=(False,) * 4)
    velocity = torch.empty(image.shape, dtype=tokens.dtype, device=tokens.device)
    kept = None if cond is None else cond.view(-1, weights.pixel_table.numel())
    pixels = forward_chunk_pixels(tokens, up, patch_size**2) if activations is None else image[:, 0].numel()
    for chunk in upsample_chunks(image.shape, patch_size, max(1, pixels // patch_size**2)):
        conditions = upsample.cond(chunk.tokens, kept).view(-1, *weights.pixel_table.shape)
        inputs = (chunk.of(image), conditions, weights, calls.readable_query(queries.of(chunk.tokens, tokens.dtype)))
        pixel_decoder.run_forward(*inputs, chunk.of(velocity), patch_size, head_norm, eps, activations)
    return velocity


def backward(
    grad_velocity: torch.Tensor,
    image: torch.Tensor,
    tokens: torch.Tensor,
    up: UpsampleWeights,
    weights: DecoderWeights,
    query: Query,
    patch_size: int,
    head_norm: str,
    eps: float,
    needs: Sequence[bool],
    cond: torch.Tensor | None = None,
    activations: torch.Tensor | None = None,
) -> arguments.Gradients:
    """Gradients of (image, tokens, upsample weights, decoder weights, query); None where `needs` is False.

    `cond` and `activations` are those of the forward; None if they are computed again.
    """
    upsample = UpsampleGradients(tokens, up, needs=needs[1:4])
    weights = arguments.contiguous(weights)
    queries = ChunkedQuery(query, weights.pixel_table.shape, needs[-4:])
    weight_gradients = arguments.WeightGradients(weights, needs[4:-4])
    grad_image = torch.empty(image.shape, dtype=image.dtype, device=image.device) if needs[0] else None
    kept = None if cond is None else calls.readable_rows(cond.reshape(-1, weights.pixel_table.numel()))
    pixels = chunk_sizes.MOST_PIXELS if activations is None else image[:, 0].numel()
    for chunk in upsample_chunks(image.shape, patch_size, max(1, pixels // patch_size**2)):
        part_of_cond = upsample.cond(chunk.tokens) if kept is None else kept[chunk.tokens]
        conditions = part_of_cond.view(-1, *weights.pixel_table.shape)
        grad_cond = torch.empty_like(conditions) if upsample.wanted else None
        grad_query = torch.empty_like(conditions) if queries.wanted else None
        grad_part = None if grad_image is None else chunk.of(grad_image)
        grads = weight_gradients.new_part()
        part_query = queries.of(chunk.tokens, tokens.dtype) if activations is None else None
        inputs = (chunk.of(image), conditions, weights, part_query)
        found = (grad_part, grad_cond, *grads, grad_query)
        pixel_decoder.run_backward(chunk.of(grad_velocity), *inputs, found, patch_size, head_norm, eps, activations)
        weight_gradients.add(grads)
        upsample.add(chunk.tokens.start, grad_cond)
        queries.add(chunk.tokens, grad_query)
    return (grad_image, *upsample.results(), *weight_gradients.results(), *queries.results())
