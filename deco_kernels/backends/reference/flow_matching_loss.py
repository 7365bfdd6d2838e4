"""Reference flow_matching_loss and frequency_loss."""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from deco_kernels.backends.arguments import Gradients
from deco_kernels.backends.reference.common import compute_dtype, constant, differentiate
from deco_kernels.signatures import BLOCK, Loss, grouped

RGB_TO_YCBCR = (
    (0.299, 0.587, 0.114),
    (-0.168736, -0.331264, 0.5),
    (0.5, -0.418688, -0.081312),
)


DCT = tuple(
    tuple(
        math.sqrt((1 if frequency == 0 else 2) / BLOCK) * math.cos(math.pi * (2 * sample + 1) * frequency / (2 * BLOCK))
        for sample in range(BLOCK)
    )
    for frequency in range(BLOCK)
)
"""Orthonormal 8-point DCT-II, [frequency, sample]."""


def padded_by_reflection(planes: Tensor) -> Tensor:
    """[B, C, H, W] reflected at bottom and right to multiples of 8; F.pad has no deterministic gradient on GPUs."""
    for axis in (-2, -1):
        size = planes.shape[axis]
        if missing := -size % BLOCK:
            planes = torch.cat((planes, planes.narrow(axis, size - 1 - missing, missing).flip(axis)), axis)
    return planes


def block_dct(planes: Tensor) -> Tensor:
    """[B, C, H, W] -> DCT coefficients [B, C, ceil(H/8), ceil(W/8), 8, 8] of every plane, row = vertical frequency."""
    blocks = padded_by_reflection(planes).unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK)).transpose(-2, -3)
    dct = constant(DCT, planes)
    return dct @ blocks @ dct.T


def block_dct_ycbcr(image: Tensor) -> Tensor:
    """RGB [B, 3, H, W] -> DCT coefficients of YCbCr [B, 3, ceil(H/8), ceil(W/8), 8, 8], see `block_dct`."""
    return block_dct(torch.einsum("kc,bchw->bkhw", constant(RGB_TO_YCBCR, image), image))


def frequency_formula(pred: Tensor, target: Tensor, frequency_weight: Tensor, sample_weight: Tensor | None) -> Tensor:
    """The frequency loss, a scalar; every tensor in one dtype, or under autocast."""
    if pred.shape[0] == 0:
        return _empty_loss(pred, target, frequency_weight, sample_weight)
    energy = frequency_weight[:, None, None] * block_dct_ycbcr(pred - target) ** 2
    return _batch_mean(energy, sample_weight)


def formula(
    pred: Tensor, target: Tensor, frequency_weight: Tensor, sample_weight: Tensor | None, frequency_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(total, pixel, frequency), scalars; every tensor in one dtype, or under autocast."""
    if pred.shape[0] == 0:
        pixel = _empty_loss(pred, target, frequency_weight, sample_weight)
    else:
        pixel = _batch_mean((pred - target) ** 2, sample_weight)
    frequency = frequency_formula(pred, target, frequency_weight, sample_weight)
    return pixel + frequency_scale * frequency, pixel, frequency


def _batch_mean(values: Tensor, sample_weight: Tensor | None) -> Tensor:
    per_sample = values.flatten(1).mean(1)
    return (per_sample if sample_weight is None else per_sample * sample_weight).mean()


def _empty_loss(*tensors: Tensor | None) -> Tensor:
    """Zero, differentiable with respect to every given tensor."""
    return functools.reduce(torch.add, [0 * tensor.sum() for tensor in tensors if tensor is not None])


def _prepare(*tensors: Tensor | None) -> Loss:
    return grouped(Loss, [None if tensor is None else tensor.to(compute_dtype(tensor)) for tensor in tensors])


def forward(
    pred: Tensor, target: Tensor, frequency_weight: Tensor, sample_weight: Tensor | None, frequency_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return formula(*_prepare(pred, target, frequency_weight, sample_weight), frequency_scale)


def backward(
    grad_total: Tensor | None,
    grad_pixel: Tensor | None,
    grad_frequency: Tensor | None,
    pred: Tensor,
    target: Tensor,
    frequency_weight: Tensor,
    sample_weight: Tensor | None,
    frequency_scale: float,
    needs: Sequence[bool],
) -> Gradients:
    inputs = Loss(pred, target, frequency_weight, sample_weight)
    grad_losses = (grad_total, grad_pixel, grad_frequency)
    return differentiate(formula, (frequency_scale,), _prepare(*inputs), inputs, needs, grad_losses)


def frequency_loss_forward(
    pred: Tensor, target: Tensor, frequency_weight: Tensor, sample_weight: Tensor | None
) -> Tensor:
    return frequency_formula(*_prepare(pred, target, frequency_weight, sample_weight))


def frequency_loss_backward(
    grad: Tensor,
    pred: Tensor,
    target: Tensor,
    frequency_weight: Tensor,
    sample_weight: Tensor | None,
    needs: Sequence[bool],
) -> Gradients:
    inputs = Loss(pred, target, frequency_weight, sample_weight)
    return differentiate(frequency_formula, (), _prepare(*inputs), inputs, needs, (grad,))
