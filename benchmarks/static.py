"""`python -m benchmarks static`: what the compilers made of the Triton and CUDA kernels, for every architecture,
without a GPU.

Per kernel and architecture: registers, spilled bytes, shared memory, executed warp instructions of the steady loop per
16 pixels by pipe, and the modelled time of the busiest pipe. All of it follows from the compiled code: no figure here
has been measured on a GPU. `--record` writes benchmarks/budgets.json; without it the figures are compared with it.
"""

import argparse
import importlib
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import sass, static_tables

BACKENDS = ("triton", "cuda")
BUDGETS = Path(__file__).with_name("budgets.json")
NVIDIA = ("sm_80", "sm_90", "sm_100")
ARCHITECTURES = (*NVIDIA, "gfx942")
"""Of the Triton kernels; the CUDA kernels for Hopper are built for sm_90a."""
SMALL_SHARED = "sm_86"  # stands for GPUs with 99 kB of shared memory; only what fits is looked at
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
WIDTHS = (16, 32, 64)
TOLERANCE = 1.03
# What one program may use, without which a kernel cannot be launched.
SHARED_LIMIT = {"sm_80": 166_912, SMALL_SHARED: 101_376, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
_COLOUR_CHANNELS = 3  # the only loops inside a tile's loop run over Y, Cb and Cr
_TRITON_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Figures(NamedTuple):
    """What one compiled kernel uses; issue_slots_per_16_px is None where nothing loops over pixels and on AMD."""

    toolchain: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    issue_slots_per_16_px: float | None
    pipes_per_16_px: dict[str, float]
    modelled_ms: float | None

    def record(self) -> dict[str, Any]:
        """The fields kept in budgets.json."""
        fields = ("toolchain", "registers", "spill_bytes", "shared_bytes", "issue_slots_per_16_px")
        return {name: getattr(self, name) for name in fields}


# ------------------------------------------------------------------------------------------------------ what to compile


def recorded_launches(architecture: str, width: int, dtype: torch.dtype) -> dict[str, Any]:
    """Every kernel variant that the five ops launch in forward and backward, by name: N 3, p 16, two 256x256 images."""
    from deco_kernels import testing

    launches: dict[str, Any] = {}
    for op in testing.OPS:
        inputs = testing.random_inputs(
            op, dtype=dtype, other_dtype=dtype, width=width, image_size=(1, 256, 256), token_width=1152
        )
        for launch in launches_of(inputs, architecture):
            launches.setdefault(f"{kernel_name(launch)}/D{width}/{str(dtype).removeprefix('torch.')}", launch)
    return launches


def launches_of(inputs, architecture: str) -> list:
    """What the Triton backend launches in forward and backward of these `testing.Inputs`; nothing runs."""
    from deco_kernels.backends.triton import common

    module = importlib.import_module(f"deco_kernels.backends.triton.{inputs.op}")
    tensors, options = list(inputs.tensors.values()), list(inputs.options.values())
    if inputs.op != "flow_matching_loss":
        options.append(1e-6)
    with common.record_launches(architecture) as recorded:
        module.forward(*tensors, *options)
        module.backward(*inputs.grad_outputs, *tensors, *options, [True] * len(tensors))
    return recorded


def kernel_name(launch) -> str:
    """ "module.kernel", with the flags that distinguish its variants."""
    module = launch.kernel.fn.__module__.rpartition(".")[2]
    flags = [name for name, value in launch.args.items() if value is True and name in ("FIRST", "LAST", "PADDED")]
    return f"{module}.{launch.kernel.fn.__name__}" + "".join(f"+{flag.lower()}" for flag in flags)


def compile_launch(launch, architecture: str):
    """Compile a recorded launch ahead of time, specialised on its arguments as a call on the device would be."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, hints = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.args[parameter.name]
        specialised = not parameter.do_not_specialize
        if parameter.is_constexpr or (specialised and isinstance(value, int) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + _TRITON_TYPES[value.dtype]
            hints[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if specialised and value % 16 == 0:
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
    pipes, slots, milliseconds = {}, None, None
    if pixels:
        warps_per_16_px = 16 * launch.options["num_warps"] / pixels
        counts, tensor_cycles = sass.steady_counts(code, _COLOUR_CHANNELS)
        pipes = {pipe: count * warps_per_16_px for pipe, count in counts.items()}
        slots = round(pipes["issue"], 1)
        if architecture == "sm_90":
            milliseconds = modelled_milliseconds(pipes, tensor_cycles * warps_per_16_px)
    return Figures(
        toolchain(architecture), code.registers, code.spill_bytes, compiled.metadata.shared, slots, pipes, milliseconds
    )


def modelled_milliseconds(pipes: dict[str, float], tensor_cycles: float) -> float:
    """Time of the busiest pipe, from warp instructions and tensor-pipe cycles per 16 pixels."""
    cycles = {pipe: count * sass.PIPE_CYCLES[pipe] for pipe, count in pipes.items() if pipe not in ("other", "tensor")}
    return static_tables.milliseconds(max(tensor_cycles, *cycles.values()))


def case_figures(architecture: str, width: int, dtype: str, parts: tuple[str, ...] = ("",)) -> dict[str, Figures]:
    """Figures of every kernel whose name starts with one of `parts`; can run in a process of its own."""
    launches = recorded_launches(architecture, width, DTYPES[dtype])
    return {name: figures(launch, architecture) for name, launch in launches.items() if name.startswith(parts)}


def _amd_figures(compiled) -> Figures:
    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", compiled.asm["amdgcn"])[1])

    spilled = 4 * 64 * field("vgpr_spill_count") + 4 * field("sgpr_spill_count")
    return Figures(toolchain("gfx942"), field("vgpr_count"), spilled, compiled.metadata.shared, None, {}, None)


def _pixels_per_tile(launch) -> int | None:
    """Pixels a turn of the steady loop covers; None for kernels that do not walk over pixels."""
    block = launch.args.get("BLOCK")
    if block is None or launch.kernel.fn.__name__ == "losses_kernel":
        return None
    walks_over_blocks = launch.kernel.fn.__module__.endswith("flow_matching_loss") and "fold" not in kernel_name(launch)
    return block * 64 if walks_over_blocks else block


def toolchain(architecture: str) -> str:
    import triton

    if architecture.startswith("gfx"):
        return f"triton {triton.__version__}, its LLVM"
    from triton import knobs

    assembler = knobs.nvidia.ptxas_blackwell if architecture == "sm_100" else knobs.nvidia.ptxas
    return f"triton {triton.__version__}, ptxas {assembler.version}"


# ---------------------------------------------------------------------------------------------------------- comparison


def recorded_budgets(backend: str) -> dict[str, dict[str, Any]]:
    """Kernel -> architecture -> record, of the kernels of one backend."""
    budgets = json.loads(BUDGETS.read_text())
    is_cuda = backend == "cuda"
    return {name: entry for name, entry in budgets.items() if name.startswith(static_tables.CUDA_PREFIX) == is_cuda}


def exceeded(figures: Figures, budget: dict[str, Any]) -> Iterator[str]:
    """What lies more than 3 % above the record; nothing if the toolchain is another one."""
    if figures.toolchain != budget["toolchain"]:
        return
    for name, recorded in budget.items():
        actual = getattr(figures, name)
        if name != "toolchain" and recorded is not None and actual > recorded * TOLERANCE:
            yield f"{name} {actual:g}, recorded {recorded:g}"


def selected(architectures: list[str], widths: list[int], dtypes: list[str]) -> Iterator[tuple[str, int, str]]:
    """(architecture, width, dtype): the given widths and dtypes on sm_90, D 32 in bfloat16 on the others too."""
    for architecture in architectures:
        for width in widths:
            for dtype in dtypes:
                if architecture == "sm_90" or (width, dtype) == (32, "bfloat16"):
                    yield architecture, width, dtype


def triton_figures(cases: list[tuple[str, int, str]]) -> Iterator[tuple[str, str, Figures]]:
    """(name, architecture, figures) of every Triton kernel in the (architecture, width, dtype) of `cases`."""
    seen = set()
    for architecture, width, dtype in cases:
        for name, launch in recorded_launches(architecture, width, DTYPES[dtype]).items():
            if (name, architecture) not in seen:
                seen.add((name, architecture))
                yield name, architecture, figures(launch, architecture)


def cuda_figures(cases: list[tuple[str, int, str]]) -> Iterator[tuple[str, str, Figures]]:
    """The same of the CUDA kernels; one compilation of a source gives all widths and dtypes."""
    from benchmarks import static_cuda

    for architecture in static_cuda.ARCHITECTURES:
        wanted = {(w, d) for a, w, d in cases if a == architecture.removesuffix("a")}
        for source in static_cuda.sources() if wanted else ():
            for name, found in static_cuda.source_figures(source, architecture).items():
                if static_cuda.is_among(name, wanted):
                    yield name, architecture, found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks static", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--record", action="store_true", help="write benchmarks/budgets.json")
    parser.add_argument("--backend", choices=BACKENDS, help="(default: both)")
    parser.add_argument(
        "--architecture", action="append", choices=tuple(SHARED_LIMIT), help=f"repeatable (default: not {SMALL_SHARED})"
    )
    parser.add_argument("--width", action="append", type=int, choices=WIDTHS, help="repeatable (default: 32)")
    parser.add_argument("--dtype", action="append", choices=tuple(DTYPES), help="repeatable (default: bfloat16)")
    parser.add_argument("--everywhere", action="store_true", help="every width and dtype on every architecture")
    parser.add_argument("--tables", action="store_true", help="print the record as the tables of a page in docs")
    parser.add_argument("--output", metavar="FILE.json", help="write all figures there")
    options = parser.parse_args(arguments)
    budgets = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    if options.tables:
        for backend in [options.backend] if options.backend else BACKENDS:
            print(*static_tables.tables(budgets, backend), sep="\n\n", end="\n\n")
        return 0
    if os.environ.get("TRITON_INTERPRET"):
        print("benchmarks static: unset TRITON_INTERPRET; the interpreter compiles nothing", file=sys.stderr)
        return 2

    default = SHARED_LIMIT if options.everywhere else ARCHITECTURES
    architectures, widths = options.architecture or list(default), options.width or [32]
    dtypes = options.dtype or ["bfloat16"]
    if options.everywhere:
        cases = [(a, w, d) for a in architectures for w in WIDTHS for d in DTYPES]
    else:
        cases = list(selected(architectures, widths, dtypes))
    everything: dict[str, dict[str, Any]] = {}
    failures = []
    print("Modelled from the compiled code, not measured on a GPU; slots per 16 pixels; ms for 32 images of 256x256.")
    print(_row("kernel", "architecture", "registers", "spills", "shared", "slots", "ms", "pipes"), flush=True)
    for name, architecture, found in _examined(options.backend, cases):
        everything.setdefault(name, {})[architecture] = found._asdict()
        print(_row(name, architecture, *_cells(found)), flush=True)
        if found.shared_bytes > SHARED_LIMIT[architecture.removesuffix("a")]:
            failures.append(f"{name}: {found.shared_bytes} bytes of shared memory do not fit {architecture}")
        if options.record:
            budgets.setdefault(name, {})[architecture] = found.record()
        elif architecture in budgets.get(name, {}):
            failures += [f"{name} on {architecture}: {what}" for what in exceeded(found, budgets[name][architecture])]
    if options.record:
        BUDGETS.write_text(json.dumps(budgets, indent=1, sort_keys=True) + "\n")
    if options.output:
        Path(options.output).write_text(json.dumps(everything, indent=1, sort_keys=True) + "\n")
    for failure in failures:
        print(f"too much: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _examined(backend: str | None, cases: list[tuple[str, int, str]]) -> Iterator[tuple[str, str, Figures]]:
    """What the command was asked for; without a choice of backend, what this machine can compile."""
    if backend != "cuda":
        yield from triton_figures(cases)
    if backend != "triton":
        from benchmarks import static_cuda

        reason = static_cuda.unavailable_reason()
        if reason is None:
            yield from cuda_figures(cases)
        elif backend == "cuda":
            raise SystemExit(f"benchmarks static: the CUDA kernels cannot be examined: {reason}")
        else:
            print(f"The CUDA kernels are left out: {reason}", file=sys.stderr)


def _cells(found: Figures) -> tuple[str, ...]:
    slots = "-" if found.issue_slots_per_16_px is None else f"{found.issue_slots_per_16_px:.0f}"
    time = "-" if found.modelled_ms is None else f"{found.modelled_ms:.3f}"
    pipes = " ".join(f"{pipe} {count:.0f}" for pipe, count in sorted(found.pipes_per_16_px.items()) if pipe != "issue")
    return str(found.registers), str(found.spill_bytes), str(found.shared_bytes), slots, time, pipes


def _row(name: str, architecture: str, registers: str, spills: str, shared: str, slots: str, time: str, pipes: str):
    return f"{name:58} {architecture:12} {registers:>9} {spills:>6} {shared:>7} {slots:>6} {time:>6}  {pipes}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
