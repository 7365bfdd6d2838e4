"""flow_matching_loss and frequency_loss on CUDA devices: csrc/cuda/flow_matching_loss.cu and
flow_matching_loss_backward.cu."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from deco_kernels.backends import arguments
from deco_kernels.backends.cuda import calls
from deco_kernels.signatures import Loss


def forward(
    pred: torch.Tensor,
    target: torch.Tensor,
    frequency_weight: torch.Tensor,
    sample_weight: torch.Tensor | None,
    frequency_scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(total, pixel, frequency), float32 scalars."""
    total, pixel, frequency = (_empty_loss(pred) for _ in range(3))
    _losses(Loss(pred, target, frequency_weight, sample_weight), frequency_scale, (total, pixel, frequency))
    return total, pixel, frequency


def frequency_loss_forward(
    pred: torch.Tensor, target: torch.Tensor, frequency_weight: torch.Tensor, sample_weight: torch.Tensor | None
) -> torch.Tensor:
    """The frequency loss, a float32 scalar."""
    frequency = _empty_loss(pred)
    _losses(Loss(pred, target, frequency_weight, sample_weight), 0.0, (None, None, frequency))
    return frequency


def backward(
    grad_total: torch.Tensor | None,
    grad_pixel: torch.Tensor | None,
    grad_frequency: torch.Tensor | None,
    pred: torch.Tensor,
    target: torch.Tensor,
    frequency_weight: torch.Tensor,
    sample_weight: torch.Tensor | None,
    frequency_scale: float,
    needs: Sequence[bool],
) -> arguments.Gradients:
    """Gradients of pred, target, frequency_weight and sample_weight; None where `needs` is False.

    The gradient of a loss is None if it is zero.
    """
    inputs = Loss(pred, target, frequency_weight, sample_weight)
    return _gradients((grad_total, grad_pixel, grad_frequency), frequency_scale, inputs, needs)


def frequency_loss_backward(
    grad: torch.Tensor,
    pred: torch.Tensor,
    target: torch.Tensor,
    frequency_weight: torch.Tensor,
    sample_weight: torch.Tensor | None,
    needs: Sequence[bool],
) -> arguments.Gradients:
    """`backward` of the frequency loss."""
    return _gradients((None, None, grad), 0.0, Loss(pred, target, frequency_weight, sample_weight), needs)


def _losses(inputs: Loss, frequency_scale: float, losses: Sequence[torch.Tensor | None]) -> None:
    """Write total, pixel and frequency to `losses`; None skips a loss."""
    if inputs.pred.numel() == 0:
        for loss in losses:
            if loss is not None:
                loss.zero_()
        return
    _launch("forward", inputs, frequency_scale, arguments.addresses(losses))


def _gradients(
    grad_losses: Sequence[torch.Tensor | None], frequency_scale: float, inputs: Loss, needs: Sequence[bool]
) -> arguments.Gradients:
    """`grad_losses`: gradients of total, pixel and frequency; None for zero."""
    wanted = [need and tensor is not None for tensor, need in zip(inputs, needs, strict=True)]
    grads = arguments.empty_gradients(inputs, wanted)
    if inputs.pred.numel() == 0:
        return arguments.zeroed(grads)
    _launch("backward", inputs, frequency_scale, arguments.addresses(grad_losses), arguments.arrays(grads))
    return grads


def _launch(direction: str, inputs: Loss, frequency_scale: float, *description: tuple[int, ...]) -> None:
    pred, target, *weights = inputs
    weights = [None if weight is None else weight.contiguous() for weight in weights]
    batch, _, height, width = pred.shape
    whole: tuple[Any, ...] = (
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
