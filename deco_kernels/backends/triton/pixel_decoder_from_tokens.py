"""pixel_decoder_from_tokens on Triton: PyTorch's matmul for the upsample and the fused decoder, in chunks.

See upsample.py and pixel_decoder.py. The backward holds one chunk of conditions and of their gradients in addition to
the workspace of the decoder, and the same of a query.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deco_kernels.backends import chunk_sizes
from deco_kernels.backends.arguments import Gradients
from deco_kernels.backends.chunks import slices
from deco_kernels.backends.query import ChunkedQuery
from deco_kernels.backends.upsample import forward_chunk_pixels
from deco_kernels.signatures import DecoderWeights, Query, UpsampleWeights

from .launching import device_guard, pixel_rows, readable_image
from .pixel_decoder import DecoderBackward, part_of_states, query_and_head, run_forward, states_of
from .pixel_decoder import activation_shape as activation_shape
from .upsample import Upsample
from .weights import pack


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
    velocity = torch.empty(image.shape, dtype=tokens.dtype, device=tokens.device)
    image = readable_image(image)
    with device_guard(tokens), torch.no_grad():
        packed = pack(weights.blocks, tokens.dtype)
        decoder_weights = query_and_head(weights)
        upsample = Upsample(tokens, up, weights.pixel_table.shape)
        queries = ChunkedQuery(query, weights.pixel_table.shape, needs=(False,) * len(query))
        kept = None if cond is None else cond.view(-1, weights.pixel_table.numel())
        upsampled = 1 if queries.upsample is None else 2  # tensors of a chunk
        chunk_tokens = max(1, forward_chunk_pixels(tokens, up, patch_size**2) // (upsampled * patch_size**2))
        states = states_of(activations, weights)
        for part in slices(upsample.tokens.shape[0], chunk_tokens):
            conditions = upsample.cond(part, kept)
            rows = pixel_rows(queries.of(part, tokens.dtype))
            run_forward(
                image, conditions, rows, packed, decoder_weights, velocity, part.start, patch_size, head_norm, eps,
                part_of_states(states, part),
            )  # fmt: skip
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
) -> Gradients:
    """Gradients of (image, tokens, upsample weights, decoder weights, query); None where `needs` is False.

    `cond` and `activations` are those of the forward; None if they are computed again.
    """
    upsample_needs, query_needs = needs[1:4], needs[-len(query) :]
    weight_needs = needs[4 : -len(query)]
    needed = (needs[0], any(upsample_needs), any(weight_needs))
    with device_guard(tokens), torch.no_grad():
        sums = DecoderBackward(image, grad_velocity, weights, tokens.dtype, patch_size, head_norm, eps, needed)
        upsample = Upsample(tokens, up, weights.pixel_table.shape)
        queries = ChunkedQuery(query, weights.pixel_table.shape, query_needs)
        kept = None if cond is None else cond.reshape(-1, *weights.pixel_table.shape)
        states = states_of(activations, weights)
        values = sums.width * (2 if queries.upsample is None else 4)  # of cond, of a query made here, of gradients
        chunk_tokens = max(1, chunk_sizes.chunk_pixels(values * tokens.element_size()) // patch_size**2)
        for part in slices(upsample.tokens.shape[0], chunk_tokens):
            conditions = upsample.cond(part) if kept is None else kept[part]
            grad_cond = torch.empty_like(conditions)
            grad_query = torch.empty_like(conditions) if queries.wanted else None
            part_query = pixel_rows(queries.of(part, tokens.dtype)) if states is None else None
            sums.add(conditions, part_query, part.start, grad_cond, grad_query, part_of_states(states, part))
            upsample.add_gradients(part, grad_cond, upsample_needs)
            queries.add(part, grad_query)
        grad_weights = sums.grad_weights() if needed[2] else (None,) * len(weight_needs)
        grads = (sums.grad_image, *upsample.grads(upsample_needs), *grad_weights, *queries.results())
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))
