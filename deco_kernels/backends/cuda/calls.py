"""Helpers of calls to the native CUDA module: device, stream, workspace, and row layouts that the kernels can read."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch

from deco_kernels import native
from deco_kernels.backends import arguments

_ROW_ALIGNMENT = 16  # bytes of one memory access to a row of channels


def module_for(tensor: torch.Tensor) -> ModuleType:
    """The native module that runs kernels on the device of `tensor`."""
    return native.cuda(tensor.device)


def launch(
    function: Callable[..., None], workspace_bytes: int, like: torch.Tensor, *description: int | float | tuple[int, ...]
) -> None:
    """Call a native function on the device and current stream of `like`, with a workspace of `workspace_bytes`."""
    workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=like.device)
    stream = torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else 0
    function((like.device.index or 0, stream, workspace.data_ptr(), workspace_bytes), *description)


def readable_query(query: torch.Tensor | None) -> torch.Tensor | None:
    """`readable_pixel_rows` of a query, if there is one."""
    return None if query is None else readable_pixel_rows(query)


def readable_pixel_rows(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` [..., P, D], copied unless the kernels can read its rows in place."""
    rows = arguments.readable_pixel_rows(tensor)
    return aligned(rows, (arguments.collapsed_stride(rows, 2), rows.stride(-2)))


def readable_image(image: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`image`, in float32 unless it has this dtype: the kernels read both."""
    return image if image.dtype is dtype else image.float()


def readable_image_rows(image: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`readable_image`, copied unless its rows are contiguous and start at multiples of 16 bytes."""
    image = readable_image(image, dtype)
    if image.stride(-1) != 1:
        return image.contiguous()
    return aligned(image, image.stride()[:-1])


def readable_rows(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` [..., D], copied unless the kernels can read its rows in place."""
    rows = arguments.readable_rows(tensor)
    return aligned(rows, (arguments.collapsed_stride(rows, 1),))


def aligned(tensor: torch.Tensor, strides: tuple[int | None, ...] = ()) -> torch.Tensor:
    """`tensor`, copied unless all its rows, which are `strides` apart, start at a multiple of 16 bytes."""
    size = tensor.element_size()
    offsets = (tensor.data_ptr(), *((stride or 0) * size for stride in strides))
    if all(offset % _ROW_ALIGNMENT == 0 for offset in offsets):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
