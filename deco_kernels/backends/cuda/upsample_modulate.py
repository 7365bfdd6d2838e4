"""upsample_modulate on CUDA devices: PyTorch's matmul and csrc/cuda/upsample_modulate.cu, in chunks of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deco_kernels.backends import arguments, chunk_sizes
from deco_kernels.backends.chunks import multiplied, slices
from deco_kernels.backends.cuda import calls
from deco_kernels.backends.upsample import UpsampleGradients, forward_chunk_pixels
from deco_kernels.signatures import ModulationWeights, UpsampleWeights


def forward(
    h: torch.Tensor,
    tokens: torch.Tensor,
    up: UpsampleWeights,
    weights: ModulationWeights,
    eps: float,
    cond: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(modulated, gate), both like h; writes the conditions to `cond` [..., P, D] if it is given."""
    module = calls.module_for(h)
    modulated, gate = (torch.empty(h.shape, dtype=h.dtype, device=h.device) for _ in range(2))
    upsample = UpsampleGradients(tokens, up, needs=(False, False, False))
    weights = arguments.contiguous(weights)
    pixels, width = h.shape[-2:]
    h_rows, modulated_rows, gate_rows = _rows(h), modulated.view(-1, width), gate.view(-1, width)
    kept = None if cond is None else cond.view(-1, pixels * width)
    chunk_tokens = max(1, forward_chunk_pixels(tokens, up, pixels) // pixels)
    for part in slices(len(upsample.rows), chunk_tokens):
        rows = multiplied(part, pixels)
        conditions = upsample.cond(part, kept).view(-1, width)
        calls.launch(
            module.modulate_forward,
            module.modulate_forward_workspace(width),
            h,
            len(conditions),
            width,
            arguments.rows(h_rows[rows]),
            arguments.rows(conditions),
            arguments.arrays(weights),
            arguments.rows(modulated_rows[rows]),
            arguments.rows(gate_rows[rows]),
            eps,
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
    cond: torch.Tensor | None = None,
) -> arguments.Gradients:
    """Gradients of (h, tokens, upsample weights, modulation weights); None where `needs` is False.

    `cond` has the conditions of the forward; None if they are computed again.
    """
    module = calls.module_for(h)
    upsample = UpsampleGradients(tokens, up, needs=needs[1:4])
    weights = arguments.contiguous(weights)
    weight_gradients = arguments.WeightGradients(weights, needs[4:])
    pixels, width = h.shape[-2:]
    grad_h = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    grad_h_rows = grad_h.view(-1, width)
    inputs = [_rows(tensor) for tensor in (grad_modulated, grad_gate, h)]
    kept = None if cond is None else _rows(cond)
    for part in slices(len(upsample.rows), max(1, chunk_sizes.MOST_PIXELS // pixels)):
        rows = multiplied(part, pixels)
        conditions = upsample.cond(part).view(-1, width) if kept is None else kept[rows]
        grad_cond = torch.empty_like(conditions) if upsample.wanted else None
        grads = weight_gradients.new_part()
        calls.launch(
            module.modulate_backward,
            module.modulate_backward_workspace(h.device.index or 0, len(conditions), width),
            h,
            len(conditions),
            width,
            *(arguments.rows(tensor[rows]) for tensor in inputs),
            arguments.rows(conditions),
            arguments.arrays(weights),
            arguments.rows(grad_h_rows[rows]),
            arguments.rows(grad_cond),
            arguments.arrays(grads),
            eps,
        )
        weight_gradients.add(grads)
        upsample.add(part.start, None if grad_cond is None else grad_cond.view(-1, pixels, width))
    return (
        grad_h if needs[0] else None,
        *upsample.results(),
        *weight_gradients.results(),
    )


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """Reshape [..., P, D] to [T·P, D] in a layout that the kernels can read."""
    return calls.readable_rows(tensor.reshape(-1, tensor.shape[-1]))
