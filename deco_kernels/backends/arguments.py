"""Describes tensors to the native modules: addresses, dtype codes and strides as plain integers.

A description holds no reference, so the tensor must outlive the call it is made for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def array(tensor: torch.Tensor | None) -> tuple[int, int]:
    """(address, dtype) of a contiguous tensor; address 0 for None."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), _DTYPE_CODES[tensor.dtype])


def arrays(tensors: Iterable[torch.Tensor | None]) -> tuple[int, ...]:
    """(address, dtype, address, dtype, ...) of contiguous tensors."""
    codes = _DTYPE_CODES
    flat = []
    for tensor in tensors:
        if tensor is None:
            flat += (0, 0)
        else:
            flat += (tensor.data_ptr(), codes[tensor.dtype])
    return tuple(flat)


def contiguous(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor if tensor.is_contiguous() else tensor.contiguous() for tensor in tensors]


def empty_gradients(tensors: Sequence[torch.Tensor], needs: Sequence[bool]) -> tuple[torch.Tensor | None, ...]:
    """A contiguous tensor like each of `tensors` to write its gradient to, or None where `needs` is False."""
    return tuple([_empty_like(tensor) if need else None for tensor, need in zip(tensors, needs, strict=True)])


def _empty_like(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous one; asking for the format takes time, which a tensor that is contiguous already can save."""
    if tensor.is_contiguous():
        return torch.empty_like(tensor)
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def add_gradients(totals: Sequence[torch.Tensor | None], gradients: Sequence[torch.Tensor | None]) -> None:
    """Adds the gradients of a part of the work to the float32 `totals`; None where one is not wanted."""
    for total, gradient in zip(totals, gradients, strict=True):
        if total is not None:
            total += gradient


def cast_gradients(totals: Sequence[torch.Tensor | None], tensors: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """Each of `totals` in the dtype of the tensor it belongs to."""
    return [None if total is None else total.to(tensor.dtype) for total, tensor in zip(totals, tensors, strict=True)]


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
    return (*array(tensor), collapsed_stride(tensor, 2), tensor.stride(-2))


def readable_pixel_rows(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` [..., P, D] itself if its channels are adjacent and one stride leads from token to token, or a copy."""
    if tensor.is_contiguous():
        return tensor
    if tensor.stride(-1) == 1 and collapsed_stride(tensor, 2) is not None:
        return tensor
    return tensor.contiguous()


def rows(tensor: torch.Tensor | None) -> tuple[int, ...]:
    """(address, dtype, stride of a row) of [..., D] as `readable_rows` returns it."""
    return (0, 0, 0) if tensor is None else (*array(tensor), collapsed_stride(tensor, 1))


def readable_rows(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` [..., D] itself if its channels are adjacent and one stride leads from row to row, or a copy."""
    if tensor.is_contiguous() or (tensor.stride(-1) == 1 and collapsed_stride(tensor, 1) is not None):
        return tensor
    return tensor.contiguous()


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
