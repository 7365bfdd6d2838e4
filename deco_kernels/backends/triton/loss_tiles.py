"""Device functions of the loss kernels: tiles of 8x8 blocks, color transform, DCT and quadratic forms.

flow_matching_loss.py defines d, M, F and A.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dct_entries(frequency, sample):
    """Entries of the orthonormal 8-point DCT-II: sqrt((1 or 2)/8)·cos(π(2·sample + 1)·frequency/16)."""
    angle = ((2 * sample + 1) * frequency) % 32  # in units of π/16, then reduced to 0..8
    angle = tl.where(angle > 16, 32 - angle, angle)
    sign = tl.where(angle > 8, -1.0, 1.0)
    angle = tl.where(angle > 8, 16 - angle, angle)
    cosine = tl.where(angle == 0, 1.0, 0.0)
    cosine = tl.where(angle == 1, 0.9807852804032304, cosine)
    cosine = tl.where(angle == 2, 0.9238795325112867, cosine)
    cosine = tl.where(angle == 3, 0.8314696123025452, cosine)
    cosine = tl.where(angle == 4, 0.7071067811865476, cosine)
    cosine = tl.where(angle == 5, 0.5555702330196022, cosine)
    cosine = tl.where(angle == 6, 0.3826834323650898, cosine)
    cosine = tl.where(angle == 7, 0.1950903220161283, cosine)
    return sign * cosine * tl.where(frequency == 0, 0.35355339059327373, 0.5)


@triton.jit
def block_dct():
    """K [64, 64]: coefficient (vertical frequency, horizontal frequency) by position (row, column)."""
    e = tl.arange(0, 64)
    vertical = dct_entries((e // 8)[:, None], (e // 8)[None, :])
    return vertical * dct_entries((e % 8)[:, None], (e % 8)[None, :])


@triton.jit
def ycbcr_row(channel):
    """Row of the RGB -> YCbCr matrix that yields Y, Cb or Cr (channel 0, 1, 2)."""
    of_r = tl.where(channel == 0, 0.299, tl.where(channel == 1, -0.168736, 0.5))
    of_g = tl.where(channel == 0, 0.587, tl.where(channel == 1, -0.331264, -0.418688))
    of_b = tl.where(channel == 0, 0.114, tl.where(channel == 1, 0.5, -0.081312))
    return of_r, of_g, of_b


@triton.jit
def sum_of_products(a0, b0, a1, b1, a2, b2):
    """a0·b0 + a1·b1 + a2·b2, rounded alike for all strides of the images.

    From plain sums the compiler makes fma(a1, b1, a0·b0) or fma(a0, b0, a1·b1), depending on the tensors' layout.
    """
    return tl.fma(a2, b2, tl.fma(a1, b1, a0 * b0))


@triton.jit
def reflected(index, size):
    """Map an index into the padded axis to the unpadded axis."""
    return tl.where(index < size, index, 2 * (size - 1) - index)


@triton.jit
def block_offsets(block_y, block_x, height, width, stride_h, stride_w, PADDED: tl.constexpr):
    """Element offsets [BLOCK, 64] of the pixels of 8x8 blocks in one plane."""
    e = tl.arange(0, 64)
    if PADDED:
        row = reflected(block_y[:, None] * 8 + (e // 8)[None, :], height)
        column = reflected(block_x[:, None] * 8 + (e % 8)[None, :], width)
        offsets = row.to(tl.int64) * stride_h + column.to(tl.int64) * stride_w
    else:
        corner = (block_y * 8).to(tl.int64) * stride_h + (block_x * 8).to(tl.int64) * stride_w
        inside = (e // 8).to(tl.int64) * stride_h + (e % 8).to(tl.int64) * stride_w
        offsets = corner[:, None] + inside[None, :]
    return offsets


@triton.jit
def load_differences(pred_ptr, pred_offsets, pred_stride_c, target_ptr, target_offsets, target_stride_c, valid):
    """pred - target in R, G and B, float32; 0 where not valid."""
    r = tl.load(pred_ptr + pred_offsets, mask=valid, other=0.0).to(tl.float32)
    r -= tl.load(target_ptr + target_offsets, mask=valid, other=0.0).to(tl.float32)
    g = tl.load(pred_ptr + pred_offsets + pred_stride_c, mask=valid, other=0.0).to(tl.float32)
    g -= tl.load(target_ptr + target_offsets + target_stride_c, mask=valid, other=0.0).to(tl.float32)
    b = tl.load(pred_ptr + pred_offsets + 2 * pred_stride_c, mask=valid, other=0.0).to(tl.float32)
    b -= tl.load(target_ptr + target_offsets + 2 * target_stride_c, mask=valid, other=0.0).to(tl.float32)
    return r, g, b


@triton.jit
def load_tile(
    pred_ptr, pred_stride_c, pred_stride_h, pred_stride_w,  # [3, H, W]
    target_ptr, target_stride_c, target_stride_h, target_stride_w,  # [3, H, W]
    tile, height, width,
    PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Tile `tile` of BLOCK 8x8 blocks: differences R, G, B [BLOCK, 64], the blocks' row and column, valid mask."""
    blocks_x = tl.cdiv(width, 8)
    block = tile * BLOCK + tl.arange(0, BLOCK)
    block_y, block_x = block // blocks_x, block % blocks_x
    valid = (block < blocks_x * tl.cdiv(height, 8))[:, None]
    pred_offsets = block_offsets(block_y, block_x, height, width, pred_stride_h, pred_stride_w, PADDED)
    target_offsets = block_offsets(block_y, block_x, height, width, target_stride_h, target_stride_w, PADDED)
    r, g, b = load_differences(
        pred_ptr, pred_offsets, pred_stride_c, target_ptr, target_offsets, target_stride_c, valid
    )
    return r, g, b, block_y, block_x, valid


@triton.jit
def split_bfloat16(x):
    """x ≈ high + low to about 17 significant bits."""
    high = x.to(tl.bfloat16)
    return high, (x - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def form_product(x, forms_ptr, channel, PRECISION: tl.constexpr):
    """x [BLOCK, 64] times the form A of a channel, float32.

    float32 forms [3, 64, 64]: one matmul of PRECISION. bfloat16 forms [3, 2, 64, 64], high and low parts: three
    bfloat16 matmuls with a relative error of 5e-6, far below the rounding of 16-bit images.
    """
    e = tl.arange(0, 64)
    pointers = e[:, None] * 64 + e[None, :]
    if forms_ptr.dtype.element_ty == tl.float32:
        product = tl.dot(x, tl.load(forms_ptr + channel * 4096 + pointers), input_precision=PRECISION)
    else:
        form_high = tl.load(forms_ptr + channel * 8192 + pointers)
        form_low = tl.load(forms_ptr + channel * 8192 + 4096 + pointers)
        high, low = split_bfloat16(x)
        product = tl.dot(high, form_low)
        product = tl.dot(low, form_high, product)
        product = tl.dot(high, form_high, product)
    return product


@triton.jit
def store_sums(sums_ptr, place, squares, energy):
    """Store the sums over a tile of d² and x·A x [BLOCK, 64] as pair number `place`."""
    pixel_sum = tl.sum(tl.sum(squares, 1), 0)
    frequency_sum = tl.sum(tl.sum(energy, 1), 0)
    # For an infinite difference, x·A x is a difference of infinities, but every squared coefficient is infinite.
    infinite = float("inf")
    tl.store(sums_ptr + place * 2, pixel_sum)
    tl.store(sums_ptr + place * 2 + 1, tl.where(pixel_sum == infinite, infinite, frequency_sum))


@triton.jit
def store_gradients(
    grad_pred_ptr, grad_target_ptr, offsets, grad, mask, PRED_GRAD: tl.constexpr, TARGET_GRAD: tl.constexpr
):
    """Store grad as the gradient of pred and its negative as that of target, if needed."""
    if PRED_GRAD:
        tl.store(grad_pred_ptr + offsets, grad, mask=mask)
    if TARGET_GRAD:
        tl.store(grad_target_ptr + offsets, -grad, mask=mask)
