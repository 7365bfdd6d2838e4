"""`python -m benchmarks.gpu_check prepare`: builds what a check needs on a machine without a GPU.

Needs nvcc, and a Python of the given version with PyTorch and the given Triton: this one, that of `make env-gpu`, or
pythonX.Y on PATH. The archive goes to --output, by default to out/prepared.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.gpu_check import prepared, probes
from benchmarks.gpu_check.running import ROOT, result_in, say
from benchmarks.static.machines import MACHINES

ARCHITECTURES = ("80", "89", "90a", "100", "120")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check prepare", description=__doc__.split("\n")[0])
    parser.add_argument("--python", required=True, metavar="X.Y", help="Python of the machine with the GPU")
    parser.add_argument("--triton", required=True, metavar="X.Y.Z", help="Triton of the machine with the GPU")
    parser.add_argument("--arch", required=True, choices=ARCHITECTURES, help="architecture of the GPU")
    parser.add_argument(
        "--multiprocessors", type=int, metavar="N", help="of the GPU (default: those of the static model's)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE.tar.xz", help="archive to write")
    options = parser.parse_args(arguments)
    try:
        found = interpreter(options.python, options.triton)
    except ValueError as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        return 2
    if found != sys.executable:
        command = [found, "-m", "benchmarks.gpu_check", "prepare", *arguments]
        return subprocess.call(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    name = f"gpu-check-python{options.python}-triton{options.triton}-sm{options.arch}.tar.xz"
    output = options.output or ROOT / "out" / "prepared" / name
    try:
        prepare(options.arch, options.multiprocessors or MACHINES[f"sm_{options.arch}"].multiprocessors, output)
    except RuntimeError as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        return 1
    return 0


def prepare(architecture: str, multiprocessors: int, output: Path) -> None:
    """Builds an archive for the current Python and Triton. Raises RuntimeError if a build fails."""
    name = f"{prepared.python_version()}-{prepared.triton_version()}-{architecture}"
    folder = ROOT / "build" / "prepared" / name
    say(f"building the CUDA module for sm_{architecture}")
    module = build_module(architecture, folder)
    say("compiling the Triton kernels")
    kernels = compile_kernels(architecture, multiprocessors, folder / "triton")
    program = probes.compile_source(architecture, folder / probes.program(architecture).name)
    prepared.write(output, architecture, kernels, folder / "triton", {"module": module, "programs": program})
    say(f"{output}: {len(kernels)} kernels, {output.stat().st_size / 1e6:.1f} MB")


def interpreter(python: str, triton: str) -> str:
    """Path of a Python of this version with this Triton and PyTorch. Raises ValueError if there is none."""
    if (python, triton) == (prepared.python_version(), prepared.triton_version()):
        return sys.executable
    probe = "import sys, torch, triton; print(f'{sys.version_info[0]}.{sys.version_info[1]}', triton.__version__)"
    for candidate in (shutil.which(str(ROOT / ".venv-gpu" / "bin" / "python")), shutil.which(f"python{python}")):
        if candidate is not None:
            answer = subprocess.run([candidate, "-c", probe], capture_output=True, text=True).stdout.split()
            if answer == [python, triton]:
                return candidate
    raise ValueError(
        f"no Python {python} with PyTorch and Triton {triton} was found; create one with "
        f"`make env-gpu GPU_ENV_PYTHON=python{python}` (requirements/gpu.txt), or run prepare with such a Python"
    )


def build_module(architecture: str, folder: Path) -> Path:
    """The CUDA module for the current Python, built in `folder` for one architecture."""
    environment = {"DECO_KERNELS_BUILD": "cuda-only", "DECO_KERNELS_CUDA_ARCHS": architecture}
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    command += ["--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    _run(command, environment)
    (module,) = (folder / "lib" / "deco_kernels").glob("_native_cuda*.so")
    return module


def compile_kernels(architecture: str, multiprocessors: int, cache: Path) -> list[str]:
    """Compiles the Triton kernels into the folder `cache`; returns their names."""
    shutil.rmtree(cache, ignore_errors=True)
    names: list[str] = []

    def keep(line: str) -> None:
        print(line, flush=True)
        result = result_in(line)
        if result is not None:
            if result["cache"] == "failed":
                raise RuntimeError(f"{result['kernel']}: {result['message']}")
            names.append(result["kernel"])

    command = [sys.executable, "-m", "benchmarks.gpu_check.compiling", architecture, str(multiprocessors)]
    _run(command, {"TRITON_CACHE_DIR": str(cache)}, keep)
    return names


def _run(command: list[str], environment: dict[str, str], each_line: Callable[[str], None] = print) -> None:
    with subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), **environment}, stdout=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            each_line(line.rstrip("\n"))
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed with exit status {process.returncode}")
