"""Reference pixel_decoder."""

import torch
import torch.nn.functional as F

from deco_kernels.backends.reference.adaln_block import block
from deco_kernels.backends.reference.common import differentiate, prepare


def patches_of(image: torch.Tensor, patch_size: int) -> torch.Tensor:
    """[B, C, H, W] -> [T, P, C], patches in row-major order, pixel k = ky*p + kx."""
    batch, channels, height, width = image.shape
    rows, columns = height // patch_size, width // patch_size
    grid = image.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(batch * rows * columns, patch_size**2, channels)


def image_of(patches: torch.Tensor, shape: torch.Size, patch_size: int) -> torch.Tensor:
    """[T, P, C] -> [B, C, H, W], the inverse of `patches_of`."""
    batch, channels, height, width = shape
    rows, columns = height // patch_size, width // patch_size
    grid = patches.reshape(batch, rows, columns, patch_size, patch_size, channels)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(shape)


def formula(image, cond, pixel_weight, pixel_table, *arguments):
    """velocity [B, C, H, W]; every tensor in one dtype, or under autocast."""
    *block_weights, head_weight, head_bias, patch_size, eps = arguments
    patches = patches_of(image, patch_size)
    silu_cond = F.silu(cond).reshape(patches.shape[0], *pixel_table.shape)
    h = F.linear(patches, pixel_weight) + pixel_table
    for weights in zip(*block_weights, strict=True):
        h = block(h, silu_cond, *weights, eps)
    velocity = F.linear(F.layer_norm(h, h.shape[-1:], eps=eps), head_weight, head_bias)
    return image_of(velocity, image.shape, patch_size)


def forward(*arguments):
    *tensors, patch_size, eps = arguments
    cond = tensors[1]
    return formula(*prepare("pixel_decoder", tensors, cond), patch_size, eps).to(cond.dtype).contiguous()


def backward(grad_velocity, *arguments):
    *tensors, patch_size, eps, needs = arguments
    return differentiate(
        lambda *t: formula(*t, patch_size, eps),
        prepare("pixel_decoder", tensors, tensors[1]),
        tensors,
        needs,
        (grad_velocity,),
    )
