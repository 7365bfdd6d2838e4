"""pixel_decoder: the whole decoder on a noised image and the conditioning of its pixels."""

import math

import torch

from benchmarks.names import GPU_BACKENDS, KEEPING_ACTIVATIONS
from benchmarks.ops.problem import Outputs, Problem, Shapes, Tensors
from benchmarks.ops.sizes import Size
from deco_kernels.testing import published


def decoder_multiply_adds(size: Size, training: bool) -> int:
    """Query, N blocks (modulation 3D², two linears of D²) and head. Training adds the same again for weights and for
    activations, without the gradient of the image."""
    query = head = size.channels * size.decoder_width
    blocks = size.depth * 5 * size.decoder_width**2
    per_pixel = query + blocks + head
    return size.pixels * (3 * per_pixel - query if training else per_pixel)


class PixelDecoder(Problem):
    op = "pixel_decoder"
    activations = ("image", "cond")
    full_precision = ("image",)
    trained = ("cond",)
    constants = ("positions",)

    def other_choice(self, backend: str) -> tuple[str, dict[str, bool]] | None:
        return (KEEPING_ACTIVATIONS, {"save_memory": False}) if backend in GPU_BACKENDS else None

    def outputs(self, size: Size) -> Shapes:
        return {"velocity": (size.batch, size.channels, size.height, size.width)}

    def options(self, size: Size) -> dict[str, int | float | str]:
        return {"patch_size": size.patch_size, "head_norm": "layer"}

    def multiply_adds(self, size: Size, training: bool) -> int:
        return decoder_multiply_adds(size, training)

    def make_weights(self, size: Size, generator: torch.Generator) -> Tensors:
        return with_published_query(super().make_weights(size, generator), size, generator)

    def published(self, tensors: Tensors, size: Size) -> Outputs:
        return (published.decoder(tensors, tensors["cond"], size.patch_size),)


def with_published_query(weights: Tensors, size: Size, generator: torch.Generator) -> Tensors:
    """Adds the published query, W_in(W_emb [rgb; position] + b_emb) + b_in, and its fold: pixel_weight, pixel_table."""
    width, features = size.decoder_width, size.channels + published.POSITION_FEATURES

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=generator.device)

    emb_weight, emb_bias = normal(width, features) / math.sqrt(features), 0.2 * normal(width)
    in_weight, in_bias = normal(width, width) / math.sqrt(width), 0.2 * normal(width)
    positions = published.position_features(size.patch_size).to(generator.device)
    folded = in_weight @ emb_weight
    return {
        **weights,
        "pixel_weight": folded[:, : size.channels].contiguous(),
        "pixel_table": positions @ folded[:, size.channels :].T + in_weight @ emb_bias + in_bias,
        "emb_weight": emb_weight,
        "emb_bias": emb_bias,
        "in_weight": in_weight,
        "in_bias": in_bias,
        "positions": positions,
    }


PROBLEM = PixelDecoder()
