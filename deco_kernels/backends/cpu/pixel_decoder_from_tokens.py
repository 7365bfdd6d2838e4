"""pixel_decoder_from_tokens on the CPU: csrc/cpu/pixel_decoder_from_tokens.cpp, or where PyTorch multiplies
csrc/cpu/pixel_decoder.cpp. In the backward, csrc/cpu/pixel_decoder_backward.cpp runs on chunks of conditions, kept or
computed again."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deco_kernels import native
from deco_kernels.backends import arguments
from deco_kernels.backends.cpu.upsample import UpsampleGradients
from deco_kernels.backends.query import ChunkedQuery
from deco_kernels.backends.upsample import chunk_tokens, upsample_chunks
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
) -> torch.Tensor:
    """velocity [B, C, H, W] in the dtype of tokens; writes the conditions to `cond` [..., P, D] if it is given."""
    up, weights = arguments.contiguous(up), arguments.contiguous(weights)
    pixels, width = weights.pixel_table.shape
    velocity = torch.empty(image.shape, dtype=tokens.dtype)
    if native.upsamples_in_pytorch(tokens.dtype, *up.up_weight.shape):
        upsample = UpsampleGradients(tokens, up, needs=(False,) * 3)
        chunked = ChunkedQuery(query, weights.pixel_table.shape, (False,) * 4, UpsampleGradients)
        _decode(image, upsample, weights, chunked, cond, velocity, patch_size, head_norm, eps)
        return velocity
    tokens = arguments.readable_rows(tokens)
    readable = _readable(query)  # named, so that copies outlive the call
    native.cpu().pixel_decoder_from_tokens_forward(
        arguments.decoder_sizes(image, weights, patch_size),
        arguments.image(image),
        arguments.upsample_sizes(tokens, pixels, width),
        arguments.rows(tokens),
        arguments.arrays(up),
        arguments.pixel_rows(cond),
        arguments.pixel_rows(readable.query),
        _query_upsample(readable, pixels, width),
        arguments.arrays(weights),
        arguments.image(velocity),
        arguments.HEAD_NORMS.index(head_norm),
        eps,
        torch.get_num_threads(),
    )
    return velocity


def _readable(query: Query) -> Query:
    """The query's tensors, copied unless the kernel can read them in place."""
    given, tokens, *up = query
    rows = None if tokens is None else arguments.readable_rows(tokens)
    return Query(arguments.readable_query(given), rows, *[None if t is None else t.contiguous() for t in up])


def _query_upsample(query: Query, pixels: int, width: int) -> tuple[int, ...]:
    """The description of the upsample of a query from `_readable`; zeros if there is none."""
    tokens, weight, bias = query[1:]
    if tokens is None:
        return (0,) * 15
    sizes = arguments.upsample_sizes(tokens, pixels, width)
    return (*sizes, *arguments.rows(tokens), *arguments.arrays((weight, bias)), *arguments.pixel_rows(None))


def _decode(
    image: torch.Tensor,
    upsample: UpsampleGradients,
    weights: DecoderWeights,
    query: ChunkedQuery,
    kept: torch.Tensor | None,
    velocity: torch.Tensor,
    patch_size: int,
    head_norm: str,
    eps: float,
) -> None:
    """Write velocity, and the conditions to `kept` if it is given, from conditions of PyTorch in chunks."""
    pixels, width = weights.pixel_table.shape
    kept_rows = None if kept is None else kept.view(-1, pixels * width)
    for chunk in upsample_chunks(image.shape, patch_size, chunk_tokens(upsample.up)):
        image_chunk = chunk.of(image)
        cond = upsample.cond(chunk.tokens, kept_rows).view(-1, pixels, width)
        part_query = arguments.readable_query(query.of(chunk.tokens, cond.dtype))
        native.cpu().pixel_decoder_forward(
            arguments.decoder_sizes(image_chunk, weights, patch_size),
            arguments.image(image_chunk),
            arguments.pixel_rows(cond),
            arguments.pixel_rows(part_query),
            arguments.arrays(weights),
            arguments.image(chunk.of(velocity)),
            arguments.HEAD_NORMS.index(head_norm),
            eps,
            torch.get_num_threads(),
        )


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
) -> arguments.Gradients:
    """Gradients of (image, tokens, upsample weights, decoder weights, query); None where `needs` is False.

    `cond` has the conditions of the forward; None if they are computed again.
    """
    weights = arguments.contiguous(weights)
    pixels, width = weights.pixel_table.shape
    grad_image = torch.empty(image.shape, dtype=image.dtype) if needs[0] else None
    upsample = UpsampleGradients(tokens, up, needs[1:4])
    chunked = ChunkedQuery(query, weights.pixel_table.shape, needs[-4:], UpsampleGradients)
    weight_gradients = arguments.WeightGradients(weights, needs[4:-4])
    kept_rows = None if cond is None else cond.reshape(-1, pixels * width)
    for chunk in upsample_chunks(image.shape, patch_size, chunk_tokens(up)):
        image_chunk = chunk.of(image)
        cond_chunk = upsample.cond(chunk.tokens) if kept_rows is None else kept_rows[chunk.tokens]
        part_query = arguments.readable_query(chunked.of(chunk.tokens, tokens.dtype))
        grad_cond = upsample.new_grad_cond(chunk.token_count, pixels)
        grad_query = chunked.new_gradient(chunk.token_count)
        grads = weight_gradients.new_part()
        native.cpu().pixel_decoder_backward(
            arguments.decoder_sizes(image_chunk, weights, patch_size),
            arguments.image(chunk.of(grad_velocity)),
            arguments.image(image_chunk),
            arguments.pixel_rows(cond_chunk.view(-1, pixels, width)),
            arguments.pixel_rows(part_query),
            arguments.arrays(weights),
            arguments.image(None if grad_image is None else chunk.of(grad_image)),
            arguments.pixel_rows(grad_cond),
            arguments.pixel_rows(grad_query),
            arguments.arrays(grads),
            arguments.HEAD_NORMS.index(head_norm),
            eps,
            torch.get_num_threads(),
        )
        weight_gradients.add(grads)
        upsample.add(chunk.tokens.start, grad_cond)
        chunked.add(chunk.tokens, grad_query)
    return (grad_image, *upsample.results(), *weight_gradients.results(), *chunked.results())
