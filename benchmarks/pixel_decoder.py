"""pixel_decoder: the whole decoder on a noised image and the conditions of its pixels."""

import math

import torch
import torch.nn.functional as F

from benchmarks.problem import EPS, Outputs, Problem, Shapes, Tensors
from benchmarks.sizes import Size

POSITION_FEATURES = 64


def block_shapes(size: Size) -> Shapes:
    """The stacked weights of the decoder's blocks."""
    depth, width = size.depth, size.decoder_width
    return {
        "norm_weight": (depth, width),
        "norm_bias": (depth, width),
        "mod_weight": (depth, 3 * width, width),
        "mod_bias": (depth, 3 * width),
        "fc1_weight": (depth, width, width),
        "fc1_bias": (depth, width),
        "fc2_weight": (depth, width, width),
        "fc2_bias": (depth, width),
    }


def decoder_shapes(size: Size) -> Shapes:
    """All weights of the decoder after the upsample."""
    return {
        "pixel_weight": (size.decoder_width, size.channels),
        "pixel_table": (size.patch_pixels, size.decoder_width),
        **block_shapes(size),
        "head_weight": (size.channels, size.decoder_width),
        "head_bias": (size.channels,),
    }


def decoder_multiply_adds(size: Size, training: bool) -> int:
    """Query, N blocks (modulation 3D², two linears of D²) and head. Gradients cost as much again for the weights and
    for the activations, but none is taken with respect to the image."""
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

    def arguments(self, size: Size) -> Shapes:
        return {
            "image": (size.batch, size.channels, size.height, size.width),
            "cond": (size.tokens, size.patch_pixels, size.decoder_width),
            **decoder_shapes(size),
        }

    def outputs(self, size: Size) -> Shapes:
        return {"velocity": (size.batch, size.channels, size.height, size.width)}

    def options(self, size: Size) -> dict[str, int | float]:
        return {"patch_size": size.patch_size}

    def multiply_adds(self, size: Size, training: bool) -> int:
        return decoder_multiply_adds(size, training)

    def make_weights(self, size: Size, generator: torch.Generator) -> Tensors:
        return with_published_query(super().make_weights(size, generator), size, generator)

    def published(self, tensors: Tensors, size: Size) -> Outputs:
        return (published_decoder(tensors, tensors["cond"], size),)


def with_published_query(weights: Tensors, size: Size, generator: torch.Generator) -> Tensors:
    """Adds the published query, W_in(W_emb [rgb; position] + b_emb) + b_in, and its fold: pixel_weight, pixel_table."""
    width, features = size.decoder_width, size.channels + POSITION_FEATURES

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=generator.device)

    emb_weight, emb_bias = normal(width, features) / math.sqrt(features), 0.2 * normal(width)
    in_weight, in_bias = normal(width, width) / math.sqrt(width), 0.2 * normal(width)
    positions = position_features(size.patch_size).to(generator.device)
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


def position_features(patch_size: int) -> torch.Tensor:
    """The class-conditional model's features of a patch's pixels, [P, 64]: cos(pi u f_i) cos(pi v f_j) / (1 + f_i f_j)
    at index 8 i + j, i over the frequencies in x."""
    frequencies = torch.linspace(0, 8, 8)
    waves = torch.cos(math.pi * torch.linspace(0, 1, patch_size)[:, None] * frequencies)
    decay = 1 / (1 + frequencies[:, None] * frequencies)
    grid = waves[None, :, :, None] * waves[:, None, None, :] * decay  # [ky, kx, i, j]
    return grid.reshape(patch_size**2, POSITION_FEATURES)


def published_decoder(tensors: Tensors, cond: torch.Tensor, size: Size) -> torch.Tensor:
    """The decoder as published: unfold, concatenation with the positions, two linears, SiLU(cond) in every block. The
    fold is written with reshape and permute, because torch.compile fails on F.fold on the CPU."""
    channels, patch_size, pixels = size.channels, size.patch_size, size.patch_pixels
    patches = F.unfold(tensors["image"], kernel_size=patch_size, stride=patch_size).transpose(1, 2)
    patches = patches.reshape(size.tokens, channels, pixels).transpose(1, 2)
    positions = tensors["positions"].expand(size.tokens, -1, -1).to(patches.dtype)
    h = F.linear(torch.cat((patches, positions), dim=-1), tensors["emb_weight"], tensors["emb_bias"])
    h = F.linear(h, tensors["in_weight"], tensors["in_bias"])
    cond = cond.reshape(h.shape)
    for weights in zip(*(tensors[name] for name in block_shapes(size)), strict=True):
        h = published_block(h, cond, *weights)
    velocity = F.linear(F.layer_norm(h, h.shape[-1:], eps=EPS), tensors["head_weight"], tensors["head_bias"])
    rows, columns = size.height // patch_size, size.width // patch_size
    grid = velocity.reshape(size.batch, rows, columns, patch_size, patch_size, channels)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(size.batch, channels, size.height, size.width)


def published_block(h, cond, norm_weight, norm_bias, mod_weight, mod_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
    """One decoder block as published."""
    shift, scale, gate = F.linear(F.silu(cond), mod_weight, mod_bias).chunk(3, dim=-1)
    normed = F.layer_norm(h, h.shape[-1:], norm_weight, norm_bias, EPS)
    modulated = normed * (1 + scale) + shift
    return h + gate * F.linear(F.silu(F.linear(modulated, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)


PROBLEM = PixelDecoder()
