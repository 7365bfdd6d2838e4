"""flow_matching_loss and frequency_loss on the CPU: csrc/cpu/flow_matching_loss.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deco_kernels import native
from deco_kernels.backends import arguments
from deco_kernels.signatures import Loss


def forward(
    pred: torch.Tensor,
    target: torch.Tensor,
    frequency_weight: torch.Tensor,
    sample_weight: torch.Tensor | None,
    frequency_scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(total, pixel, frequency), float32 scalars."""
    total, pixel, frequency = (torch.empty((), dtype=torch.float32) for _ in range(3))
    _losses(Loss(pred, target, frequency_weight, sample_weight), frequency_scale, total, pixel, frequency)
    return total, pixel, frequency


def frequency_loss_forward(
    pred: torch.Tensor, target: torch.Tensor, frequency_weight: torch.Tensor, sample_weight: torch.Tensor | None
) -> torch.Tensor:
    """The frequency loss, a float32 scalar."""
    frequency = torch.empty((), dtype=torch.float32)
    _losses(Loss(pred, target, frequency_weight, sample_weight), 0.0, None, None, frequency)
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
    total, pixel, frequency = (
        0.0 if grad is None else grad.item() for grad in (grad_total, grad_pixel, grad_frequency)
    )
    return _gradients(
        total + pixel,
        frequency_scale * total + frequency,
        Loss(pred, target, frequency_weight, sample_weight),
        needs,
    )


def frequency_loss_backward(
    grad: torch.Tensor,
    pred: torch.Tensor,
    target: torch.Tensor,
    frequency_weight: torch.Tensor,
    sample_weight: torch.Tensor | None,
    needs: Sequence[bool],
) -> arguments.Gradients:
    """`backward` of the frequency loss."""
    return _gradients(0.0, grad.item(), Loss(pred, target, frequency_weight, sample_weight), needs)


def _losses(inputs: Loss, frequency_scale: float, *losses: torch.Tensor | None) -> None:
    """Write total, pixel and frequency to `losses`; None skips a loss."""
    pred, target, *weights = inputs
    weights_in_float32 = [_in_float32(weight) for weight in weights]
    native.cpu().flow_matching_loss_forward(
        _shape(pred),
        arguments.image(pred),
        arguments.image(target),
        *arguments.addresses(weights_in_float32),
        frequency_scale,
        *arguments.addresses(losses),
        torch.get_num_threads(),
    )


def _gradients(grad_pixel: float, grad_frequency: float, inputs: Loss, needs: Sequence[bool]) -> arguments.Gradients:
    """`grad_pixel` and `grad_frequency` are the gradients of the two parts, including through the total."""
    pred, target, *weights = inputs
    grad_images = [
        torch.empty(tensor.shape, dtype=tensor.dtype) if need else None
        for tensor, need in zip((pred, target), needs[:2], strict=True)
    ]
    grad_weights = [
        torch.empty(weight.shape, dtype=torch.float32) if need and weight is not None else None
        for weight, need in zip(weights, needs[2:], strict=True)
    ]
    weights_in_float32 = [_in_float32(weight) for weight in weights]
    native.cpu().flow_matching_loss_backward(
        _shape(pred),
        arguments.image(pred),
        arguments.image(target),
        *arguments.addresses(weights_in_float32),
        grad_pixel,
        grad_frequency,
        arguments.arrays(grad_images),
        *arguments.addresses(grad_weights),
        torch.get_num_threads(),
    )
    in_their_dtype = [
        None if gradient is None or weight is None else gradient.to(weight.dtype)
        for gradient, weight in zip(grad_weights, weights, strict=True)
    ]
    return (*grad_images, *in_their_dtype)


def _shape(pred: torch.Tensor) -> tuple[int, int, int]:
    """(B, H, W)"""
    batch, _, height, width = pred.shape
    return batch, height, width


def _in_float32(weight: torch.Tensor | None) -> torch.Tensor | None:
    return None if weight is None else weight.to(torch.float32).contiguous()
