"""Host time per call on one pixel, and what importing the package adds to importing PyTorch."""

import statistics
import subprocess
import sys
import time

import torch

from benchmarks.names import FORWARD, TRAINING
from benchmarks.problem import problem_of
from benchmarks.sizes import Size
from benchmarks.steps import Step, contenders_of, require_gradients
from benchmarks.verification import SEED
from deco_kernels import BackendUnavailable

_OP = "pixel_decoder"
_BATCHES = 15

_IMPORT = """
import time, torch
start = time.perf_counter()
import deco_kernels
package = time.perf_counter()
import deco_kernels.ops
print(package - start, time.perf_counter() - start)
"""


def measure_overhead(device: str, backends: tuple[str, ...], calls: int) -> list[dict]:
    """Microseconds per call of pixel_decoder on a single pixel, median of batches of `calls` calls taken in turns."""
    problem, size = problem_of(_OP), Size(height=1, width=1, patch_size=1)
    rows = []
    for pass_ in (FORWARD, TRAINING):
        operands = problem.make_operands(size, torch.float32, torch.Generator(device).manual_seed(SEED))
        require_gradients(problem, operands, pass_ == TRAINING)
        steps = {}
        for contender in contenders_of(problem, size, backends, compiled=False):
            step = Step(problem, contender, torch.float32, device, pass_ == TRAINING)
            try:
                for _ in range(3):
                    step(operands)
            except BackendUnavailable as error:
                row = {"op": _OP, "pass": pass_, "contender": contender.name}
                rows.append(row | {"status": "unavailable", "reason": str(error)})
                continue
            steps[contender.name] = step
        micros = {name: [] for name in steps}
        for _ in range(_BATCHES):
            for name, step in steps.items():
                micros[name].append(_microseconds(step, operands, calls, device))
        for name, values in micros.items():
            median = statistics.median(values)
            rows.append({"op": _OP, "pass": pass_, "contender": name, "status": "ok", "us": median})
    return rows


def _microseconds(step: Step, operands, calls: int, device: str) -> float:
    """On a GPU until the last call has been launched: the queue is empty at the start and is not waited for."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        step(operands)
    return 1e6 * (time.perf_counter() - start) / calls


def measure_import(repeats: int) -> dict:
    """Seconds that `import deco_kernels`, then also `deco_kernels.ops`, add to `import torch`: medians of processes."""
    samples = []
    for _ in range(repeats):
        answer = subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, text=True, check=True)
        samples.append([float(value) for value in answer.stdout.split()])
    package, with_ops = (statistics.median(values) for values in zip(*samples, strict=True))
    return {"package_s": package, "package_and_ops_s": with_ops, "repeats": repeats}
