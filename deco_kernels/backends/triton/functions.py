"""Device functions shared by the Triton kernels. Importing this module imports Triton.

Inline assembly cannot be interpreted, so `tanh_fast` has a second implementation for TRITON_INTERPRET=1.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction


@triton.jit
def tanh_fast(x, ONCE: tl.constexpr = False):
    """tanh by the special-function unit (PTX tanh.approx.f32, maximum relative error 2^-11).

    ONCE prevents the compiler from computing it twice if the result is needed in two register layouts.
    """
    if INTERPRETED:
        # An error of the same size: the exact value rounded to 11 significant bits.
        bits = (2 * tl.sigmoid(2 * x) - 1).to(tl.int32, bitcast=True)
        y = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    else:
        y = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=not ONCE, pack=1
        )
    return y


@triton.jit
def once(x):
    """x, float32 on NVIDIA GPUs, which Triton 3.9 then does not compute again for another register layout; 3.6 may."""
    if not INTERPRETED:
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=False, pack=1)
    return x


@triton.jit
def twice_sigmoid(t, FAST_TANH: tl.constexpr):
    """2·sigmoid(2t) = 1 + tanh(t), so that SiLU(2t) = t·twice_sigmoid(t)."""
    if FAST_TANH:
        w = 1.0 + tanh_fast(t, ONCE=True)
    else:
        w = tl.div_rn(2.0, 1.0 + tl.exp(-2.0 * t))
    return w


@triton.jit
def silu_of_double(t, FAST_TANH: tl.constexpr):
    """SiLU(2t); callers fold the factor ½ into the weights that produce t."""
    if FAST_TANH:
        y = t + t * tanh_fast(t)
    else:
        y = t * twice_sigmoid(t, FAST_TANH)
    return y


@triton.jit
def silu_of_double_grad(t, w):
    """d SiLU(2t) / dt, from w = twice_sigmoid(t)."""
    return w * (1.0 + t * (2.0 - w))


@triton.jit
def mean_of(h, D: tl.constexpr):
    """Mean over the last axis of h [BLOCK, D], exact for equal values of normal size."""
    mean = tl.sum(h, 1) * (1.0 / D)
    if not SUMS_IN_PAIRS:  # a second pass adds the mean of what the rounding errors of the first left
        mean += tl.sum(h - mean[:, None], 1) * (1.0 / D)
    return mean


@triton.jit
def normalize(h, D: tl.constexpr, EPS: tl.constexpr, RMS: tl.constexpr = False):
    """LayerNorm without affine over the last axis of h [BLOCK, D]: the normalized rows and 1/std [BLOCK].

    With RMS, RMSNorm: the mean is not subtracted. NaN if the variance is not finite. 1/std amplifies the error of the
    mean by up to 1,000 at eps 1e-6.
    """
    centered = h if RMS else h - mean_of(h, D)[:, None]
    variance = tl.sum(centered * centered, 1) * (1.0 / D)
    rstd = tl.rsqrt(variance + EPS) + variance * 0.0
    return centered * rstd[:, None], rstd


@triton.jit
def normalize_grad(grad, normalized, rstd, D: tl.constexpr, RMS: tl.constexpr = False):
    """Gradient of `normalize` with respect to h, from the gradient of its first result."""
    mean = tl.sum(grad, 1) * (1.0 / D)
    projection = tl.sum(grad * normalized, 1) * (1.0 / D)
    centered = grad if RMS else grad - mean[:, None]
    return rstd[:, None] * (centered - normalized * projection[:, None])


@triton.jit
def packed_matrix(matrices_ptr, index, D: tl.constexpr):
    """Packed matrix `index`, [in, out]."""
    d = tl.arange(0, D)
    return tl.load(matrices_ptr + index * D * D + d[:, None] * D + d[None, :])


@triton.jit
def affine(x, matrix, biases_ptr, index, D: tl.constexpr, PRECISION: tl.constexpr):
    """x [BLOCK, D] times matrix [in, out] plus packed bias `index`, float32."""
    bias = tl.load(biases_ptr + index * D + tl.arange(0, D))
    return tl.dot(x, matrix, input_precision=PRECISION) + bias[None, :]


@triton.jit
def linear(x, matrices_ptr, biases_ptr, index, D: tl.constexpr, PRECISION: tl.constexpr):
    """Packed linear `index` of x [BLOCK, D], float32."""
    return affine(x, packed_matrix(matrices_ptr, index, D), biases_ptr, index, D, PRECISION)


@triton.jit
def add_linear_grad(weight, biases, grad, x, number: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """Add one tile's gradients of a linear to the sums over pixels.

    weight [out, in] += gradᵀ·x; row `number` of biases [16, out] += sum of grad [BLOCK, out] over its rows. The tensor
    cores compute both: a matmul with ones gives the sum in all 16 rows, and the selection afterward keeps NaN out of
    the sums of other linears.
    """
    weight = tl.dot(tl.trans(grad), x, weight, input_precision=PRECISION)
    sums = tl.dot(tl.full([16, BLOCK], 1.0, grad.dtype), grad, biases, input_precision=PRECISION)
    return weight, tl.where(tl.arange(0, 16)[:, None] == number, sums, biases)


@triton.jit
def add_to(pointers, value, mask=None):
    """Add to memory that only this program writes."""
    tl.store(pointers, tl.load(pointers, mask=mask) + value, mask=mask)


@triton.jit
def tile_pixels(tile, n_tokens, PIXELS: tl.constexpr, BLOCK: tl.constexpr):
    """Tile index -> (token, pixel of the patch, whether it is valid), for BLOCK consecutive pixels.

    A tile is part of one token (token is then a scalar) or covers BLOCK / PIXELS whole tokens.
    """
    tile = tl.full((), 0, tl.int32) + tile  # the interpreter's loop counters are Python integers
    lane = tl.arange(0, BLOCK)
    if PIXELS >= BLOCK:
        token = tile // (PIXELS // BLOCK)
        pixel = (tile % (PIXELS // BLOCK)) * BLOCK + lane
        valid = tl.full([BLOCK], True, tl.int1)
    else:
        token = tile * (BLOCK // PIXELS) + lane // PIXELS
        pixel = lane % PIXELS
        valid = token < n_tokens
    return token, pixel, valid


@triton.jit
def row_offsets(token, pixel, token_stride, pixel_stride, D: tl.constexpr):
    """Element offsets [BLOCK, D] of the pixels' rows in a [tokens, pixels, D] tensor with unit channel stride."""
    rows = token.to(tl.int64) * token_stride + pixel.to(tl.int64) * pixel_stride
    return rows[:, None] + tl.arange(0, D)[None, :]


@triton.jit
def image_offsets(token, pixel, tokens_y, tokens_x, stride_b, stride_h, stride_w, PATCH: tl.constexpr):
    """Element offsets [BLOCK] of the pixels' first channel in a [B, C, H, W] tensor with any strides."""
    image = token // (tokens_y * tokens_x)
    place = token - image * (tokens_y * tokens_x)
    row = (place // tokens_x) * PATCH + pixel // PATCH
    column = (place % tokens_x) * PATCH + pixel % PATCH
    return image.to(tl.int64) * stride_b + row.to(tl.int64) * stride_h + column.to(tl.int64) * stride_w


@triton.jit
def load_states(h_ptr, offsets, mask, D: tl.constexpr):
    """h [BLOCK, D], float32; masked rows are 0, 1, 0, 1, ..., so that their LayerNorm is finite even for eps 0."""
    filler = (tl.arange(0, D) % 2)[None, :].to(h_ptr.dtype.element_ty)
    return tl.load(h_ptr + offsets, mask=mask, other=filler).to(tl.float32)


INTERPRETED = tl.constexpr(not isinstance(tanh_fast, JITFunction))

# In Triton 3.8 and later, compiled tl.sum adds the values of a thread pairwise, which is exact for equal values.
# Earlier versions add them sequentially, and the interpreter adds in NumPy's order.
SUMS_IN_PAIRS = tl.constexpr(
    not INTERPRETED.value and tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 8)
)

if INTERPRETED:
    from . import interpreter  # noqa: F401  fixes Triton's interpreter
