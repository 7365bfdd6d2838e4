"""A capture of a CUDA graph in which CPU tensors stand for those of the GPU: host copies and waits are refused."""

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from deco_kernels.ops import registry

HOST, NEW, DEVICE = range(3)
"""A tensor from Python data and what follows from it; a new tensor without data; all others, such as arguments."""

FROM_PYTHON = {"lift_fresh", "lift_fresh_copy"}
WAITS = {  # for the values of a scalar, or for the number of elements in the result
    *("_local_scalar_dense", "equal", "allclose", "is_nonzero", "nonzero", "masked_select", "unique_dim", "_unique2"),
    *("unique_consecutive", "repeat_interleave"),
}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
READS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.__array__}


class CaptureRefused(RuntimeError):
    """An operation that a CUDA graph cannot capture."""


@contextlib.contextmanager
def mock_capture() -> Iterator[Callable[[torch.Tensor], bool]]:
    """Context in which operations run, unless a capture on a GPU would fail: then it raises CaptureRefused.

    Yields a function that says whether a tensor would be on the host.
    """
    operators, serve = _Operators(), registry.serve
    host_side = _HostSide(operators)

    def seen(*arguments, **kept):  # PyTorch leaves its modes while an operator that is implemented in Python runs
        with host_side, operators:
            return serve(*arguments, **kept)

    with mock.patch.object(registry, "serve", seen), host_side, operators:
        yield lambda tensor: operators.kind(tensor) == HOST


def name_of(function) -> str:
    return str(function).split(".")[1]


class _Operators(TorchDispatchMode):
    """Checks the operators, and knows where each tensor would be."""

    def __init__(self):
        super().__init__()
        self.kinds = WeakTensorKeyDictionary()

    def kind(self, tensor: torch.Tensor) -> int:
        return self.kinds.get(tensor, DEVICE)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunction(), self:
            results = function.decompose(*args, **kwargs or {})
        if results is not NotImplemented:  # it consists of operations that were checked
            return results
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        self.check(function, tensors)
        results = function(*args, **kwargs or {})
        kind = HOST if name_of(function) in FROM_PYTHON else self.kind_of_result(tensors)
        for result in tree_leaves(results):
            if isinstance(result, torch.Tensor) and (result not in self.kinds or kind == HOST):
                self.kinds[result] = kind
        return results

    def kind_of_result(self, tensors: list[torch.Tensor]) -> int:
        """Scalars on the host are arguments of kernels; they do not decide unless there is nothing else."""
        kinds = {self.kind(tensor) for tensor in tensors}
        shaped = {self.kind(tensor) for tensor in tensors if tensor.dim()}
        return DEVICE if DEVICE in kinds else HOST if HOST in shaped or kinds == {HOST} else NEW

    def check(self, function, tensors: list[torch.Tensor]) -> None:
        """Raises CaptureRefused if the operation waits for the device or copies from the host."""
        kinds = [self.kind(tensor) for tensor in tensors]
        name = name_of(function)
        by_mask = name in INDEXING and any(tensor.dtype in (torch.bool, torch.uint8) for tensor in tensors[1:])
        if (name in WAITS or by_mask) and set(kinds) != {HOST}:
            raise CaptureRefused(f"{function} waits for values on the device")
        copied = [tensor for tensor, kind in zip(tensors, kinds, strict=True) if kind == HOST and tensor.dim()]
        if copied and (DEVICE in kinds or name == "copy_"):
            raise CaptureRefused(f"{function} uses a tensor of shape {tuple(copied[0].shape)} that is on the host")


class _HostSide(TorchFunctionMode):
    """What PyTorch does with tensors outside its operators."""

    def __init__(self, operators: _Operators):
        self.operators = operators

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kind = self.operators.kind(args[0]) if args and isinstance(args[0], torch.Tensor) else None
        if function in READS and kind in (NEW, DEVICE):
            raise CaptureRefused(f"{function.__name__} copies a tensor to the host")
        if function is torch.Tensor.data_ptr and kind == HOST:
            raise CaptureRefused("a kernel gets the address of a tensor that is on the host")
        if function == torch.Tensor.is_cpu.__get__:
            return kind == HOST
        return function(*args, **kwargs or {})
