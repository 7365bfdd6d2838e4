"""Launching and recording of Triton kernels, and tensor layouts that the kernels accept."""

from __future__ import annotations

import contextlib
import functools
import importlib
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime.jit import JITFunction

from .table import Launch, launch_parameters

# The interpreter runs programs sequentially; two suffice to test the sums over partial buffers.
_INTERPRETED_PROGRAMS = 2


# Called functions before their callers.
_KERNEL_MODULES = (
    "functions", "weights", "adaln_block", "pixel_decoder_head", "pixel_decoder", "upsample_modulate", "loss_tiles",
    "flow_matching_loss",
)  # fmt: skip


class RecordedLaunch(NamedTuple):
    """One kernel launch as requested by the host code."""

    kernel: Any
    args: dict[str, Any]
    grid: tuple[int, ...]
    options: dict[str, int]


class _Recording(NamedTuple):
    architecture: str
    multiprocessors: int | None
    launches: list[RecordedLaunch]


_recording: _Recording | None = None


@functools.cache
def fix_cache_keys() -> None:
    """Compute the keys of all kernels in one order, so that every process finds what another has compiled.

    Up to Triton 3.6 a kernel's key lacks the constants of functions that no key was computed of before.
    """
    for name in _KERNEL_MODULES:
        module = importlib.import_module(f".{name}", __package__)
        for value in vars(module).values():
            if isinstance(value, JITFunction):
                value.cache_key  # noqa: B018


@contextlib.contextmanager
def record_launches(architecture: str, multiprocessors: int | None = None) -> Iterator[list[RecordedLaunch]]:
    """Record the launches of the host code for `architecture` ("sm_90", "gfx942") without running them.

    For ahead-of-time compilation: tensors may be on the CPU, and results are undefined. Persistent grids are those of a
    device with `multiprocessors`; by default they have few programs.
    """
    global _recording
    fix_cache_keys()
    _recording = _Recording(architecture, multiprocessors, [])
    try:
        yield _recording.launches
    finally:
        _recording = None


@functools.cache
def _device_architecture(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def architecture_of(device: torch.device) -> str:
    """Architecture name of the launch table: "sm_90", "gfx942" and the like; "interpreter" for CPU tensors."""
    if _recording is not None:
        return _recording.architecture
    return _device_architecture(device) if device.type == "cuda" else "interpreter"


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def program_limit(device: torch.device, parameters: Launch) -> int:
    """Maximum number of programs of a persistent kernel."""
    if _recording is not None and _recording.multiprocessors is not None:
        return _recording.multiprocessors * parameters.programs_per_multiprocessor
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    return _multiprocessors(device) * parameters.programs_per_multiprocessor


def parameters_for(kernel: str, width: int, dtype: torch.dtype, device: torch.device, depth: int = 1) -> Launch:
    """Launch parameters of a kernel on this device; `depth` as in `launch_parameters`."""
    return launch_parameters(kernel, width, dtype, architecture_of(device), depth)


def math_options(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """PRECISION of float32 matmuls and FAST_TANH, the numerical options of the kernels.

    Three TF32 matmuls give float32 accuracy; a single one is used if PyTorch's setting allows TF32. Its older setting,
    `allow_tf32`, raises if the newer one has been set; the newer one follows both.
    """
    architecture = architecture_of(device)
    nvidia = not architecture.startswith("gfx")
    precision = ("tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3") if nvidia else "ieee"
    return {"PRECISION": precision, "FAST_TANH": nvidia and dtype != torch.float32}


def device_guard(tensor: torch.Tensor) -> contextlib.AbstractContextManager[None]:
    """Make the tensor's device current: Triton launches on the current device and its current stream."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()


def _refuse_compilation(*, repr: str, **_: Any) -> bool:
    if not torch.cuda.is_current_stream_capturing():
        return False  # a thread beside that of the capture
    raise RuntimeError(
        f"deco_kernels: the Triton kernel {repr} has to be compiled for these arguments, which is not possible while a "
        "CUDA graph is being captured; call the op once with the same shapes, strides and dtypes before the capture"
    )


_one_hook = threading.Lock()


@contextlib.contextmanager
def _compilation_refused() -> Iterator[None]:
    """Context in which a kernel that has to be compiled raises RuntimeError, by Triton's hook before compilation.

    Threads take turns, so that each puts back the hook that was there.
    """
    knobs = getattr(triton, "knobs", None)  # Triton 3.3 keeps the hook in JITFunction
    holder, name = (JITFunction, "cache_hook") if knobs is None else (knobs.runtime, "jit_cache_hook")
    with _one_hook:
        previous = getattr(holder, name)
        setattr(holder, name, _refuse_compilation)
        try:
            yield
        finally:
            setattr(holder, name, previous)


def launch(kernel: Any, grid: tuple[int, ...], parameters: Launch, *args: Any, **constexprs: Any) -> None:
    """Run `kernel` on the current stream with the given warps and stages; an empty grid does nothing."""
    if 0 in grid:
        return
    fix_cache_keys()
    options = {"num_warps": parameters.warps, "num_stages": parameters.stages, "enable_fp_fusion": True}
    if _recording is not None:
        bound = dict(zip(kernel.arg_names, args, strict=False)) | constexprs
        _recording.launches.append(RecordedLaunch(kernel, bound, grid, options))
    elif torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        with _compilation_refused():
            kernel[grid](*args, **constexprs, **options)
    else:
        kernel[grid](*args, **constexprs, **options)


def persistent_grid(rows: int, parameters: Launch, device: torch.device) -> tuple[int]:
    """One program per tile of `rows` rows, at most `program_limit`."""
    return (min(triton.cdiv(rows, parameters.block), program_limit(device, parameters)),)


def launch_over_rows(kernel: Any, name: str, rows: int, like: torch.Tensor, *args: Any, **constexprs: Any) -> None:
    """Launch a persistent kernel that iterates over tiles of `rows` rows, with the parameters of `name`.

    D, the dtype and the device are those of `like` [..., D]; D, BLOCK, PRECISION and FAST_TANH are added to
    `constexprs`, which has N if the kernel computes several decoder blocks.
    """
    width = like.shape[-1]
    parameters = parameters_for(name, width, like.dtype, like.device, constexprs.get("N", 1))
    launch(
        kernel, persistent_grid(rows, parameters, like.device), parameters, *args,
        D=width, BLOCK=parameters.block, **math_options(like.dtype, like.device), **constexprs,
    )  # fmt: skip


def weight_partials(name: str, like: torch.Tensor, blocks: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Zeroed sums per program of kernel `name`, for the weight gradients of `count` linears in each of `blocks`.

    [programs, blocks, count, D, D] and [programs, blocks, count, D], float32; D, dtype and device are those of `like`.
    """
    width = like.shape[-1]
    programs = program_limit(like.device, parameters_for(name, width, like.dtype, like.device))
    shape = (programs, blocks, count, width)
    return like.new_zeros(*shape, width, dtype=torch.float32), like.new_zeros(shape, dtype=torch.float32)


# ---------------------------------------------------------------------------------------------------------- tensors


def collapsed_rows(tensor: torch.Tensor, trailing: int) -> torch.Tensor:
    """[..., *trailing dims] as [rows, *trailing dims] with unit channel stride; copied only if no view exists."""
    shape = tensor.shape[-trailing:]
    if tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
        tensor = tensor.contiguous()
    rows = tensor.numel() // max(1, shape.numel()) if tensor.numel() else 0
    try:
        return tensor.view(rows, *shape)
    except RuntimeError:
        return tensor.contiguous().view(rows, *shape)


def pixel_rows(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """[..., P, D] as `collapsed_rows`; None for None, here and below."""
    return None if tensor is None else collapsed_rows(tensor, 2)


def part_of(rows: torch.Tensor | None, part: slice) -> torch.Tensor | None:
    return None if rows is None else rows[part]


def optional(rows: torch.Tensor | None) -> tuple[torch.Tensor | None, int | None, int | None]:
    """Pointer and strides of tokens and pixels, the arguments of kernels for rows [tokens, P, D] or None."""
    return (None, None, None) if rows is None else (rows, rows.stride(0), rows.stride(1))


def readable_image(image: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W], copied if its channels are too far apart for the kernels.

    They multiply channel and stride in 32 bits if the stride fits. Raises ValueError if copying does not help.
    """
    _, channels, height, width = image.shape
    farthest = (2**31 - 1) // max(1, channels - 1)
    if farthest < height * width < 2**31:
        raise ValueError(
            f"images of {channels} channels: expected at most {farthest} pixels each on backend 'triton', got "
            f"{height} x {width}; use another backend or smaller images"
        )
    return image.contiguous() if farthest < image.stride(1) < 2**31 else image


def contiguous(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors, copied if they are not contiguous."""
    return tuple(tensor.contiguous() for tensor in tensors)
