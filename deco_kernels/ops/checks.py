"""Argument checks shared by the public ops: made once, before anything is launched.

TypeError: what is not a tensor, dtypes, layouts, mixed devices. ValueError: shapes and values. Every message names the
argument, what was expected, what came and what to do.
"""

import math
from collections.abc import Sequence

import torch

_STORAGE = frozenset((torch.float32, torch.bfloat16, torch.float16))
_DOUBLE = frozenset((torch.float64,))
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
_STRIDED = torch.strided


def check_tensors(op: str, names: Sequence[str], tensors: Sequence[torch.Tensor]) -> None:
    """All are strided floating-point tensors on one device, and either none or all of them are float64."""
    first = tensors[0]
    if not isinstance(first, torch.Tensor):
        _refuse_tensor(op, names[0], first, names[0], first)
    dtypes = _DOUBLE if first.dtype is torch.float64 else _STORAGE
    device = first.device
    for tensor in tensors:
        if (
            type(tensor) not in _PLAIN
            or tensor.dtype not in dtypes
            or tensor.device != device
            or tensor.layout is not _STRIDED
        ):
            break
    else:
        return
    for name, tensor in zip(names, tensors, strict=True):
        _refuse_tensor(op, name, tensor, names[0], first)


def _refuse_tensor(op: str, name: str, tensor: torch.Tensor, first_name: str, first: torch.Tensor) -> None:
    """Raises for what is wrong with the tensor; a well-behaved subclass of torch.Tensor passes."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{op}: {name}: expected a torch.Tensor, got {type(tensor).__name__}; pass a tensor")
    if tensor.dtype not in _STORAGE and tensor.dtype not in _DOUBLE:
        raise TypeError(
            f"{op}: {name}: expected dtype float32, bfloat16, float16 or float64, got {tensor.dtype}; "
            "convert it with .to(torch.float32)"
        )
    if tensor.device != first.device:
        raise TypeError(
            f"{op}: {name}: expected device {first.device} like {first_name}, got {tensor.device}; "
            "move all arguments to one device"
        )
    if (tensor.dtype is torch.float64) != (first.dtype is torch.float64):
        raise TypeError(
            f"{op}: {name}: expected {'float64' if first.dtype is torch.float64 else 'no float64'} like {first_name} "
            f"({first.dtype}), got {tensor.dtype}; float64 is computed only when every tensor is float64"
        )
    if tensor.layout is not torch.strided:
        raise TypeError(f"{op}: {name}: expected a strided tensor, got {tensor.layout}; call .to_dense()")
    if _is_dtensor(tensor):
        raise TypeError(
            f"{op}: {name}: expected a torch.Tensor, got a DTensor; wrap the whole PixelDecoder as one FSDP unit, "
            "so that the op sees the gathered parameters"
        )


def _is_dtensor(tensor: torch.Tensor) -> bool:
    return any(base.__name__ == "DTensor" for base in type(tensor).__mro__)


def check_same_dtype(op: str, name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    if tensor.dtype != other.dtype:
        raise TypeError(
            f"{op}: {name}: expected dtype {other.dtype} like {other_name}, got {tensor.dtype}; "
            f"convert one of them with .to({other.dtype})"
        )


def check_shape(op: str, name: str, tensor: torch.Tensor, shape: tuple[int, ...], symbols: str) -> None:
    """`symbols` names the expected sizes, "[N, 3D, D]"."""
    if tensor.shape != shape:
        _refuse_shape(op, name, tensor, shape, symbols)


def check_shapes(
    op: str,
    names: Sequence[str],
    tensors: Sequence[torch.Tensor],
    shapes: Sequence[tuple[int, ...]],
    symbols: Sequence[str],
) -> None:
    """`check_shape` for several tensors."""
    if [tensor.shape for tensor in tensors] == shapes:
        return
    for name, tensor, shape, symbol in zip(names, tensors, shapes, symbols, strict=True):
        check_shape(op, name, tensor, shape, symbol)


def _refuse_shape(op: str, name: str, tensor: torch.Tensor, shape: tuple[int, ...], symbols: str) -> None:
    raise ValueError(
        f"{op}: {name}: expected shape {symbols} = {list(shape)}, got {list(tensor.shape)}; "
        "check the sizes of this argument against the others"
    )


def check_rank(op: str, name: str, tensor: torch.Tensor, rank: int, symbols: str, *, at_least: bool = False) -> None:
    if tensor.dim() < rank or (tensor.dim() > rank and not at_least):
        raise ValueError(
            f"{op}: {name}: expected {'at least ' if at_least else ''}{rank} dimensions {symbols}, got {tensor.dim()} "
            f"(shape {list(tensor.shape)}); reshape it"
        )


def check_nonempty(op: str, name: str, tensor: torch.Tensor, symbols: str) -> None:
    if 0 in tensor.shape:
        raise ValueError(
            f"{op}: {name}: expected every size of {symbols} to be at least 1, got {list(tensor.shape)}; "
            "only the batch may be empty"
        )


def check_patch_size(op: str, patch_size: int, height: int, width: int) -> None:
    if not isinstance(patch_size, int) or isinstance(patch_size, bool):
        raise TypeError(
            f"{op}: patch_size: expected an int, got {type(patch_size).__name__}; pass the patch side in pixels"
        )
    if patch_size < 1:
        raise ValueError(f"{op}: patch_size: expected at least 1, got {patch_size}; pass the patch side in pixels")
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"{op}: image: expected height and width divisible by patch_size {patch_size}, got {height} x {width}; "
            "crop or pad the image"
        )


def check_eps(op: str, eps: float) -> float:
    value = check_number(op, "eps", eps)
    if value < 0:
        raise ValueError(f"{op}: eps: expected a number of at least 0, got {value}; the published models use 1e-6")
    return value


def check_number(op: str, name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name}: expected a Python float, got {type(value).__name__}; pass float(value)")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{op}: {name}: expected a finite number, got {value}; pass a finite number")
    return float(value)


def check_token_count(op: str, name: str, leading: Sequence[int], expected: int) -> None:
    count = math.prod(leading)
    if count != expected:
        raise ValueError(
            f"{op}: {name}: expected leading sizes that multiply to the number of patches B*(H/p)*(W/p) = {expected}, "
            f"got {list(leading)} = {count}; check patch_size and the image's size"
        )


def autocast_activation(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Under autocast, float32 activations are cast to the autocast dtype, as a linear layer would."""
    device_type = tensors[0].device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):  # autocast does not know "meta"
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(tensor.to(dtype) if tensor.dtype is torch.float32 else tensor for tensor in tensors)
