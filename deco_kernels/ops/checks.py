"""Argument checks of the public ops, performed before any kernel is launched.

TypeError: arguments that are not tensors, dtypes, layouts, mixed devices. ValueError: shapes and values. Every message
has the argument, the expected and the given value, and the remedy. `deco_kernels.signatures` defines names and shapes.
"""

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch

from deco_kernels.backends.arguments import HEAD_NORMS
from deco_kernels.signatures import OPS, Argument

Sizes = dict[str, Any]
"""Size of each symbol; "..." maps to the leading sizes."""

Tensors = Sequence[Any]
"""Tensor arguments of an op in order; None for an optional one that is not given, as are those left out at the end."""

_STORAGE = frozenset((torch.float32, torch.bfloat16, torch.float16))
_DOUBLE = frozenset((torch.float64,))
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
_STRIDED = torch.strided
_MIN_SIDE = 5  # sides of 1 to 4 pixels cannot be reflected to 8


def check_tensors(op: str, tensors: Tensors) -> None:
    """Check that an op's tensors are strided, floating-point, on one device, and either all or none float64."""
    first, names = tensors[0], OPS[op].names
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
    for argument, tensor in zip(OPS[op].arguments[: len(tensors)], tensors, strict=True):
        if tensor is not None or not argument.optional:
            _refuse_tensor(op, argument.name, tensor, names[0], first)


def _refuse_tensor(op: str, name: str, tensor: torch.Tensor, first_name: str, first: torch.Tensor) -> None:
    """Raise TypeError for an invalid tensor; valid subclasses of torch.Tensor pass."""
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
    own = type(tensor) in (torch.Tensor, torch.nn.Parameter)  # torch.compile does not trace every loop over __mro__
    return not own and any(base.__name__ == "DTensor" for base in type(tensor).__mro__)


def check_same_dtype(op: str, name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    if tensor.dtype != other.dtype:
        raise TypeError(
            f"{op}: {name}: expected dtype {other.dtype} like {other_name}, got {tensor.dtype}; "
            f"convert one of them with .to({other.dtype})"
        )


def check_shapes(op: str, tensors: Tensors, sizes: Sizes | None = None) -> Sizes:
    """Check an op's tensors against each other and the given sizes. Returns the size of every symbol."""
    described = OPS[op]
    sizes = dict(sizes or {})
    for index in described.sized_by:
        if index < len(tensors) and tensors[index] is not None:
            _take_sizes(op, described.arguments[index], tensors[index], sizes)
    for text, factor, symbols in described.computed:
        size = factor
        for symbol in symbols:
            size = size * sizes[symbol]
        sizes[text] = size
    for argument, tensor in zip(described.arguments[: len(tensors)], tensors, strict=True):
        if tensor is None:
            continue
        expected = [sizes[symbol] for symbol in argument.sizes]
        if argument.leading:
            expected = [*sizes["..."], *expected]
        if list(tensor.shape) != expected:
            raise ValueError(
                f"{op}: {argument.name}: expected shape {argument.shape} = {expected}, got {list(tensor.shape)}; "
                "check the sizes of this argument against the others"
            )
        if not argument.may_be_empty and 0 in expected:
            raise ValueError(
                f"{op}: {argument.name}: expected every size of {argument.shape} to be at least 1, got {expected}; "
                "only the batch may be empty"
            )
    return sizes


def _take_sizes(op: str, argument: Argument, tensor: torch.Tensor, sizes: Sizes) -> None:
    """Add the sizes of a tensor's symbols that are not yet known."""
    check_rank(op, argument, tensor)
    rank = len(argument.sizes)
    if argument.leading:
        sizes.setdefault("...", tensor.shape[:-rank])
    for symbol, size in zip(argument.sizes, tensor.shape[-rank:], strict=True):
        sizes.setdefault(symbol, size)


def check_rank(op: str, argument: Argument, tensor: torch.Tensor) -> None:
    rank = len(argument.sizes)
    if tensor.dim() < rank or (tensor.dim() > rank and not argument.leading):
        raise ValueError(
            f"{op}: {argument.name}: expected {'at least ' * argument.leading}{rank} dimensions {argument.shape}, "
            f"got {tensor.dim()} (shape {list(tensor.shape)}); reshape it"
        )


def check_patch_size(op: str, image: torch.Tensor, patch_size: int) -> int:
    """Check that patch_size is an integer that divides H and W of the image [B, C, H, W]; returns it as an int."""
    check_rank(op, OPS[op].arguments[0], image)
    remedy = "pass the patch side in pixels"
    try:
        size = operator.index(patch_size)
    except TypeError:
        size = None
    if size is None or isinstance(patch_size, (bool, torch.Tensor)):
        raise TypeError(f"{op}: patch_size: expected an int, got {type(patch_size).__name__}; {remedy}")
    if size < 1:
        raise ValueError(f"{op}: patch_size: expected at least 1, got {size}; {remedy}")
    height, width = image.shape[2:]
    if height % size or width % size:
        raise ValueError(
            f"{op}: image: expected height and width divisible by patch_size {size}, got {height} x {width}; "
            "crop or pad the image"
        )
    return size


def check_decoder(op: str, tensors: Tensors, patch_size: int) -> int:
    """Check the tensors and the patch size of a decoder; returns the patch size as an int."""
    check_tensors(op, tensors)
    patch_size = check_patch_size(op, tensors[0], patch_size)
    sizes = check_shapes(op, tensors, {"P": patch_size**2})
    expected = sizes["B"] * (sizes["H"] // patch_size) * (sizes["W"] // patch_size)
    count = math.prod(sizes["..."])
    if count != expected:
        raise ValueError(
            f"{op}: {OPS[op].names[1]}: expected leading sizes that multiply to the number of patches "
            f"B*(H/p)*(W/p) = {expected}, got {list(sizes['...'])} = {count}; check patch_size and the image's size"
        )
    return patch_size


def given_query(*tensors: Any) -> Tensors:
    """The arguments of a query, or () if all are None."""
    return tensors if any(tensor is not None for tensor in tensors) else ()


def check_head_norm(op: str, head_norm: str) -> str:
    if head_norm not in HEAD_NORMS:
        raise ValueError(
            f"{op}: head_norm: expected one of {list(HEAD_NORMS)}, got {head_norm!r}; published DeCo models use 'layer'"
        )
    return head_norm


def check_loss_images(op: str, name: str, image: torch.Tensor) -> None:
    """Check that images [B, C, H, W] have three channels and can be padded to multiples of 8 by reflection."""
    _, channels, height, width = image.shape
    if channels != 3:
        raise ValueError(
            f"{op}: {name}: expected 3 channels, got {channels}; the frequency loss is defined for RGB images"
        )
    for side, size in (("height", height), ("width", width)):
        if size < _MIN_SIDE:
            raise ValueError(
                f"{op}: {name}: expected a {side} of at least {_MIN_SIDE} pixels, got {size}; "
                "a smaller image cannot be padded to a block of 8 by reflection: enlarge it"
            )


def check_eps(op: str, eps: float) -> float:
    value = check_number(op, "eps", eps)
    if value < 0:
        raise ValueError(f"{op}: eps: expected a number of at least 0, got {value}; the published models use 1e-6")
    return value


def check_flag(op: str, name: str, value: bool) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name}: expected True or False, got {value!r}; pass one of them")
    return value


def check_number(op: str, name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name}: expected a Python float, got {type(value).__name__}; pass float(value)")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(
            f"{op}: {name}: expected a number below 1.8e308, got a larger integer; "
            "pass a finite number that a float can hold"
        ) from None
    if not -math.inf < number < math.inf:
        raise ValueError(f"{op}: {name}: expected a finite number, got {value}; pass a finite number")
    return number


def check_query(op: str, activation: torch.Tensor, given: Tensors) -> tuple[torch.Tensor, Tensors]:
    """Check that a query is given in one way at most, in the dtype of the activation.

    Args:
        activation: the op's second argument.
        given: query, or query, query_tokens, query_weight, query_bias; () if all are None.

    Returns:
        (activation, query tensors), both after `autocast_activation`; None for each tensor that is not given.
    """
    described = OPS[op].arguments
    names_of_query = [argument.name for argument in described if argument.name.startswith("query")]
    (activation,) = autocast_activation(activation)
    if not given:
        return activation, [None] * len(names_of_query)
    query, *upsampled = given
    missing = [name for name, tensor in zip(names_of_query[1:], upsampled, strict=True) if tensor is None]
    if missing and len(missing) < len(upsampled):
        raise ValueError(
            f"{op}: {missing[0]}: expected a tensor, got None; pass query_tokens, query_weight and query_bias together"
        )
    if query is not None and upsampled and not missing:
        raise ValueError(
            f"{op}: query: expected None beside query_tokens, got a tensor; pass only one of them, for a sum of both "
            "add an upsampled query yourself"
        )
    activations = [None if tensor is None else autocast_activation(tensor)[0] for tensor in given[:2]]
    for name, tensor in zip(names_of_query[: len(activations)], activations, strict=True):
        if tensor is not None:
            check_same_dtype(op, name, tensor, described[1].name, activation)
    return activation, (*activations, *given[2:])


def autocast_activation(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Under autocast, cast float32 activations to the autocast dtype, as a linear layer does."""
    device_type = tensors[0].device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):  # autocast does not support "meta"
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(tensor.to(dtype) if tensor.dtype is torch.float32 else tensor for tensor in tensors)
