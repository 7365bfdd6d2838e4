"""Descriptions of tensors for the native modules: addresses, dtype codes and strides as plain integers.

A description holds no reference: the tensor must outlive the call.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from deco_kernels.signatures import ACTIVATION, OPS, Argument, DecoderWeights, Group, flat, grouped, mapped

Gradients = tuple[torch.Tensor | None, ...]
"""Gradients of every tensor argument in order; None if not needed."""

Losses = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""(total, pixel, frequency), float32 or float64 scalars."""

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
    """Uninitialized contiguous tensors for the gradients of the inputs; None where `needs` is False."""
    return tuple([_empty_like(tensor) if need else None for tensor, need in zip(flat(inputs), needs, strict=True)])


def _empty_like(tensor: torch.Tensor) -> torch.Tensor:
    """Uninitialized contiguous tensor; passing the memory format is slow, so contiguous tensors omit it."""
    if tensor.is_contiguous():
        return torch.empty_like(tensor)
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def kept_dtype(argument: Argument, tensor: torch.Tensor) -> torch.dtype:
    """Dtype in which a one-pass op keeps the gradient of a tensor between forward and backward.

    float32 or wider, so that the gradient is rounded once, after the incoming gradient is applied. A bfloat16
    activation, the largest tensor, keeps its dtype; float16 would underflow before a loss scale is applied.
    """
    if argument.rounding == ACTIVATION and tensor.dtype is torch.bfloat16:
        return tensor.dtype
    return torch.promote_types(tensor.dtype, torch.float32)


def empty_kept_gradients(op: str, inputs: Sequence[Any], needs: Sequence[bool]) -> Gradients:
    """`empty_gradients` in the dtypes in which they are kept."""
    return tuple(
        torch.empty(tensor.shape, dtype=kept_dtype(argument, tensor), device=tensor.device) if need else None
        for argument, tensor, need in zip(OPS[op].arguments, flat(inputs), needs, strict=True)
    )


def kept_like(op: str, inputs: Group) -> Group:
    """The tensors in the dtypes in which their gradients are kept."""
    pairs = zip(OPS[op].arguments, flat(inputs), strict=True)
    return grouped(type(inputs), (None if t is None else t.to(kept_dtype(argument, t)) for argument, t in pairs))


def add_gradients(totals: Gradients, gradients: Gradients) -> None:
    """Add the gradients of one chunk to the float32 `totals`, in one kernel on a GPU; None if not needed."""
    pairs = zip(totals, gradients, strict=True)
    found = [(total, gradient) for total, gradient in pairs if total is not None and gradient is not None]
    if found:
        torch._foreach_add_(*map(list, zip(*found, strict=True)))


def zeroed(gradients: Gradients) -> Gradients:
    """Gradients of an empty batch: fill them with zeros in place."""
    return tuple(None if gradient is None else gradient.zero_() for gradient in gradients)


class WeightGradients:
    """Gradients of weights, summed over chunks in float32."""

    def __init__(self, weights: Sequence[Any], needs: Sequence[bool]):
        """`needs`: which gradients are needed."""
        self.weights, self.needs = flat(weights), needs
        self.totals: Gradients | None = None

    def new_part(self) -> Gradients:
        """Uninitialized tensors for the gradients of one chunk; None if not needed."""
        pairs = zip(self.weights, self.needs, strict=True)
        return tuple([w.new_empty(w.shape, dtype=torch.float32) if need else None for w, need in pairs])

    def add(self, part: Gradients) -> None:
        """Add the gradients of a chunk; those of the first become the totals."""
        if self.totals is None:
            self.totals = part
        else:
            add_gradients(self.totals, part)

    def results(self) -> Gradients:
        """Each in the dtype of its weight; None if not needed, zeros if there are no chunks."""
        totals = zeroed(self.new_part()) if self.totals is None else self.totals
        pairs = zip(totals, self.weights, strict=True)
        return tuple([None if total is None else total.to(weight.dtype) for total, weight in pairs])


def image(tensor: torch.Tensor | None) -> tuple[int, ...]:
    """(address, dtype, strides of B, C, H, W in elements) of [B, C, H, W] with any strides."""
    if tensor is None:
        return (0, 0, 0, 0, 0, 0)
    return (tensor.data_ptr(), _DTYPE_CODES[tensor.dtype], *tensor.stride())


def pixel_rows(tensor: torch.Tensor | None) -> tuple[int, ...]:
    """(address, dtype, token stride, pixel stride in elements) of [..., P, D] from `readable_pixel_rows`."""
    if tensor is None:
        return (0, 0, 0, 0)
    if tensor.is_contiguous():
        pixels, width = tensor.shape[-2:]
        return (*array(tensor), pixels * width, width)
    return (*array(tensor), collapsed_stride(tensor, 2) or 0, tensor.stride(-2))


def readable_pixel_rows(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` [..., P, D], copied unless it has unit channel stride and a single token stride."""
    if tensor.is_contiguous():
        return tensor
    if tensor.stride(-1) == 1 and collapsed_stride(tensor, 2) is not None:
        return tensor
    return tensor.contiguous()


def rows(tensor: torch.Tensor | None) -> tuple[int, ...]:
    """(address, dtype, row stride in elements) of [..., D] from `readable_rows`."""
    return (0, 0, 0) if tensor is None else (*array(tensor), collapsed_stride(tensor, 1) or 0)


HEAD_NORMS = ("layer", "rms")
"""By number in the native modules."""


def readable_query(query: torch.Tensor | None) -> torch.Tensor | None:
    """`readable_pixel_rows` of a query, if there is one."""
    return None if query is None else readable_pixel_rows(query)


def readable_rows(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` [..., D], copied unless it has unit channel stride and a single row stride."""
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
    """Stride of all dimensions except the last `trailing`, collapsed into one; None if they cannot be collapsed."""
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
