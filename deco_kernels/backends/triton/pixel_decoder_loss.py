"""pixel_decoder_loss on Triton: decoder and loss in one pass by chunks, for patches that hold whole 8x8 blocks of the
loss; for smaller ones the kernels of pixel_decoder and flow_matching_loss, one after the other.

A chunk is whole images, or whole rows of patches of one image (chunk_sizes.py):
    forward_kernel      of pixel_decoder.py, stores h before each block and before the head
    gradient_kernel     of flow_matching_loss.py, stores the sums of the losses, and the gradient of the velocity in its
                        place
    head_kernel         of pixel_decoder_head.py, overwrites h before the head by its gradient
    the rest            the backward of the blocks and of the embedding, as in the backward of pixel_decoder
Nothing is computed twice, and velocity, its gradient and h exist for one chunk only: 2·D·(N + 1) + 6 bytes per pixel in
16-bit dtypes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from deco_kernels.backends import chunk_sizes
from deco_kernels.backends.arguments import Gradients, Losses, zeroed
from deco_kernels.backends.chunks import ImageChunk, image_chunks
from deco_kernels.backends.composition import (
    Composition,
    empty_one_pass_gradients,
    gradient_scale,
    unscaled,
)
from deco_kernels.signatures import BLOCK, PixelDecoderLoss

from . import flow_matching_loss, pixel_decoder
from .flow_matching_loss import LossCall, grad_frequency_weight, grad_sample_weight, no_losses
from .launching import collapsed_rows, device_guard, part_of, pixel_rows, readable_image
from .pixel_decoder import DecoderBackward, query_and_head, run_forward
from .weights import PackedWeights, pack

_composition = Composition("triton", pixel_decoder, flow_matching_loss)


class _Pass:
    """The chunks of one call, and what they share."""

    def __init__(self, inputs: PixelDecoderLoss, patch_size: int, frequency_scale: float, head_norm: str, eps: float):
        self.inputs = inputs = inputs._replace(image=readable_image(inputs.image))
        self.patch_size, self.frequency_scale, self.head_norm, self.eps = patch_size, frequency_scale, head_norm, eps
        self.cond, self.query = collapsed_rows(inputs.cond, 2), pixel_rows(inputs.query)
        self.ends = query_and_head(inputs.weights)
        velocity = self.cond.new_empty(()).expand(inputs.image.shape)  # for its sizes and dtype
        self.loss = LossCall(velocity, inputs.target, inputs.frequency_weight, inputs.sample_weight)
        self.forms = self.loss.forms()

    def losses(self, packed: PackedWeights) -> Losses:
        """The losses without gradients."""
        parts = []
        for chunk in self.chunks(chunk_sizes.MOST_PIXELS):
            loss = self.loss_of(chunk, self.run_decoder(chunk, packed))
            parts.append(loss.new_sums(loss.forward))
            loss.write_sums(self.forms, parts[-1])
        return self.loss.losses(self.sums_of(parts), self.frequency_scale)

    def chunks(self, pixels: int) -> Iterator[ImageChunk]:
        image = self.inputs.image
        return image_chunks(image.shape, self.patch_size, *chunk_sizes.chunk_of_images(image, self.patch_size, pixels))

    def run_decoder(self, chunk: ImageChunk, packed: PackedWeights, states: torch.Tensor | None = None) -> torch.Tensor:
        """The velocity of a chunk; `states` as in `run_forward`."""
        image, cond, query = chunk.of(self.inputs.image), self.cond[chunk.tokens], part_of(self.query, chunk.tokens)
        velocity = torch.empty(image.shape, dtype=cond.dtype, device=cond.device)
        options = (self.patch_size, self.head_norm, self.eps)
        run_forward(image, cond, query, packed, self.ends, velocity, 0, *options, states)
        return velocity

    def loss_of(self, chunk: ImageChunk, velocity: torch.Tensor) -> LossCall:
        weight = self.inputs.sample_weight
        chunk_weight = None if weight is None else weight[chunk.images]
        return LossCall(velocity, chunk.of(self.inputs.target), self.inputs.frequency_weight, chunk_weight)

    def sums_of(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """[B, tiles, 2] from the sums of the chunks in order."""
        return torch.cat([part.view(-1, 2) for part in parts]).view(self.loss.batch, -1, 2)


class _PassWithGradients(_Pass):
    """With the gradients of `scale` times the total."""

    def __init__(
        self,
        inputs: PixelDecoderLoss,
        patch_size: int,
        frequency_scale: float,
        head_norm: str,
        eps: float,
        scale: float,
        grads: Gradients,
    ):
        """`grads`: the gradients of all tensors, written; None where not needed."""
        super().__init__(inputs, patch_size, frequency_scale, head_norm, eps)
        inputs = self.inputs
        grad_image, grad_cond, self.grad_target, *others, grad_query = grads
        *self.grad_weights, self.grad_frequency, self.grad_sample = others
        needs_weights = any(gradient is not None for gradient in self.grad_weights)
        self.needs_decoder = needs_weights or any(g is not None for g in (grad_image, grad_cond, grad_query))
        self.grad_image = inputs.image if grad_image is None else grad_image  # as it is, if not needed
        self.grad_cond = torch.empty_like(self.cond) if grad_cond is None else grad_cond.view(self.cond.shape)
        self.grad_query = pixel_rows(grad_query)
        self.backward = DecoderBackward(
            inputs.image, inputs.image, inputs.weights, self.cond.dtype, patch_size, head_norm, eps,
            (grad_image is not None, grad_cond is not None, needs_weights), self.grad_image,
            velocity_bytes=3 * self.cond.itemsize,
        )  # fmt: skip
        one = torch.full((), scale, dtype=torch.float32, device=self.cond.device)
        self.coefficients = self.loss.coefficients((one, None, None), frequency_scale)

    def run(self) -> Losses:
        backward = self.backward
        chunks = list(self.chunks(backward.chunk_pixels if self.needs_decoder else chunk_sizes.MOST_PIXELS))
        pixels, width = self.cond.shape[1:]
        states = self.cond.new_empty(backward.depth + 1, chunks[0].tokens.stop, pixels, width)
        parts: list[torch.Tensor] = []
        spectra: list[torch.Tensor] = []
        for chunk in chunks:
            kept = states[:, : chunk.token_count] if self.needs_decoder else None
            velocity = self.run_decoder(chunk, backward.packed, kept)
            loss = self.loss_of(chunk, velocity)
            if self.grad_frequency is not None:
                spectra.append(loss.spectrum())
            parts.append(loss.new_sums(loss.backward))
            self._differentiate(chunk, loss, parts[-1])
            if kept is not None:
                self._backward(chunk, velocity, kept)
        sums = self.sums_of(parts)
        self._write_weights(sums, spectra)
        return self.loss.losses(sums, self.frequency_scale)

    def _differentiate(self, chunk: ImageChunk, loss: LossCall, sums: torch.Tensor) -> None:
        """The gradient of the velocity in its place, and that of the target."""
        grad_velocity = loss.pred if self.needs_decoder else None
        if self.grad_target is None:
            loss.write_gradients(self.forms, self.coefficients, grad_velocity, None, sums=sums)
            return
        grad_target = chunk.of(self.grad_target)
        written = grad_target.contiguous()
        loss.write_gradients(self.forms, self.coefficients, grad_velocity, written, sums=sums)
        if written is not grad_target:
            grad_target.copy_(written)

    def _backward(self, chunk: ImageChunk, grad_velocity: torch.Tensor, states: torch.Tensor) -> None:
        part = self.backward.on(chunk.of(self.inputs.image), grad_velocity, chunk.of(self.grad_image))
        h = states[part.depth]
        part.head(h, h, 0)
        grad_query = part_of(self.grad_query, chunk.tokens)
        part.add_from_head(self.cond[chunk.tokens], 0, self.grad_cond[chunk.tokens], grad_query, states, h)

    def _write_weights(self, sums: torch.Tensor, spectra: list[torch.Tensor]) -> None:
        if self.backward.needs_weights:
            for gradient, total in zip(self.grad_weights, self.backward.weight_sums(), strict=True):
                if gradient is not None:
                    gradient.copy_(total)
        if self.grad_frequency is not None:
            self.grad_frequency.copy_(grad_frequency_weight(torch.stack(spectra).sum(0), self.coefficients))
        if self.grad_sample is not None:
            self.grad_sample.copy_(grad_sample_weight(sums, self.coefficients))


def forward(inputs: PixelDecoderLoss, patch_size: int, frequency_scale: float, head_norm: str, eps: float) -> Losses:
    """(total, pixel, frequency), float32 scalars."""
    if patch_size < BLOCK:
        return _composition.forward(inputs, patch_size, frequency_scale, head_norm, eps)
    with device_guard(inputs.cond):
        if inputs.image.numel() == 0:
            return no_losses(inputs.image)
        call = _Pass(inputs, patch_size, frequency_scale, head_norm, eps)
        return call.losses(pack(inputs.weights.blocks, inputs.cond.dtype))


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
    with device_guard(inputs.cond):
        grads = empty_one_pass_gradients(inputs, needs)
        scale = gradient_scale(inputs.cond.dtype, inputs.image.numel())
        if inputs.image.numel() == 0:
            return no_losses(inputs.image), unscaled(zeroed(grads), scale)
        losses = _PassWithGradients(inputs, patch_size, frequency_scale, head_norm, eps, scale, grads).run()
        return losses, unscaled(grads, scale)
