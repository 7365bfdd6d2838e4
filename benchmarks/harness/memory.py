"""Peak memory growth of one training step of an op, outputs included; one process per contender."""

import functools
import gc
import json
import signal
import subprocess
import sys

import torch

from benchmarks.harness.steps import Contender, Step, contenders_of, require_gradients
from benchmarks.harness.verification import SEED
from benchmarks.names import PUBLISHED, REFERENCE, TWO_OPS
from benchmarks.ops.pixel_decoder_from_tokens import PixelDecoderFromTokens
from benchmarks.ops.problem import Problem, problem_of
from benchmarks.ops.sizes import Size
from deco_kernels import BackendUnavailable
from deco_kernels.machine import default_heap, peak_bytes, reset_peak

_DECODER, _ONE_PASS = "pixel_decoder", "pixel_decoder_loss_from_tokens"
CASES = ((_DECODER, 8), (_ONE_PASS, 1), (_ONE_PASS, 32))  # (op, images of 256x256 pixels)
_WARM = Size(height=16, width=16)


def contenders_in(op: str, backends: tuple[str, ...]) -> list[str]:
    """The published formulation and every backend, with both choices of save_memory; of a one-pass op, at whose sizes
    the formulations may not fit the memory, every fused backend and its two ops with both choices."""
    fused = [name for name in backends if name != REFERENCE]
    if op == _DECODER:
        choices = [(name, problem_of(op).other_choice(name)) for name in fused]
        return [PUBLISHED, *backends, *(name + choice[0] for name, choice in choices if choice is not None)]
    return [name + choice for name in fused for choice in (_keeping(name), TWO_OPS, "")]


def _keeping(backend: str) -> str:
    """The two ops with save_memory=False."""
    return TWO_OPS + PixelDecoderFromTokens().other_choice(backend)[0]


def measure_memory(op: str, batch: int, device: str, dtype: str, backends: tuple[str, ...], threads: int) -> list[dict]:
    """Rows of all contenders."""
    rows = []
    for contender in contenders_in(op, backends):
        arguments = (op, str(batch), contender, dtype, device, str(threads))
        command = [sys.executable, "-m", "benchmarks.harness.memory", *arguments]
        answer = subprocess.run(command, env=default_heap(), capture_output=True, text=True, check=False)
        row = {"op": op, "pixels": Size(batch=batch).pixels, "dtype": dtype, "contender": contender}
        if answer.returncode:
            lines = answer.stderr.strip().splitlines() or [f"the process ended with status {answer.returncode}"]
            killed = answer.returncode == -signal.SIGKILL  # as the system does where memory runs out
            rows.append(row | {"status": "unavailable" if killed else "failed", "reason": lines[-1]})
        else:
            rows.append(row | json.loads(answer.stdout))
    return rows


def growth(op: str, size: Size, name: str, dtype: torch.dtype, device: str) -> int:
    """Peak memory during the step minus memory before it, in bytes. A step on one token runs first, so that code and
    thread stacks are loaded."""
    step_growth(op, _WARM, name, dtype, device)
    gc.collect()
    return step_growth(op, size, name, dtype, device)


def step_growth(op: str, size: Size, name: str, dtype: torch.dtype, device: str) -> int:
    problem = problem_of(op)
    operands = problem.make_operands(size, dtype, torch.Generator(device).manual_seed(SEED))
    require_gradients(problem, operands, training=True)
    step = Step(problem, _contender(problem, size, name), dtype, device, training=True)
    before = reset_peak(device)
    step(operands)
    return peak_bytes(device) - before


def _contender(problem: Problem, size: Size, name: str) -> Contender:
    backend = name.split()[0]
    if name == backend + _keeping(backend):
        call = functools.partial(problem.two_ops, size=size, backend=backend, save_memory=False)
        return Contender(name, call, backend)
    backends = () if name == PUBLISHED else (backend,)
    return next(contender for contender in contenders_of(problem, size, backends) if contender.name == name)


def main(arguments: list[str]) -> int:
    """OP BATCH CONTENDER DTYPE DEVICE THREADS: prints one JSON object."""
    op, batch, name, dtype, device, threads = arguments
    torch.set_num_threads(int(threads))
    try:
        size = Size(batch=int(batch))
        found = {"status": "ok", "growth_bytes": growth(op, size, name, getattr(torch, dtype), device)}
    except BackendUnavailable as error:
        found = {"status": "unavailable", "reason": str(error)}
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
