"""Reference flow_matching_loss and frequency_loss."""

import functools
import math

import torch
import torch.nn.functional as F

from deco_kernels.backends.reference.common import compute_dtype, differentiate

BLOCK = 8
RGB_TO_YCBCR = (
    (0.299, 0.587, 0.114),
    (-0.168736, -0.331264, 0.5),
    (0.5, -0.418688, -0.081312),
)


def dct_matrix(like: torch.Tensor) -> torch.Tensor:
    """Orthonormal 8-point DCT-II, [frequency, sample]."""
    rows = [
        [
            math.sqrt((1 if frequency == 0 else 2) / BLOCK)
            * math.cos(math.pi * (2 * sample + 1) * frequency / (2 * BLOCK))
            for sample in range(BLOCK)
        ]
        for frequency in range(BLOCK)
    ]
    return like.new_tensor(rows)


def block_dct(planes: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] -> DCT coefficients [B, C, ceil(H/8), ceil(W/8), 8, 8] of every plane, row = vertical frequency."""
    height, width = planes.shape[-2:]
    padded = F.pad(planes, (0, -width % BLOCK, 0, -height % BLOCK), mode="reflect")
    blocks = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK)).transpose(-2, -3)
    dct = dct_matrix(planes)
    return dct @ blocks @ dct.T


def block_dct_ycbcr(image: torch.Tensor) -> torch.Tensor:
    """RGB [B, 3, H, W] -> DCT coefficients of YCbCr [B, 3, ceil(H/8), ceil(W/8), 8, 8], see `block_dct`."""
    return block_dct(torch.einsum("kc,bchw->bkhw", image.new_tensor(RGB_TO_YCBCR), image))


def frequency_formula(pred, target, frequency_weight, sample_weight):
    """The frequency loss, a scalar; every tensor in one dtype, or under autocast."""
    if pred.shape[0] == 0:
        return _empty_loss(pred, target, frequency_weight, sample_weight)
    energy = frequency_weight[:, None, None] * block_dct_ycbcr(pred - target) ** 2
    return _batch_mean(energy, sample_weight)


def formula(pred, target, frequency_weight, sample_weight, frequency_scale):
    """(total, pixel, frequency), scalars; every tensor in one dtype, or under autocast."""
    if pred.shape[0] == 0:
        pixel = _empty_loss(pred, target, frequency_weight, sample_weight)
    else:
        pixel = _batch_mean((pred - target) ** 2, sample_weight)
    frequency = frequency_formula(pred, target, frequency_weight, sample_weight)
    return pixel + frequency_scale * frequency, pixel, frequency


def _batch_mean(values: torch.Tensor, sample_weight: torch.Tensor | None) -> torch.Tensor:
    per_sample = values.flatten(1).mean(1)
    return (per_sample if sample_weight is None else per_sample * sample_weight).mean()


def _empty_loss(pred, target, frequency_weight, sample_weight):
    """0, differentiable with respect to every tensor given."""
    tensors = [tensor for tensor in (pred, target, frequency_weight, sample_weight) if tensor is not None]
    return functools.reduce(torch.add, [0 * tensor.sum() for tensor in tensors])


def _prepare(*tensors):
    return [None if tensor is None else tensor.to(compute_dtype(tensor)) for tensor in tensors]


def forward(pred, target, frequency_weight, sample_weight, frequency_scale):
    total, pixel, frequency = formula(*_prepare(pred, target, frequency_weight, sample_weight), frequency_scale)
    return total, pixel, frequency


def backward(grad_total, grad_pixel, grad_frequency, *arguments):
    *tensors, frequency_scale, needs = arguments
    return differentiate(
        lambda *t: formula(*t, frequency_scale),
        _prepare(*tensors),
        tensors,
        needs,
        (grad_total, grad_pixel, grad_frequency),
    )


def frequency_loss_forward(*tensors):
    return frequency_formula(*_prepare(*tensors))


def frequency_loss_backward(grad, *arguments):
    *tensors, needs = arguments
    return differentiate(frequency_formula, _prepare(*tensors), tensors, needs, (grad,))
