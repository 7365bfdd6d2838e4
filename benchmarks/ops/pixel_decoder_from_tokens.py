"""pixel_decoder_from_tokens: the upsample of the tokens and the decoder together."""

import torch
import torch.nn.functional as F

from benchmarks.names import GPU_BACKENDS, KEEPING_ACTIVATIONS, KEEPING_COND
from benchmarks.ops.pixel_decoder import decoder_multiply_adds, with_published_query
from benchmarks.ops.problem import Outputs, Problem, Shapes, Tensors
from benchmarks.ops.sizes import Size
from deco_kernels.testing import published


class PixelDecoderFromTokens(Problem):
    op = "pixel_decoder_from_tokens"
    activations = ("image", "tokens")
    full_precision = ("image",)
    trained = ("tokens",)
    constants = ("positions",)

    def other_choice(self, backend: str) -> tuple[str, dict[str, bool]]:
        return KEEPING_ACTIVATIONS if backend in GPU_BACKENDS else KEEPING_COND, {"save_memory": False}

    def outputs(self, size: Size) -> Shapes:
        return {"velocity": (size.batch, size.channels, size.height, size.width)}

    def options(self, size: Size) -> dict[str, int | float | str]:
        return {"patch_size": size.patch_size, "head_norm": "layer"}

    def multiply_adds(self, size: Size, training: bool) -> int:
        upsample = size.pixels * size.decoder_width * size.token_width
        return decoder_multiply_adds(size, training) + (3 * upsample if training else upsample)

    def make_weights(self, size: Size, generator: torch.Generator) -> Tensors:
        return with_published_query(super().make_weights(size, generator), size, generator)

    def published(self, tensors: Tensors, size: Size) -> Outputs:
        cond = F.linear(tensors["tokens"], tensors["up_weight"], tensors["up_bias"])
        return (published.decoder(tensors, cond, size.patch_size),)


PROBLEM = PixelDecoderFromTokens()
