"""The fused ops of the per-pixel decoder and its training loss, as differentiable PyTorch operators."""

from deco_kernels.ops.adaln_block import adaln_block
from deco_kernels.ops.flow_matching_loss import flow_matching_loss, frequency_loss, jpeg_frequency_weight
from deco_kernels.ops.pixel_decoder import pixel_decoder, pixel_decoder_from_tokens
from deco_kernels.ops.pixel_decoder_loss import pixel_decoder_loss, pixel_decoder_loss_from_tokens
from deco_kernels.ops.upsample_modulate import upsample_modulate

__all__ = [
    "adaln_block",
    "flow_matching_loss",
    "frequency_loss",
    "jpeg_frequency_weight",
    "pixel_decoder",
    "pixel_decoder_from_tokens",
    "pixel_decoder_loss",
    "pixel_decoder_loss_from_tokens",
    "upsample_modulate",
]
