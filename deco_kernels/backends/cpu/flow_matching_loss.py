"""flow_matching_loss and frequency_loss on the CPU: csrc/cpu/flow_matching_loss.cpp."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from deco_kernels import native
from deco_kernels.backends import arguments
from deco_kernels.backends.arguments import Losses
from deco_kernels.signatures import Loss

_LEAST_PART = 2.0**-24
"""Powers of two from here to 1 multiply a kept gradient."""


def forward(
    pred: torch.Tensor,
    target: torch.Tensor,
    frequency_weight: torch.Tensor,
    sample_weight: torch.Tensor | None,
    frequency_scale: float,
) -> Losses:
    """(total, pixel, frequency), float32 scalars."""
    losses = _empty_losses()
    _losses(Loss(pred, target, frequency_weight, sample_weight), frequency_scale, losses)
    return losses


def keeps_gradient(inputs: Loss) -> bool:
    """Whether one pass gives the losses and the gradient of pred: for all inputs."""
    return True


def forward_with_gradient(inputs: Loss, frequency_scale: float) -> tuple[Losses, torch.Tensor]:
    """The losses, and the gradient of total with respect to pred."""
    losses, gradient = _empty_losses(), _empty_image_like(inputs.pred)
    _losses(inputs, frequency_scale, losses, (1.0, frequency_scale), gradient)
    return losses, gradient


def kept_backward(gradient: torch.Tensor, grad_total: torch.Tensor, inputs: Loss, frequency_scale: float) -> None:
    """Changes a gradient from `forward_with_gradient` into that for `grad_total`."""
    factor = grad_total.item()
    _complete(gradient, factor, (factor, frequency_scale * factor), inputs)


def frequency_loss_forward(
    pred: torch.Tensor, target: torch.Tensor, frequency_weight: torch.Tensor, sample_weight: torch.Tensor | None
) -> torch.Tensor:
    """The frequency loss, a float32 scalar."""
    _, _, frequency = _empty_losses()
    _losses(Loss(pred, target, frequency_weight, sample_weight), 0.0, (None, None, frequency))
    return frequency


def frequency_loss_forward_with_gradient(inputs: Loss) -> tuple[torch.Tensor, torch.Tensor]:
    """`forward_with_gradient` of the frequency loss."""
    (_, _, frequency), gradient = _empty_losses(), _empty_image_like(inputs.pred)
    _losses(inputs, 0.0, (None, None, frequency), (0.0, 1.0), gradient)
    return frequency, gradient


def frequency_loss_kept_backward(gradient: torch.Tensor, grad: torch.Tensor, inputs: Loss) -> None:
    """`kept_backward` of the frequency loss."""
    factor = grad.item()
    _complete(gradient, factor, (0.0, factor), inputs)


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


def _losses(
    inputs: Loss,
    frequency_scale: float,
    losses: Sequence[torch.Tensor | None],
    grad_losses: tuple[float, float] = (0.0, 0.0),
    gradient: torch.Tensor | None = None,
) -> None:
    """Write total, pixel and frequency to `losses`; None skips a loss.

    gradient: that of pred, written too unless None, for the gradients `grad_losses` of the pixel and frequency loss.
    """
    inputs = _with_weights_in_float32(inputs)
    native.cpu().flow_matching_loss_forward(
        *_description(inputs),
        frequency_scale,
        *arguments.addresses(losses),
        *grad_losses,
        arguments.array(gradient),
        torch.get_num_threads(),
    )


def _complete(gradient: torch.Tensor, factor: float, grad_losses: tuple[float, float], inputs: Loss) -> None:
    """From the gradient of pred for an incoming gradient of 1 to that for `factor`, rounded once.

    `grad_losses`: `factor` as gradients of the pixel and frequency loss.
    """
    if factor == 1:
        return
    parts = 1 / factor if _LEAST_PART <= factor < 1 else 0
    if parts and math.frexp(parts)[0] == 0.5:  # of accumulated steps: the product is exact unless it underflows
        gradient.mul_(factor)
    else:
        _write_gradients(*grad_losses, inputs, (gradient, None), (None, None))


def _gradients(grad_pixel: float, grad_frequency: float, inputs: Loss, needs: Sequence[bool]) -> arguments.Gradients:
    """`grad_pixel` and `grad_frequency` are the gradients of the two parts, including through the total."""
    pred, target, *weights = inputs
    grad_images = [
        _empty_image_like(tensor) if need else None for tensor, need in zip((pred, target), needs[:2], strict=True)
    ]
    grad_weights = [
        torch.empty(weight.shape, dtype=torch.float32) if need and weight is not None else None
        for weight, need in zip(weights, needs[2:], strict=True)
    ]
    _write_gradients(grad_pixel, grad_frequency, inputs, grad_images, grad_weights)
    in_their_dtype = [
        None if gradient is None or weight is None else gradient.to(weight.dtype)
        for gradient, weight in zip(grad_weights, weights, strict=True)
    ]
    return (*grad_images, *in_their_dtype)


def _write_gradients(
    grad_pixel: float,
    grad_frequency: float,
    inputs: Loss,
    grad_images: Sequence[torch.Tensor | None],
    grad_weights: Sequence[torch.Tensor | None],
) -> None:
    """Write the gradients that are not None; those of the weights are float32."""
    inputs = _with_weights_in_float32(inputs)
    native.cpu().flow_matching_loss_backward(
        *_description(inputs),
        grad_pixel,
        grad_frequency,
        arguments.arrays(grad_images),
        *arguments.addresses(grad_weights),
        torch.get_num_threads(),
    )


def _description(inputs: Loss) -> tuple[Any, ...]:
    """The arguments of the kernels; the weights are those of `_with_weights_in_float32`."""
    pred, target, *weights = inputs
    batch, _, height, width = pred.shape
    return (batch, height, width), arguments.image(pred), arguments.image(target), *arguments.addresses(weights)


def _with_weights_in_float32(inputs: Loss) -> Loss:
    frequency_weight, sample_weight = inputs.frequency_weight, inputs.sample_weight
    return inputs._replace(
        frequency_weight=frequency_weight.to(torch.float32).contiguous(),
        sample_weight=None if sample_weight is None else sample_weight.to(torch.float32).contiguous(),
    )


def _empty_losses() -> Losses:
    total, pixel, frequency = (torch.empty((), dtype=torch.float32) for _ in range(3))
    return total, pixel, frequency


def _empty_image_like(image: torch.Tensor) -> torch.Tensor:
    return torch.empty(image.shape, dtype=image.dtype)
