"""Interleaved timing on cold buffers."""

import math
import time
from collections.abc import Callable, Sequence

import torch

from deco_kernels.machine import last_level_cache

COLD_FACTOR = 3  # rotating buffers hold at least this many times the last-level cache
_ASLEEP_SECONDS = 0.002  # longer than a launch takes the host
_LONGEST_SLEEP = 0.1  # seconds: more launches than the queue holds would wait for its end anyway
_MOST_CYCLES_PER_SECOND = 2e9  # of a GPU's clock
_SHORTEST_MS = 1.0  # shorter calls are repeated within one measurement


def buffer_count(bytes_each: int, device: str) -> int:
    """Number of sets of activations to rotate so that each is cold when it is used again."""
    return max(1, math.ceil(COLD_FACTOR * last_level_cache(device) / max(1, bytes_each)))


def milliseconds(call: Callable[[], object], device: str, asleep_s: float = 0.0) -> float:
    """Duration of one call: CUDA events on the current stream, or the wall clock on a CPU.

    The GPU sleeps for `asleep_s` before the first event. Time that the host takes meanwhile to enqueue is not counted.
    """
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if asleep_s > 0:
            torch.cuda._sleep(int(min(asleep_s, _LONGEST_SLEEP) * _MOST_CYCLES_PER_SECOND))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def kernel_milliseconds(launch: Callable[[], object]) -> float:
    """Duration of one kernel on the GPU, without the host's time for its launch."""
    return milliseconds(launch, "cuda", _ASLEEP_SECONDS)


def interleaved(
    calls: Sequence[Callable[[int], object]],
    device: str,
    budget_s: float,
    min_rounds: int,
    max_rounds: int = 100,
    asleep: bool = False,
) -> list[list[float]]:
    """Milliseconds per call of every contender, interleaved.

    Each round times every contender once and starts with a different one. The argument of a call is the number of calls
    so far, which selects the buffer. Rounds continue until `budget_s` is spent: at least `min_rounds`, and from then on
    up to `max_rounds` in all. Two unmeasured rounds warm up first; only one on a CPU if it takes longer than
    `budget_s`. With `asleep`, a GPU sleeps while the host enqueues a call.
    """
    counter = 0

    def run(call, repeats, asleep_s=0.0):
        nonlocal counter
        first = counter
        counter += repeats

        def repeated():
            for index in range(repeats):
                call(first + index)

        return milliseconds(repeated, device, asleep_s) / repeats

    warm = [run(call, 1) for call in calls]
    sleeps = [0.0 for _ in calls]
    if device == "cuda" or sum(warm) <= 1e3 * budget_s:
        if asleep and device == "cuda":
            sleeps = [_host_seconds(call) for call in calls]
        warm = [run(call, 1, asleep_s) for call, asleep_s in zip(calls, sleeps, strict=True)]
    repeats = [max(1, math.ceil(_SHORTEST_MS / max(each, 1e-3))) for each in warm]
    times: list[list[float]] = [[] for _ in calls]
    deadline = time.perf_counter() + budget_s
    for round_ in range(max(min_rounds, max_rounds)):
        if round_ >= min_rounds and time.perf_counter() > deadline:
            break
        for turn in range(len(calls)):
            index = (turn + round_) % len(calls)
            times[index].append(run(calls[index], repeats[index], repeats[index] * sleeps[index]))
    return times


def _host_seconds(call: Callable[[int], object]) -> float:
    """Upper estimate of the host's time to enqueue a call."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call(0)
    return 1.5 * (time.perf_counter() - start)
