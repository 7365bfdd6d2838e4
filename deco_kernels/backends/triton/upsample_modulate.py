"""upsample_modulate on Triton: PyTorch's matmul for the upsample, then one fused kernel per chunk of tokens.

    y = up_weight·token + up_bias (per pixel);  shift, scale, gate = W_mod·SiLU(y) + b_mod
    modulated = LN(h)·(1 + scale) + shift

A persistent program iterates over tiles of `block` pixels; SiLU(y), the modulation and LN(h) of a tile stay in
registers; the three D×D matrices pass through shared memory. Forward: 6·D² FLOPs and 3·D values moved per pixel in
addition to y. Backward: reads or recomputes y, 18·D² FLOPs, 5·D values. Weight gradients as in adaln_block.py:
registers, partial buffers, a sum in fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from deco_kernels.backends import chunk_sizes
from deco_kernels.backends.arguments import Gradients
from deco_kernels.backends.chunks import slices
from deco_kernels.backends.upsample import forward_chunk_pixels
from deco_kernels.signatures import ModulationWeights, UpsampleWeights

from .functions import (
    add_linear_grad,
    affine,
    linear,
    load_states,
    normalize,
    normalize_grad,
    packed_matrix,
    row_offsets,
    silu_of_double,
    silu_of_double_grad,
    tile_pixels,
    twice_sigmoid,
)
from .launching import collapsed_rows, device_guard, launch_over_rows, weight_partials
from .upsample import Upsample
from .weights import GATE, SCALE, SHIFT, one_block, pack, unpack_grad


@triton.jit(do_not_specialize=["n_tokens"])
def forward_kernel(
    h_ptr, h_token_stride, h_pixel_stride,  # [n_tokens, P, D], unit channel stride
    cond_ptr,  # [n_tokens, P, D] contiguous
    matrices_ptr, biases_ptr,  # [3, D, D] (in, out), [3, D]: see weights.py
    modulated_ptr, gate_ptr,  # out [n_tokens, P, D] contiguous
    n_tokens,
    D: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr,
    EPS: tl.constexpr, PRECISION: tl.constexpr, FAST_TANH: tl.constexpr,
):  # fmt: skip
    for tile in range(tl.program_id(0), tl.cdiv(n_tokens * PIXELS, BLOCK), tl.num_programs(0)):
        token, pixel, valid = tile_pixels(tile, n_tokens, PIXELS, BLOCK)
        mask = valid[:, None]
        rows = row_offsets(token, pixel, PIXELS * D, D, D)
        h = tl.load(h_ptr + row_offsets(token, pixel, h_token_stride, h_pixel_stride, D), mask=mask, other=0.0)
        cond = tl.load(cond_ptr + rows, mask=mask, other=0.0).to(tl.float32)
        s = silu_of_double(0.5 * cond, FAST_TANH).to(matrices_ptr.dtype.element_ty)
        tl.store(gate_ptr + rows, linear(s, matrices_ptr, biases_ptr, GATE, D, PRECISION), mask=mask)
        normalized, _ = normalize(h.to(tl.float32), D, EPS)
        scale = linear(s, matrices_ptr, biases_ptr, SCALE, D, PRECISION)
        shift = linear(s, matrices_ptr, biases_ptr, SHIFT, D, PRECISION)
        tl.store(modulated_ptr + rows, normalized * scale + shift, mask=mask)


@triton.jit(do_not_specialize=["n_tokens"])
def backward_kernel(
    grad_modulated_ptr, grad_modulated_token_stride, grad_modulated_pixel_stride,  # [n_tokens, P, D]
    grad_gate_ptr, grad_gate_token_stride, grad_gate_pixel_stride,  # [n_tokens, P, D]; both with unit channel stride
    h_ptr, h_token_stride, h_pixel_stride,  # [n_tokens, P, D], unit channel stride
    cond_ptr,  # [n_tokens, P, D] contiguous
    matrices_ptr, biases_ptr,  # [3, D, D] (in, out), [3, D]
    grad_h_ptr, grad_cond_ptr,  # out [n_tokens, P, D] contiguous
    grad_matrix_ptr, grad_bias_ptr,  # in and out [programs, 3, D, D] (out, in), [programs, 3, D] float32
    n_tokens,
    COND_GRAD: tl.constexpr, WEIGHT_GRAD: tl.constexpr,  # which gradients are needed
    D: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr,
    EPS: tl.constexpr, PRECISION: tl.constexpr, FAST_TANH: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, D)
    if WEIGHT_GRAD:
        square = grad_matrix_ptr + tl.program_id(0) * 3 * D * D + d[:, None] * D + d[None, :]
        part = tl.arange(0, 16)[:, None]
        line = grad_bias_ptr + tl.program_id(0) * 3 * D + part * D + d[None, :]
        shift_weight = tl.load(square + SHIFT * D * D)
        scale_weight = tl.load(square + SCALE * D * D)
        gate_weight = tl.load(square + GATE * D * D)
        biases = tl.load(line, mask=part < 3, other=0.0)
    for tile in range(tl.program_id(0), tl.cdiv(n_tokens * PIXELS, BLOCK), tl.num_programs(0)):
        token, pixel, valid = tile_pixels(tile, n_tokens, PIXELS, BLOCK)
        mask = valid[:, None]
        rows = row_offsets(token, pixel, PIXELS * D, D, D)
        t = 0.5 * tl.load(cond_ptr + rows, mask=mask, other=0.0).to(tl.float32)
        w = twice_sigmoid(t, FAST_TANH)
        operand: tl.constexpr = matrices_ptr.dtype.element_ty
        s = (t * w).to(operand)
        h = load_states(h_ptr, row_offsets(token, pixel, h_token_stride, h_pixel_stride, D), mask, D)
        modulated_rows = row_offsets(token, pixel, grad_modulated_token_stride, grad_modulated_pixel_stride, D)
        grad_shift = tl.load(grad_modulated_ptr + modulated_rows, mask=mask, other=0.0)
        gate_rows = row_offsets(token, pixel, grad_gate_token_stride, grad_gate_pixel_stride, D)
        grad_gate = tl.load(grad_gate_ptr + gate_rows, mask=mask, other=0.0)

        scale_matrix = packed_matrix(matrices_ptr, SCALE, D)
        scale = affine(s, scale_matrix, biases_ptr, SCALE, D, PRECISION)
        normalized, rstd = normalize(h, D, EPS)
        grad_modulated = grad_shift.to(tl.float32)
        tl.store(grad_h_ptr + rows, normalize_grad(grad_modulated * scale, normalized, rstd, D), mask=mask)
        grad_scale = (grad_modulated * normalized).to(operand)
        if COND_GRAD:
            shift_matrix = packed_matrix(matrices_ptr, SHIFT, D)
            gate_matrix = packed_matrix(matrices_ptr, GATE, D)
            grad_s = tl.dot(grad_shift, tl.trans(shift_matrix), input_precision=PRECISION)
            grad_s = tl.dot(grad_scale, tl.trans(scale_matrix), grad_s, input_precision=PRECISION)
            grad_s = tl.dot(grad_gate, tl.trans(gate_matrix), grad_s, input_precision=PRECISION)
            tl.store(grad_cond_ptr + rows, grad_s * (0.5 * silu_of_double_grad(t, w)), mask=mask)
        if WEIGHT_GRAD:
            gate_weight, biases = add_linear_grad(gate_weight, biases, grad_gate, s, GATE, BLOCK, PRECISION)
            scale_weight, biases = add_linear_grad(scale_weight, biases, grad_scale, s, SCALE, BLOCK, PRECISION)
            shift_weight, biases = add_linear_grad(shift_weight, biases, grad_shift, s, SHIFT, BLOCK, PRECISION)
    if WEIGHT_GRAD:
        tl.store(square + SHIFT * D * D, shift_weight)
        tl.store(square + SCALE * D * D, scale_weight)
        tl.store(square + GATE * D * D, gate_weight)
        tl.store(line, biases, mask=part < 3)


def forward(
    h: torch.Tensor,
    tokens: torch.Tensor,
    up: UpsampleWeights,
    weights: ModulationWeights,
    eps: float,
    cond: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(modulated, gate), both like h; writes the conditions to `cond` [..., P, D] if it is given."""
    modulated, gate = (torch.empty(h.shape, dtype=h.dtype, device=h.device) for _ in range(2))
    with device_guard(h), torch.no_grad():
        packed = pack(one_block(weights), h.dtype)
        h = collapsed_rows(h, 2)
        pixels, width = h.shape[1:]
        upsample = Upsample(tokens, up, (pixels, width))
        kept = None if cond is None else cond.view(-1, pixels * width)
        modulated_rows, gate_rows = modulated.view(h.shape), gate.view(h.shape)
        for part in slices(h.shape[0], max(1, forward_chunk_pixels(tokens, up, pixels) // pixels)):
            length = part.stop - part.start
            launch_over_rows(
                forward_kernel, "upsample_modulate", length * pixels, h,
                h[part], h.stride(0), h.stride(1), upsample.cond(part, kept), *packed,
                modulated_rows[part], gate_rows[part], length, PIXELS=pixels, EPS=eps,
            )  # fmt: skip
    return modulated, gate


def backward(
    grad_modulated: torch.Tensor,
    grad_gate: torch.Tensor,
    h: torch.Tensor,
    tokens: torch.Tensor,
    up: UpsampleWeights,
    weights: ModulationWeights,
    eps: float,
    needs: Sequence[bool],
    cond: torch.Tensor | None = None,
) -> Gradients:
    """Gradients of (h, tokens, upsample weights, modulation weights); None where `needs` is False.

    `cond` has the conditions of the forward; None if they are computed again.
    """
    stacked = one_block(weights)
    upsample_needs = needs[1:4]
    cond_needed, weights_needed = any(upsample_needs), any(needs[4:])
    grad_h = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    with device_guard(h), torch.no_grad():
        packed = pack(stacked, h.dtype)
        h, grad_modulated, grad_gate = (collapsed_rows(tensor, 2) for tensor in (h, grad_modulated, grad_gate))
        pixels, width = h.shape[1:]
        upsample = Upsample(tokens, up, (pixels, width))
        sums = weight_partials("upsample_modulate_backward", h, 1, 3) if weights_needed else (grad_h, grad_h)
        grad_h_rows = grad_h.view(h.shape)
        kept = None if cond is None else cond.reshape(h.shape)
        chunk_tokens = max(1, chunk_sizes.chunk_pixels(2 * width * h.element_size()) // pixels)
        for part in slices(h.shape[0], chunk_tokens):
            length = part.stop - part.start
            conditions = upsample.cond(part) if kept is None else kept[part]
            grad_cond = torch.empty_like(conditions)
            launch_over_rows(
                backward_kernel, "upsample_modulate_backward", length * pixels, h,
                grad_modulated[part], grad_modulated.stride(0), grad_modulated.stride(1),
                grad_gate[part], grad_gate.stride(0), grad_gate.stride(1), h[part], h.stride(0), h.stride(1),
                conditions, *packed, grad_h_rows[part], grad_cond, *sums, length,
                COND_GRAD=cond_needed, WEIGHT_GRAD=weights_needed, PIXELS=pixels, EPS=eps,
            )  # fmt: skip
            upsample.add_gradients(part, grad_cond, upsample_needs)
        grad_weights: Gradients = (None,) * 4
        if weights_needed:
            grad_weights = tuple(grad[0] for grad in unpack_grad(sums, stacked))
        grads = (grad_h, *upsample.grads(upsample_needs), *grad_weights)
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))
