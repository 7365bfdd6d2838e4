"""Gradients of images that flow_matching_loss pads by reflection at bottom and right to multiples of 8."""

import triton
import triton.language as tl

from .loss_tiles import store_gradients


@triton.jit
def fold_kernel(
    pred_ptr, pred_stride_b, pred_stride_c, pred_stride_h, pred_stride_w,  # [B, 3, H, W]
    target_ptr, target_stride_b, target_stride_c, target_stride_h, target_stride_w,  # [B, 3, H, W]
    coefficients_ptr, sample_weight_ptr,  # as in gradient_kernel
    grad_padded_ptr,  # [B, 3, H', W'] float32
    grad_pred_ptr, grad_target_ptr,  # out [B, 3, H, W] contiguous
    height, width,
    WEIGHTED: tl.constexpr, PRED_GRAD: tl.constexpr, TARGET_GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (b·3 + c)·tiles + tile: the pixel part plus every padded position that reflects onto a pixel, one plane.

    The grid has one size, like that of spectrum_kernel: only the first may exceed 65,535.
    """
    tiles = tl.cdiv(height.to(tl.int64) * width, BLOCK)
    sample, channel = tl.program_id(0) // (3 * tiles), tl.program_id(0) // tiles % 3
    padded_height, padded_width = tl.cdiv(height, 8) * 8, tl.cdiv(width, 8) * 8
    pixel = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    valid = pixel < height.to(tl.int64) * width
    row, column = pixel // width, pixel % width

    pred = tl.load(
        pred_ptr + sample * pred_stride_b + channel * pred_stride_c + row * pred_stride_h + column * pred_stride_w,
        mask=valid, other=0.0,
    ).to(tl.float32)  # fmt: skip
    target = tl.load(
        target_ptr + sample * target_stride_b + channel * target_stride_c
        + row * target_stride_h + column * target_stride_w,
        mask=valid, other=0.0,
    ).to(tl.float32)  # fmt: skip
    of_pixel = tl.load(coefficients_ptr)
    if WEIGHTED:
        of_pixel *= tl.load(sample_weight_ptr + sample).to(tl.float32)
    grad = of_pixel * (pred - target)

    plane = grad_padded_ptr + (sample * 3 + channel) * padded_height * padded_width
    mirror_row, mirror_column = 2 * (height - 1) - row, 2 * (width - 1) - column
    row_doubled = valid & (mirror_row >= height) & (mirror_row < padded_height)
    column_doubled = valid & (mirror_column >= width) & (mirror_column < padded_width)
    grad += tl.load(plane + row * padded_width + column, mask=valid, other=0.0)
    grad += tl.load(plane + mirror_row * padded_width + column, mask=row_doubled, other=0.0)
    grad += tl.load(plane + row * padded_width + mirror_column, mask=column_doubled, other=0.0)
    grad += tl.load(plane + mirror_row * padded_width + mirror_column, mask=row_doubled & column_doubled, other=0.0)
    offsets = (sample * 3 + channel) * height * width + pixel
    store_gradients(grad_pred_ptr, grad_target_ptr, offsets, grad, valid, PRED_GRAD, TARGET_GRAD)
