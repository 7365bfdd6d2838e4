"""Reference pixel_decoder_loss."""

import torch
from torch import Tensor

from deco_kernels.backends.arguments import Losses
from deco_kernels.backends.reference import flow_matching_loss, pixel_decoder
from deco_kernels.backends.reference.common import OnePass
from deco_kernels.signatures import DecoderWeights


def formula(
    image: Tensor,
    cond: Tensor,
    target: Tensor,
    weights: DecoderWeights,
    frequency_weight: Tensor,
    sample_weight: Tensor | None,
    query: Tensor | None,
    patch_size: int,
    frequency_scale: float,
    head_norm: str,
    eps: float,
) -> Losses:
    """(total, pixel, frequency), scalars; every tensor in one dtype, or under autocast, which excludes the loss."""
    velocity = pixel_decoder.formula(image, cond, weights, query, patch_size, head_norm, eps)
    wide = torch.promote_types(target.dtype, torch.float32)
    sample_weight = None if sample_weight is None else sample_weight.to(wide)
    with torch.autocast(image.device.type, enabled=False):
        pair = (velocity.to(wide), target.to(wide))
        return flow_matching_loss.formula(*pair, frequency_weight.to(wide), sample_weight, frequency_scale)


_op = OnePass("pixel_decoder_loss", formula)
forward, forward_with_gradients = _op.forward, _op.forward_with_gradients
