"""Small kernels for the tests of Triton's interpreter and of compiled code."""

import triton
import triton.language as tl

from deco_kernels.backends.triton.functions import mean_of, tanh_fast


@triton.jit
def to_bfloat16(x_ptr, y_ptr, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    tl.store(y_ptr + place, tl.load(x_ptr + place).to(tl.bfloat16))


@triton.jit
def product(a_ptr, b_ptr, c_ptr, SIZE: tl.constexpr):
    d = tl.arange(0, SIZE)
    square = d[:, None] * SIZE + d[None, :]
    tl.store(c_ptr + square, tl.dot(tl.load(a_ptr + square), tl.load(b_ptr + square)))


@triton.jit
def fast_tanh(x_ptr, y_ptr, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    tl.store(y_ptr + place, tanh_fast(tl.load(x_ptr + place)))


@triton.jit
def row_means(x_ptr, means_ptr, BLOCK: tl.constexpr, D: tl.constexpr):
    """Means over the channels of x [BLOCK, D] as loaded, and of a matrix product."""
    row, d = tl.arange(0, BLOCK), tl.arange(0, D)
    x = tl.load(x_ptr + row[:, None] * D + d[None, :])
    matrix = tl.load(x_ptr + d[:, None] * D + d[None, :])
    tl.store(means_ptr + row, mean_of(x.to(tl.float32), D))
    tl.store(means_ptr + BLOCK + row, mean_of(tl.dot(x, matrix), D))
