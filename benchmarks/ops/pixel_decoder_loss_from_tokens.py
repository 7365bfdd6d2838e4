"""pixel_decoder_loss_from_tokens: the upsample of the tokens, the decoder and its training loss."""

import torch.nn.functional as F

from benchmarks.ops.flow_matching_loss import FREQUENCY_SCALE
from benchmarks.ops.pixel_decoder_loss import PixelDecoderLoss
from benchmarks.ops.problem import Outputs, Tensors
from benchmarks.ops.sizes import Size
from deco_kernels import ops
from deco_kernels.signatures import OPS


class PixelDecoderLossFromTokens(PixelDecoderLoss):
    op = "pixel_decoder_loss_from_tokens"
    activations = ("image", "tokens", "target")
    trained = ("tokens",)

    def multiply_adds(self, size: Size, training: bool) -> int:
        upsample = size.pixels * size.decoder_width * size.token_width
        return super().multiply_adds(size, training) + (3 * upsample if training else upsample)

    def published(self, tensors: Tensors, size: Size) -> Outputs:
        cond = F.linear(tensors["tokens"], tensors["up_weight"], tensors["up_bias"])
        return super().published({**tensors, "cond": cond}, size)

    def two_ops(self, tensors: Tensors, size: Size, backend: str) -> Outputs:
        decoder = {name: tensors[name] for name in OPS["pixel_decoder_from_tokens"].names}
        velocity = ops.pixel_decoder_from_tokens(**decoder, patch_size=size.patch_size, backend=backend)
        pair = (velocity, tensors["target"], tensors["frequency_weight"])
        return ops.flow_matching_loss(*pair, frequency_scale=FREQUENCY_SCALE, backend=backend)


PROBLEM = PixelDecoderLossFromTokens()
