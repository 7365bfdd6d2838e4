"""flow_matching_loss and frequency_loss on CUDA devices: csrc/cuda/flow_matching_loss.cu and
flow_matching_loss_backward.cu."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from deco_kernels.backends import arguments
from deco_kernels.backends.arguments import Losses
from deco_kernels.backends.cuda import calls
from deco_kernels.signatures import Loss


def forward(
    pred: torch.Tensor,
    target: torch.Tensor,
    frequency_weight: torch.Tensor,
    sample_weight: torch.Tensor | None,
    frequency_scale: float,
) -> Losses:
    """(total, pixel, frequency), float32 scalars."""
    inputs = Loss(pred, target, frequency_weight, sample_weight)
    losses = _empty_losses(pred)
    _losses(inputs, frequency_scale, losses)
    return losses


def keeps_gradient(inputs: Loss) -> bool:
    """Whether one pass gives the losses and the gradient of pred: if the kernels read both images in place."""
    module = calls.module_for(inputs.pred)
    return bool(module.loss_keeps_gradient(*_description(inputs)))


def forward_with_gradient(inputs: Loss, frequency_scale: float) -> tuple[Losses, torch.Tensor]:
    """The losses, and the gradient of total with respect to pred, for inputs with `keeps_gradient`."""
    losses, gradient = _empty_losses(inputs.pred), _empty_gradient(inputs.pred)
    _losses(inputs, frequency_scale, losses, (1.0, 0.0), gradient)
    return losses, gradient


def kept_backward(gradient: torch.Tensor, grad_total: torch.Tensor, inputs: Loss, frequency_scale: float) -> None:
    """Changes a gradient from `forward_with_gradient` into that for `grad_total`."""
    _complete((grad_total, None, None), frequency_scale, inputs, gradient)


def frequency_loss_forward(
    pred: torch.Tensor, target: torch.Tensor, frequency_weight: torch.Tensor, sample_weight: torch.Tensor | None
) -> torch.Tensor:
    """The frequency loss, a float32 scalar."""
    frequency = _empty_loss(pred)
    _losses(Loss(pred, target, frequency_weight, sample_weight), 0.0, (None, None, frequency))
    return frequency


def frequency_loss_forward_with_gradient(inputs: Loss) -> tuple[torch.Tensor, torch.Tensor]:
    """`forward_with_gradient` of the frequency loss."""
    frequency, gradient = _empty_loss(inputs.pred), _empty_gradient(inputs.pred)
    _losses(inputs, 0.0, (None, None, frequency), (0.0, 1.0), gradient)
    return frequency, gradient


def frequency_loss_kept_backward(gradient: torch.Tensor, grad: torch.Tensor, inputs: Loss) -> None:
    """`kept_backward` of the frequency loss."""
    _complete((None, None, grad), 0.0, inputs, gradient)


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


def _losses(
    inputs: Loss,
    frequency_scale: float,
    losses: Sequence[torch.Tensor | None],
    grad_losses: tuple[float, float] = (0.0, 0.0),
    gradient: torch.Tensor | None = None,
) -> None:
    """Write total, pixel and frequency to `losses`; None skips a loss.

    gradient: that of pred, written too unless None, for the incoming gradients `grad_losses` of total and frequency.
    """
    if inputs.pred.numel() == 0:
        for loss in losses:
            if loss is not None:
                loss.zero_()
        return
    _launch("forward", inputs, frequency_scale, arguments.addresses(losses), grad_losses, arguments.array(gradient))


def _gradients(
    grad_losses: Sequence[torch.Tensor | None], frequency_scale: float, inputs: Loss, needs: Sequence[bool]
) -> arguments.Gradients:
    """`grad_losses`: gradients of total, pixel and frequency; None for zero."""
    wanted = [need and tensor is not None for tensor, need in zip(inputs, needs, strict=True)]
    grads = arguments.empty_gradients(inputs, wanted)
    if inputs.pred.numel() == 0:
        return arguments.zeroed(grads)
    _launch("backward", inputs, frequency_scale, arguments.addresses(grad_losses), arguments.arrays(grads), 0)
    return grads


def _complete(
    grad_losses: Sequence[torch.Tensor | None], frequency_scale: float, inputs: Loss, gradient: torch.Tensor
) -> None:
    """Write the gradient of pred, unless the incoming gradient that is not None is 1; the kernel reads it."""
    if gradient.numel() > 0:
        grads = arguments.arrays((gradient, None, None, None))
        _launch("backward", inputs, frequency_scale, arguments.addresses(grad_losses), grads, 1)


def _description(inputs: Loss) -> tuple[tuple[int, ...], ...]:
    pred, target, *weights = inputs
    batch, _, height, width = pred.shape
    images = arguments.image(pred), arguments.image(target)
    return ((batch, height, width), *images, arguments.arrays(weights))


def _launch(direction: str, inputs: Loss, frequency_scale: float, *description: Any) -> None:
    pred, _, frequency_weight, sample_weight = inputs
    inputs = inputs._replace(
        frequency_weight=frequency_weight.contiguous(),
        sample_weight=None if sample_weight is None else sample_weight.contiguous(),
    )
    whole = (*_description(inputs), frequency_scale, *description)
    module = calls.module_for(pred)
    function = getattr(module, f"flow_matching_loss_{direction}")
    workspace_bytes = getattr(module, f"flow_matching_loss_{direction}_workspace")(pred.device.index or 0, *whole)
    calls.launch(function, workspace_bytes, pred, *whole)


def _empty_losses(pred: torch.Tensor) -> Losses:
    return _empty_loss(pred), _empty_loss(pred), _empty_loss(pred)


def _empty_loss(pred: torch.Tensor) -> torch.Tensor:
    return torch.empty((), dtype=torch.float32, device=pred.device)


def _empty_gradient(pred: torch.Tensor) -> torch.Tensor:
    return torch.empty(pred.shape, dtype=pred.dtype, device=pred.device)
