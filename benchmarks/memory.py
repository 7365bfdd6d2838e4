"""Peak memory growth of one training step of pixel_decoder, outputs included; a process per contender."""

import json
import os
import subprocess
import sys

import torch

from benchmarks.names import KEPT_HEAP, PUBLISHED
from benchmarks.problem import problem_of
from benchmarks.sizes import Size
from benchmarks.steps import Step, contenders_of, require_gradients
from benchmarks.verification import SEED
from deco_kernels import BackendUnavailable

_OP = "pixel_decoder"
SIZE = Size(batch=8)  # 524,288 pixels
_WARM = Size(height=16, width=16)


def measure_memory(device: str, dtype: str, backends: tuple[str, ...], threads: int) -> list[dict]:
    """Rows of the published formulation and of every backend. The processes run with glibc's default heap: it returns
    large blocks, so that the peak is what is alive at once."""
    environment = {name: value for name, value in os.environ.items() if name not in KEPT_HEAP}
    rows = []
    for contender in (PUBLISHED, *backends):
        command = [sys.executable, "-m", "benchmarks.memory", contender, dtype, device, str(threads)]
        answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        row = {"op": _OP, "pixels": SIZE.pixels, "dtype": dtype, "contender": contender}
        if answer.returncode:
            lines = answer.stderr.strip().splitlines()
            rows.append(row | {"status": "unavailable", "reason": lines[-1] if lines else "the process was killed"})
        else:
            rows.append(row | json.loads(answer.stdout))
    return rows


def growth(name: str, dtype: torch.dtype, device: str) -> int:
    """Bytes by which the peak of this process exceeds what it held before the step. A step on one token comes first, so
    that code and thread stacks are loaded."""
    problem = problem_of(_OP)
    backends = () if name == PUBLISHED else (name,)
    before = 0
    for size in (_WARM, SIZE):
        contender = next(c for c in contenders_of(problem, size, backends) if c.name == name)
        operands = problem.make_operands(size, dtype, torch.Generator(device).manual_seed(SEED))
        require_gradients(problem, operands, training=True)
        before = reset_peak(device)
        Step(problem, contender, dtype, device, training=True)(operands)
    return peak_bytes(device) - before


def reset_peak(device: str) -> int:
    """Makes the peak start anew where the system allows it; returns the bytes held now."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass  # the peak of making the operands then stands, and is below that of the step
    return _status_bytes("VmRSS")


def peak_bytes(device: str) -> int:
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def main(arguments: list[str]) -> int:
    """CONTENDER DTYPE DEVICE THREADS: prints one JSON object."""
    name, dtype, device, threads = arguments
    torch.set_num_threads(int(threads))
    try:
        found = {"status": "ok", "growth_bytes": growth(name, getattr(torch, dtype), device)}
    except BackendUnavailable as error:
        found = {"status": "unavailable", "reason": str(error)}
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
