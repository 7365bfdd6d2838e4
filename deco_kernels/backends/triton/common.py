"""What the Triton kernels share: device functions, launching, and repairs of Triton's interpreter.

Importing this module imports Triton; the rest of the package reaches it only after `unavailable_reason` said None.
Under ``TRITON_INTERPRET=1`` the kernels run on the CPU, operation by operation in numpy. `_repair_interpreter` makes
that run compute what the hardware computes, and faster; no other module knows that an interpreter exists. Inline
assembly cannot be interpreted, so `tanh_fast` has a second spelling.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from .table import Launch, launch_parameters

# ------------------------------------------------------------------------------------------------ device functions


@triton.jit
def tanh_fast(x, ONCE: tl.constexpr = False):
    """tanh by the special-function unit (PTX tanh.approx.f32, largest relative error 2^-11).

    ONCE keeps the compiler from computing it a second time where its result is needed in two register layouts.
    """
    if INTERPRETED:
        # The same size of error: the exact value rounded to 11 significant bits.
        bits = (2 * tl.sigmoid(2 * x) - 1).to(tl.int32, bitcast=True)
        y = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    else:
        y = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=not ONCE, pack=1
        )
    return y


@triton.jit
def twice_sigmoid(t, FAST_TANH: tl.constexpr):
    """2·sigmoid(2t) = 1 + tanh(t), so that SiLU(2t) = t·twice_sigmoid(t)."""
    if FAST_TANH:
        w = 1.0 + tanh_fast(t, ONCE=True)
    else:
        w = tl.div_rn(2.0, 1.0 + tl.exp(-2.0 * t))
    return w


@triton.jit
def silu_of_double(t, FAST_TANH: tl.constexpr):
    """SiLU(2t); the factor 2 lets a caller fold ½ into the weights that produce t."""
    if FAST_TANH:
        y = t + t * tanh_fast(t)
    else:
        y = t * twice_sigmoid(t, FAST_TANH)
    return y


@triton.jit
def silu_of_double_grad(t, w):
    """d SiLU(2t) / dt, from w = twice_sigmoid(t)."""
    return w * (1.0 + t * (2.0 - w))


@triton.jit
def normalize(h, D: tl.constexpr, EPS: tl.constexpr):
    """LayerNorm without affine over the last axis of h [BLOCK, D]: the normalised rows and 1/std [BLOCK]."""
    centered = h - (tl.sum(h, 1) * (1.0 / D))[:, None]
    rstd = tl.rsqrt(tl.sum(centered * centered, 1) * (1.0 / D) + EPS)
    return centered * rstd[:, None], rstd


@triton.jit
def normalize_grad(grad, normalized, rstd, D: tl.constexpr):
    """Gradient of `normalize` with respect to h, from the gradient of its first result."""
    mean = tl.sum(grad, 1) * (1.0 / D)
    projection = tl.sum(grad * normalized, 1) * (1.0 / D)
    return rstd[:, None] * (grad - mean[:, None] - normalized * projection[:, None])


@triton.jit
def packed_matrix(matrices_ptr, index, D: tl.constexpr):
    """Packed matrix number `index`, [in, out]."""
    d = tl.arange(0, D)
    return tl.load(matrices_ptr + index * D * D + d[:, None] * D + d[None, :])


@triton.jit
def affine(x, matrix, biases_ptr, index, D: tl.constexpr, PRECISION: tl.constexpr):
    """x [BLOCK, D] times matrix [in, out] plus packed bias number `index`, float32."""
    bias = tl.load(biases_ptr + index * D + tl.arange(0, D))
    return tl.dot(x, matrix, input_precision=PRECISION) + bias[None, :]


@triton.jit
def linear(x, matrices_ptr, biases_ptr, index, D: tl.constexpr, PRECISION: tl.constexpr):
    """x [BLOCK, D] through packed linear number `index`, float32."""
    return affine(x, packed_matrix(matrices_ptr, index, D), biases_ptr, index, D, PRECISION)


@triton.jit
def add_linear_grad(weight, biases, grad, x, number: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """Sums over pixels of a linear's gradients, with those of one tile added.

    weight [out, in] += gradᵀ·x; row `number` of biases [16, out] += sum of grad [BLOCK, out] over its rows. The tensor
    cores compute both: a product with ones yields the sum in all 16 rows; the choice afterwards keeps a NaN out of the
    sums of other linears.
    """
    weight = tl.dot(tl.trans(grad), x, weight, input_precision=PRECISION)
    sums = tl.dot(tl.full([16, BLOCK], 1.0, grad.dtype), grad, biases, input_precision=PRECISION)
    return weight, tl.where(tl.arange(0, 16)[:, None] == number, sums, biases)


@triton.jit
def add_to(pointers, value, mask=None):
    """Add to memory that this program alone owns."""
    tl.store(pointers, tl.load(pointers, mask=mask) + value, mask=mask)


@triton.jit
def tile_pixels(tile, n_tokens, PIXELS: tl.constexpr, BLOCK: tl.constexpr):
    """Tile number -> (token, pixel of the patch, whether it exists), for BLOCK consecutive pixels.

    A tile lies inside one token (token is then a scalar) or covers BLOCK / PIXELS whole tokens.
    """
    tile = tl.full((), 0, tl.int32) + tile  # the interpreter's loop counters are Python integers
    lane = tl.arange(0, BLOCK)
    if PIXELS >= BLOCK:
        token = tile // (PIXELS // BLOCK)
        pixel = (tile % (PIXELS // BLOCK)) * BLOCK + lane
        valid = tl.full([BLOCK], True, tl.int1)
    else:
        token = tile * (BLOCK // PIXELS) + lane // PIXELS
        pixel = lane % PIXELS
        valid = token < n_tokens
    return token, pixel, valid


@triton.jit
def row_offsets(token, pixel, token_stride, pixel_stride, D: tl.constexpr):
    """Element offsets [BLOCK, D] of the pixels' rows in a [tokens, pixels, D] tensor with unit channel stride."""
    rows = token.to(tl.int64) * token_stride + pixel.to(tl.int64) * pixel_stride
    return rows[:, None] + tl.arange(0, D)[None, :]


@triton.jit
def load_states(h_ptr, offsets, mask, D: tl.constexpr):
    """h [BLOCK, D], float32; missing rows are 0, 1, 0, 1, ..., so that their LayerNorm is finite even with eps 0."""
    filler = (tl.arange(0, D) % 2)[None, :].to(h_ptr.dtype.element_ty)
    return tl.load(h_ptr + offsets, mask=mask, other=filler).to(tl.float32)


# ------------------------------------------------------------------------------------------------------- launching

INTERPRETED = tl.constexpr(not isinstance(tanh_fast, JITFunction))

# The interpreter runs programs one after the other; two of them still exercise the sums over partial buffers.
_INTERPRETED_PROGRAMS = 2


class RecordedLaunch(NamedTuple):
    """One kernel launch as the host code asked for it."""

    kernel: Any
    args: dict[str, Any]
    grid: tuple[int, ...]
    options: dict[str, int]


_recording: tuple[str, list[RecordedLaunch]] | None = None


@contextlib.contextmanager
def record_launches(architecture: str) -> Iterator[list[RecordedLaunch]]:
    """Collect what the host code would launch on `architecture` ("sm_90", "gfx942"); nothing runs.

    For ahead-of-time compilation: tensors may lie on the CPU, results hold undefined values.
    """
    global _recording
    launches: list[RecordedLaunch] = []
    _recording = (architecture, launches)
    try:
        yield launches
    finally:
        _recording = None


@functools.cache
def _device_architecture(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def architecture_of(device: torch.device) -> str:
    """The name the launch table uses: "sm_90", "gfx942" and the like; "interpreter" for CPU tensors."""
    if _recording is not None:
        return _recording[0]
    return _device_architecture(device) if device.type == "cuda" else "interpreter"


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def program_limit(device: torch.device, parameters: Launch) -> int:
    """How many programs a persistent kernel starts at most."""
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    return _multiprocessors(device) * parameters.programs_per_multiprocessor


def parameters_for(kernel: str, width: int, dtype: torch.dtype, device: torch.device) -> Launch:
    """The shipped launch parameters of a kernel on this device."""
    return launch_parameters(kernel, width, dtype, architecture_of(device))


def math_options(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """PRECISION of float32 dots and FAST_TANH, the kernels' two numerical switches.

    Three TF32 products make a float32-accurate one; a single one is used where PyTorch's own setting allows it.
    """
    architecture = architecture_of(device)
    nvidia = not architecture.startswith("gfx")
    precision = ("tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3") if nvidia else "ieee"
    return {"PRECISION": precision, "FAST_TANH": nvidia and dtype != torch.float32}


def device_guard(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Make the tensor's device current: Triton launches on the current device and its current stream."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()


def _refuse_compilation(*, repr: str, **_: Any) -> bool:
    raise RuntimeError(
        f"deco_kernels: the Triton kernel {repr} has to be compiled for these arguments, which cannot happen while a "
        "CUDA graph is being captured; call the op once with the same shapes, strides and dtypes before the capture"
    )


@contextlib.contextmanager
def _compilation_refused() -> Iterator[None]:
    """Within, a kernel that has to be compiled raises RuntimeError; Triton calls its hook before every compilation."""
    knobs = getattr(triton, "knobs", None)  # Triton 3.3 keeps the hook in JITFunction
    holder, name = (JITFunction, "cache_hook") if knobs is None else (knobs.runtime, "jit_cache_hook")
    previous = getattr(holder, name)
    setattr(holder, name, _refuse_compilation)
    try:
        yield
    finally:
        setattr(holder, name, previous)


def launch(kernel: Any, grid: tuple[int, ...], parameters: Launch, *args: Any, **constexprs: Any) -> None:
    """Run `kernel` on the current stream with the table's warps and stages; an empty grid does nothing."""
    if 0 in grid:
        return
    options = {"num_warps": parameters.warps, "num_stages": parameters.stages, "enable_fp_fusion": True}
    if _recording is not None:
        bound = dict(zip(kernel.arg_names, args, strict=False)) | constexprs
        _recording[1].append(RecordedLaunch(kernel, bound, grid, options))
    elif torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        with _compilation_refused():
            kernel[grid](*args, **constexprs, **options)
    else:
        kernel[grid](*args, **constexprs, **options)


def persistent_grid(rows: int, parameters: Launch, device: torch.device) -> tuple[int]:
    """One program per tile of `rows` rows, at most as many as `program_limit` says."""
    return (min(triton.cdiv(rows, parameters.block), program_limit(device, parameters)),)


def launch_over_rows(kernel: Any, name: str, rows: int, like: torch.Tensor, *args: Any, **constexprs: Any) -> None:
    """Launch a persistent kernel that walks over tiles of `rows` rows, with the table's parameters of `name`.

    D, the dtype and the device are those of `like` [..., D]; D, BLOCK, PRECISION and FAST_TANH are added to
    `constexprs`.
    """
    width = like.shape[-1]
    parameters = parameters_for(name, width, like.dtype, like.device)
    launch(
        kernel, persistent_grid(rows, parameters, like.device), parameters, *args,
        D=width, BLOCK=parameters.block, **math_options(like.dtype, like.device), **constexprs,
    )  # fmt: skip


def weight_partials(name: str, like: torch.Tensor, blocks: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Zeroed sums of each program of kernel `name`, for the weight gradients of `count` linears in each of `blocks`.

    [programs, blocks, count, D, D] and [programs, blocks, count, D], float32; D, dtype and device are those of `like`.
    """
    width = like.shape[-1]
    programs = program_limit(like.device, parameters_for(name, width, like.dtype, like.device))
    shape = (programs, blocks, count, width)
    return like.new_zeros(*shape, width, dtype=torch.float32), like.new_zeros(shape, dtype=torch.float32)


# ------------------------------------------------------------------------------------------------- host-side helpers


def collapsed_rows(tensor: torch.Tensor, trailing: int) -> torch.Tensor:
    """[..., *trailing dims] as [rows, *trailing dims] with unit channel stride; a copy only where no view exists."""
    shape = tensor.shape[-trailing:]
    if tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
        tensor = tensor.contiguous()
    rows = tensor.numel() // max(1, shape.numel()) if tensor.numel() else 0
    try:
        return tensor.view(rows, *shape)
    except RuntimeError:
        return tensor.contiguous().view(rows, *shape)


def contiguous(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors, copied only where they are not contiguous."""
    return tuple(tensor.contiguous() for tensor in tensors)


def chunks(count: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, length) of consecutive pieces of at most `size`."""
    for start in range(0, count, size):
        yield start, min(size, count - start)


# -------------------------------------------------------------------------------------- repairs of the interpreter


def _repair_interpreter() -> None:
    """Correct the faults of Triton's interpreter (seen in 3.6 to 3.9) that these kernels meet, all about bfloat16.

    It holds bfloat16 as uint16 bit patterns. Conversion from float32 drops the low bits instead of rounding to nearest
    even, conversion from and to other types takes the bit pattern for a number, and so does `tl.dot`.
    """
    import numpy as np
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    handle = interpreter.TensorHandle
    original_cast, original_dot = builder.cast_impl, builder.create_dot

    def widened(bits: np.ndarray) -> np.ndarray:
        return (bits.astype(np.uint32) << 16).view(np.float32)

    def rounded(values: np.ndarray) -> np.ndarray:
        bits = np.ascontiguousarray(values).view(np.uint32)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(values), (bits >> 16) | 0x40, nearest).astype(np.uint16)

    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source != target and source == tl.bfloat16:
            src = handle(widened(src.data), tl.float32)
        if source != target and target == tl.bfloat16:
            single = original_cast(self, src, tl.float32)
            return handle(rounded(single.data), tl.bfloat16)
        return original_cast(self, src, dst_type)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        a, b = (handle(widened(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return original_dot(self, a, b, d, input_precision, max_num_imprecise_acc)

    builder.cast_impl, builder.create_dot = cast_impl, create_dot

    # Every call of a device function prepares triton.language for interpretation anew, most of the run time. Once per
    # module is enough, as a launch does it for the kernel's own module.
    prepared: set[int] = set()

    def call(self, *args, **kwargs):
        if id(self.fn.__globals__) not in prepared:
            prepared.add(id(self.fn.__globals__))
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


if INTERPRETED:
    _repair_interpreter()
