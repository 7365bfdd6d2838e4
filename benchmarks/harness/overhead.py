"""Host time per call on one pixel, and the import time of the package beyond that of PyTorch."""

import functools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from benchmarks.harness.steps import require_gradients
from benchmarks.harness.verification import SEED
from benchmarks.names import BEST_EAGER, FORWARD, PUBLISHED, TRAINING
from benchmarks.ops.problem import Operands, Problem, problem_of
from benchmarks.ops.sizes import Size
from deco_kernels import BackendUnavailable, ops

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
    """Microseconds per call of pixel_decoder on a single pixel, median over interleaved batches of `calls` calls.

    The arguments are prepared before the clock starts. With backward, a call includes clearing the previous gradients.
    """
    problem, size = problem_of(_OP), Size(height=1, width=1, patch_size=1)
    rows = []
    for pass_ in (FORWARD, TRAINING):
        training = pass_ == TRAINING
        operands = problem.make_operands(size, torch.float32, torch.Generator(device).manual_seed(SEED))
        require_gradients(problem, operands, training)
        loops = {}
        for name, call in _calls(problem, size, operands, backends).items():
            loop = functools.partial(_train if training else _forward, call, operands)
            row = {"op": _OP, "pass": pass_, "contender": name}
            try:
                loop(3)
            except BackendUnavailable as error:
                rows.append(row | {"status": "unavailable", "reason": str(error)})
            else:
                loops[name] = loop
        micros = {name: [] for name in loops}
        for _ in range(_BATCHES):
            for name, loop in loops.items():
                micros[name].append(_microseconds(loop, calls, device))
        for name, values in micros.items():
            median = statistics.median(values)
            rows.append({"op": _OP, "pass": pass_, "contender": name, "status": "ok", "us": median})
    return rows


def _calls(problem: Problem, size: Size, operands: Operands, backends: tuple[str, ...]) -> dict[str, Callable]:
    """Functions without arguments that return the velocity."""
    tensors = operands.tensors()
    arguments = {**problem.given(tensors, size), **problem.options(size)}
    return {
        PUBLISHED: lambda: problem.published(tensors, size)[0],
        BEST_EAGER: lambda: problem.best_eager(tensors, size)[0],
        **{backend: functools.partial(ops.pixel_decoder, **arguments, backend=backend) for backend in backends},
    }


def _forward(call: Callable, operands: Operands, count: int) -> None:
    with torch.no_grad():
        for _ in range(count):
            call()


def _train(call: Callable, operands: Operands, count: int) -> None:
    leaves = [tensor for tensor in operands.tensors().values() if tensor.requires_grad]
    for _ in range(count):
        for leaf in leaves:
            leaf.grad = None
        call().backward(operands.incoming[0])


def _microseconds(loop: Callable[[int], None], calls: int, device: str) -> float:
    """On a GPU, the time until the last call is launched: the queue starts empty and is not synchronized."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    loop(calls)
    return 1e6 * (time.perf_counter() - start) / calls


def measure_import(repeats: int) -> dict:
    """Median seconds that importing deco_kernels, then also deco_kernels.ops, adds to importing torch."""
    samples = []
    for _ in range(repeats):
        answer = subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, text=True, check=True)
        samples.append([float(value) for value in answer.stdout.split()])
    package, with_ops = (statistics.median(values) for values in zip(*samples, strict=True))
    return {"package_s": package, "package_and_ops_s": with_ops, "repeats": repeats}
