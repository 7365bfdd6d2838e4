"""Reference pixel_decoder."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from deco_kernels.backends.arguments import Gradients
from deco_kernels.backends.reference.adaln_block import block
from deco_kernels.backends.reference.common import differentiate, prepare
from deco_kernels.signatures import BlockWeights, DecoderWeights, PixelDecoder, flat, grouped


def patches_of(image: Tensor, patch_size: int) -> Tensor:
    """[B, C, H, W] -> [T, P, C], patches in row-major order, pixel k = ky*p + kx."""
    batch, channels, height, width = image.shape
    rows, columns = height // patch_size, width // patch_size
    grid = image.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(batch * rows * columns, patch_size**2, channels)


def image_of(patches: Tensor, shape: torch.Size, patch_size: int) -> Tensor:
    """[T, P, C] -> [B, C, H, W], the inverse of `patches_of`."""
    batch, channels, height, width = shape
    rows, columns = height // patch_size, width // patch_size
    grid = patches.reshape(batch, rows, columns, patch_size, patch_size, channels)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(shape)


def formula(
    image: Tensor,
    cond: Tensor,
    weights: DecoderWeights,
    query: Tensor | None,
    patch_size: int,
    head_norm: str,
    eps: float,
) -> Tensor:
    """velocity [B, C, H, W]; every tensor in one dtype, or under autocast."""
    pixel_weight, pixel_table, blocks, head_weight, head_bias = weights
    patches = patches_of(image, patch_size)
    silu_cond = F.silu(cond).reshape(patches.shape[0], *pixel_table.shape)
    h = F.linear(patches, pixel_weight) + pixel_table
    if query is not None:
        h = h + query.reshape(h.shape)
    for one in zip(*flat(blocks), strict=True):
        h = block(h, silu_cond, grouped(BlockWeights, one), eps)
    normalized = (F.rms_norm if head_norm == "rms" else F.layer_norm)(h, h.shape[-1:], eps=eps)
    velocity = F.linear(normalized, head_weight, head_bias)
    return image_of(velocity, image.shape, patch_size)


def forward(
    image: Tensor,
    cond: Tensor,
    weights: DecoderWeights,
    query: Tensor | None,
    patch_size: int,
    head_norm: str,
    eps: float,
) -> Tensor:
    inputs = prepare("pixel_decoder", PixelDecoder(image, cond, weights, query), cond)
    return formula(*inputs, patch_size, head_norm, eps).to(cond.dtype).contiguous()


def backward(
    grad_velocity: Tensor,
    image: Tensor,
    cond: Tensor,
    weights: DecoderWeights,
    query: Tensor | None,
    patch_size: int,
    head_norm: str,
    eps: float,
    needs: Sequence[bool],
) -> Gradients:
    inputs = PixelDecoder(image, cond, weights, query)
    prepared = prepare("pixel_decoder", inputs, cond)
    return differentiate(formula, (patch_size, head_norm, eps), prepared, inputs, needs, (grad_velocity,))
