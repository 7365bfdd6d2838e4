"""pixel_decoder_loss on the CPU: csrc/cpu/pixel_decoder_loss.cpp for patches of 8x8 and 16x16 pixels, which hold whole
8x8 blocks of the loss; for smaller ones the kernels of pixel_decoder and flow_matching_loss, one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deco_kernels import native
from deco_kernels.backends import arguments
from deco_kernels.backends.arguments import Gradients, Losses
from deco_kernels.backends.composition import Composition
from deco_kernels.backends.cpu import flow_matching_loss, pixel_decoder
from deco_kernels.signatures import BLOCK, PixelDecoderLoss, flat

_composition = Composition("cpu", pixel_decoder, flow_matching_loss)


def forward(inputs: PixelDecoderLoss, patch_size: int, frequency_scale: float, head_norm: str, eps: float) -> Losses:
    """(total, pixel, frequency), float32 scalars."""
    if patch_size < BLOCK:
        return _composition.forward(inputs, patch_size, frequency_scale, head_norm, eps)
    return _run(inputs, patch_size, frequency_scale, head_norm, eps, [None] * len(flat(inputs)))


def forward_with_gradients(
    inputs: PixelDecoderLoss,
    patch_size: int,
    frequency_scale: float,
    head_norm: str,
    eps: float,
    needs: Sequence[bool],
) -> tuple[Losses, Gradients]:
    """The losses, and the gradients of total in the dtypes in which they are kept; None where `needs` is False."""
    if patch_size < BLOCK:
        return _composition.forward_with_gradients(inputs, patch_size, frequency_scale, head_norm, eps, needs)
    kept = arguments.empty_kept_gradients("pixel_decoder_loss", inputs, needs)
    return _run(inputs, patch_size, frequency_scale, head_norm, eps, kept), kept


def _run(
    inputs: PixelDecoderLoss,
    patch_size: int,
    frequency_scale: float,
    head_norm: str,
    eps: float,
    grads: Sequence[torch.Tensor | None],
) -> Losses:
    """Computes the losses, and writes the gradients that are not None."""
    image, cond, target, weights, *loss_weights, query = inputs
    cond, query = arguments.readable_pixel_rows(cond), arguments.readable_query(query)
    weights = arguments.contiguous(weights)
    loss_weights_in_float32 = [None if w is None else w.to(torch.float32).contiguous() for w in loss_weights]
    total, pixel, frequency = (torch.empty((), dtype=torch.float32) for _ in range(3))
    grad_image, grad_cond, grad_target, *grad_weights, grad_frequency_weight, grad_sample_weight, grad_query = grads
    native.cpu().pixel_decoder_loss(
        arguments.decoder_sizes(image, weights, patch_size),
        arguments.image(image),
        arguments.pixel_rows(cond),
        arguments.pixel_rows(query),
        arguments.image(target),
        arguments.arrays(weights),
        *arguments.addresses(loss_weights_in_float32),
        frequency_scale,
        *arguments.addresses((total, pixel, frequency)),
        int(any(gradient is not None for gradient in (*grads[:-3], grad_query))),
        arguments.image(grad_image),
        arguments.pixel_rows(grad_cond),
        arguments.pixel_rows(grad_query),
        arguments.image(grad_target),
        arguments.arrays(grad_weights),
        *arguments.addresses((grad_frequency_weight, grad_sample_weight)),
        arguments.HEAD_NORMS.index(head_norm),
        eps,
        torch.get_num_threads(),
    )
    return total, pixel, frequency
