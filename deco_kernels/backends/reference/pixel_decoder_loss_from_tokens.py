"""Reference pixel_decoder_loss_from_tokens."""

import torch.nn.functional as F
from torch import Tensor

from deco_kernels.backends.arguments import Losses
from deco_kernels.backends.reference import pixel_decoder_loss
from deco_kernels.backends.reference.common import OnePass
from deco_kernels.signatures import DecoderWeights, UpsampleWeights


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


_op = OnePass("pixel_decoder_loss_from_tokens", formula)
forward, forward_with_gradients = _op.forward, _op.forward_with_gradients
