"""pixel_decoder_loss_from_tokens in chunks of tokens: upsample matmul, a backend's pixel_decoder_loss, and the matmuls
of the upsample's gradients. Neither cond nor the velocity, nor a gradient of them, exists as a whole."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from types import ModuleType

import torch

from deco_kernels.backends import arguments
from deco_kernels.backends.arguments import Gradients, Losses
from deco_kernels.backends.chunks import ImageChunk
from deco_kernels.backends.query import ChunkedQuery
from deco_kernels.backends.upsample import UpsampleGradients, upsample_chunks
from deco_kernels.signatures import BLOCK, PixelDecoderLoss, PixelDecoderLossFromTokens, mapped

OP = "pixel_decoder_loss_from_tokens"


class LossFromTokens:
    """The op from a backend's module of pixel_decoder_loss.

    The losses are sums over the images and, apart from reflected borders, over their blocks. So the losses of a chunk
    of whole blocks are its part of the whole, if sample_weight is multiplied by the chunk's share of the pixels.
    """

    def __init__(self, loss: ModuleType, chunk_pixels: int, upsample: type[UpsampleGradients] = UpsampleGradients):
        """`chunk_pixels`: pixels per chunk, about. `upsample`: that of the backend."""
        self.loss, self.chunk_pixels, self.upsample = loss, chunk_pixels, upsample

    def forward(
        self, inputs: PixelDecoderLossFromTokens, patch_size: int, frequency_scale: float, head_norm: str, eps: float
    ) -> Losses:
        """(total, pixel, frequency)."""
        upsample, query = self._upsample(inputs, needs=(False,) * 3), self._query(inputs, needs=(False,) * 4)
        parts = [
            self.loss.forward(_part(inputs, upsample, query, chunk), patch_size, frequency_scale, head_norm, eps)
            for chunk in self._chunks(inputs, patch_size)
        ]
        return _sums(parts, inputs.image)

    def forward_with_gradients(
        self,
        inputs: PixelDecoderLossFromTokens,
        patch_size: int,
        frequency_scale: float,
        head_norm: str,
        eps: float,
        needs: Sequence[bool],
    ) -> tuple[Losses, Gradients]:
        """The losses, and the gradients of total in the dtypes in which they are kept; None where `needs` is False."""
        needs_image, needs_tokens, needs_target, *needs_weights = needs[: -len(inputs.query)]
        upsample = self._upsample(inputs, (needs_tokens, *needs_weights[:2]))
        query = self._query(inputs, needs[-len(inputs.query) :])
        needs_part = [needs_image, upsample.wanted, needs_target, *needs_weights[2:], query.wanted]
        needs_here = [needs_image, False, needs_target, False, False, *needs_weights[2:], *[False] * len(inputs.query)]
        kept = arguments.empty_kept_gradients(OP, inputs, needs_here)[: -len(inputs.query)]
        grad_image, _, grad_target, _, _, *totals, grad_sample_weight = arguments.zeroed(kept)
        losses, options = [], (patch_size, frequency_scale, head_norm, eps)
        for chunk in self._chunks(inputs, patch_size):
            part = _part(inputs, upsample, query, chunk)
            found, grads = self.loss.forward_with_gradients(part, *options, needs_part)
            losses.append(found)
            grad_image_part, grad_cond, grad_target_part, *grads_of_weights, grad_sample_weight_part, grad_query = grads
            for gradient, gradient_part in ((grad_image, grad_image_part), (grad_target, grad_target_part)):
                if gradient is not None and gradient_part is not None:
                    chunk.of(gradient).copy_(gradient_part)
            upsample.add(chunk.tokens.start, grad_cond)
            query.add(chunk.tokens, grad_query)
            arguments.add_gradients(tuple(totals), tuple(grads_of_weights))
            if grad_sample_weight is not None:
                grad_sample_weight[chunk.images] += grad_sample_weight_part * _share(part.image, inputs.image)
            del part, grads, grad_cond, grad_query  # their memory serves the next chunk
        grad_tokens, *grads_up = upsample.results()
        gradients = (grad_image, grad_tokens, grad_target, *grads_up, *totals, grad_sample_weight, *query.results())
        return _sums(losses, inputs.image), gradients

    def _chunks(self, inputs: PixelDecoderLossFromTokens, patch_size: int) -> Iterator[ImageChunk]:
        count = max(1, self.chunk_pixels // len(inputs.weights.pixel_table))
        return upsample_chunks(inputs.image.shape, patch_size, count, lines=_line_step(inputs.image, patch_size))

    def _upsample(self, inputs: PixelDecoderLossFromTokens, needs: Sequence[bool]) -> UpsampleGradients:
        """The upsample, with weights and tokens in the dtypes in which their gradients are kept."""
        tokens, up = inputs.tokens, inputs.up
        if tokens.dtype is torch.float16:  # its gradients would underflow
            tokens, up = tokens.float(), up._replace(up_weight=up.up_weight.to(torch.float16))
        return self.upsample(tokens, mapped(torch.Tensor.float, up), needs)

    def _query(self, inputs: PixelDecoderLossFromTokens, needs: Sequence[bool]) -> ChunkedQuery:
        """The query, with its tensors in the dtypes in which their gradients are kept."""
        wide = arguments.kept_like(OP, inputs).query
        if inputs.tokens.dtype is torch.float16 and wide.query_weight is not None:
            wide = wide._replace(query_weight=wide.query_weight.to(torch.float16).float())
        return ChunkedQuery(wide, inputs.weights.pixel_table.shape, needs, self.upsample)


def _part(
    inputs: PixelDecoderLossFromTokens, upsample: UpsampleGradients, query: ChunkedQuery, chunk: ImageChunk
) -> PixelDecoderLoss:
    """The chunk's call of pixel_decoder_loss."""
    image, tokens, sample_weight = inputs.image, inputs.tokens, inputs.sample_weight
    image_part = chunk.of(image)
    cond = upsample.cond(chunk.tokens).to(tokens.dtype).view(-1, *inputs.weights.pixel_table.shape)
    share, part_weight = _share(image_part, image), None
    if sample_weight is not None:
        part_weight = sample_weight[chunk.images].float() * share
    elif share != 1:
        part_weight = image.new_full((len(image_part),), share, dtype=torch.float32)
    weights = (inputs.weights, inputs.frequency_weight, part_weight)
    part_query = query.of(chunk.tokens, tokens.dtype)
    return PixelDecoderLoss(image_part, cond, chunk.of(inputs.target), *weights, part_query)


def _line_step(image: torch.Tensor, patch_size: int) -> int:
    """Lines of an image that a chunk may hold a multiple of: whole patches and blocks, or all if borders reflect."""
    height, width = image.shape[2:]
    return math.lcm(patch_size, BLOCK) if height % BLOCK == 0 and width % BLOCK == 0 else height


def _share(part: torch.Tensor, whole: torch.Tensor) -> float:
    return part.numel() / whole.numel()


def _sums(parts: Sequence[Losses], image: torch.Tensor) -> Losses:
    """Sums over the chunks, in order; zeros for an empty batch."""
    total, pixel, frequency = losses = tuple(
        torch.zeros((), dtype=torch.float32, device=image.device) for _ in range(3)
    )
    for part in parts:
        torch._foreach_add_(losses, part)
    return total, pixel, frequency
