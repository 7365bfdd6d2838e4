"""adaln_block on the CPU: csrc/cpu/adaln_block.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deco_kernels import native
from deco_kernels.backends import arguments
from deco_kernels.signatures import BlockWeights


def forward(h: torch.Tensor, cond: torch.Tensor, weights: BlockWeights, eps: float) -> torch.Tensor:
    """h' with the shape and dtype of h."""
    h, cond = arguments.readable_rows(h), arguments.readable_rows(cond)
    weights = arguments.contiguous(weights)
    out = torch.empty(h.shape, dtype=h.dtype)
    native.cpu().adaln_block_forward(
        *arguments.row_sizes(h),
        arguments.rows(h),
        arguments.rows(cond),
        arguments.arrays(weights),
        arguments.rows(out),
        eps,
        torch.get_num_threads(),
    )
    return out


def backward(
    grad_out: torch.Tensor,
    h: torch.Tensor,
    cond: torch.Tensor,
    weights: BlockWeights,
    eps: float,
    needs: Sequence[bool],
) -> arguments.Gradients:
    """Gradients of (h, cond, weights); None where `needs` is False."""
    grads = arguments.empty_gradients((h, cond, weights), needs)
    grad_out, h, cond = (arguments.readable_rows(tensor) for tensor in (grad_out, h, cond))
    weights = arguments.contiguous(weights)
    native.cpu().adaln_block_backward(
        *arguments.row_sizes(h),
        arguments.rows(grad_out),
        arguments.rows(h),
        arguments.rows(cond),
        arguments.arrays(weights),
        arguments.rows(grads[0]),
        arguments.rows(grads[1]),
        arguments.arrays(grads[2:]),
        eps,
        torch.get_num_threads(),
    )
    return grads
