"""Bytes of global memory that the CUDA kernels move per pixel, counted by the emulator.

Each byte of global memory counts once per launch for reading and once for writing: the caches serve repeated accesses.
"""

import functools

import torch

from benchmarks.static.calls import forward_and_backward
from benchmarks.static.cuda_kernels import EXTENSION, KERNELS
from benchmarks.static.figures import CUDA_PREFIX
from deco_kernels import testing
from deco_kernels.testing import emulation

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_ROWS, _COLUMNS = 32, (32, 64)  # the difference excludes what does not depend on the number of pixels
_PADDED_ROWS = 28


def bytes_per_pixel(label: str) -> float:
    """Bytes of the kernel with a label of `cuda_kernels.source_figures`.

    Raises:
        RuntimeError: bank conflicts in the loop over pixels, which the model of shared memory leaves out.
    """
    variant, *parts = label.removeprefix(CUDA_PREFIX).split("/")
    width = next((int(part[1:]) for part in parts if part.startswith("D")), 32)
    dtype = next((part for part in parts if part in _DTYPES), "bfloat16")
    _, *flags = variant.split("+")
    small, large = (
        _launch(KERNELS[variant].op, KERNELS[variant].launch, width, dtype, columns, tuple(flags))
        for columns in _COLUMNS
    )
    pixels = (_PADDED_ROWS if "padded" in flags else _ROWS) * (_COLUMNS[1] - _COLUMNS[0])
    moved = [launch.read.distinct + launch.written.distinct for launch in (small, large)]
    if small.shared.conflicts * large.blocks != large.shared.conflicts * small.blocks:
        raise RuntimeError(f"{label}: bank conflicts in the loop over pixels, which the model leaves out")
    return (moved[1] - moved[0]) / pixels


def _launch(
    op: str, name: str, width: int, dtype: str, columns: int, flags: tuple[str, ...]
) -> emulation.RecordedLaunch:
    """The launch of a variant; the block backward of the decoder runs once per decoder block: first, between, last."""
    kind = ("float32_target" in flags, "padded" in flags, "extended" in flags)
    launches = _launches(op, width, dtype, columns, *kind, small="tiled" in flags and "ahead" not in flags)
    found = [launch for launch in launches if launch.name == name]
    if "tiled" not in flags or "first" in flags:
        return found[0]
    return found[-1] if "last" in flags else found[1]


@functools.cache
def _launches(
    op: str, width: int, dtype: str, columns: int, float32_target: bool, padded: bool, extended: bool, small: bool
) -> list[emulation.RecordedLaunch]:
    """`small`: on a device with little shared memory."""
    module = emulation.emulated_module()
    inputs = testing.random_inputs(
        op,
        dtype=_DTYPES[dtype],
        other_dtype=torch.float32 if float32_target else _DTYPES[dtype],
        width=width,
        image_size=(1, _PADDED_ROWS if padded else _ROWS, columns),
        token_width=16,
        **(EXTENSION if extended else {}),
    )
    module.set_device_limits(emulation.MULTIPROCESSORS, emulation.SMALL_SHARED if small else emulation.LARGE_SHARED)
    try:
        return emulation.record_accesses(lambda: forward_and_backward(inputs, emulation.BACKEND))
    finally:
        module.set_device_limits(emulation.MULTIPROCESSORS, emulation.LARGE_SHARED)
