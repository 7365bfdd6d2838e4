"""Figures of the compiled Triton kernels that the ops launch, for `python -m benchmarks static`."""

import importlib
import multiprocessing
import re
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.static import sass
from benchmarks.static.calls import gradients_needed
from benchmarks.static.figures import COLOR_CHANNELS, CONSUMER, Figures, counted_figures
from benchmarks.static.machines import MACHINES
from deco_kernels.testing.inputs import ONE_PASS

NVIDIA = ("sm_80", "sm_90", "sm_100", *CONSUMER)
ARCHITECTURES = (*NVIDIA, "gfx942")
"""Architectures of the Triton kernels; the CUDA kernels for Hopper are built for sm_90a."""
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
WIDTHS = (16, 32, 64)
OPS = (
    "adaln_block", "pixel_decoder", "upsample_modulate", "pixel_decoder_from_tokens", "flow_matching_loss",
    "pixel_decoder_loss",
)  # fmt: skip
"""Ops that have kernels; the others launch those of these."""
KEEPING_KERNELS = (
    "pixel_decoder.forward_kernel+keeps", "pixel_decoder_head.head_kernel", "flow_matching_loss.gradient_kernel+sums",
)  # fmt: skip
"""Kernels that a call launches only if it keeps the decoder's activations, or joins decoder and loss."""
_FLAGS = ("FIRST", "LAST", "PADDED", "KEEPS", "SUMS", "QUERY", "RMS")
_TRITON_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


# ------------------------------------------------------------------------------------------------------ what to compile


def recorded_launches(architecture: str, width: int, dtype: torch.dtype) -> dict[str, Any]:
    """Every kernel variant that the ops launch in forward and backward, by name: N 3, p 16, one 256x256 image."""
    from deco_kernels import testing

    launches: dict[str, Any] = {}
    for op in OPS:
        inputs = testing.random_inputs(
            op, dtype=dtype, other_dtype=dtype, width=width, image_size=(1, 256, 256), token_width=1152
        )
        for launch in launches_of(inputs, architecture):
            launches.setdefault(f"{kernel_name(launch)}/D{width}/{str(dtype).removeprefix('torch.')}", launch)
    return launches


def launches_of(inputs, architecture: str, multiprocessors: int | None = None) -> list:
    """Launches of the Triton backend in forward and backward of these `testing.Inputs`, recorded without running."""
    from deco_kernels.backends.triton import launching

    module = importlib.import_module(f"deco_kernels.backends.triton.{inputs.op}")
    groups, options = inputs.groups(), list(inputs.options.values())
    if inputs.op != "flow_matching_loss":
        options.append(1e-6)
    with launching.record_launches(architecture, multiprocessors) as recorded:
        if inputs.op in ONE_PASS:
            module.forward(groups, *options)
            module.forward_with_gradients(groups, *options, gradients_needed(inputs))
            return recorded
        module.forward(*groups, *options)
        module.backward(*inputs.grad_outputs, *groups, *options, gradients_needed(inputs))
    return recorded


def kernel_name(launch) -> str:
    """Name "module.kernel", with the flags that distinguish its variants."""
    module = launch.kernel.fn.__module__.rpartition(".")[2]
    flags = [name for name, value in launch.args.items() if value is True and name in _FLAGS]
    return f"{module}.{launch.kernel.fn.__name__}" + "".join(f"+{flag.lower()}" for flag in flags)


def compile_launch(launch, architecture: str):
    """Compiles a recorded launch ahead of time, specialized on its arguments like a call on the device."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, hints = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.args[parameter.name]
        specialized = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialized and isinstance(value, int) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + _TRITON_TYPES[value.dtype]
            hints[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if specialized and value % 16 == 0:
                hints[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=hints)
    if architecture.startswith("gfx"):
        target = GPUTarget("hip", architecture, 64)
    else:
        target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    return triton.compile(source, target=target, options=launch.options)


# -------------------------------------------------------------------------------------------------------------- figures


def figures(launch, architecture: str) -> Figures:
    compiled = compile_launch(launch, architecture)
    if architecture.startswith("gfx"):
        return _amd_figures(compiled)
    code = sass.read(compiled.asm["cubin"])
    pixels = _pixels_per_tile(launch)
    counted: dict[str, Any] = {}
    if pixels:
        warps_per_16_px = 16 * launch.options["num_warps"] / pixels
        steady = sass.steady_counts(code, COLOR_CHANNELS)
        instructions = {opcode: count * warps_per_16_px for opcode, count in steady.items()}
        counted = counted_figures(MACHINES[architecture], instructions)
    return Figures(toolchain(architecture), code.registers, code.spill_bytes, compiled.metadata.shared, **counted)


def case_figures(architecture: str, width: int, dtype: str, parts: tuple[str, ...] = ("",)) -> dict[str, Figures]:
    """Figures of every kernel whose name starts with one of `parts`."""
    launches = recorded_launches(architecture, width, DTYPES[dtype])
    return {name: figures(launch, architecture) for name, launch in launches.items() if name.startswith(parts)}


def _amd_figures(compiled) -> Figures:
    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", compiled.asm["amdgcn"])[1])

    spilled = 4 * 64 * field("vgpr_spill_count") + 4 * field("sgpr_spill_count")
    return Figures(toolchain("gfx942"), field("vgpr_count"), spilled, compiled.metadata.shared)


def _pixels_per_tile(launch) -> int | None:
    """Pixels per iteration of the steady loop; None for kernels without a loop over pixels."""
    block = launch.args.get("BLOCK")
    if block is None or launch.kernel.fn.__name__ == "losses_kernel":
        return None
    walks_over_blocks = launch.kernel.fn.__module__.endswith("flow_matching_loss")
    return block * 64 if walks_over_blocks else block


def toolchain(architecture: str) -> str:
    import triton

    if architecture.startswith("gfx"):
        return f"triton {triton.__version__}, its LLVM"
    from triton import knobs

    assembler = knobs.nvidia.ptxas_blackwell if int(architecture.removeprefix("sm_")) >= 100 else knobs.nvidia.ptxas
    return f"triton {triton.__version__}, ptxas {assembler.version}"


def all_figures(cases: list[tuple[str, int, str]], part: str = "") -> Iterator[tuple[str, str, Figures]]:
    """(name, architecture, figures) of every Triton kernel in the (architecture, width, dtype) of `cases` whose name
    starts with `part`. The kernels of a case are compiled on all cores."""
    for architecture, width, dtype in cases:
        _case.clear()
        launches = recorded_launches(architecture, width, DTYPES[dtype]).items()
        _case.update((name, (launch, architecture)) for name, launch in launches if name.startswith(part))
        with multiprocessing.get_context("fork").Pool() as pool:
            for name, found in zip(_case, pool.imap(_figures_of, _case), strict=True):
                yield name, architecture, found


_case: dict[str, tuple[Any, str]] = {}  # kernel -> (launch, architecture); inherited by the processes of the pool


def _figures_of(name: str) -> Figures:
    return figures(*_case[name])
