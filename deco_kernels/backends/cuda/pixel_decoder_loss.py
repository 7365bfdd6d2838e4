"""pixel_decoder_loss on CUDA devices: csrc/cuda/pixel_decoder_loss.cu for patches that hold whole 8x8 blocks of the
loss; for smaller ones the kernels of pixel_decoder and flow_matching_loss, one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deco_kernels.backends import arguments, chunk_sizes
from deco_kernels.backends.arguments import Gradients, Losses
from deco_kernels.backends.composition import (
    Composition,
    empty_one_pass_gradients,
    gradient_scale,
    unscaled,
)
from deco_kernels.backends.cuda import calls, flow_matching_loss, pixel_decoder
from deco_kernels.signatures import BLOCK, PixelDecoderLoss, flat

_composition = Composition("cuda", pixel_decoder, flow_matching_loss)


def forward(inputs: PixelDecoderLoss, patch_size: int, frequency_scale: float, head_norm: str, eps: float) -> Losses:
    """(total, pixel, frequency), float32 scalars."""
    if patch_size < BLOCK:
        return _composition.forward(inputs, patch_size, frequency_scale, head_norm, eps)
    nothing: Gradients = (None,) * len(flat(inputs))
    return _run(inputs, patch_size, frequency_scale, head_norm, eps, 1.0, nothing)


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
    grads = empty_one_pass_gradients(inputs, needs)
    if needs[2]:
        inputs = inputs._replace(target=inputs.target.float())  # its gradient is written in its dtype
    scale = gradient_scale(inputs.cond.dtype, inputs.image.numel())
    losses = _run(inputs, patch_size, frequency_scale, head_norm, eps, scale, grads)
    return losses, unscaled(grads, scale)


def _run(
    inputs: PixelDecoderLoss,
    patch_size: int,
    frequency_scale: float,
    head_norm: str,
    eps: float,
    grad_total: float,
    grads: Gradients,
) -> Losses:
    """Computes the losses, and writes the gradients of grad_total·total that are not None."""
    image, cond, target, weights, *loss_weights, query = inputs
    total, pixel, frequency = (torch.empty((), dtype=torch.float32, device=cond.device) for _ in range(3))
    if image.numel() == 0:
        arguments.zeroed(grads)
        return total.zero_(), pixel.zero_(), frequency.zero_()
    image, cond = calls.readable_image(image, cond.dtype), calls.readable_pixel_rows(cond)
    query = calls.readable_query(query)
    target = calls.readable_image_rows(target, cond.dtype)
    weights = arguments.contiguous(weights)
    loss_weights = [None if weight is None else weight.contiguous() for weight in loss_weights]
    grad_image, grad_cond, grad_target, *grad_weights, grad_frequency_weight, grad_sample_weight, grad_query = grads
    shape = arguments.decoder_sizes(image, weights, patch_size)
    backward = any(gradient is not None for gradient in (grad_image, grad_cond, *grad_weights, grad_query))
    pixels = chunk_pixels(*shape[-2:]) if backward else chunk_sizes.MOST_PIXELS
    description = (
        shape,
        arguments.image(image),
        arguments.pixel_rows(cond),
        arguments.pixel_rows(query),
        arguments.image(target),
        arguments.arrays(weights),
        arguments.arrays(loss_weights),
        frequency_scale,
        arguments.addresses((total, pixel, frequency)),
        grad_total,
        arguments.image(grad_image),
        arguments.pixel_rows(grad_cond),
        arguments.pixel_rows(grad_query),
        arguments.image(grad_target),
        arguments.arrays(grad_weights),
        arguments.arrays((grad_frequency_weight, grad_sample_weight)),
        arguments.HEAD_NORMS.index(head_norm),
        eps,
        chunk_sizes.chunk_of_images(image, patch_size, pixels),
    )
    module = calls.module_for(cond)
    workspace = module.pixel_decoder_loss_workspace(cond.device.index or 0, *description)
    calls.launch(module.pixel_decoder_loss, workspace, cond, *description)
    return total, pixel, frequency


def chunk_pixels(width: int, depth: int) -> int:
    """Pixels per chunk with gradients of the decoder, whose kernels hand on 2·D·(N + 2) + 6 bytes per pixel."""
    return pixel_decoder.backward_chunk_pixels(width, depth, velocity_bytes=6)
