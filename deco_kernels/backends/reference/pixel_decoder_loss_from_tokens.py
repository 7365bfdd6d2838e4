"""Reference pixel_decoder_loss_from_tokens."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from deco_kernels.backends.arguments import Gradients, Losses
from deco_kernels.backends.reference import pixel_decoder_loss
from deco_kernels.backends.reference.common import losses_and_gradients, prepare
from deco_kernels.signatures import DecoderWeights, PixelDecoderLossFromTokens, UpsampleWeights

OP = "pixel_decoder_loss_from_tokens"


def formula(
    image: Tensor,
    tokens: Tensor,
    target: Tensor,
    up: UpsampleWeights,
    weights: DecoderWeights,
    frequency_weight: Tensor,
    sample_weight: Tensor | None,
    patch_size: int,
    frequency_scale: float,
    eps: float,
) -> Losses:
    """(total, pixel, frequency), scalars; every tensor in one dtype, or under autocast, which excludes the loss."""
    cond = F.linear(tokens, *up).unflatten(-1, weights.pixel_table.shape)
    options = (patch_size, frequency_scale, eps)
    return pixel_decoder_loss.formula(image, cond, target, weights, frequency_weight, sample_weight, *options)


def forward(inputs: PixelDecoderLossFromTokens, patch_size: int, frequency_scale: float, eps: float) -> Losses:
    return formula(*prepare(OP, inputs, inputs.tokens), patch_size, frequency_scale, eps)


def forward_with_gradients(
    inputs: PixelDecoderLossFromTokens, patch_size: int, frequency_scale: float, eps: float, needs: Sequence[bool]
) -> tuple[Losses, Gradients]:
    """The losses, and the gradients of total in the dtypes in which they are kept."""
    return losses_and_gradients(OP, formula, inputs, inputs.tokens, (patch_size, frequency_scale, eps), needs)
