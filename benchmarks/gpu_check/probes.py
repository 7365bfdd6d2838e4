"""Measures the cycles per scheduler of single instructions with probes.cu, beside the static model: `probes 90a`.

Prints one JSON line per probe, with the keys `probe`, `cycles` and `modeled` (cycles of the static model).
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu_check.running import ROOT
from benchmarks.harness.toolkit import cuda_tool
from benchmarks.static.machines import MACHINES

SOURCE = Path(__file__).with_name("probes.cu")
FOLDER = ROOT / "build" / "gpu_check"
_MMA, _LDMATRIX, _FFMA = "HMMA.16816.F32.BF16", "LDSM.16.M88.4", "FFMA"
OPCODES = {
    "mma.sync m16n8k16": {_MMA: 1},
    "wgmma m64n32k16": {"HGMMA.64x32x16.F32.BF16": 1},
    "wgmma m64n96k16": {"HGMMA.64x96x16.F32.BF16": 1},
    "tanh": {"MUFU.TANH": 1},
    "ldmatrix.x4": {_LDMATRIX: 1},
    "shuffle": {"SHFL.BFLY": 1},
    "FFMA": {_FFMA: 1},
    "ldmatrix.x4 and two mma.sync": {_LDMATRIX: 1, _MMA: 2},
    "mma.sync and four FFMA": {_MMA: 1, _FFMA: 4},
}
"""Probe -> the instructions that fill its loop, each so often; wgmma exists on sm_90a alone."""

PIPES = {"tensor": "mma.sync m16n8k16", "shared": "ldmatrix.x4", "special": "tanh", "fp32": "FFMA"}
"""Pipe of the static model -> the probe that measures it."""
WGMMA = ("wgmma m64n32k16", "wgmma m64n96k16")
"""Probes of the tensor cores that Triton's kernels on sm_90 use."""


def program(architecture: str) -> Path:
    """Path of the compiled program of this source."""
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    return FOLDER / f"probes-{architecture}-{digest}"


def compile_source(architecture: str, output: Path, *arguments: str) -> Path:
    """Compiles probes.cu for one architecture to a program, or as the arguments of nvcc say.

    Raises RuntimeError if there is no nvcc or if it fails.
    """
    nvcc = cuda_tool("nvcc")
    if nvcc is None:
        raise RuntimeError("no nvcc on PATH or in $CUDA_HOME/bin")
    output.parent.mkdir(parents=True, exist_ok=True)
    command = [nvcc, "-std=c++17", "-O3", f"-arch=sm_{architecture}", *arguments, str(SOURCE), "-o", str(output)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"compiling {SOURCE.name} failed:\n{result.stderr[-2000:]}")
    return output


def modeled_cycles(probe: str, architecture: str) -> float:
    """Cycles per scheduler of the instructions of a probe in the static model."""
    machine = MACHINES[f"sm_{architecture}"]
    return max(machine.occupied(machine.cycles(OPCODES[probe])).values())


def main(architecture: str) -> int:
    binary = program(architecture)
    if not binary.exists():
        compile_source(architecture, binary)
    result = subprocess.run([binary], stdout=subprocess.PIPE, text=True)
    for line in result.stdout.splitlines():
        measured = json.loads(line)
        print(json.dumps(measured | {"modeled": modeled_cycles(measured["probe"], architecture)}), flush=True)
    return result.returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
