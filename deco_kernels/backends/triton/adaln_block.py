"""adaln_block on Triton: one decoder block, and the device functions shared with pixel_decoder.

    s = SiLU(cond);  shift, scale, gate = s·W_mod + b_mod;  m = LN(h)·(1 + scale) + shift
    h' = h + gate·(W_2·SiLU(W_1·m + b_1) + b_2)

A persistent program iterates over tiles of `block` rows; a row is one pixel. The activations of a tile stay in
registers; the five D×D matrices pass through shared memory. Forward: 10·D² FLOPs per row, 3·D values moved (h, cond,
h'). Backward: 30·D² FLOPs, 5·D values (h, cond, grad in; two gradients out). Sums over rows (weight and bias gradients)
stay in registers for all tiles of a program, go to a partial buffer per program and are added over programs in fixed
order: results on the same device are bitwise reproducible.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from deco_kernels.backends.arguments import Gradients
from deco_kernels.signatures import BlockWeights

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
from .weights import FC1, FC2, GATE, SCALE, SHIFT, PackedWeights, one_block, pack, unpack_grad

# -------------------------------------------------------------------------------------------------- device functions


@triton.jit
def block_forward(
    h, s, matrices_ptr, biases_ptr, block,
    D: tl.constexpr, EPS: tl.constexpr, PRECISION: tl.constexpr, FAST_TANH: tl.constexpr,
):  # fmt: skip
    """h' [BLOCK, D] of packed block `block`; h is float32, s = SiLU(cond) has the compute dtype."""
    first = 5 * block
    shift = linear(s, matrices_ptr, biases_ptr, first + SHIFT, D, PRECISION)
    scale = linear(s, matrices_ptr, biases_ptr, first + SCALE, D, PRECISION)
    normalized, _ = normalize(h, D, EPS)
    m = (normalized * scale + shift).to(s.dtype)
    t = linear(m, matrices_ptr, biases_ptr, first + FC1, D, PRECISION)
    a = silu_of_double(t, FAST_TANH).to(s.dtype)
    u = linear(a, matrices_ptr, biases_ptr, first + FC2, D, PRECISION)
    gate = linear(s, matrices_ptr, biases_ptr, first + GATE, D, PRECISION)
    return h + gate * u


@triton.jit
def block_backward(
    h, s, grad, shift_matrix, scale_matrix, gate_matrix, fc1_matrix, fc2_matrix, biases_ptr,
    D: tl.constexpr, EPS: tl.constexpr, PRECISION: tl.constexpr, FAST_TANH: tl.constexpr,
):  # fmt: skip
    """Backward of a block, recomputed from h [BLOCK, D] float32 and s in the compute dtype, given the gradient of h'.

    Returns the gradient of h in float32 and, in the compute dtype, the factors of the other gradients: the gradients of
    shift, scale, gate, t and u, and the inputs m and a of the two linears.
    """
    normalized, rstd = normalize(h, D, EPS)
    shift = affine(s, shift_matrix, biases_ptr, SHIFT, D, PRECISION)
    scale = affine(s, scale_matrix, biases_ptr, SCALE, D, PRECISION)
    m = (normalized * scale + shift).to(s.dtype)
    t = affine(m, fc1_matrix, biases_ptr, FC1, D, PRECISION)
    w = twice_sigmoid(t, FAST_TANH)
    a = (t * w).to(s.dtype)
    gate = affine(s, gate_matrix, biases_ptr, GATE, D, PRECISION)
    u = affine(a, fc2_matrix, biases_ptr, FC2, D, PRECISION)

    grad_gate = (grad * u).to(s.dtype)
    grad_u = (grad * gate).to(s.dtype)
    grad_a = tl.dot(grad_u, tl.trans(fc2_matrix), input_precision=PRECISION)
    grad_t = (grad_a * silu_of_double_grad(t, w)).to(s.dtype)
    grad_m = tl.dot(grad_t, tl.trans(fc1_matrix), input_precision=PRECISION)
    grad_shift = grad_m.to(s.dtype)
    grad_scale = (grad_m * normalized).to(s.dtype)
    grad_h = grad + normalize_grad(grad_m * scale, normalized, rstd, D)
    return grad_h, grad_shift, grad_scale, grad_gate, grad_t, grad_u, m, a


@triton.jit
def modulation_backward(
    grad_s, grad_shift, grad_scale, grad_gate, shift_matrix, scale_matrix, gate_matrix, PRECISION: tl.constexpr
):  # fmt: skip
    """grad_s [BLOCK, D] float32 plus the gradients of s through shift, scale and gate."""
    grad_s = tl.dot(grad_shift, tl.trans(shift_matrix), grad_s, input_precision=PRECISION)
    grad_s = tl.dot(grad_scale, tl.trans(scale_matrix), grad_s, input_precision=PRECISION)
    return tl.dot(grad_gate, tl.trans(gate_matrix), grad_s, input_precision=PRECISION)


@triton.jit
def partial_sums(grad_matrix_ptr, grad_bias_ptr, grad_program_stride, bias_program_stride, D: tl.constexpr):
    """Pointers to this program's sums: (its first matrix [D, D], its biases [16, D], mask of their valid rows)."""
    d = tl.arange(0, D)
    program = tl.program_id(0).to(tl.int64)
    square = grad_matrix_ptr + program * grad_program_stride + d[:, None] * D + d[None, :]
    part = tl.arange(0, 16)[:, None]
    line = grad_bias_ptr + program * bias_program_stride + part * D + d[None, :]
    return square, line, part < 5


@triton.jit
def load_sums(square, line, exists, D: tl.constexpr):
    """Load a program's sums: weights [D, D] of shift, scale, gate, fc1 and fc2, and their biases [16, D]."""
    shift_weight = tl.load(square + SHIFT * D * D)
    scale_weight = tl.load(square + SCALE * D * D)
    gate_weight = tl.load(square + GATE * D * D)
    fc1_weight = tl.load(square + FC1 * D * D)
    fc2_weight = tl.load(square + FC2 * D * D)
    biases = tl.load(line, mask=exists, other=0.0)
    return shift_weight, scale_weight, gate_weight, fc1_weight, fc2_weight, biases


@triton.jit
def store_sums(
    square, line, exists, shift_weight, scale_weight, gate_weight, fc1_weight, fc2_weight, biases, D: tl.constexpr
):  # fmt: skip
    """Store a program's sums, the inverse of `load_sums`."""
    tl.store(square + SHIFT * D * D, shift_weight)
    tl.store(square + SCALE * D * D, scale_weight)
    tl.store(square + GATE * D * D, gate_weight)
    tl.store(square + FC1 * D * D, fc1_weight)
    tl.store(square + FC2 * D * D, fc2_weight)
    tl.store(line, biases, mask=exists)


# ----------------------------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=["n_rows"])
def forward_kernel(
    h_ptr, h_stride,  # [n_rows, D], unit channel stride
    cond_ptr, cond_stride,  # [n_rows, D], unit channel stride
    matrices_ptr, biases_ptr,  # [5, D, D] (in, out), [5, D]: see weights.py
    out_ptr,  # [n_rows, D] contiguous
    n_rows,
    D: tl.constexpr, BLOCK: tl.constexpr, EPS: tl.constexpr, PRECISION: tl.constexpr, FAST_TANH: tl.constexpr,
):  # fmt: skip
    for tile in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK), tl.num_programs(0)):
        row, column, valid = tile_pixels(tile, n_rows, 1, BLOCK)
        mask = valid[:, None]
        h = tl.load(h_ptr + row_offsets(row, column, h_stride, 0, D), mask=mask, other=0.0).to(tl.float32)
        cond = tl.load(cond_ptr + row_offsets(row, column, cond_stride, 0, D), mask=mask, other=0.0).to(tl.float32)
        s = silu_of_double(0.5 * cond, FAST_TANH).to(matrices_ptr.dtype.element_ty)
        h = block_forward(h, s, matrices_ptr, biases_ptr, 0, D, EPS, PRECISION, FAST_TANH)
        tl.store(out_ptr + row_offsets(row, column, D, 0, D), h, mask=mask)


@triton.jit(do_not_specialize=["n_tokens"])
def backward_kernel(
    h_ptr, h_stride,  # [n_tokens·PIXELS, D], unit channel stride: the block's input
    cond_ptr, cond_token_stride, cond_pixel_stride,  # [n_tokens, PIXELS, D], unit channel stride
    grad_ptr, grad_stride,  # [n_tokens·PIXELS, D], unit channel stride: gradient of h'
    matrices_ptr, biases_ptr,  # [5, D, D] (in, out), [5, D] of this block
    grad_h_ptr,  # out [n_tokens·PIXELS, D] contiguous; may alias grad
    grad_cond_ptr,  # in and out [n_tokens·PIXELS, D] contiguous: sum of the gradients of s, to which this block adds
    grad_matrix_ptr, grad_bias_ptr,  # in and out [programs, 5, D, D] (out, in), [programs, 5, D] float32
    grad_program_stride, bias_program_stride,  # elements between two programs' partial sums
    n_tokens,
    FIRST: tl.constexpr,  # first launched block: grad_cond holds no sum yet
    LAST: tl.constexpr,  # last launched block: convert the gradient of s to that of cond
    COND_GRAD: tl.constexpr, WEIGHT_GRAD: tl.constexpr,  # which gradients are needed
    CONTIGUOUS: tl.constexpr,  # h, cond and grad have the layout of the results
    D: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr,
    EPS: tl.constexpr, PRECISION: tl.constexpr, FAST_TANH: tl.constexpr,
):  # fmt: skip
    """Recompute one block, then run its backward.

    A stored gradient depends on the whole loaded row, so grad_h may overwrite grad. The order of the weight gradients
    minimizes registers: operands without further uses come first.
    """
    if WEIGHT_GRAD:
        square, line, exists = partial_sums(grad_matrix_ptr, grad_bias_ptr, grad_program_stride, bias_program_stride, D)
        shift_weight, scale_weight, gate_weight, fc1_weight, fc2_weight, biases = load_sums(square, line, exists, D)
    for tile in range(tl.program_id(0), tl.cdiv(n_tokens * PIXELS, BLOCK), tl.num_programs(0)):
        token, pixel, valid = tile_pixels(tile, n_tokens, PIXELS, BLOCK)
        mask = valid[:, None]
        rows = row_offsets(token, pixel, PIXELS * D, D, D)
        h_rows, grad_rows, cond_rows = rows, rows, rows
        if not CONTIGUOUS:
            h_rows = row_offsets(token, pixel, PIXELS * h_stride, h_stride, D)
            grad_rows = row_offsets(token, pixel, PIXELS * grad_stride, grad_stride, D)
            cond_rows = row_offsets(token, pixel, cond_token_stride, cond_pixel_stride, D)
        t = 0.5 * tl.load(cond_ptr + cond_rows, mask=mask, other=0.0).to(tl.float32)
        s = (t * twice_sigmoid(t, FAST_TANH)).to(matrices_ptr.dtype.element_ty)
        h = load_states(h_ptr, h_rows, mask, D)
        grad = tl.load(grad_ptr + grad_rows, mask=mask, other=0.0).to(tl.float32)

        shift_matrix = packed_matrix(matrices_ptr, SHIFT, D)
        scale_matrix = packed_matrix(matrices_ptr, SCALE, D)
        gate_matrix = packed_matrix(matrices_ptr, GATE, D)
        fc1_matrix = packed_matrix(matrices_ptr, FC1, D)
        fc2_matrix = packed_matrix(matrices_ptr, FC2, D)
        grad_h, grad_shift, grad_scale, grad_gate, grad_t, grad_u, m, a = block_backward(
            h, s, grad, shift_matrix, scale_matrix, gate_matrix, fc1_matrix, fc2_matrix, biases_ptr,
            D, EPS, PRECISION, FAST_TANH,
        )  # fmt: skip
        tl.store(grad_h_ptr + rows, grad_h, mask=mask)

        if COND_GRAD:
            if FIRST:
                grad_s = tl.zeros([BLOCK, D], tl.float32)
            else:
                grad_s = tl.load(grad_cond_ptr + rows, mask=mask, other=0.0).to(tl.float32)
            grad_s = modulation_backward(
                grad_s, grad_shift, grad_scale, grad_gate, shift_matrix, scale_matrix, gate_matrix, PRECISION
            )
            if LAST:
                # cond is loaded again, which frees its registers in between.
                t = 0.5 * tl.load(cond_ptr + cond_rows, mask=mask, other=0.0).to(tl.float32)
                grad_s *= 0.5 * silu_of_double_grad(t, twice_sigmoid(t, FAST_TANH))
            tl.store(grad_cond_ptr + rows, grad_s, mask=mask)
        if WEIGHT_GRAD:
            fc2_weight, biases = add_linear_grad(fc2_weight, biases, grad_u, a, FC2, BLOCK, PRECISION)
            fc1_weight, biases = add_linear_grad(fc1_weight, biases, grad_t, m, FC1, BLOCK, PRECISION)
            gate_weight, biases = add_linear_grad(gate_weight, biases, grad_gate, s, GATE, BLOCK, PRECISION)
            scale_weight, biases = add_linear_grad(scale_weight, biases, grad_scale, s, SCALE, BLOCK, PRECISION)
            shift_weight, biases = add_linear_grad(shift_weight, biases, grad_shift, s, SHIFT, BLOCK, PRECISION)
    if WEIGHT_GRAD:
        store_sums(square, line, exists, shift_weight, scale_weight, gate_weight, fc1_weight, fc2_weight, biases, D)


# -------------------------------------------------------------------------------------------------------------- host


def run_block_backward(
    h: torch.Tensor,
    cond: torch.Tensor,
    grad: torch.Tensor,
    packed: PackedWeights,
    grad_h: torch.Tensor,
    grad_cond: torch.Tensor,
    partials: tuple[torch.Tensor, torch.Tensor] | None,
    *,
    first: bool,
    last: bool,
    cond_needed: bool,
    eps: float,
) -> None:
    """Launch backward_kernel for one block.

    h and grad [tokens·pixels, D], cond [tokens, pixels, D]; partials: (matrix [programs, 5, D, D],
    bias [programs, 5, D]) sums to add to, or None if no weight gradient is needed.
    """
    tokens, pixels, _ = cond.shape
    grad_matrix, grad_bias = partials or (grad_cond, grad_cond)
    launch_over_rows(
        backward_kernel, "adaln_block_backward", tokens * pixels, cond,
        h, h.stride(0), cond, cond.stride(0), cond.stride(1), grad, grad.stride(0), packed.matrices, packed.biases,
        grad_h, grad_cond, grad_matrix, grad_bias, grad_matrix.stride(0), grad_bias.stride(0), tokens,
        FIRST=first, LAST=last, COND_GRAD=cond_needed, WEIGHT_GRAD=partials is not None,
        CONTIGUOUS=all(tensor.is_contiguous() for tensor in (h, cond, grad)), PIXELS=pixels, EPS=eps,
    )  # fmt: skip


def forward(h: torch.Tensor, cond: torch.Tensor, weights: BlockWeights, eps: float) -> torch.Tensor:
    """h' with the shape and dtype of h."""
    out = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    with device_guard(h):
        packed = pack(one_block(weights), h.dtype)
        h, cond = collapsed_rows(h, 1), collapsed_rows(cond, 1)
        launch_over_rows(
            forward_kernel, "adaln_block", h.shape[0], h,
            h, h.stride(0), cond, cond.stride(0), *packed, out, h.shape[0], EPS=eps,
        )  # fmt: skip
    return out


def backward(
    grad_out: torch.Tensor,
    h: torch.Tensor,
    cond: torch.Tensor,
    weights: BlockWeights,
    eps: float,
    needs: Sequence[bool],
) -> Gradients:
    """Gradients of (h, cond, weights); None where `needs` is False."""
    stacked = one_block(weights)
    grad_h = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    grad_cond = torch.empty(cond.shape, dtype=cond.dtype, device=cond.device)
    with device_guard(h):
        packed = pack(stacked, h.dtype)
        h, cond, grad_out = (collapsed_rows(tensor, 1) for tensor in (h, cond, grad_out))
        partials = weight_partials("adaln_block_backward", h, 1, 5) if any(needs[2:]) else None
        run_block_backward(
            h, cond[:, None], grad_out, packed, grad_h, grad_cond, partials,
            first=True, last=True, cond_needed=needs[1], eps=eps,
        )  # fmt: skip
        grad_weights: Gradients = (None,) * 8
        if partials is not None:
            grads = unpack_grad(partials, stacked)
            grad_weights = tuple(grad[0] if need else None for grad, need in zip(grads, needs[2:], strict=True))
    return (grad_h if needs[0] else None, grad_cond if needs[1] else None, *grad_weights)
