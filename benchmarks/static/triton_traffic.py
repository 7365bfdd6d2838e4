"""Bytes of global memory that the Triton kernels move per pixel, counted while Triton's interpreter runs them.

A byte counts once per launch for reading and once for writing, however often the launch accesses it: repeated accesses
are served by the caches. `python -m benchmarks.static.triton_traffic WIDTH DTYPE` prints kernel -> bytes per pixel as
JSON; it needs TRITON_INTERPRET=1, which decides at Triton's import whether kernels are compiled or interpreted.
"""

import contextlib
import functools
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from benchmarks.static import triton_kernels
from benchmarks.static.calls import forward_and_backward
from benchmarks.static.triton_kernels import DTYPES, kernel_name
from deco_kernels import testing

_SMALL, _LARGE = (1, 16, 32), (1, 16, 64)  # the difference excludes what does not depend on the number of pixels
_PIXELS = 16 * 32


@functools.cache
def bytes_per_pixel(width: int, dtype: str) -> dict[str, float]:
    """Kernel name, as in `triton_kernels.kernel_name` -> bytes, from a process that interprets the kernels."""
    command = [sys.executable, "-m", __name__, str(width), dtype]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    output = subprocess.run(command, env=environment, capture_output=True, text=True)
    if output.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{output.stderr[-2000:]}")
    return json.loads(output.stdout)


class _Accesses:
    """Distinct addresses that one launch reads and writes."""

    def __init__(self) -> None:
        self._read: list[np.ndarray] = []
        self._written: list[np.ndarray] = []

    def add(self, pointers: Any, mask: Any, written: bool) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        addresses = np.broadcast_to(pointers.data, mask.data.shape)[mask.data]
        first_bytes = np.unique(addresses)
        bytes_ = (first_bytes[:, None] + np.arange(size, dtype=first_bytes.dtype)).ravel()
        (self._written if written else self._read).append(bytes_)

    def total(self) -> int:
        return sum(len(np.unique(np.concatenate(part))) for part in (self._read, self._written) if part)


@contextlib.contextmanager
def _recorded() -> Iterator[Counter[str]]:
    """Bytes of the largest launch in the context, by kernel name."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    from deco_kernels.backends.triton.launching import RecordedLaunch

    found: Counter[str] = Counter()
    current = _Accesses()
    load, store, run = (
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
        GridExecutor.__call__,
    )

    def recorded_load(self, ptrs, mask, *rest, **options):
        current.add(ptrs, mask, written=False)
        return load(self, ptrs, mask, *rest, **options)

    def recorded_store(self, ptrs, value, mask, *rest, **options):
        current.add(ptrs, mask, written=True)
        return store(self, ptrs, value, mask, *rest, **options)

    def recorded_run(self, *args, **constexprs):
        nonlocal current
        current = _Accesses()
        run(self, *args, **constexprs)
        name = kernel_name(RecordedLaunch(self, constexprs, self.grid, {}))
        found[name] = max(found[name], current.total())

    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = recorded_load, recorded_store
    GridExecutor.__call__ = recorded_run
    try:
        yield found
    finally:
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store
        GridExecutor.__call__ = run


def bytes_of_op(op: str, width: int, dtype: torch.dtype, other_dtype: torch.dtype | None = None) -> dict[str, float]:
    """Bytes per pixel of the kernels that forward and backward of an op launch, in this process; `other_dtype` of image
    and weights is `dtype` by default."""
    counts = []
    for image_size in (_SMALL, _LARGE):
        inputs = testing.random_inputs(
            op, dtype=dtype, other_dtype=other_dtype or dtype, width=width, image_size=image_size, token_width=64
        )
        with _recorded() as found:
            forward_and_backward(inputs, "triton")
        counts.append(found)
    small, large = counts
    return {name: (large[name] - small[name]) / _PIXELS for name in large}


def main(arguments: list[str]) -> int:
    width, dtype = int(arguments[0]), DTYPES[arguments[1]]
    found: dict[str, float] = {}
    for op in triton_kernels.OPS:
        found = bytes_of_op(op, width, dtype) | found
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
