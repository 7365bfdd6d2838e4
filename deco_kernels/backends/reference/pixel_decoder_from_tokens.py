"""Reference pixel_decoder_from_tokens."""

from collections.abc import Sequence

from torch import Tensor

from deco_kernels.backends.arguments import Gradients
from deco_kernels.backends.reference import pixel_decoder
from deco_kernels.backends.reference.common import differentiate, prepare, upsample
from deco_kernels.signatures import DecoderWeights, PixelDecoderFromTokens, UpsampleWeights


def formula(
    image: Tensor, tokens: Tensor, up: UpsampleWeights, weights: DecoderWeights, patch_size: int, eps: float
) -> Tensor:
    """velocity [B, C, H, W]; every tensor in one dtype, or under autocast."""
    cond = upsample(tokens, up, weights.pixel_table.shape)
    return pixel_decoder.formula(image, cond, weights, patch_size, eps)


def forward(
    image: Tensor, tokens: Tensor, up: UpsampleWeights, weights: DecoderWeights, patch_size: int, eps: float
) -> Tensor:
    return forward_with_cond(image, tokens, up, weights, patch_size, eps)[0]


def forward_with_cond(
    image: Tensor, tokens: Tensor, up: UpsampleWeights, weights: DecoderWeights, patch_size: int, eps: float
) -> tuple[Tensor, Tensor]:
    inputs = prepare("pixel_decoder_from_tokens", PixelDecoderFromTokens(image, tokens, up, weights), tokens)
    cond = upsample(inputs.tokens, inputs.up, weights.pixel_table.shape)
    velocity = pixel_decoder.formula(inputs.image, cond, inputs.weights, patch_size, eps)
    return velocity.to(tokens.dtype).contiguous(), cond.to(tokens.dtype).contiguous()


def backward(
    grad_velocity: Tensor,
    image: Tensor,
    tokens: Tensor,
    up: UpsampleWeights,
    weights: DecoderWeights,
    cond: Tensor | None,
    patch_size: int,
    eps: float,
    needs: Sequence[bool],
) -> Gradients:
    """Differentiates the formula, which computes the condition again."""
    inputs = PixelDecoderFromTokens(image, tokens, up, weights)
    prepared = prepare("pixel_decoder_from_tokens", inputs, tokens)
    return differentiate(formula, (patch_size, eps), prepared, inputs, needs, (grad_velocity,))
