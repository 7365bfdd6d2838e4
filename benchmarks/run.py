"""One run of the benchmarks: all requested parts, one result."""

import argparse
import dataclasses
import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import torch

from benchmarks import profiling
from benchmarks.harness import results, scaling
from benchmarks.harness.ceilings import measure_ceilings
from benchmarks.harness.header import header
from benchmarks.harness.measure import Options, check_memory, measure
from benchmarks.harness.memory import CASES, measure_memory
from benchmarks.harness.overhead import measure_import, measure_overhead
from benchmarks.models import end_to_end
from benchmarks.names import AUTOTUNED, COMPILED, DEVICE_BACKENDS, OPS
from benchmarks.ops import modulated_rms_norm
from benchmarks.ops.problem import problem_of
from benchmarks.ops.sizes import STANDARD, size_of
from benchmarks.report import comparison, tables
from benchmarks.static import timed_kernels
from deco_kernels import BackendUnavailable
from deco_kernels.machine import load
from deco_kernels.native import ISA_VARIABLE
from deco_kernels.ops.registry import backend_names

Part = tuple[str, str, Callable[[], object]]  # description, section of the result, function that measures it


def run(options: argparse.Namespace) -> int:
    """Prints the report and writes the result. Returns the exit status: 1 if a contender was wrong or failed, or if
    nothing was measured, else 0.

    Raises:
        ValueError: unknown backend, no GPU, or --compare names an invalid result. MemoryError: a size is too large.
        OSError: a file cannot be read or written.
    """
    began = time.perf_counter()
    default = [name for name in DEVICE_BACKENDS[options.device] if name != "reference" or not options.quick]
    backends = tuple(dict.fromkeys(options.backend or default))
    for backend in backends:
        if backend not in backend_names():
            raise ValueError(f"unknown backend {backend!r}; use {', '.join(backend_names())}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("no GPU: PyTorch sees no CUDA device here; use --device cpu")
    if options.profile is not None or options.trace:
        if options.threads:
            torch.set_num_threads(options.threads)
        try:
            return profiling.run(options, _groups(options))
        except BackendUnavailable as error:
            raise ValueError(str(error)) from error
    for op, size, _, pass_ in _groups(options):
        check_memory(problem_of(op), size, options.device, pass_)
    old = tables.load(options.compare) if options.compare else None
    if options.threads:
        torch.set_num_threads(options.threads)

    dtypes = tuple(getattr(torch, name) for name in options.dtype)
    about = header(options.device) | ({"held_to": "AVX2"} if options.avx2 else {})
    result = results.empty(about, measure_ceilings(options.device, dtypes))
    for number, (text, section, work) in enumerate(_parts(options, backends)):
        if number > 0 and options.stop_after and time.perf_counter() - began > options.stop_after:
            result["left_out"].append(text)
            continue
        _progress(text)
        found = work()
        if section == "import_time":
            result[section] = found
        else:
            result[section] += found
        if options.stream:
            for entry in found if isinstance(found, list) else [found]:
                print(json.dumps({"benchmark": section} | entry), flush=True)
        if options.output:
            results.save(result, options.output)
        if _timing(options, backends).compiled:
            torch.compiler.reset()  # imports Inductor, which takes seconds
    result["ceilings"] = results.best_of(result["ceilings"], measure_ceilings(options.device, dtypes))
    result["header"]["load_at_end"] = load()

    if old:
        comparison.mark_unstable(old, result)
    if options.output:
        results.save(result, options.output)
    if options.csv:
        results.save_csv(result, options.csv)
    print(tables.markdown(result))
    if old:
        print(comparison.markdown(old, result))
    return status_of(result)


def _parts(options: argparse.Namespace, backends: tuple[str, ...]) -> Iterator[Part]:
    """All requested parts, in the order in which they run."""
    timing = _timing(options, backends)
    for op, size, dtype, pass_ in _groups(options):
        text = f"{op}, {dtype}, {pass_}, {size}"
        yield text, "rows", functools.partial(measure, problem_of(op), size, dtype, pass_, timing)
        if op == "adaln_block" and options.device == "cuda" and modulated_rms_norm.installed():
            liger, alone = modulated_rms_norm.PROBLEM, _timing(options, modulated_rms_norm.BACKENDS)
            yield f"{liger.op}, {dtype}, {pass_}", "rows", functools.partial(measure, liger, size, dtype, pass_, alone)
    if "avx2" in options.parts:
        text = "pixel_decoder with the cpu backend restricted to AVX2"
        yield text, "rows", lambda: _rows_with_instruction_set("avx2", options)
    if "memory" in options.parts:
        for dtype in options.dtype[:1] if options.quick else options.dtype:
            for op, batch in CASES[:1] if options.quick else CASES:
                asked = (op, batch, options.device, dtype, backends, torch.get_num_threads())
                yield f"peak memory, {op}, {batch} images, {dtype}", "memory", functools.partial(measure_memory, *asked)
    if "overhead" in options.parts:
        calls = 50 if options.quick else 200
        yield "host time per call", "overhead", lambda: measure_overhead(options.device, backends, calls)
    if "import" in options.parts:
        yield "import time", "import_time", lambda: measure_import(repeats=3 if options.quick else 7)
    yield from _parts_on_request(options, backends)


def _parts_on_request(options: argparse.Namespace, backends: tuple[str, ...]) -> Iterator[Part]:
    """Parts beyond single ops. The reference backend is eager PyTorch and appears only in the tables of the ops."""
    timing = _timing(options, tuple(name for name in backends if name != "reference"))
    timing = dataclasses.replace(timing, min_rounds=5)
    dtypes = [getattr(torch, name) for name in options.dtype]
    if "scaling" in options.parts:
        for op, dtype, pass_ in itertools.product(scaling.OPS, dtypes, options.pass_):
            text = f"scaling of {op}, {dtype}, {pass_}"
            yield text, "scaling", functools.partial(scaling.measure_scaling, op, dtype, pass_, timing)
    if "end_to_end" in options.parts:
        for case, dtype in itertools.product(end_to_end.CASES[options.device], dtypes):
            text = f"{case.pass_} of {case.preset}, batch {case.batch}, {dtype}"
            yield text, "end_to_end", functools.partial(end_to_end.measure_end_to_end, case, dtype, timing)
    if "kernels" in options.parts:
        yield "kernels against their budgets", "kernels", functools.partial(timed_kernels.measure_kernels, options.full)


def _timing(options: argparse.Namespace, backends: tuple[str, ...]) -> Options:
    compiled: tuple[str, ...] = () if options.quick or options.no_compile else (COMPILED,)
    if compiled and options.full and options.device == "cuda":
        compiled += (AUTOTUNED,)
    return Options(
        device=options.device,
        backends=backends,
        compiled=compiled,
        budget_s=0.6 if options.quick else 2.5,
        min_rounds=5 if options.quick else 9,
    )


def _groups(options: argparse.Namespace) -> Iterator[tuple]:
    """(op, size, dtype, pass) of every group timed op by op."""
    for op in OPS:
        if op in options.parts:
            for size in dict.fromkeys(size_of(text, op) for text in options.size):  # presets can be the same for an op
                for dtype in options.dtype:
                    for pass_ in options.pass_:
                        yield op, size, getattr(torch, dtype), pass_


def _rows_with_instruction_set(name: str, options: argparse.Namespace) -> list[dict]:
    """Forward pass of pixel_decoder in a process whose cpu backend is restricted to an instruction set; PyTorch is not
    restricted."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "result.json")
        command = [sys.executable, "-m", "benchmarks", "pixel_decoder", "--pass", "forward", "--backend", "cpu"]
        command += ["--size", STANDARD, "--no-compile", "--output", path]
        command += ["--quick"] * options.quick + ["--default-heap"] * options.default_heap
        command += ["--threads", str(torch.get_num_threads())]
        command += [word for dtype in options.dtype for word in ("--dtype", dtype)]
        answer = subprocess.run(
            command, env={**os.environ, ISA_VARIABLE: name}, capture_output=True, text=True, check=False
        )
        if not os.path.isfile(path):
            raise OSError(f"the process restricted to {name} failed: {answer.stderr.strip()}")
        rows = results.load(path)["rows"]
    return [row | {"forced_instruction_set": name} for row in rows]


def _progress(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def status_of(result: dict) -> int:
    """Exit status; prints one line per problem to stderr."""
    entries = [entry for part in results.LISTS for entry in result[part] if part != "left_out"]
    bad = [entry for entry in entries if entry["status"] in ("wrong", "failed")]
    for entry in bad:
        where = ", ".join(entry[key] for key in ("op", "preset", "dtype", "pass", "architecture") if key in entry)
        what = entry.get("contender") or entry["kernel"]
        print(
            f"benchmarks: {what} {entry['status']} in {where}: {entry['reason']}",
            file=sys.stderr,
        )
    throttled = sorted({reason for entry in entries for reason in entry.get("throttled") or ()})
    if throttled:
        print(f"benchmarks: the GPU lowered its clocks while rows were timed: {', '.join(throttled)}", file=sys.stderr)
    if result["left_out"]:
        print(f"benchmarks: left out, for lack of time: {'; '.join(result['left_out'])}", file=sys.stderr)
    measured = result["import_time"] or any(entry["status"] == "ok" for entry in entries)
    return 0 if measured and not bad else 1
