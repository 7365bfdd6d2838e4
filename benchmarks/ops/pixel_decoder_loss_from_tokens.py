"""pixel_decoder_loss_from_tokens: the upsample of the tokens, the decoder and its training loss."""

import torch.nn.functional as F

from benchmarks.ops.pixel_decoder_loss import PixelDecoderLoss
from benchmarks.ops.problem import Outputs, Tensors
from benchmarks.ops.sizes import Size


class PixelDecoderLossFromTokens(PixelDecoderLoss):
    op = "pixel_decoder_loss_from_tokens"
    activations = ("image", "tokens", "target")
    trained = ("tokens",)
    decoder = "pixel_decoder_from_tokens"

    def multiply_adds(self, size: Size, training: bool) -> int:
        upsample = size.pixels * size.decoder_width * size.token_width
        return super().multiply_adds(size, training) + (3 * upsample if training else upsample)

    def published(self, tensors: Tensors, size: Size) -> Outputs:
        cond = F.linear(tensors["tokens"], tensors["up_weight"], tensors["up_bias"])
        return super().published({**tensors, "cond": cond}, size)


PROBLEM = PixelDecoderLossFromTokens()
