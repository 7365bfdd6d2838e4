"""pixel_decoder_loss: the decoder and its training loss."""

import torch

from benchmarks.ops.flow_matching_loss import FREQUENCY_SCALE, loss_multiply_adds
from benchmarks.ops.pixel_decoder import PixelDecoder
from benchmarks.ops.problem import Outputs, Shapes, Tensors
from benchmarks.ops.sizes import Size
from deco_kernels import ops
from deco_kernels.signatures import OPS
from deco_kernels.testing import published


class PixelDecoderLoss(PixelDecoder):
    op = "pixel_decoder_loss"
    activations = ("image", "cond", "target")
    full_precision = ("image", "target")
    constants = ("positions", "frequency_weight")
    one_pass = True
    decoder = "pixel_decoder"

    def outputs(self, size: Size) -> Shapes:
        return {"total": (), "pixel": (), "frequency": ()}

    def output_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def options(self, size: Size) -> dict[str, int | float | str]:
        return {"patch_size": size.patch_size, "frequency_scale": FREQUENCY_SCALE, "head_norm": "layer"}

    def multiply_adds(self, size: Size, training: bool) -> int:
        return super().multiply_adds(size, training) + loss_multiply_adds(size, training)

    def make_weights(self, size: Size, generator: torch.Generator) -> Tensors:
        weight = ops.jpeg_frequency_weight(device=generator.device)
        return {**super().make_weights(size, generator), "frequency_weight": weight}

    def make_incoming(self, size: Size, dtype: torch.dtype, generator: torch.Generator) -> Outputs:
        """Only `total` is differentiated."""
        return (torch.ones((), device=generator.device),)

    def published(self, tensors: Tensors, size: Size) -> Outputs:
        """The loss is computed in float32, outside autocast."""
        velocity = published.decoder(tensors, tensors["cond"], size.patch_size)
        with torch.autocast(velocity.device.type, enabled=False):
            weight = tensors["frequency_weight"]
            return published.losses(velocity, tensors["target"], weight, frequency_scale=FREQUENCY_SCALE)

    def two_ops(self, tensors: Tensors, size: Size, backend: str, **choice: bool) -> Outputs:
        given = {name: tensors[name] for name in OPS[self.decoder].names if name in tensors}
        velocity = getattr(ops, self.decoder)(**given, patch_size=size.patch_size, backend=backend, **choice)
        pair = (velocity, tensors["target"], tensors["frequency_weight"])
        return ops.flow_matching_loss(*pair, frequency_scale=FREQUENCY_SCALE, backend=backend)


PROBLEM = PixelDecoderLoss()
