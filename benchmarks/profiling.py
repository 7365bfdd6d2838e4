"""`python -m benchmarks OP --profile [CONTENDER]`: one contender alone, for profilers and with counters."""

import argparse
import time
from collections.abc import Callable, Iterable

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.harness import gpu_state, perf_events
from benchmarks.harness.gpu_state import Watch
from benchmarks.harness.measure import check_memory, rotating, rotating_buffers
from benchmarks.harness.steps import Step, contenders_of
from benchmarks.names import COMPILE_MODES, DEVICE_BACKENDS, TRAINING
from benchmarks.ops.problem import problem_of
from benchmarks.report.markdown import section, table
from deco_kernels.ops.registry import backend_names

Call = Callable[[int], object]
CALLS = 10
ROWS = 15  # of the table of kernels or operators


def run(options: argparse.Namespace, groups) -> int:
    """Profiles each group (op, size, dtype, pass) and prints a report; the exit status.

    On a GPU the calls lie between cudaProfilerStart and cudaProfilerStop and each in an NVTX range "OP CONTENDER PASS",
    which ncu and nsys select by. Every call finds its arguments cold: it takes the next of buffers that together exceed
    the cache, so no kernel that clears the cache is in the way.

    Raises ValueError for an unknown contender, or a trace of more than one group.
    """
    groups = list(groups)
    if options.trace and len(groups) > 1:
        raise ValueError(
            f"--trace takes one group, these options select {len(groups)}; name one op, --dtype, --pass and --size"
        )
    for op, size, dtype, pass_ in groups:
        problem = problem_of(op)
        check_memory(problem, size, options.device, pass_)
        name = options.profile or DEVICE_BACKENDS[options.device][1]
        compiled = (name,) if name in COMPILE_MODES else ()
        found = {each.name: each for each in contenders_of(problem, size, tuple(backend_names()), compiled)}
        if name not in found:
            known = ", ".join([*found, *COMPILE_MODES])
            raise ValueError(f"--profile: unknown contender {name!r} of {op}; use {known}")
        step = Step(problem, found[name], dtype, options.device, pass_ == TRAINING)
        buffers = rotating_buffers(problem, size, dtype, options.device, pass_ == TRAINING)
        call = rotating(step, buffers)
        for index in range(3):
            call(index)
        text = f"{op} {name} {pass_}"
        notes = [*_timed(call, text, options.device)]
        body = _traced(call, text, options.device, options.trace) if options.trace else ""
        print(section(f"## {text}, {str(dtype).removeprefix('torch.')}", body, notes))
    return 0


def _timed(call: Call, text: str, device: str) -> list[str]:
    """Notes on the time of a call, between the marks of profilers, and on its cycles."""
    if device == "cpu":
        try:
            with perf_events.Counters() as counters:
                ms = _milliseconds(call)
        except OSError as error:
            return [_time(_milliseconds(call)), f"cycles and instructions are not counted here: {error}"]
        cycles, instructions = (counters.counts[name] / CALLS for name in perf_events.HARDWARE)
        return [_time(ms), f"{cycles:.4g} cycles and {instructions:.4g} instructions per call, of all threads"]
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    with Watch(device) as watch:
        torch.cuda.profiler.start()
        start.record()
        for index in range(CALLS):
            with torch.cuda.nvtx.range(text):
                call(index)
        end.record()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    ms, megahertz = start.elapsed_time(end) / CALLS, clock_of(watch.take())
    return [_time(ms), f"{1e3 * ms * megahertz:.4g} cycles per call at {megahertz} MHz" if megahertz else "no clock"]


def _milliseconds(call: Call) -> float:
    began = time.perf_counter()
    for index in range(CALLS):
        call(index)
    return 1e3 * (time.perf_counter() - began) / CALLS


def _time(ms: float) -> str:
    return f"{ms:.4g} ms per call, mean of {CALLS}"


def clock_of(seen: dict) -> int | None:
    """The highest SM clock under load that a `Watch` saw, in MHz; else the present one, or None without NVML."""
    clocks = seen.get("sm_clock_mhz")
    return clocks[1] if clocks else gpu_state.header().get("sm_clock_mhz")


def _traced(call: Call, text: str, device: str, path: str) -> str:
    """Writes a Chrome trace of the calls; a table of the GPU's kernels, or of operators on the CPU."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with Watch(device) as watch, profile(activities=activities) as profiled:
        for index in range(CALLS):
            with record_function(text):
                call(index)
        if device == "cuda":
            torch.cuda.synchronize()
    profiled.export_chrome_trace(path)
    return time_table(profiled.key_averages(), text, device, clock_of(watch.take()))


def time_table(averages: Iterable[FunctionEventAvg], text: str, device: str, megahertz: int | None) -> str:
    """Table of kernels or operators by their own time, the longest first."""
    cpu = device == "cpu"
    events = [event for event in averages if event.key != text and (cpu or event.device_type is DeviceType.CUDA)]
    own = {event.key: event.self_cpu_time_total if cpu else event.self_device_time_total for event in events}
    lines = []
    for event in sorted(events, key=lambda event: -own[event.key])[:ROWS]:
        us = own[event.key] / CALLS
        cycles = [f"{us * megahertz:,.0f}"] if megahertz else []
        lines.append([event.key, f"{event.count / CALLS:g}", f"{us:,.1f}", *cycles])
    counted = ["operator", "calls"] if cpu else ["kernel", "launches"]
    heads = [*counted, "µs per call of the contender", *(["cycles"] if megahertz else [])]
    return table(heads, lines)
