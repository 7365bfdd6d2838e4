"""flow_matching_loss and frequency_loss on CUDA devices: csrc/cuda/flow_matching_loss.cu and
flow_matching_loss_backward.cu."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deco_kernels.backends import arguments
from deco_kernels.backends.cuda import calls


def forward(
    pred: torch.Tensor,
    target: torch.Tensor,
    frequency_weight: torch.Tensor,
    sample_weight: torch.Tensor | None,
    frequency_scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(total, pixel, frequency), float32 scalars."""
    losses = tuple(_empty_loss(pred) for _ in range(3))
    _losses((pred, target, frequency_weight, sample_weight), frequency_scale, losses)
    return losses


def frequency_loss_forward(
    pred: torch.Tensor, target: torch.Tensor, frequency_weight: torch.Tensor, sample_weight: torch.Tensor | None
) -> torch.Tensor:
    """The frequency loss, a float32 scalar."""
    frequency = _empty_loss(pred)
    _losses((pred, target, frequency_weight, sample_weight), 0.0, (None, None, frequency))
    return frequency


def backward(
    grad_total: torch.Tensor,
    grad_pixel: torch.Tensor,
    grad_frequency: torch.Tensor,
    pred: torch.Tensor,
    target: torch.Tensor,
    frequency_weight: torch.Tensor,
    sample_weight: torch.Tensor | None,
    frequency_scale: float,
    needs: Sequence[bool],
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of pred, target, frequency_weight and sample_weight where `needs` asks for them."""
    tensors = (pred, target, frequency_weight, sample_weight)
    return _gradients((grad_total, grad_pixel, grad_frequency), frequency_scale, tensors, needs)


def frequency_loss_backward(
    grad: torch.Tensor,
    pred: torch.Tensor,
    target: torch.Tensor,
    frequency_weight: torch.Tensor,
    sample_weight: torch.Tensor | None,
    needs: Sequence[bool],
) -> tuple[torch.Tensor | None, ...]:
    """As `backward`, of the frequency loss."""
    return _gradients((None, None, grad), 0.0, (pred, target, frequency_weight, sample_weight), needs)


def _losses(tensors, frequency_scale: float, losses) -> None:
    """Writes total, pixel and frequency where they are wanted (not None)."""
    if tensors[0].numel() == 0:
        for loss in losses:
            if loss is not None:
                loss.zero_()
        return
    _launch("forward", tensors, frequency_scale, _addresses(losses))


def _gradients(grad_losses, frequency_scale: float, tensors, needs) -> tuple[torch.Tensor | None, ...]:
    """`grad_losses`: of total, pixel and frequency; None: zero."""
    wanted = [need and tensor is not None for tensor, need in zip(tensors, needs, strict=True)]
    grads = [
        torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) if want else None
        for tensor, want in zip(tensors, wanted, strict=True)
    ]
    if tensors[0].numel() == 0:
        return tuple(None if grad is None else grad.zero_() for grad in grads)
    _launch("backward", tensors, frequency_scale, _addresses(grad_losses), arguments.arrays(grads))
    return tuple(grads)


def _launch(direction: str, tensors, frequency_scale: float, *description) -> None:
    pred, target, *weights = tensors
    weights = [None if weight is None else weight.contiguous() for weight in weights]
    batch, _, height, width = pred.shape
    whole = (
        (batch, height, width),
        arguments.image(pred),
        arguments.image(target),
        arguments.arrays(weights),
        frequency_scale,
        *description,
    )
    module = calls.module_for(pred)
    function = getattr(module, f"flow_matching_loss_{direction}")
    workspace_bytes = getattr(module, f"flow_matching_loss_{direction}_workspace")(pred.device.index or 0, *whole)
    calls.launch(function, workspace_bytes, pred, *whole)


def _empty_loss(pred: torch.Tensor) -> torch.Tensor:
    return torch.empty((), dtype=torch.float32, device=pred.device)


def _addresses(tensors) -> tuple[int, ...]:
    return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)
