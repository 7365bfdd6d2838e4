"""pixel_decoder_loss_from_tokens on the CPU. With gradients: the upsample, pixel_decoder_loss and the gradients of the
upsample, in chunks of tokens. Losses alone: the kernel of pixel_decoder_from_tokens, which multiplies in its tiles,
and that of the loss."""

from __future__ import annotations

from deco_kernels.backends.arguments import Losses
from deco_kernels.backends.cpu import flow_matching_loss, pixel_decoder_from_tokens, pixel_decoder_loss
from deco_kernels.backends.cpu.upsample import UpsampleGradients
from deco_kernels.backends.loss_from_tokens import LossFromTokens
from deco_kernels.signatures import PixelDecoderLossFromTokens

chunked = LossFromTokens(pixel_decoder_loss, 1 << 17, UpsampleGradients)
forward_with_gradients = chunked.forward_with_gradients


def forward(
    inputs: PixelDecoderLossFromTokens, patch_size: int, frequency_scale: float, head_norm: str, eps: float
) -> Losses:
    """(total, pixel, frequency)."""
    decoder = (inputs.image, inputs.tokens, inputs.up, inputs.weights, inputs.query)
    velocity = pixel_decoder_from_tokens.forward(*decoder, patch_size, head_norm, eps)
    loss = (velocity, inputs.target, inputs.frequency_weight, inputs.sample_weight)
    return flow_matching_loss.forward(*loss, frequency_scale)
