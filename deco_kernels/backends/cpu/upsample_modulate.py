"""upsample_modulate on the CPU: csrc/cpu/upsample_modulate.cpp and upsample_modulate_backward.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deco_kernels import native
from deco_kernels.backends import arguments
from deco_kernels.backends.upsample import UpsampleGradients, chunk_tokens
from deco_kernels.signatures import ModulationWeights, UpsampleWeights


def forward(
    h: torch.Tensor, tokens: torch.Tensor, up: UpsampleWeights, weights: ModulationWeights, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(modulated, gate) with the shape and dtype of h."""
    h, tokens = arguments.readable_pixel_rows(h), arguments.readable_rows(tokens)
    up, weights = arguments.contiguous(up), arguments.contiguous(weights)
    modulated, gate = torch.empty(h.shape, dtype=h.dtype), torch.empty(h.shape, dtype=h.dtype)
    native.cpu().upsample_modulate_forward(
        arguments.upsample_sizes(tokens, *h.shape[-2:]),
        arguments.rows(tokens),
        arguments.arrays(up),
        arguments.pixel_rows(h),
        arguments.arrays(weights),
        arguments.pixel_rows(modulated),
        arguments.pixel_rows(gate),
        eps,
        torch.get_num_threads(),
    )
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
) -> arguments.Gradients:
    """Gradients of (h, tokens, upsample weights, modulation weights); None where `needs` is False."""
    up, weights = arguments.contiguous(up), arguments.contiguous(weights)
    pixels, width = h.shape[-2:]
    grad_modulated, grad_gate, h_rows = (_token_rows(tensor) for tensor in (grad_modulated, grad_gate, h))
    grad_h = torch.empty(h_rows.shape, dtype=h.dtype) if needs[0] else None
    upsample = UpsampleGradients(tokens, up, needs[1:4])
    rows = arguments.readable_rows(upsample.rows)
    totals = arguments.zero_totals(weights, needs[4:])
    size = chunk_tokens(up)
    for first in range(0, len(rows), size):
        chunk = slice(first, first + size)
        grad_cond = upsample.new_grad_cond(len(rows[chunk]), pixels)
        grads = arguments.empty_parts(totals)
        native.cpu().upsample_modulate_backward(
            arguments.upsample_sizes(rows[chunk], pixels, width),
            arguments.rows(rows[chunk]),
            arguments.arrays(up),
            *(arguments.pixel_rows(tensor[chunk]) for tensor in (grad_modulated, grad_gate, h_rows)),
            arguments.arrays(weights),
            arguments.pixel_rows(None if grad_h is None else grad_h[chunk]),
            arguments.pixel_rows(grad_cond),
            arguments.arrays(grads),
            eps,
            torch.get_num_threads(),
        )
        arguments.add_gradients(totals, grads)
        upsample.add(first, grad_cond)
    return (
        None if grad_h is None else grad_h.view(h.shape),
        *upsample.results(),
        *arguments.cast_gradients(totals, weights),
    )


def _token_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Reshape [..., P, D] to [T, P, D] in a layout that the kernels can read."""
    return arguments.readable_pixel_rows(tensor.reshape(-1, *tensor.shape[-2:]))
