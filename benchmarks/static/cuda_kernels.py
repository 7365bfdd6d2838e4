"""Figures of the kernels in csrc/cuda compiled by nvcc, for `python -m benchmarks static`.

Registers, spills and instructions come from the compiled code. Shared memory and pixels per loop iteration come from
the launches of the ops, which the emulator records without running them.
"""

import functools
import itertools
import math
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.harness.toolkit import cuda_tool
from benchmarks.static import divergence, sass
from benchmarks.static.figures import COLOR_CHANNELS, CONSUMER, CUDA_PREFIX, SHARED_LIMIT, Figures, counted_figures
from benchmarks.static.machines import MACHINES
from deco_kernels import testing
from deco_kernels.backends.cuda import scaled_product
from deco_kernels.testing import emulation, source_regions

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100", *CONSUMER)
CSRC = Path(__file__).resolve().parents[2] / "csrc"

_WIDTHS, DEPTH, _IMAGE = (16, 32, 64), 3, (1, 256, 256)
_PIXELS = _IMAGE[1] * _IMAGE[2]
_LOSS, _PADDED_IMAGE = "flow_matching_loss", (1, 252, 252)
_MANY_MULTIPROCESSORS = 1 << 16  # every grid then has one block per tile
_DTYPES = {"BFloat16": "bfloat16", "Float16": "float16"}
GENERAL, EXTENDED = "+general", "+extended"
TILED, AHEAD = "+tiled", "+ahead"
"""Flags of the block backward in the decoder: an architecture runs the kernel that copies its inputs ahead, or, with
less shared memory, the one that does not."""
EXTENSION = {"query": "given", "head_norm": "rms"}
"""Arguments of `testing.random_inputs` with which the EXTENDED variants run."""
_VARIANTS = tuple(itertools.product(("", GENERAL), ("", EXTENDED)))


class Kernel(NamedTuple):
    """A kernel, or the part of a kernel that one kind of call executes."""

    op: str  # op that launches the kernel
    launch: str  # name of the launch
    counted: bool = True  # whether its outermost loop iterates over pixels and contains matmuls
    # Iterations of an inner loop with matmuls; None: one per tile of 16 pixels of the outer iteration.
    inner_trips: int | None = None
    skipped: tuple[str, ...] = ()  # source regions that this kind of call does not execute


KERNELS = {
    # "general": patches with few pixels, and tensors with offsets of 2^32 bytes or more. "extended": with a query or an
    # RMS head.
    **{
        f"pixel_decoder.forward_kernel{general}{extended}": Kernel(
            "pixel_decoder", "pixel_decoder_forward", inner_trips=DEPTH, skipped=("refill_of_forward",)
        )
        for general, extended in _VARIANTS
    },
    **{
        f"pixel_decoder.forward_kernel{general}+keeps{extended}": Kernel(
            "pixel_decoder_loss",
            "pixel_decoder_keeping_forward",
            inner_trips=DEPTH,
            skipped=("refill_of_forward",),
        )
        for general, extended in _VARIANTS
    },
    **{
        f"decoder_head.head_kernel{general}{extended}": Kernel("pixel_decoder_loss", "pixel_decoder_head")
        for general, extended in _VARIANTS
    },
    "adaln_block.forward_kernel": Kernel("adaln_block", "adaln_block_forward"),
    "upsample_modulate.modulate_kernel": Kernel("upsample_modulate", "upsample_modulate_forward"),
    **{
        f"decoder_recompute.recompute_kernel{general}{extended}": Kernel(
            "pixel_decoder", "pixel_decoder_recompute", inner_trips=DEPTH, skipped=("refill_of_recompute",)
        )
        for general, extended in _VARIANTS
    },
    # Template flags, then the step of the chain; the last block of a decoder is launched first.
    **{
        f"block_backward.backward_kernel+mlp{TILED}{ahead}{step}": Kernel("pixel_decoder", launch, skipped=skipped)
        for ahead, launch in (("", "block_backward"), (AHEAD, "block_backward_ahead"))
        for step, skipped in (
            ("+first", ("gradient_of_later_blocks", "gradient_of_cond")),
            ("", ("gradient_of_cond",)),
            ("+last", ()),
        )
    },
    "block_backward.backward_kernel+mlp+first+last": Kernel(
        "adaln_block", "block_backward", skipped=("gradient_of_later_blocks",)
    ),
    "block_backward.backward_kernel+first+last": Kernel(
        "upsample_modulate", "block_backward", skipped=("gradient_of_later_blocks",)
    ),
    **{
        f"decoder_embedding.embedding_kernel{general}{extended}": Kernel("pixel_decoder", "pixel_decoder_embedding")
        for general, extended in _VARIANTS
    },
    "decoder_embedding.table_kernel": Kernel("pixel_decoder", "pixel_table_gradient", counted=False),
    "pack_weights.pack_kernel": Kernel("pixel_decoder", "pack_weights", counted=False),
    "gradient_sums.sum_kernel": Kernel("pixel_decoder", "sum_partials", counted=False),
    "gradient_sums.unpack_kernel": Kernel("pixel_decoder", "unpack_gradients", counted=False),
    "scaled_product.product_kernel": Kernel("pixel_decoder_loss", "scaled_product", counted=False),
    **{
        f"flow_matching_loss{source}_kernel{images}": Kernel(_LOSS, launch, inner_trips=COLOR_CHANNELS)
        for source, launch in (
            (".sums", "flow_matching_loss_sums"),
            ("_backward.gradient", "flow_matching_loss_gradient"),
        )
        for images in ("", "+float32_target", "+padded")
    },
    **{
        f"flow_matching_loss_backward.gradient_kernel+sums{images}": Kernel(
            "pixel_decoder_loss", "flow_matching_loss_gradient_and_sums", inner_trips=COLOR_CHANNELS
        )
        for images in ("", "+float32_target")
    },
    "flow_matching_loss.losses_kernel": Kernel(_LOSS, "flow_matching_loss", counted=False),
    "flow_matching_loss_backward.spectrum_kernel": Kernel(_LOSS, "flow_matching_loss_spectrum", counted=False),
    "flow_matching_loss_backward.frequency_weight_kernel": Kernel(
        _LOSS, "flow_matching_loss_frequency_weight", counted=False
    ),
    "flow_matching_loss_backward.sample_weight_kernel": Kernel(
        _LOSS, "flow_matching_loss_sample_weight", counted=False
    ),
    "loss_padding.difference_kernel": Kernel(_LOSS, "flow_matching_loss_difference", counted=False),
    "loss_padding.fold_kernel": Kernel(_LOSS, "flow_matching_loss_fold", counted=False),
}
_FLAGS = {  # boolean template parameters by kernel
    "block_backward.backward_kernel": ("mlp", "tiled", "ahead"),
    "pixel_decoder.forward_kernel": ("general", "keeps", "extended"),
    "decoder_head.head_kernel": ("general", "extended"),
    "decoder_embedding.embedding_kernel": ("general", "extended"),
    "flow_matching_loss_backward.gradient_kernel": ("sums",),
    "decoder_recompute.recompute_kernel": ("general", "extended"),
}


def unavailable_reason() -> str | None:
    """Reason why no CUDA kernel can be examined on this machine, or None."""
    if nvcc() is None:
        return "no nvcc on PATH, in $CUDA_HOME/bin or in /usr/local/cuda/bin"
    return emulation.unavailable_reason()


def nvcc() -> str | None:
    return cuda_tool("nvcc")


@functools.cache
def toolchain() -> str:
    version = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    return "nvcc " + re.search(r"V([\d.]+)", version)[1]


def sources() -> list[str]:
    """CUDA sources that contain kernels, the slowest to compile first."""
    found = (path for path in (CSRC / "cuda").glob("*.cu") if "DECO_KERNEL(" in path.read_text())
    return [path.stem for path in sorted(found, key=lambda path: (path.stem != "block_backward", path.stem))]


def compile_source(source: str, architecture: str, cubin: Path, only_width: int | None, variants: bool) -> None:
    """Compiles csrc/cuda/SOURCE.cu with the flags of the module and with source lines of the instructions."""
    number = architecture.removeprefix("sm_")
    command = [nvcc(), "-std=c++17", "-O3", "-lineinfo", f"-I{CSRC}", f"-I{CSRC / 'include'}"]
    command += [f"-gencode=arch=compute_{number},code=sm_{number}", "-cubin", "-o", str(cubin)]
    command += [f"-DDECO_ONLY_WIDTH={only_width}"] if only_width else []
    command += [] if variants else ["-DDECO_ONLY_PLAIN"]
    command += [str(CSRC / "cuda" / f"{source}.cu")]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0 or "warning" in result.stderr:
        raise RuntimeError(f"{source}.cu does not compile cleanly for {architecture}:\n{result.stderr[-4000:]}")


def source_figures(
    source: str, architecture: str, only_width: int | None = None, variants: bool = True
) -> dict[str, Figures]:
    """Figures of the kernels of a source that run on the architecture, by "cuda.source.kernel+flags/D32/bfloat16". With
    `only_width`, decoder kernels are compiled only for that width in bfloat16; with or without the variants GENERAL and
    EXTENDED."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / f"{source}.cubin"
        compile_source(source, architecture, cubin, only_width, variants)
        codes, lines = sass.read_all(cubin), sass.read_lines(cubin)
    figures = {}
    for mangled, code in codes.items():
        name, width, dtype = _describe(source, mangled)
        divergence.check(name, code)
        found = [variant for variant in KERNELS if _is_variant(variant, name)]
        if not found:
            raise LookupError(f"{name} of {source}.cu is missing in benchmarks.static.cuda_kernels.KERNELS")
        for variant in found:
            launch = _launch_of(variant, width, architecture)
            if launch is not None:
                label = "/".join([CUDA_PREFIX + variant] + [f"D{width}"] * bool(width) + [dtype] * bool(dtype))
                figures[label] = _figures(code, lines[mangled], KERNELS[variant], launch, architecture)
    return figures


def all_figures(cases: list[tuple[str, int, str]]) -> Iterator[tuple[str, str, Figures]]:
    """(name, architecture, figures) of every CUDA kernel in the (architecture, width, dtype) of `cases`. A source is
    compiled once: for one width in bfloat16 if nothing else is wanted, else for all widths and dtypes."""
    for architecture in ARCHITECTURES:
        wanted = {(w, d) for a, w, d in cases if a == architecture.removesuffix("a")}
        widths = {width for width, _ in wanted}
        only_width = widths.pop() if len(widths) == 1 and {dtype for _, dtype in wanted} == {"bfloat16"} else None
        for source in sources() if wanted else ():
            for name, found in source_figures(source, architecture, only_width).items():
                if is_among(name, wanted):
                    yield name, architecture, found


def is_among(name: str, wanted: set[tuple[int, str]]) -> bool:
    """Whether a label of `source_figures` matches one of the (width, dtype); labels without either always match."""
    _, *parts = name.split("/")
    return any(all(part in (f"D{width}", dtype) for part in parts) for width, dtype in wanted)


def _describe(source: str, mangled: str) -> tuple[str, int, str]:
    """("source.kernel+flags", D or 0, dtype or "") from a mangled kernel name."""
    function, parameters = re.search(r"\d([a-z][a-z_]*_kernel)(?:I(\w+?)EEv|E)", mangled).groups(default="")
    dtype = re.search(r"\d(BFloat16|Float16)E", parameters)
    width = re.search(r"Li(\d+)E?", parameters)
    values = re.findall(r"Lb([01])", parameters)
    flags = [flag for flag, value in zip(_FLAGS.get(f"{source}.{function}", ()), values, strict=True) if value == "1"]
    if "PaddedDifference" in parameters:
        flags.append("padded")
    elif re.search(r"ImagePairINS0_\d+\w+16EfE", parameters):
        flags.append("float32_target")
    name = "+".join([f"{source}.{function}", *flags])
    return name, int(width[1]) if width else 0, _DTYPES[dtype[1]] if dtype else ""


def _is_variant(variant: str, name: str) -> bool:
    """Whether a name in KERNELS is the compiled kernel or one of its chain steps."""
    return variant in (name, f"{name}+first", f"{name}+last", f"{name}+first+last")


def _launch_of(variant: str, width: int, architecture: str) -> "Launch | None":
    """None for the one of the kernels with and without AHEAD that the architecture does not run."""
    kernel = KERNELS[variant]
    found = launches(width or 32, SHARED_LIMIT[architecture.removesuffix("a")], EXTENDED in variant)
    return found.get((kernel.op, kernel.launch)) if TILED in variant else found[kernel.op, kernel.launch]


def _figures(code: sass.Code, lines, kernel: Kernel, launch: "Launch", architecture: str) -> Figures:
    counted: dict[str, Any] = {}
    if kernel.counted:
        skipped = _lines_of(kernel.skipped)
        instructions = per_16_pixels(code, launch, kernel.inner_trips, lambda a: bool(lines[a] & skipped))
        if instructions is not None:
            counted = counted_figures(MACHINES[architecture], instructions)
    return Figures(toolchain(), code.registers, code.spill_bytes, launch.shared_bytes, **counted)


def _lines_of(names: tuple[str, ...]) -> set[tuple[str, int]]:
    """(file, line) of every line in these regions of csrc/cuda."""
    regions = source_regions.all_regions()
    return {(str(regions[name].path), line) for name in names for line in regions[name].lines}


def per_16_pixels(code: sass.Code, launch: "Launch", inner_trips: int | None, is_skipped) -> dict[str, float] | None:
    """Executed warp instructions of the steady loop per 16 pixels by opcode.

    All warps run the outermost loop; if they are more than tiles of 16 pixels, the others run only its inner loops. If
    there are two outermost loops, one warp per tile runs the larger one and the other warps run the second. Inner loops
    without matmuls count once. None if the compiler has interleaved loops.
    """
    tiles = launch.turn_pixels // 16
    inner_trips = inner_trips or tiles
    with_products = [loop for loop in sass.loops(code) if _has_products(code, loop)]
    inner = [loop for loop in with_products if any(sass.is_inside(loop, other) for other in with_products)]
    outermost = _merged([loop for loop in with_products if loop not in inner])
    if len(outermost) > 2:
        return None
    warps = [launch.warps] if len(outermost) == 1 else [tiles, launch.warps - tiles]
    weights = {loop: count / tiles for loop, count in zip(outermost, warps, strict=True)}
    most = 1 if len(outermost) == 1 else math.inf  # executions of an outermost loop per tile

    def executions(address: int) -> float:
        weight = sum(weight for (first, last), weight in weights.items() if first <= address <= last)
        if weight == 0 or is_skipped(address):
            return 0
        is_inner = any(first <= address <= last for first, last in inner)
        return weight * inner_trips if is_inner else min(weight, most)

    return sass.counts(code, executions)


def _merged(loops: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Loops that overlap are one: the compiler has moved part of its body behind its end."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(loops):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return sorted(merged, key=lambda loop: loop[0] - loop[1])


def _has_products(code: sass.Code, loop: tuple[int, int]) -> bool:
    return any(
        sass.pipe_of(instruction.opcode) == "tensor" and loop[0] <= instruction.address <= loop[1]
        for instruction in code.instructions
    )


# ------------------------------------------------------------------------------------------------------------- launches


class Launch(NamedTuple):
    warps: int  # per block
    shared_bytes: int
    turn_pixels: int  # pixels per iteration of a block, a multiple of 16; unused for kernels without a pixel loop


@functools.cache
def launches(width: int, shared_limit: int, extended: bool = False) -> dict[tuple[str, str], Launch]:
    """(op, name) -> launch, for forward and backward of the ops with N 3 on a 256x256 image, and of the loss also on an
    image that needs padding; extended only of the decoder's ops."""
    module = emulation.emulated_module()
    module.set_device_limits(_MANY_MULTIPROCESSORS, shared_limit)
    ops = {kernel.op: None for variant, kernel in KERNELS.items() if not extended or EXTENDED in variant}
    calls = [(_LOSS, _PADDED_IMAGE)] * (not extended) + [(op, _IMAGE) for op in ops]
    options = EXTENSION if extended else {}
    found = {}
    try:
        for op, image_size in calls:
            inputs = testing.random_inputs(
                op, dtype=torch.bfloat16, width=width, depth=DEPTH, image_size=image_size, token_width=8, **options
            )
            for name, blocks, threads, shared_bytes in module.launches_of(lambda inputs=inputs: _run(inputs)):
                found[op, name] = Launch(threads // 32, shared_bytes, 16 * round(_PIXELS / blocks / 16))
    finally:
        module.set_device_limits(emulation.MULTIPROCESSORS, emulation.LARGE_SHARED)
    return found


def _run(inputs: testing.Inputs) -> None:
    """Forward and backward, with the product of a kept gradient that PyTorch computes on the CPU."""
    testing.run(inputs, emulation.BACKEND)
    if inputs.op == "pixel_decoder_loss":
        scaled_product.product(inputs.tensors["cond"], torch.ones(()))
