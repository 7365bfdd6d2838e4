"""Peak memory growth of one training step of pixel_decoder, outputs included; one process per contender."""

import json
import subprocess
import sys

import torch

from benchmarks.harness.steps import Step, contenders_of, require_gradients
from benchmarks.harness.verification import SEED
from benchmarks.names import PUBLISHED
from benchmarks.ops.problem import problem_of
from benchmarks.ops.sizes import Size
from deco_kernels import BackendUnavailable
from deco_kernels.machine import default_heap, peak_bytes, reset_peak

_OP = "pixel_decoder"
SIZE = Size(batch=8)  # 524,288 pixels
_WARM = Size(height=16, width=16)


def measure_memory(device: str, dtype: str, backends: tuple[str, ...], threads: int) -> list[dict]:
    """Rows of the published formulation and of every backend."""
    rows = []
    for contender in (PUBLISHED, *backends):
        command = [sys.executable, "-m", "benchmarks.harness.memory", contender, dtype, device, str(threads)]
        answer = subprocess.run(command, env=default_heap(), capture_output=True, text=True, check=False)
        row = {"op": _OP, "pixels": SIZE.pixels, "dtype": dtype, "contender": contender}
        if answer.returncode:
            lines = answer.stderr.strip().splitlines()
            rows.append(row | {"status": "unavailable", "reason": lines[-1] if lines else "the process was killed"})
        else:
            rows.append(row | json.loads(answer.stdout))
    return rows


def growth(name: str, dtype: torch.dtype, device: str) -> int:
    """Peak memory during the step minus memory before it, in bytes. A step on one token runs first, so that code and
    thread stacks are loaded."""
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
