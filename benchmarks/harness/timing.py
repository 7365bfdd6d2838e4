"""Interleaved timing on cold buffers."""

import math
import time
from collections.abc import Callable, Sequence

import torch

from deco_kernels.machine import last_level_cache

COLD_FACTOR = 3  # rotating buffers hold at least this many times the last-level cache
_ASLEEP_CYCLES = 4_000_000  # about 2 ms at 2 GHz, longer than a launch takes the host
_SHORTEST_MS = 1.0  # shorter calls are repeated within one measurement


def buffer_count(bytes_each: int, device: str) -> int:
    """Number of sets of activations to rotate so that each is cold when it is used again."""
    return max(1, math.ceil(COLD_FACTOR * last_level_cache(device) / max(1, bytes_each)))


def milliseconds(call: Callable[[], object], device: str) -> float:
    """Duration of one call: CUDA events on the current stream, or the wall clock on a CPU."""
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def kernel_milliseconds(launch: Callable[[], object]) -> float:
    """Duration of one kernel on the GPU. The GPU sleeps while the host enqueues, so no time of the host is counted."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(_ASLEEP_CYCLES)
    start.record()
    launch()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def interleaved(
    calls: Sequence[Callable[[int], object]], device: str, budget_s: float, min_rounds: int, max_rounds: int = 100
) -> list[list[float]]:
    """Milliseconds per call of every contender, interleaved.

    Each round times every contender once and starts with a different one. The argument of a call is the number of calls
    so far, which selects the buffer. Rounds continue until `budget_s` is spent. Two unmeasured rounds warm up first;
    only one on a CPU if it takes longer than `budget_s`.
    """
    counter = 0

    def run(call, repeats):
        nonlocal counter
        first = counter
        counter += repeats

        def repeated():
            for index in range(repeats):
                call(first + index)

        return milliseconds(repeated, device) / repeats

    warm = [run(call, 1) for call in calls]
    if device == "cuda" or sum(warm) <= 1e3 * budget_s:
        warm = [run(call, 1) for call in calls]
    repeats = [max(1, math.ceil(_SHORTEST_MS / max(each, 1e-3))) for each in warm]
    times: list[list[float]] = [[] for _ in calls]
    deadline = time.perf_counter() + budget_s
    for round_ in range(max_rounds):
        if round_ >= min_rounds and time.perf_counter() > deadline:
            break
        for turn in range(len(calls)):
            index = (turn + round_) % len(calls)
            times[index].append(run(calls[index], repeats[index]))
    return times
