"""The stages of `make gpu-check` and their steps, the most valuable first."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu_check import probes
from benchmarks.gpu_check.running import ROOT, Step
from benchmarks.harness.toolkit import cuda_tool
from benchmarks.names import OPS

STAGE_SECONDS = 540
MOST_PROCESSES = 8
"""Of the tests."""
_FIRST_OPS = ("pixel_decoder", "flow_matching_loss")
_ONE_PASS_OPS = ("pixel_decoder_loss", "pixel_decoder_loss_from_tokens")
_TRAINING = ["--size", "train-xl-256"]
_SEPARATE_ALLOCATIONS = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
_PROFILED = {  # op -> its kernel that ncu examines
    "pixel_decoder": "forward_kernel",
    "adaln_block": "backward_kernel",
    "flow_matching_loss": "gradient_kernel",
}
_SECTIONS = ("SpeedOfLight", "Occupancy", "MemoryWorkloadAnalysis", "WarpStateStats")


class Machine(NamedTuple):
    """What the steps depend on.

    Attributes:
        capability: compute capability, such as "9.0".
        folder: folder for the result files of the benchmarks, NAME.json each.
        multiprocessors: their number.
        ready: whether a prepared archive has brought the CUDA module.
        failed: IDs of tests that failed in earlier stages.
    """

    capability: str
    folder: Path
    multiprocessors: int = 132
    ready: bool = False
    failed: tuple[str, ...] = ()

    @property
    def architecture(self) -> str:
        """The architecture that the CUDA module is built for."""
        number = self.capability.replace(".", "")
        return {"90": "90a"}.get(number, number)


def setup(machine: Machine) -> Iterator[Step]:
    """What has to be compiled on this machine before the steps of a stage."""
    if not machine.ready:
        build = {"DECO_KERNELS_BUILD": "cuda-only", "DECO_KERNELS_CUDA_ARCHS": machine.architecture}
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        yield Step("build", "CUDA module", command, 120, build, _lacking("nvcc") or _lacking_package("pybind11"))
    command = _module("benchmarks.gpu_check.compiling", machine.architecture, str(machine.multiprocessors))
    yield Step("compile", "Triton kernels that are not in the cache", command, 60, missing=_lacking_package("triton"))


def first(machine: Machine) -> Iterator[Step]:
    """Correctness and the times that matter most: two ops without torch.compile, and sampling."""
    command = _module("benchmarks.gpu_check.probes", machine.architecture)
    missing = None if probes.program(machine.architecture).exists() else _lacking("nvcc")
    yield Step("probes", "cycles of single instructions", command, 25, missing=missing)
    selftest = _module("deco_kernels", "--selftest", "--dtype", "bfloat16", "--backend", "cuda", "--backend", "triton")
    yield Step("selftest", "bfloat16 of cuda and triton against float64", selftest, 25)
    yield _benchmark(machine, "pixel_decoder", 50, "pixel_decoder", *_TRAINING, "--dtype", "bfloat16", "--no-compile")
    yield _benchmark(machine, "loss", 20, "flow_matching_loss", *_TRAINING, "--dtype", "bfloat16", "--no-compile")
    yield _sampling("sampling", 50)
    yield _tests("tests", 130, *map(str, gpu_tests()), "-k", "not emulator")
    yield _benchmark(machine, "kernels", 40, "kernels", "--dtype", "bfloat16")


def second(machine: Machine) -> Iterator[Step]:
    """Sanitizers, the other ops, whole steps, sizes, and counters of three kernels."""
    yield _sanitizer("memcheck", 30)
    yield _sanitizer("racecheck", 80)
    yield _benchmark(machine, "one_pass", 45, *_ONE_PASS_OPS, *_TRAINING, "--dtype", "bfloat16", "--no-compile")
    yield _benchmark(machine, "end_to_end", 80, "end_to_end", "--dtype", "bfloat16", "--no-compile")
    yield _benchmark(machine, "graphs", 30, "pixel_decoder", "overhead", "--size", "sample-256", "--quick")
    yield _benchmark(machine, "scaling", 55, "scaling", "--dtype", "bfloat16")
    for op, kernel in _PROFILED.items():
        yield _counters(op, kernel, 30)
    others = [op for op in OPS if op not in (*_FIRST_OPS, *_ONE_PASS_OPS)]
    yield _benchmark(machine, "other_ops", 50, *others, "memory", *_TRAINING, "--dtype", "bfloat16", "--no-compile")


def third(machine: Machine) -> Iterator[Step]:
    """Baselines with torch.compile, other dtypes and widths, the emulator, and what failed before."""
    yield _benchmark(machine, "compiled", 110, *_FIRST_OPS, *_TRAINING, "--dtype", "bfloat16")
    yield _sampling("compiled_trunk", 90, "--compile-trunk")
    yield _benchmark(machine, "float16", 50, *_FIRST_OPS, *_TRAINING, "--dtype", "float16", "--no-compile")
    widths = [word for width in (16, 64) for word in ("--size", f"B=32,D={width}")]
    yield _benchmark(machine, "widths", 65, "pixel_decoder", *widths, "--dtype", "bfloat16", "--no-compile")
    yield _tests("emulator", 110, *map(str, gpu_tests()), "-k", "emulator")
    again = _tests("failures", 40, *machine.failed, "--tb=long")
    yield again if machine.failed else again._replace(missing="no test has failed")


STAGES = {"first": first, "second": second, "third": third}


def gpu_tests() -> list[Path]:
    """Files with tests marked gpu, the CUDA kernels first. Other test files may need packages that this program does
    not require."""
    return sorted(ROOT.glob("tests/*/test_*_gpu.py"), key=lambda path: ("cuda" not in path.name, path))


def _module(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", name, *arguments]


def _benchmark(machine: Machine, name: str, seconds: int, *arguments: str) -> Step:
    output = ["--device", "cuda", "--stream", "--output", str(machine.folder / f"{name}.json")]
    command = _module("benchmarks", *arguments, *output, "--stop-after", str(seconds // 2))
    return Step(name, f"benchmarks {' '.join(arguments)}", command, seconds)


def _sampling(name: str, seconds: int, *arguments: str) -> Step:
    """The step time of the largest class-to-image model at batch 1, which its trunk decides."""
    steps = ["--preset", "deco-xl/16", "--steps", "100", "--trunk-steps", "50", "--rounds", "3"]
    command = _module("benchmarks", "reuse", *steps, *arguments, "--device", "cuda", "--stream")
    return Step(name, f"benchmarks {' '.join(command[3:])}", command, seconds)


def _tests(name: str, seconds: int, *arguments: str) -> Step:
    """With pytest-xdist in processes that share the GPU: most of a test is work of the host."""
    options = "-q -m gpu -p benchmarks.gpu_check.streamed_tests -p no:cacheprovider -o console_output_style=classic"
    processes = [] if _lacking_package("xdist") else ["-n", str(min(MOST_PROCESSES, os.cpu_count() or 1))]
    command = _module("pytest", *options.split(), *processes, *arguments)
    return Step(name, "tests marked gpu", command, seconds, missing=_lacking_package("pytest"))


def _sanitizer(check: str, seconds: int) -> Step:
    tool = cuda_tool("compute-sanitizer") or "compute-sanitizer"
    calls = _module("benchmarks.gpu_check.calls", "small", "cuda")
    command = [tool, "--tool", check, "--error-exitcode", "9", *calls]
    missing = _lacking("compute-sanitizer")
    return Step(check, "small calls of the cuda backend", command, seconds, _SEPARATE_ALLOCATIONS, missing)


def _counters(op: str, kernel: str, seconds: int) -> Step:
    """Hardware counters of one launch on a training batch; clocks stay as they are."""
    options = [word for section in _SECTIONS for word in ("--section", section)]
    options += ["--clock-control", "none", "--kernel-name", f"regex:^{kernel}$", "--launch-count", "1"]
    command = [cuda_tool("ncu") or "ncu", *options, *_module("benchmarks.gpu_check.calls", "training", "cuda", op)]
    return Step(f"ncu {op}", f"hardware counters of {kernel}", command, seconds, missing=_lacking("ncu"))


def _lacking(tool: str) -> str | None:
    return None if cuda_tool(tool) else f"no {tool} on PATH or in $CUDA_HOME/bin"


def _lacking_package(name: str) -> str | None:
    return None if importlib.util.find_spec(name) else f"the package {name} is not installed"
