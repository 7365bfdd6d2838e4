"""adaln_block on CUDA devices: csrc/cuda/adaln_block.cu and block_backward.cu."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deco_kernels.backends import arguments
from deco_kernels.backends.cuda import calls
from deco_kernels.signatures import BlockWeights


def forward(h: torch.Tensor, cond: torch.Tensor, weights: BlockWeights, eps: float) -> torch.Tensor:
    """h' with the shape and dtype of h."""
    module = calls.module_for(h)
    rows, width = arguments.row_sizes(h)
    out = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    h, cond = calls.readable_rows(h), calls.readable_rows(cond)
    weights = arguments.contiguous(weights)
    calls.launch(
        module.adaln_block_forward,
        module.adaln_block_forward_workspace(width),
        h,
        rows,
        width,
        arguments.rows(h),
        arguments.rows(cond),
        arguments.arrays(weights),
        arguments.rows(out),
        eps,
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
    module = calls.module_for(h)
    rows, width = arguments.row_sizes(h)
    grads = arguments.empty_gradients((h, cond, weights), (True, *needs[1:]))
    if rows == 0:
        grads = arguments.zeroed(grads)
    else:
        grad_out, h, cond = (calls.readable_rows(tensor) for tensor in (grad_out, h, cond))
        weights = arguments.contiguous(weights)
        calls.launch(
            module.adaln_block_backward,
            module.adaln_block_backward_workspace(h.device.index or 0, rows, width),
            h,
            rows,
            width,
            arguments.rows(grad_out),
            arguments.rows(h),
            arguments.rows(cond),
            arguments.arrays(weights),
            arguments.rows(grads[0]),
            arguments.rows(grads[1]),
            arguments.arrays(grads[2:]),
            eps,
        )
    return (grads[0] if needs[0] else None, *grads[1:])
