"""Fixes of Triton's interpreter, which runs kernels on the CPU with NumPy (TRITON_INTERPRET=1).

The defects, present in 3.6 to 3.9, concern bfloat16, which the interpreter stores as uint16 bit patterns. Conversion
from float32 truncates instead of rounding to nearest even; conversion from and to other types and `tl.dot` treat the
bit pattern as a number. Importing this module replaces the interpreter's functions.
"""

from typing import Any, TypeAlias

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle, _patch_lang

Array: TypeAlias = np.ndarray[Any, Any]

_original_cast, _original_dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot


def _widened(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _rounded(values: Array) -> Array:
    bits = np.ascontiguousarray(values).view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, nearest).astype(np.uint16)


def _cast(self: Any, src: Any, dst_type: Any) -> Any:
    source, target = src.dtype.scalar, dst_type.scalar
    if source != target and source == tl.bfloat16:
        src = TensorHandle(_widened(src.data), tl.float32)
    if source != target and target == tl.bfloat16:
        single = _original_cast(self, src, tl.float32)
        return TensorHandle(_rounded(single.data), tl.bfloat16)
    return _original_cast(self, src, dst_type)


def _dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    a, b = (TensorHandle(_widened(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
    return _original_dot(self, a, b, d, input_precision, max_num_imprecise_acc)


# Every call of a device function patches triton.language for interpretation, which takes most of the run time. Once per
# module is enough, since a launch does it for the kernel's module.
_prepared: set[int] = set()


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    if id(self.fn.__globals__) not in _prepared:
        _prepared.add(id(self.fn.__globals__))
        _patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = _cast, _dot
InterpretedFunction.__call__ = _call
