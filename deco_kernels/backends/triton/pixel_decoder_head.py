"""Backward of the decoder's head on Triton, velocity = W_out·norm(h) + b_out; norm is LayerNorm or RMSNorm (RMS)."""

from __future__ import annotations

import triton
import triton.language as tl

from .functions import add_to, image_offsets, load_states, normalize, normalize_grad, row_offsets, tile_pixels


@triton.jit
def head_backward(
    h, grad_velocity_ptr, offsets, stride_c, valid, head_weight_ptr, grad_h_ptrs, grad_weight, grad_bias,
    WEIGHT_GRAD: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, EPS: tl.constexpr,
    RMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gradient of h [BLOCK, D] to grad_h_ptrs. With WEIGHT_GRAD, returns grad_weight [16, D] and grad_bias
    [16], of C channels padded for matmuls, plus those of the tile."""
    channel = tl.arange(0, 16)
    normalized, rstd = normalize(h, D, EPS, RMS)
    grad_normalized = tl.zeros([BLOCK, D], tl.float32)
    grad_channels = tl.zeros([16, BLOCK], tl.float32)
    for c in tl.static_range(C):
        grad = tl.load(grad_velocity_ptr + offsets + c * stride_c, mask=valid, other=0.0).to(tl.float32)
        grad_normalized += grad[:, None] * tl.load(head_weight_ptr + c * D + tl.arange(0, D)).to(tl.float32)[None, :]
        grad_channels = tl.where(channel[:, None] == c, grad[None, :], grad_channels)
    tl.store(grad_h_ptrs, normalize_grad(grad_normalized, normalized, rstd, D, RMS), mask=valid[:, None])
    if WEIGHT_GRAD:
        operand: tl.constexpr = grad_h_ptrs.dtype.element_ty
        grad_weight = tl.dot(grad_channels.to(operand), normalized.to(operand), grad_weight, input_precision=PRECISION)
        grad_bias += tl.sum(grad_channels, 1)
    return grad_weight, grad_bias


@triton.jit
def add_head_sums(grad_weight_ptr, grad_bias_ptr, grad_weight, grad_bias, D: tl.constexpr, C: tl.constexpr):
    """Add a program's gradients of the head, [16, D] and [16], to its sums."""
    channel, d = tl.arange(0, 16), tl.arange(0, D)
    row = tl.program_id(0) * C + channel
    add_to(grad_weight_ptr + row[:, None] * D + d[None, :], grad_weight, mask=(channel < C)[:, None])
    add_to(grad_bias_ptr + row, grad_bias, mask=channel < C)


@triton.jit(do_not_specialize=["first_token", "n_tokens"])
def head_kernel(
    h_ptr,  # [n_tokens, P, D]: h after the last block
    grad_h_ptr,  # out, may be h_ptr: its gradient
    head_weight_ptr,  # [C, D]
    grad_velocity_ptr, velocity_stride_b, velocity_stride_c, velocity_stride_h, velocity_stride_w,  # [B, C, H, W]
    grad_head_weight_ptr, grad_head_bias_ptr,  # in and out [programs, C, D], [programs, C] float32
    first_token, n_tokens, tokens_y, tokens_x,  # h row 0 is token `first_token` of the images
    WEIGHT_GRAD: tl.constexpr,  # whether gradients of the head are needed
    D: tl.constexpr, C: tl.constexpr, PATCH: tl.constexpr, BLOCK: tl.constexpr,
    EPS: tl.constexpr, RMS: tl.constexpr, PRECISION: tl.constexpr, FAST_TANH: tl.constexpr,
):  # fmt: skip
    """Backward of the head."""
    PIXELS: tl.constexpr = PATCH * PATCH
    grad_head_weight = tl.zeros([16, D], tl.float32)
    grad_head_bias = tl.zeros([16], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(n_tokens * PIXELS, BLOCK), tl.num_programs(0)):
        token, pixel, valid = tile_pixels(tile, n_tokens, PIXELS, BLOCK)
        rows = row_offsets(token, pixel, PIXELS * D, D, D)
        offsets = image_offsets(
            first_token + token, pixel, tokens_y, tokens_x,
            velocity_stride_b, velocity_stride_h, velocity_stride_w, PATCH,
        )  # fmt: skip
        h = load_states(h_ptr, rows, valid[:, None], D)
        grad_head_weight, grad_head_bias = head_backward(
            h, grad_velocity_ptr, offsets, velocity_stride_c, valid, head_weight_ptr, grad_h_ptr + rows,
            grad_head_weight, grad_head_bias, WEIGHT_GRAD, D, C, BLOCK, EPS, RMS, PRECISION,
        )  # fmt: skip
    if WEIGHT_GRAD:
        add_head_sums(grad_head_weight_ptr, grad_head_bias_ptr, grad_head_weight, grad_head_bias, D, C)
