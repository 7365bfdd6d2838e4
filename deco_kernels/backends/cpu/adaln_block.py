"""adaln_block on the CPU: csrc/cpu/adaln_block.cpp."""

from __future__ import annotations

import torch

from deco_kernels import native
from deco_kernels.backends import arguments


def forward(h: torch.Tensor, cond: torch.Tensor, *rest) -> torch.Tensor:
    """h' like h; `rest` is the eight weights and eps."""
    *weights, eps = rest
    h, cond = arguments.readable_rows(h), arguments.readable_rows(cond)
    weights = arguments.contiguous(weights)
    out = torch.empty(h.shape, dtype=h.dtype)
    native.cpu().adaln_block_forward(
        *_size(h),
        arguments.rows(h),
        arguments.rows(cond),
        arguments.arrays(weights),
        arguments.rows(out),
        eps,
        torch.get_num_threads(),
    )
    return out


def backward(grad_out: torch.Tensor, h: torch.Tensor, cond: torch.Tensor, *rest) -> tuple:
    """Gradients of (h, cond, the eight weights) where `needs` asks; `rest` is the weights, eps, needs."""
    *weights, eps, needs = rest
    grads = arguments.empty_gradients((h, cond, *weights), needs)
    grad_out, h, cond = (arguments.readable_rows(tensor) for tensor in (grad_out, h, cond))
    weights = arguments.contiguous(weights)
    native.cpu().adaln_block_backward(
        *_size(h),
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


def _size(h: torch.Tensor) -> tuple[int, int]:
    """(rows, D)"""
    width = h.shape[-1]
    return h.numel() // width, width
