"""Interleaved timing on cold buffers."""

import math
import os
import time
from collections.abc import Callable, Sequence

import torch

COLD_FACTOR = 3  # rotating buffers hold at least this many times the last-level cache
_SHORTEST_MS = 1.0  # shorter calls are repeated within one measurement


def last_level_cache(device: str) -> int:
    """Bytes of the device's last cache; 32 MiB where the system does not tell."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = []
    folder = "/sys/devices/system/cpu/cpu0/cache"
    for index in os.listdir(folder) if os.path.isdir(folder) else ():
        path = os.path.join(folder, index, "size")
        if os.path.isfile(path):
            with open(path) as file:
                sizes.append(int(file.read().strip().rstrip("K")) * 1024)
    return max(sizes, default=32 << 20)


def buffer_count(bytes_each: int, device: str) -> int:
    """How many sets of activations must rotate for each to be cold when its turn comes."""
    return max(1, math.ceil(COLD_FACTOR * last_level_cache(device) / max(1, bytes_each)))


def milliseconds(call: Callable[[], object], device: str) -> float:
    """Duration of one call: events on the current stream of a GPU, the wall clock on a CPU."""
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


def interleaved(
    calls: Sequence[Callable[[int], object]], device: str, budget_s: float, min_rounds: int, max_rounds: int = 100
) -> list[list[float]]:
    """Milliseconds per call of every contender, measured in turns.

    Each round times every contender once, beginning with another one each time; a call's argument counts the calls made
    so far, to choose the buffer. Rounds go on until `budget_s` is spent. Two unmeasured rounds warm up first; one
    will do on a CPU where it takes longer than that.
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
