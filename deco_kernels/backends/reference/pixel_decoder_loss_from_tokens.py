"""Reference pixel_decoder_loss_from_tokens."""

from torch import Tensor

from deco_kernels.backends.arguments import Losses
from deco_kernels.backends.reference import pixel_decoder_loss
from deco_kernels.backends.reference.common import OnePass, query_of, upsample
from deco_kernels.signatures import DecoderWeights, Query, UpsampleWeights


def formula(
    image: Tensor,
    tokens: Tensor,
    target: Tensor,
    up: UpsampleWeights,
    weights: DecoderWeights,
    frequency_weight: Tensor,
    sample_weight: Tensor | None,
    query: Query,
    patch_size: int,
    frequency_scale: float,
    head_norm: str,
    eps: float,
) -> Losses:
    """(total, pixel, frequency), scalars; every tensor in one dtype, or under autocast, which excludes the loss."""
    shape = weights.pixel_table.shape
    tensors = (image, upsample(tokens, up, shape), target, weights, frequency_weight, sample_weight)
    options = (patch_size, frequency_scale, head_norm, eps)
    return pixel_decoder_loss.formula(*tensors, query_of(query, shape), *options)


_op = OnePass("pixel_decoder_loss_from_tokens", formula)
forward, forward_with_gradients = _op.forward, _op.forward_with_gradients
