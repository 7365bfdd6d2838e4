"""Describes tensors to the native modules: addresses, dtype codes and strides as plain integers.

A description holds no reference, so the tensor must outlive the call it is made for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from deco_kernels.signatures import DecoderWeights, Group, flat, mapped

Gradients = tuple[torch.Tensor | None, ...]
"""Of every tensor argument in order; None where none was asked for."""

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def array(tensor: torch.Tensor | None) -> tuple[int, int]:
    """(address, dtype) of a contiguous tensor; address 0 for None."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), _DTYPE_CODES[tensor.dtype])


def addresses(tensors: Iterable[torch.Tensor | None]) -> tuple[int, ...]:
    """Addresses of contiguous tensors; 0 for None."""
    return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)


def arrays(tensors: Sequence[Any]) -> tuple[int, ...]:
    """(address, dtype, address, dtype, ...) of contiguous tensors or groups of them; None as in `array`."""
    codes = _DTYPE_CODES
    found: list[int] = []
    for tensor in flat(tensors):
        if tensor is None:
            found += (0, 0)
        else:
            found += (tensor.data_ptr(), codes[tensor.dtype])
    return tuple(found)


def contiguous(weights: Group) -> Group:
    return mapped(torch.Tensor.contiguous, weights)


def empty_gradients(inputs: Sequence[Any], needs: Sequence[bool]) -> Gradients:
    """A contiguous tensor like each of the inputs to write its gradient to, or None where `needs` is False."""
    return tuple([_empty_like(tensor) if need else None for tensor, need in zip(flat(inputs), needs, strict=True)])


def _empty_like(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous one; asking for the format takes time, which a tensor that is contiguous already can save."""
    if tensor.is_contiguous():
        return torch.empty_like(tensor)
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def add_gradients(totals: Gradients, gradients: Gradients) -> None:
    """Adds the gradients of a part of the work to the float32 `totals`; None where one is not wanted."""
    for total, gradient in zip(totals, gradients, strict=True):
        if total is not None and gradient is not None:
            total += gradient


def zeroed(gradients: Gradients) -> Gradients:
    """For an empty batch."""
    return tuple(None if gradient is None else gradient.zero_() for gradient in gradients)


def zero_totals(weights: Sequence[Any], needs: Sequence[bool]) -> Gradients:
    """Zeros in float32 like each of the weights to add gradients of chunks to, or None where `needs` is False."""
    return tuple(
        torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if need else None
        for weight, need in zip(flat(weights), needs, strict=True)
    )


def empty_parts(totals: Gradients) -> Gradients:
    """Memory for the gradients of one chunk."""
    return tuple(None if total is None else torch.empty_like(total) for total in totals)


def cast_gradients(totals: Gradients, weights: Sequence[Any]) -> Gradients:
    """Each of `totals` in the dtype of the weight it belongs to."""
    pairs = zip(totals, flat(weights), strict=True)
    return tuple(None if total is None else total.to(weight.dtype) for total, weight in pairs)


def image(tensor: torch.Tensor | None) -> tuple[int, ...]:
    """(address, dtype, strides of B, C, H, W) of [B, C, H, W] with any strides."""
    if tensor is None:
        return (0, 0, 0, 0, 0, 0)
    return (tensor.data_ptr(), _DTYPE_CODES[tensor.dtype], *tensor.stride())


def pixel_rows(tensor: torch.Tensor | None) -> tuple[int, ...]:
    """(address, dtype, stride of a token, stride of a pixel) of [..., P, D] as `readable_pixel_rows` returns it."""
    if tensor is None:
        return (0, 0, 0, 0)
    if tensor.is_contiguous():
        pixels, width = tensor.shape[-2:]
        return (*array(tensor), pixels * width, width)
    return (*array(tensor), collapsed_stride(tensor, 2) or 0, tensor.stride(-2))


def readable_pixel_rows(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` [..., P, D] itself if its channels are adjacent and one stride leads from token to token, or a copy."""
    if tensor.is_contiguous():
        return tensor
    if tensor.stride(-1) == 1 and collapsed_stride(tensor, 2) is not None:
        return tensor
    return tensor.contiguous()


def rows(tensor: torch.Tensor | None) -> tuple[int, ...]:
    """(address, dtype, stride of a row) of [..., D] as `readable_rows` returns it."""
    return (0, 0, 0) if tensor is None else (*array(tensor), collapsed_stride(tensor, 1) or 0)


def readable_rows(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` [..., D] itself if its channels are adjacent and one stride leads from row to row, or a copy."""
    if tensor.is_contiguous() or (tensor.stride(-1) == 1 and collapsed_stride(tensor, 1) is not None):
        return tensor
    return tensor.contiguous()


def decoder_sizes(image: torch.Tensor, weights: DecoderWeights, patch_size: int) -> tuple[int, ...]:
    """(B, C, H, W, patch_size, D, N)"""
    depth, width = weights.blocks.modulation.norm_weight.shape
    return (*image.shape, patch_size, width, depth)


def row_sizes(h: torch.Tensor) -> tuple[int, int]:
    """(rows, D) of [..., D]"""
    width = h.shape[-1]
    return h.numel() // width, width


def upsample_sizes(tokens: torch.Tensor, pixels: int, width: int) -> tuple[int, int, int, int]:
    """(T, Z, P, D)"""
    token_width = tokens.shape[-1]
    return (tokens.numel() // token_width, token_width, pixels, width)


def collapsed_stride(tensor: torch.Tensor, trailing: int) -> int | None:
    """The one stride that walks over all dimensions but the last `trailing`, in order, or None if there is none."""
    if tensor.numel() == 0:
        return 0
    stride, expected = 0, None
    for dim in range(tensor.dim() - trailing - 1, -1, -1):
        size = tensor.shape[dim]
        if size == 1:
            continue
        if expected is None:
            stride = tensor.stride(dim)
        elif tensor.stride(dim) != expected:
            return None
        expected = tensor.stride(dim) * size
    return stride
