"""One run of the benchmarks: all parts asked for, one result."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

import torch

from benchmarks import report
from benchmarks.ceilings import best_of, measure_ceilings
from benchmarks.machine import header, load
from benchmarks.measure import Options, measure
from benchmarks.memory import measure_memory
from benchmarks.names import DEVICE_BACKENDS, OPS
from benchmarks.overhead import measure_import, measure_overhead
from benchmarks.problem import problem_of
from benchmarks.sizes import STANDARD, size_of
from deco_kernels.ops.registry import backend_names

_ISA_VARIABLE = "DECO_KERNELS_CPU_ISA"


def run(options: argparse.Namespace) -> int:
    """Prints the report and writes the result. Returns the exit status: 1 if a contender was wrong or failed, or if
    nothing was measured, else 0.

    Raises:
        ValueError: an unknown backend, no GPU. MemoryError: a size too large. OSError: the result cannot be written.
    """
    backends = tuple(options.backend or DEVICE_BACKENDS[options.device])
    for backend in backends:
        if backend not in backend_names():
            raise ValueError(f"unknown backend {backend!r}; use {', '.join(backend_names())}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("no GPU: PyTorch sees no CUDA device here; use --device cpu")
    if options.threads:
        torch.set_num_threads(options.threads)

    dtypes = [getattr(torch, name) for name in options.dtype]
    result = {
        "format": report.FORMAT,
        "header": header(options.device),
        "ceilings": measure_ceilings(options.device, tuple(dtypes)),
        "rows": [],
        "memory": [],
        "overhead": [],
        "import_time": None,
    }
    timing = Options(
        device=options.device,
        backends=backends,
        compiled=not (options.quick or options.no_compile),
        budget_s=0.6 if options.quick else 2.5,
        min_rounds=5 if options.quick else 9,
    )
    for problem, size, dtype, pass_ in _groups(options, dtypes):
        _progress(f"{problem.op}, {dtype}, {pass_}, {size}")
        result["rows"] += measure(problem, size, dtype, pass_, timing)
        torch.compiler.reset()
    if "avx2" in options.parts:
        _progress("pixel_decoder with the cpu backend held to AVX2")
        result["rows"] += _rows_with_instruction_set("avx2", options)
    if "memory" in options.parts:
        _progress("peak memory")
        for dtype in options.dtype:
            result["memory"] += measure_memory(options.device, dtype, backends, torch.get_num_threads())
    if "overhead" in options.parts:
        _progress("host time per call")
        result["overhead"] = measure_overhead(options.device, backends, calls=50 if options.quick else 200)
    if "import" in options.parts:
        _progress("import time")
        result["import_time"] = measure_import(repeats=3 if options.quick else 7)
    result["ceilings"] = best_of(result["ceilings"], measure_ceilings(options.device, tuple(dtypes)))
    result["header"]["load_at_end"] = load()

    print(report.markdown(result))
    if options.output:
        with open(options.output, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)
            file.write("\n")
    return _status(result)


def _groups(options: argparse.Namespace, dtypes: list[torch.dtype]):
    for op in OPS:
        if op in options.parts:
            for size in options.size:
                for dtype in dtypes:
                    for pass_ in options.pass_:
                        yield problem_of(op), size_of(size, op), dtype, pass_


def _rows_with_instruction_set(name: str, options: argparse.Namespace) -> list[dict]:
    """The forward of pixel_decoder in a process whose cpu backend is held to an instruction set; PyTorch is not."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "result.json")
        command = [sys.executable, "-m", "benchmarks", "pixel_decoder", "--pass", "forward", "--backend", "cpu"]
        command += ["--size", STANDARD, "--no-compile", "--output", path]
        command += ["--quick"] * options.quick + ["--default-heap"] * options.default_heap
        command += ["--threads", str(torch.get_num_threads())]
        command += [word for dtype in options.dtype for word in ("--dtype", dtype)]
        answer = subprocess.run(
            command, env={**os.environ, _ISA_VARIABLE: name}, capture_output=True, text=True, check=False
        )
        if not os.path.isfile(path):
            raise OSError(f"the process held to {name} failed: {answer.stderr.strip()}")
        rows = report.load(path)["rows"]
    return [row | {"forced_instruction_set": name} for row in rows]


def _progress(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def _status(result: dict) -> int:
    entries = result["rows"] + result["memory"] + result["overhead"]
    bad = [entry for entry in entries if entry["status"] in ("wrong", "failed")]
    for entry in bad:
        where = ", ".join(entry[key] for key in ("op", "dtype", "pass") if key in entry)
        print(
            f"benchmarks: {entry['contender']} {entry['status']} in {where}: {entry['reason']}",
            file=sys.stderr,
        )
    measured = result["import_time"] is not None or any(entry["status"] == "ok" for entry in entries)
    return 0 if measured and not bad else 1
