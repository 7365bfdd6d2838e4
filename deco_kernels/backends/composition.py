"""pixel_decoder_loss as a composition of the decoder's and the loss's kernels, for small patches."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from types import ModuleType

import torch

from deco_kernels.backends.arguments import Gradients, Losses, empty_kept_gradients, kept_like
from deco_kernels.signatures import BLOCK, Loss, PixelDecoderLoss

_log = logging.getLogger("deco_kernels")


class Composition:
    """pixel_decoder_loss from a backend's modules of pixel_decoder and flow_matching_loss.

    Between the two, the velocity and its gradient are stored in the activation dtype. float16 gradients are computed
    times a power of two, so that they do not underflow.
    """

    def __init__(self, backend: str, decoder: ModuleType, loss: ModuleType):
        self.backend, self.decoder, self.loss = backend, decoder, loss

    def forward(
        self, inputs: PixelDecoderLoss, patch_size: int, frequency_scale: float, head_norm: str, eps: float
    ) -> Losses:
        """(total, pixel, frequency)."""
        log_composition(self.backend)
        velocity = self._velocity(inputs, patch_size, head_norm, eps)
        losses: Losses = self.loss.forward(velocity, *loss_weights(inputs), frequency_scale)
        return losses

    def forward_with_gradients(
        self,
        inputs: PixelDecoderLoss,
        patch_size: int,
        frequency_scale: float,
        head_norm: str,
        eps: float,
        needs: Sequence[bool],
    ) -> tuple[Losses, Gradients]:
        """The losses, and the gradients of total in the dtypes in which they are kept; None where `needs` is False."""
        log_composition(self.backend)
        cond, query = inputs.cond, inputs.query
        wide = kept_like("pixel_decoder_loss", inputs)._replace(cond=cond, query=query)
        needs_image, needs_cond, needs_target, *needs_weights, needs_frequency, needs_sample, needs_query = needs
        needs_decoder = [needs_image, needs_cond, *needs_weights, needs_query]

        velocity = self._velocity(wide, patch_size, head_norm, eps)
        scale = gradient_scale(velocity.dtype, velocity.numel())
        needs_loss = [any(needs_decoder), needs_target, needs_frequency, needs_sample]
        losses, found = self._losses_and_gradients(velocity, wide, frequency_scale, scale, needs_loss)
        grad_velocity, grad_target, *grad_loss_weights = found
        grads: Gradients = (None,) * len(needs_decoder)
        if grad_velocity is not None:
            decoder_inputs = (wide.image, cond, wide.weights, query, patch_size, head_norm, eps)
            grads = self.decoder.backward(grad_velocity, *decoder_inputs, needs_decoder)
        gradients = (*grads[:2], grad_target, *grads[2:-1], *grad_loss_weights, grads[-1])
        return losses, unscaled(gradients, scale)

    def _velocity(self, inputs: PixelDecoderLoss, patch_size: int, head_norm: str, eps: float) -> torch.Tensor:
        decoder = (inputs.image, inputs.cond, inputs.weights, inputs.query)
        velocity: torch.Tensor = self.decoder.forward(*decoder, patch_size, head_norm, eps)
        return velocity

    def _losses_and_gradients(
        self,
        velocity: torch.Tensor,
        inputs: PixelDecoderLoss,
        frequency_scale: float,
        scale: float,
        needs: Sequence[bool],
    ) -> tuple[Losses, Gradients]:
        """The losses, and the gradients of scale·total by velocity and the loss's other tensors, in one pass if only
        that of the velocity is needed."""
        tensors = Loss(velocity, *loss_weights(inputs))
        if scale == 1 and list(needs) == [True, False, False, False] and self.loss.keeps_gradient(tensors):
            losses, gradient = self.loss.forward_with_gradient(tensors, frequency_scale)
            return losses, (gradient, None, None, None)
        losses = self.loss.forward(*tensors, frequency_scale)
        one = losses[0].new_full((), scale)
        return losses, self.loss.backward(one, None, None, *tensors, frequency_scale, needs)


def loss_weights(inputs: PixelDecoderLoss) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The arguments of the loss besides the velocity: target and weights."""
    return inputs.target, inputs.frequency_weight, inputs.sample_weight


def gradient_scale(dtype: torch.dtype, values: int) -> float:
    """Power of two that brings the gradient of a mean over float16 velocities near the size of one difference."""
    return 2.0 ** round(math.log2(max(1, values)) - 1) if dtype is torch.float16 else 1.0


def empty_one_pass_gradients(inputs: PixelDecoderLoss, needs: Sequence[bool]) -> Gradients:
    """Uninitialized tensors for the gradients times `gradient_scale`: as they are kept, those of cond and query in
    their dtype."""
    grad_image, grad_cond, *others, grad_query = empty_kept_gradients("pixel_decoder_loss", inputs, needs)
    dtype = inputs.cond.dtype
    grad_cond, grad_query = (g if g is None else torch.empty_like(g, dtype=dtype) for g in (grad_cond, grad_query))
    return (grad_image, grad_cond, *others, grad_query)


def unscaled(gradients: Gradients, scale: float) -> Gradients:
    """Gradients that were computed times `scale`, in the dtypes in which they are kept."""
    if scale == 1:
        return gradients
    return tuple(None if g is None else g.float() / scale for g in gradients)


@functools.cache
def log_composition(backend: str) -> None:
    """Log once that a backend computes pixel_decoder_loss in two steps."""
    _log.info(
        "pixel_decoder_loss runs pixel_decoder and flow_matching_loss on backend %r: "
        "patches of less than %dx%d pixels hold no whole block",
        *(backend, BLOCK, BLOCK),
    )
