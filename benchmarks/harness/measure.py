"""Rows for one op, size, dtype and pass: every contender is verified, then timed interleaved with the others."""

import dataclasses
import os
from collections.abc import Callable

import torch

from benchmarks.harness.cuda_timing import graph_columns, host_microseconds
from benchmarks.harness.gpu_state import Watch
from benchmarks.harness.steps import Contender, Step, contenders_of, require_gradients
from benchmarks.harness.timing import buffer_count, interleaved
from benchmarks.harness.verification import SEED, can_be_timed, flagged, verify
from benchmarks.names import BACKWARD_ALONE, TRAINING
from benchmarks.ops.problem import Operands, Problem
from benchmarks.ops.sizes import Size

UNSTABLE = 0.05  # of the median: half the distance from the 20th to the 80th percentile, or the drift within the run
_EAGER_FLOATS = 13  # saved per pixel, block and channel by a training step in eager PyTorch


@dataclasses.dataclass(frozen=True)
class Options:
    device: str
    backends: tuple[str, ...]
    compiled: tuple[str, ...]  # keys of COMPILE_MODES
    budget_s: float  # for the timing of one group of rows
    min_rounds: int


def measure(problem: Problem, size: Size, dtype: torch.dtype, pass_: str, options: Options) -> list[dict]:
    """Rows of one group in the format of the result file, every contender verified and timed, and flagged if wrong."""
    contenders = contenders_of(problem, size, options.backends, options.compiled)
    verification = verify(problem, size, dtype, options.device, pass_ == TRAINING, contenders)
    refused = verification.refused
    running = [contender for contender in contenders if can_be_timed(refused, contender.name)]
    rows = time_contenders(problem, size, dtype, pass_, options, running)
    for contender in contenders:
        if contender not in running:
            rows.append(row_of(problem, size, dtype, pass_) | {"contender": contender.name})
    rows = flagged(rows, refused)
    return [row | {"errors": verification.worst.get(row["contender"])} for row in rows]


def time_contenders(
    problem: Problem, size: Size, dtype: torch.dtype, pass_: str, options: Options, contenders: list[Contender]
) -> list[dict]:
    """Rows of contenders, timed interleaved."""
    if not contenders:
        return []
    device, training = options.device, pass_ == TRAINING
    buffers = rotating_buffers(problem, size, dtype, device, training)
    labels = [(contender.name, pass_) for contender in contenders]
    steps = [Step(problem, contender, dtype, device, training) for contender in contenders]
    if training and problem.has_backward_alone:
        for contender in contenders:
            if not contender.eager:
                labels.append((contender.name, BACKWARD_ALONE))
                steps.append(_backward_alone(problem, size, contender.name))
    calls = [rotating(step, buffers) for step in steps]
    with Watch(device) as watch:
        times = interleaved(calls, device, options.budget_s, options.min_rounds, asleep=True)
        seen = watch.take()
    columns = [statistics_of(ms) | seen for ms in times]
    if device == "cuda":
        graphs = graph_columns(steps, buffers, options.budget_s / 4, options.min_rounds)
        for column, call, graph in zip(columns, calls, graphs, strict=True):
            column |= {"host_us": host_microseconds(call)} | graph
    return [
        row_of(problem, size, dtype, of_pass) | {"contender": name, "status": "ok", "reason": None} | column
        for (name, of_pass), column in zip(labels, columns, strict=True)
    ]


def eager_bytes(problem: Problem, size: Size, pass_: str) -> int:
    """Approximate upper bound of the memory of an eager float32 step, in bytes."""
    blocks = size.depth if "decoder" in problem.op and pass_ == TRAINING else 1
    kept = 4 * _EAGER_FLOATS * size.pixels * problem.row_width(size) * blocks
    return problem.bytes_moved(size, torch.float32, training=True) + kept


def check_memory(problem: Problem, size: Size, device: str, pass_: str) -> None:
    """Raises MemoryError if an eager step of this size does not fit the device."""
    needed, available = eager_bytes(problem, size, pass_), available_memory(device)
    if needed > available:
        raise MemoryError(
            f"size {size} needs about {needed / 2**30:.1f} GiB for eager {problem.op} ({pass_}), "
            f"{available / 2**30:.1f} GiB are available; choose a smaller B, H or W"
        )


def available_memory(device: str) -> int:
    """Bytes currently free on the device."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    if os.path.isfile("/proc/meminfo"):
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def rotating_buffers(problem: Problem, size: Size, dtype: torch.dtype, device: str, training: bool) -> list[Operands]:
    """Sets of activations and incoming gradients, enough for cold caches; all share the weights."""
    generator = torch.Generator(device).manual_seed(SEED)
    first = problem.make_operands(size, dtype, generator)
    bytes_each = sum(tensor.nbytes for tensor in first.activations.values())
    buffers = [first]
    for _ in range(buffer_count(bytes_each, device) - 1):
        activations = problem.make_activations(size, dtype, generator)
        buffers.append(Operands(activations, first.weights, problem.make_incoming(size, dtype, generator)))
    for operands in buffers:
        require_gradients(problem, operands, training)
    return buffers


def rotating(step: Callable[[Operands], object], buffers: list[Operands]) -> Callable[[int], object]:
    """A function that calls the step on buffer `count % len(buffers)`."""
    return lambda count: step(buffers[count % len(buffers)])


def _backward_alone(problem: Problem, size: Size, backend: str):
    return lambda operands: problem.backward_alone(operands, size, backend)


def row_of(problem: Problem, size: Size, dtype: torch.dtype, pass_: str) -> dict:
    """The unmeasured fields of a row. BACKWARD_ALONE counts the FLOPs of a training step minus the forward pass."""
    forward = (problem.bytes_moved(size, dtype, training=False), problem.flops(size, training=False))
    training = (problem.bytes_moved(size, dtype, training=True), problem.flops(size, training=True))
    alone = (problem.backward_bytes(size, dtype), training[1] - forward[1])
    moved, flops = {TRAINING: training, BACKWARD_ALONE: alone}.get(pass_, forward)
    arithmetic = dtype if problem.autocast else torch.float32
    return {
        "op": problem.op,
        "size": dataclasses.asdict(size),
        "dtype": str(dtype).removeprefix("torch."),
        "arithmetic": str(arithmetic).removeprefix("torch."),
        "pass": pass_,
        "forced_instruction_set": None,
        "bytes": moved,
        "flops": flops,
    }


def statistics_of(times: list[float]) -> dict:
    """Median and spread of times in milliseconds, given in the order of measurement."""
    values = torch.tensor(times, dtype=torch.float64)
    low, median, high = values.quantile(values.new_tensor([0.2, 0.5, 0.8])).tolist()
    half = max(1, len(times) // 2)
    drift = (values[:half].median() - values[-half:].median()).abs().item()
    return {
        "ms": median,
        "ms_p20": low,
        "ms_p80": high,
        "rounds": len(times),
        "unstable": max((high - low) / 2, drift) > UNSTABLE * median,
    }
