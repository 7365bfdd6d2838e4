"""Upsample by PyTorch's matmul in chunks of tokens, so that cond and its gradient need not be stored as a whole."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch

from deco_kernels.backends import chunk_sizes
from deco_kernels.backends.arguments import readable_rows
from deco_kernels.backends.chunks import ImageChunk, image_chunks
from deco_kernels.signatures import UpsampleWeights

MIN_TOKENS = 1024
MIN_VALUES = 1 << 23
STEP = 4096  # rows of up_weight


def chunk_tokens(up: UpsampleWeights) -> int:
    """Tokens per chunk: 1,024, or more while its cond has at most 2^23 values."""
    return max(MIN_TOKENS, MIN_VALUES // up.up_weight.shape[0])


def forward_chunk_pixels(tokens: torch.Tensor, up: UpsampleWeights, pixels: int) -> int:
    """Pixels per chunk of a forward on a GPU, whose matmul hands on conditions; `pixels` per token."""
    return chunk_sizes.chunk_pixels(up.up_weight.shape[0] // pixels * tokens.element_size())


def upsample_chunks(shape: torch.Size, patch_size: int, tokens: int, lines: int | None = None) -> Iterator[ImageChunk]:
    """Chunks of about `tokens` tokens of a batch [B, C, H, W].

    A chunk is whole images, or a multiple of `lines` rows of pixels of one image (by default `patch_size`; a multiple
    of it).
    """
    _, _, height, width = shape
    per_row = max(1, width // patch_size)
    per_image = max(1, height // patch_size * per_row)
    if per_image <= tokens:
        return image_chunks(shape, patch_size, -(-tokens // per_image), max(1, height))
    lines = patch_size if lines is None else lines
    return image_chunks(shape, patch_size, 1, -(-tokens * patch_size // (per_row * lines)) * lines)


class UpsampleGradients:
    """Gradients of tokens [T, Z], up_weight [P*D, Z] and up_bias [P*D], accumulated over chunks of tokens in order.

    Matmuls run in PyTorch in the dtype of tokens (float16 on the CPU in float32). Sums over chunks are float32.
    Transposed matrices are copied, because libraries choose other matmuls for them, with other bits.
    """

    def __init__(self, tokens: torch.Tensor, up: UpsampleWeights, needs: Sequence[bool]):
        """`needs`: which of the three gradients are needed."""
        up_weight, up_bias = up
        self.up, self.inputs = up, (tokens, up_weight, up_bias)
        self.dtype = tokens.dtype if tokens.is_cuda or tokens.dtype is torch.bfloat16 else torch.float32
        self.rows = readable_rows(tokens.reshape(-1, tokens.shape[-1]))
        self.grad_tokens = torch.empty_like(self.rows, memory_format=torch.contiguous_format) if needs[0] else None
        self.needs = needs
        self.grad_weight: torch.Tensor | None = None
        self.grad_bias: torch.Tensor | None = None
        self.wanted = any(needs)

    @functools.cached_property
    def weight(self) -> torch.Tensor:
        """up_weight [P*D, Z] rounded to the dtype of tokens, in the compute dtype."""
        tokens, up_weight, _ = self.inputs
        return readable_rows(up_weight.to(tokens.dtype).to(self.dtype))

    @functools.cached_property
    def bias(self) -> torch.Tensor:
        """up_bias [P*D], rounded and in the compute dtype as `weight`, so that the matmul can add it."""
        tokens, _, up_bias = self.inputs
        return up_bias.to(tokens.dtype).to(self.dtype)

    def cond(self, part: slice, kept: torch.Tensor | None = None) -> torch.Tensor:
        """Conditions [tokens, P*D] of a part of the tokens, in the dtype of tokens.

        `kept` [T, P*D], of the dtype of tokens: memory for the conditions of all tokens; the result is a part of it.
        """
        tokens, rows = self.inputs[0], self.rows[part].to(self.dtype)
        result = None if kept is None else kept[part]
        if self.dtype is tokens.dtype:
            return torch.addmm(self.bias, rows, self.weight.T, out=result)
        found = torch.addmm(self.bias, rows, self.weight.T)
        return found.to(tokens.dtype) if result is None else result.copy_(found)

    def new_grad_cond(self, tokens: int, pixels: int) -> torch.Tensor | None:
        """Uninitialized [tokens, P, D] for the gradient of a chunk's cond; None if no gradient needs it."""
        width = self.inputs[1].shape[0] // pixels
        return self.rows.new_empty(tokens, pixels, width, dtype=self.dtype) if self.wanted else None

    def add(self, first: int, grad_cond: torch.Tensor | None) -> None:
        """Accumulate the gradients from that of the cond of tokens `first` onward, [tokens, P, D]."""
        if grad_cond is None:
            return
        grad = grad_cond.flatten(1).to(self.dtype)
        last = first + grad.shape[0]
        if self.grad_tokens is not None:
            self.grad_tokens[first:last] = grad @ self.weight
        if self.needs[1]:
            rows = self.rows[first:last].to(self.dtype)
            self.grad_weight = added_product(self.grad_weight, grad, rows, self.inputs[1].dtype)
        if self.needs[2]:
            self.grad_bias = added(self.grad_bias, grad.sum(0, dtype=torch.float32))

    def results(self) -> tuple[torch.Tensor | None, ...]:
        """(grad_tokens, grad_up_weight, grad_up_bias), each like its tensor, or None if not needed."""
        totals = (self.grad_tokens, self.grad_weight, self.grad_bias)
        return tuple(
            finished(total, tensor) if need else None
            for total, tensor, need in zip(totals, self.inputs, self.needs, strict=True)
        )


def added_product(
    total: torch.Tensor | None, grad: torch.Tensor, rows: torch.Tensor, wanted: torch.dtype
) -> torch.Tensor:
    """total + grad.T @ rows in float32; a single chunk keeps the dtype of the matmul if it is `wanted`.

    A 16-bit product is computed in parts of STEP rows, because it is converted or added out of place.
    """
    if grad.dtype is torch.float32:
        return grad.T @ rows if total is None else total.addmm_(grad.T, rows)
    if total is None and grad.dtype is wanted:
        return grad.T @ rows
    shape = (grad.shape[1], rows.shape[1])
    result = grad.new_empty(shape, dtype=torch.float32) if total is None else total.float()
    for part, columns in zip(result.split(STEP), grad.split(STEP, dim=1), strict=True):
        product = columns.T @ rows
        part.copy_(product) if total is None else part.add_(product)
    return result


def added(total: torch.Tensor | None, part: torch.Tensor) -> torch.Tensor:
    """total + part in float32; a single chunk keeps the dtype of the matmul."""
    if total is None:
        return part
    return total.add_(part) if total.dtype is torch.float32 else total.float().add_(part)


def finished(total: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """`total` with the dtype and shape of the argument `like`; zeros if there are no tokens."""
    if total is None:
        return torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    return total.to(like.dtype).view(like.shape)
