"""upsample_modulate on the CPU: csrc/cpu/upsample_modulate.cpp and, where PyTorch multiplies, csrc/cpu/modulate.cpp.

In the backward, the conditions are those of the forward or computed again (csrc/cpu/upsample.cpp).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deco_kernels import native
from deco_kernels.backends import arguments
from deco_kernels.backends.chunks import multiplied, slices
from deco_kernels.backends.cpu.upsample import UpsampleGradients
from deco_kernels.backends.upsample import chunk_tokens
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
    up, weights = arguments.contiguous(up), arguments.contiguous(weights)
    modulated, gate = torch.empty(h.shape, dtype=h.dtype), torch.empty(h.shape, dtype=h.dtype)
    if native.upsamples_in_pytorch(h.dtype, *up.up_weight.shape):
        _modulate(h, UpsampleGradients(tokens, up, needs=(False,) * 3), weights, cond, modulated, gate, eps)
        return modulated, gate
    h, tokens = arguments.readable_pixel_rows(h), arguments.readable_rows(tokens)
    native.cpu().upsample_modulate_forward(
        arguments.upsample_sizes(tokens, *h.shape[-2:]),
        arguments.rows(tokens),
        arguments.arrays(up),
        arguments.pixel_rows(cond),
        arguments.pixel_rows(h),
        arguments.arrays(weights),
        arguments.pixel_rows(modulated),
        arguments.pixel_rows(gate),
        eps,
        torch.get_num_threads(),
    )
    return modulated, gate


def _modulate(
    h: torch.Tensor,
    upsample: UpsampleGradients,
    weights: ModulationWeights,
    kept: torch.Tensor | None,
    modulated: torch.Tensor,
    gate: torch.Tensor,
    eps: float,
) -> None:
    """Write modulated and gate, and the conditions to `kept` if it is given, from conditions of PyTorch in chunks."""
    pixels, width = h.shape[-2:]
    kept_rows = None if kept is None else kept.view(-1, pixels * width)
    h_rows, modulated_rows, gate_rows = _rows(h), modulated.view(-1, width), gate.view(-1, width)
    for part in slices(len(upsample.rows), chunk_tokens(upsample.up)):
        rows = multiplied(part, pixels)
        cond = upsample.cond(part, kept_rows).view(-1, width)
        native.cpu().modulate_forward(
            *arguments.row_sizes(cond),
            arguments.rows(h_rows[rows]),
            arguments.rows(cond),
            arguments.arrays(weights),
            arguments.rows(modulated_rows[rows]),
            arguments.rows(gate_rows[rows]),
            eps,
            torch.get_num_threads(),
        )


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
    up, weights = arguments.contiguous(up), arguments.contiguous(weights)
    pixels, width = h.shape[-2:]
    grad_h = torch.empty(h.shape, dtype=h.dtype) if needs[0] else None
    grad_h_rows = None if grad_h is None else grad_h.view(-1, width)
    upsample = UpsampleGradients(tokens, up, needs[1:4])
    weight_gradients = arguments.WeightGradients(weights, needs[4:])
    inputs = [_rows(tensor) for tensor in (grad_modulated, grad_gate, h)]
    kept_rows = None if cond is None else _rows(cond)
    for part in slices(len(upsample.rows), chunk_tokens(upsample.up)):
        rows = multiplied(part, pixels)
        cond_rows = upsample.cond(part).view(-1, width) if kept_rows is None else kept_rows[rows]
        grad_cond = upsample.new_grad_cond(part.stop - part.start, pixels)
        grads = weight_gradients.new_part()
        native.cpu().modulate_backward(
            *arguments.row_sizes(cond_rows),
            *(arguments.rows(tensor[rows]) for tensor in inputs),
            arguments.rows(cond_rows),
            arguments.arrays(weights),
            arguments.rows(None if grad_h_rows is None else grad_h_rows[rows]),
            arguments.rows(grad_cond),
            arguments.arrays(grads),
            eps,
            torch.get_num_threads(),
        )
        weight_gradients.add(grads)
        upsample.add(part.start, grad_cond)
    return (grad_h, *upsample.results(), *weight_gradients.results())


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """Reshape [..., P, D] to [T·P, D] in a layout that the kernels can read."""
    return arguments.readable_rows(tensor.reshape(-1, tensor.shape[-1]))
