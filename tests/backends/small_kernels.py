"""Kernels of one operation each, for the tests of Triton's interpreter."""

import triton
import triton.language as tl

from deco_kernels.backends.triton.functions import tanh_fast


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
