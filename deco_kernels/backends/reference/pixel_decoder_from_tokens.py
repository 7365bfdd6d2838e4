"""Reference pixel_decoder_from_tokens."""

from collections.abc import Sequence

from torch import Tensor

from deco_kernels.backends.arguments import Gradients
from deco_kernels.backends.reference import pixel_decoder
from deco_kernels.backends.reference.common import differentiate, prepare, query_of, upsample
from deco_kernels.signatures import DecoderWeights, PixelDecoderFromTokens, Query, UpsampleWeights


def formula(
    image: Tensor,
    tokens: Tensor,
    up: UpsampleWeights,
    weights: DecoderWeights,
    query: Query,
    patch_size: int,
    head_norm: str,
    eps: float,
) -> Tensor:
    """velocity [B, C, H, W]; every tensor in one dtype, or under autocast."""
    shape = weights.pixel_table.shape
    cond = upsample(tokens, up, shape)
    return pixel_decoder.formula(image, cond, weights, query_of(query, shape), patch_size, head_norm, eps)


def forward(
    image: Tensor,
    tokens: Tensor,
    up: UpsampleWeights,
    weights: DecoderWeights,
    query: Query,
    patch_size: int,
    head_norm: str,
    eps: float,
    cond: Tensor | None = None,
) -> Tensor:
    inputs = prepare("pixel_decoder_from_tokens", PixelDecoderFromTokens(image, tokens, up, weights, query), tokens)
    if cond is not None:
        cond.copy_(upsample(inputs.tokens, inputs.up, weights.pixel_table.shape))
    return formula(*inputs, patch_size, head_norm, eps).to(tokens.dtype).contiguous()


def backward(
    grad_velocity: Tensor,
    image: Tensor,
    tokens: Tensor,
    up: UpsampleWeights,
    weights: DecoderWeights,
    query: Query,
    patch_size: int,
    head_norm: str,
    eps: float,
    needs: Sequence[bool],
    cond: Tensor | None = None,
) -> Gradients:
    """Differentiates the formula, which computes the condition again."""
    inputs = PixelDecoderFromTokens(image, tokens, up, weights, query)
    prepared = prepare("pixel_decoder_from_tokens", inputs, tokens)
    return differentiate(formula, (patch_size, head_norm, eps), prepared, inputs, needs, (grad_velocity,))
