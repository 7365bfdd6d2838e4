"""Packing of block weights for the kernels, and unpacking of their gradients.

The affine part of LayerNorm folds exactly into the modulation linear. With n the normalized rows, w and b the affine,
    (n·w + b)·(1 + scale) + shift = n·scale' + shift'
    scale' = w·(1 + scale),  shift' = shift + b·(1 + scale),
so the kernels use modified rows of the modulation weight and bias and no affine. fc1 is packed with a factor 1/2, since
the kernels evaluate SiLU(2t) from t. A packed set holds the matrices [shift', scale', gate, fc1/2, fc2] as [in, out] in
the compute dtype and their biases in float32. Every call packs the weights, so they may change between calls and
between replays of a CUDA graph.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from deco_kernels.signatures import BlockWeights, Group, ModulationWeights, flat, mapped

from .launching import contiguous, launch
from .table import Launch

# Indices of the packed matrices and biases of a block.
SHIFT, SCALE, GATE, FC1, FC2 = (tl.constexpr(number) for number in range(5))

_ONE_PROGRAM = Launch(block=0, warps=4, stages=1, programs_per_multiprocessor=1)


class PackedWeights(NamedTuple):
    """matrices [N, M, D, D] (in, out) in the compute dtype, biases [N, M, D] float32; M is 5, or 3 without the MLP."""

    matrices: torch.Tensor
    biases: torch.Tensor

    def block(self, index: int) -> PackedWeights:
        """Packed weights of one block."""
        return PackedWeights(self.matrices[index], self.biases[index])


@triton.jit
def pack_kernel(
    matrices_ptr,  # out [N, M, D, D] as [in, out]
    biases_ptr,  # out [N, M, D] float32
    norm_weight_ptr, norm_bias_ptr,  # [N, D]
    mod_weight_ptr, mod_bias_ptr,  # [N, 3D, D] as [out, in]; [N, 3D]
    fc1_weight_ptr, fc1_bias_ptr, fc2_weight_ptr, fc2_bias_ptr,  # [N, D, D] as [out, in]; [N, D]; unused without MLP
    D: tl.constexpr, MLP: tl.constexpr,
):  # fmt: skip
    """One program packs one block."""
    n = tl.program_id(0)
    d = tl.arange(0, D)
    source = d[:, None] * D + d[None, :]
    target = d[None, :] * D + d[:, None]
    M: tl.constexpr = 5 if MLP else 3
    matrices_ptr += n * M * D * D
    biases_ptr += n * M * D
    mod_weight_ptr += n * 3 * D * D
    mod_bias_ptr += n * 3 * D

    norm_weight = tl.load(norm_weight_ptr + n * D + d).to(tl.float32)
    norm_bias = tl.load(norm_bias_ptr + n * D + d).to(tl.float32)
    shift = tl.load(mod_weight_ptr + source).to(tl.float32)
    scale = tl.load(mod_weight_ptr + D * D + source).to(tl.float32)
    tl.store(matrices_ptr + target, shift + norm_bias[:, None] * scale)
    tl.store(matrices_ptr + D * D + target, norm_weight[:, None] * scale)
    tl.store(matrices_ptr + 2 * D * D + target, tl.load(mod_weight_ptr + 2 * D * D + source).to(tl.float32))

    shift_bias = tl.load(mod_bias_ptr + d).to(tl.float32)
    scale_bias = 1.0 + tl.load(mod_bias_ptr + D + d).to(tl.float32)
    tl.store(biases_ptr + d, shift_bias + norm_bias * scale_bias)
    tl.store(biases_ptr + D + d, norm_weight * scale_bias)
    tl.store(biases_ptr + 2 * D + d, tl.load(mod_bias_ptr + 2 * D + d).to(tl.float32))
    if MLP:
        fc1 = tl.load(fc1_weight_ptr + n * D * D + source).to(tl.float32)
        tl.store(matrices_ptr + 3 * D * D + target, 0.5 * fc1)
        tl.store(matrices_ptr + 4 * D * D + target, tl.load(fc2_weight_ptr + n * D * D + source).to(tl.float32))
        tl.store(biases_ptr + 3 * D + d, 0.5 * tl.load(fc1_bias_ptr + n * D + d).to(tl.float32))
        tl.store(biases_ptr + 4 * D + d, tl.load(fc2_bias_ptr + n * D + d).to(tl.float32))


@triton.jit
def unpack_grad_kernel(
    grad_matrix_ptr,  # [N, M, D, D] float32 as [out, in]: gradients of the packed matrices
    grad_bias_ptr,  # [N, M, D] float32
    norm_weight_ptr, norm_bias_ptr, mod_weight_ptr, mod_bias_ptr,  # as in pack_kernel
    grad_norm_weight_ptr, grad_norm_bias_ptr, grad_mod_weight_ptr, grad_mod_bias_ptr,  # out, like their tensors
    grad_fc1_weight_ptr, grad_fc1_bias_ptr, grad_fc2_weight_ptr, grad_fc2_bias_ptr,  # out; unused without MLP
    D: tl.constexpr, MLP: tl.constexpr,
):  # fmt: skip
    """Backward of pack_kernel; one program unpacks one block."""
    n = tl.program_id(0)
    d = tl.arange(0, D)
    square = d[:, None] * D + d[None, :]
    M: tl.constexpr = 5 if MLP else 3
    grad_matrix_ptr += n * M * D * D
    grad_bias_ptr += n * M * D
    mod_weight_ptr += n * 3 * D * D
    grad_mod_weight_ptr += n * 3 * D * D
    mod_bias_ptr += n * 3 * D
    grad_mod_bias_ptr += n * 3 * D

    norm_weight = tl.load(norm_weight_ptr + n * D + d).to(tl.float32)
    norm_bias = tl.load(norm_bias_ptr + n * D + d).to(tl.float32)
    scale = tl.load(mod_weight_ptr + D * D + square).to(tl.float32)
    scale_bias = 1.0 + tl.load(mod_bias_ptr + D + d).to(tl.float32)
    grad_shift = tl.load(grad_matrix_ptr + square)
    grad_scale = tl.load(grad_matrix_ptr + D * D + square)
    grad_shift_bias = tl.load(grad_bias_ptr + d)
    grad_scale_bias = tl.load(grad_bias_ptr + D + d)

    tl.store(grad_norm_weight_ptr + n * D + d, tl.sum(grad_scale * scale, 1) + grad_scale_bias * scale_bias)
    tl.store(grad_norm_bias_ptr + n * D + d, tl.sum(grad_shift * scale, 1) + grad_shift_bias * scale_bias)
    tl.store(grad_mod_weight_ptr + square, grad_shift)
    grad_mod_scale = norm_weight[:, None] * grad_scale + norm_bias[:, None] * grad_shift
    tl.store(grad_mod_weight_ptr + D * D + square, grad_mod_scale)
    tl.store(grad_mod_weight_ptr + 2 * D * D + square, tl.load(grad_matrix_ptr + 2 * D * D + square))
    tl.store(grad_mod_bias_ptr + d, grad_shift_bias)
    tl.store(grad_mod_bias_ptr + D + d, norm_weight * grad_scale_bias + norm_bias * grad_shift_bias)
    tl.store(grad_mod_bias_ptr + 2 * D + d, tl.load(grad_bias_ptr + 2 * D + d))
    if MLP:
        tl.store(grad_fc1_weight_ptr + n * D * D + square, 0.5 * tl.load(grad_matrix_ptr + 3 * D * D + square))
        tl.store(grad_fc2_weight_ptr + n * D * D + square, tl.load(grad_matrix_ptr + 4 * D * D + square))
        tl.store(grad_fc1_bias_ptr + n * D + d, 0.5 * tl.load(grad_bias_ptr + 3 * D + d))
        tl.store(grad_fc2_bias_ptr + n * D + d, tl.load(grad_bias_ptr + 4 * D + d))


def one_block(weights: Group) -> Group:
    """Weights of one block with a leading size N = 1."""
    return mapped(lambda weight: weight[None], weights)


def pack(group: BlockWeights | ModulationWeights, dtype: torch.dtype) -> PackedWeights:
    """Pack the weights of N blocks, or only their modulations."""
    weights = contiguous(*flat(group))
    norm_weight = weights[0]
    blocks, width = norm_weight.shape
    mlp = len(weights) == 8
    count = 5 if mlp else 3
    matrices = norm_weight.new_empty(blocks, count, width, width, dtype=dtype)
    biases = norm_weight.new_empty(blocks, count, width, dtype=torch.float32)
    args = (matrices, biases, *weights, *([norm_weight] * (8 - len(weights))))
    launch(pack_kernel, (blocks,), _ONE_PROGRAM, *args, D=width, MLP=mlp)
    return PackedWeights(matrices, biases)


def unpack_grad(
    sums: tuple[torch.Tensor, torch.Tensor],
    group: BlockWeights | ModulationWeights,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, ...]:
    """Gradients of the weights given to `pack`, in order, in their dtypes or in `dtype`.

    sums: those of the programs that `weight_partials` describes, [programs, N, M, D, D] as [out, in] and
    [programs, N, M, D]; their sums over the programs are the gradients of the packed tensors.
    """
    weights = flat(group)
    grads = tuple(torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format) for weight in weights)
    blocks, width = weights[0].shape
    padding = [grads[0]] * (8 - len(grads))
    args = (*(total.sum(0) for total in sums), *contiguous(*weights[:4]), *grads, *padding)
    launch(unpack_grad_kernel, (blocks,), _ONE_PROGRAM, *args, D=width, MLP=len(weights) == 8)
    return grads
