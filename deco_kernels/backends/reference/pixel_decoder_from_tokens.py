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
    image: Tensor,
    tokens: Tensor,
    up: UpsampleWeights,
    weights: DecoderWeights,
    patch_size: int,
    eps: float,
    cond: Tensor | None = None,
) -> Tensor:
    inputs = prepare("pixel_decoder_from_tokens", PixelDecoderFromTokens(image, tokens, up, weights), tokens)
    if cond is not None:
        cond.copy_(upsample(inputs.tokens, inputs.up, weights.pixel_table.shape))
    return formula(*inputs, patch_size, eps).to(tokens.dtype).contiguous()


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
