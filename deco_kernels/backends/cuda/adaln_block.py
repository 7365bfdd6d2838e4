"""adaln_block on CUDA devices: csrc/cuda/adaln_block.cu and block_backward.cu."""

from __future__ import annotations

import torch

from deco_kernels.backends import arguments
from deco_kernels.backends.cuda import calls


def forward(h: torch.Tensor, cond: torch.Tensor, *rest) -> torch.Tensor:
    """h' like h; `rest` is the eight weights and eps."""
    *weights, eps = rest
    module = calls.module_for(h)
    rows, width = _size(h)
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
        out.data_ptr(),
        eps,
    )
    return out


def backward(grad_out: torch.Tensor, h: torch.Tensor, cond: torch.Tensor, *rest) -> tuple:
    """Gradients of (h, cond, the eight weights) where `needs` asks; `rest` is the weights, eps, needs."""
    *weights, eps, needs = rest
    module = calls.module_for(h)
    rows, width = _size(h)
    grads = calls.empty_gradients((h, cond, *weights), (True, *needs[1:]))
    if rows == 0:
        grads = [None if grad is None else grad.zero_() for grad in grads]
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
            grads[0].data_ptr(),
            0 if grads[1] is None else grads[1].data_ptr(),
            arguments.arrays(grads[2:]),
            eps,
        )
    return (grads[0] if needs[0] else None, *grads[1:])


def _size(h: torch.Tensor) -> tuple[int, int]:
    """(rows, D)"""
    width = h.shape[-1]
    return h.numel() // width, width
