"""Reference pixel_decoder_loss."""

from collections.abc import Sequence

import torch
from torch import Tensor

from deco_kernels.backends.arguments import Gradients, Losses
from deco_kernels.backends.reference import flow_matching_loss, pixel_decoder
from deco_kernels.backends.reference.common import losses_and_gradients, prepare
from deco_kernels.signatures import DecoderWeights, PixelDecoderLoss

OP = "pixel_decoder_loss"


def formula(
    image: Tensor,
    cond: Tensor,
    target: Tensor,
    weights: DecoderWeights,
    frequency_weight: Tensor,
    sample_weight: Tensor | None,
    patch_size: int,
    frequency_scale: float,
    eps: float,
) -> Losses:
    """(total, pixel, frequency), scalars; every tensor in one dtype, or under autocast, which excludes the loss."""
    velocity = pixel_decoder.formula(image, cond, weights, patch_size, eps)
    wide = torch.promote_types(target.dtype, torch.float32)
    sample_weight = None if sample_weight is None else sample_weight.to(wide)
    with torch.autocast(image.device.type, enabled=False):
        pair = (velocity.to(wide), target.to(wide))
        return flow_matching_loss.formula(*pair, frequency_weight.to(wide), sample_weight, frequency_scale)


def forward(inputs: PixelDecoderLoss, patch_size: int, frequency_scale: float, eps: float) -> Losses:
    return formula(*prepare(OP, inputs, inputs.cond), patch_size, frequency_scale, eps)


def forward_with_gradients(
    inputs: PixelDecoderLoss, patch_size: int, frequency_scale: float, eps: float, needs: Sequence[bool]
) -> tuple[Losses, Gradients]:
    """The losses, and the gradients of total in the dtypes in which they are kept."""
    return losses_and_gradients(OP, formula, inputs, inputs.cond, (patch_size, frequency_scale, eps), needs)
