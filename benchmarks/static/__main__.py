"""`python -m benchmarks static`: static analysis of the compiled Triton and CUDA kernels for every architecture,
without a GPU.

Per kernel and architecture: registers, spilled bytes, shared memory, issue slots of the steady loop per 16 pixels, the
cycles in which they occupy each pipe, and the modeled time of the largest bound (benchmarks/static/machines.py). No
figure is measured on a GPU. `--record` writes benchmarks/budgets.json; otherwise the figures are compared with it.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.static import cuda_kernels, cuda_traffic, tables, triton_kernels, triton_traffic
from benchmarks.static.figures import BUDGETS, CUDA_PREFIX, SHARED_LIMIT, Figures, exceeded
from benchmarks.static.triton_kernels import ARCHITECTURES, DTYPES, WIDTHS
from deco_kernels.command_line import new_file

BACKENDS = ("triton", "cuda")


def selected(architectures: list[str], widths: list[int], dtypes: list[str]) -> Iterator[tuple[str, int, str]]:
    """(architecture, width, dtype): all given widths and dtypes on sm_90, only D 32 in bfloat16 on the others."""
    for architecture in architectures:
        for width in widths:
            for dtype in dtypes:
                if architecture == "sm_90" or (width, dtype) == (32, "bfloat16"):
                    yield architecture, width, dtype


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks static", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--record", action="store_true", help="write benchmarks/budgets.json")
    parser.add_argument("--backend", choices=BACKENDS, help="kernels to examine (default: both)")
    parser.add_argument(
        "--architecture", action="append", choices=tuple(SHARED_LIMIT), help="repeatable (default: all but sm_86)"
    )
    parser.add_argument("--width", action="append", type=int, choices=WIDTHS, help="repeatable (default: 32)")
    parser.add_argument("--dtype", action="append", choices=tuple(DTYPES), help="repeatable (default: bfloat16)")
    parser.add_argument("--everywhere", action="store_true", help="every width and dtype on every architecture")
    parser.add_argument("--kernel", default="", metavar="PREFIX", help="only Triton kernels whose names start so")
    parser.add_argument(
        "--launch",
        metavar="KERNEL=BLOCK,WARPS,STAGES,PROGRAMS",
        type=_launch,
        help="other parameters of a kernel of the launch table (Triton); its figures are not compared or recorded",
    )
    parser.add_argument("--tables", action="store_true", help="print the tables of docs/triton.md and docs/cuda.md")
    parser.add_argument("--output", type=new_file, metavar="FILE.json", help="write all figures to this file")
    options = parser.parse_args(arguments)
    budgets = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    backend = "triton" if options.launch or options.kernel else options.backend
    if options.launch and options.record:
        parser.error("--launch: figures of other parameters are not recorded; leave out --record")
    if options.tables:
        for backend in [options.backend] if options.backend else BACKENDS:
            print(*tables.tables(budgets, backend), sep="\n\n", end="\n\n")
        return 0
    if os.environ.get("TRITON_INTERPRET"):
        print("benchmarks static: unset TRITON_INTERPRET; the interpreter compiles nothing", file=sys.stderr)
        return 2

    default = SHARED_LIMIT if options.everywhere else ARCHITECTURES
    architectures, widths = options.architecture or list(default), options.width or [32]
    dtypes = options.dtype or ["bfloat16"]
    if options.everywhere:
        cases = [(a, w, d) for a in architectures for w in WIDTHS for d in DTYPES]
    else:
        cases = list(selected(architectures, widths, dtypes))
    everything: dict[str, dict[str, Any]] = {}
    failures = []
    print("Modeled, not measured. Issue slots and cycles per scheduler for 16 pixels; ms for 32 images of 256x256.")
    print(_row("kernel", "architecture", "registers", "spills", "shared", "slots", "ms", "bound", "cycles"), flush=True)
    for name, architecture, compiled in _examined(backend, cases, options.kernel, options.launch):
        found = _with_traffic(name, compiled, budgets, options.record)
        everything.setdefault(name, {})[architecture] = found._asdict()
        print(_row(name, architecture, *_cells(found, architecture)), flush=True)
        if found.shared_bytes > SHARED_LIMIT[architecture.removesuffix("a")]:
            failures.append(f"{name}: {found.shared_bytes} bytes of shared memory do not fit {architecture}")
        if options.record:
            budgets.setdefault(name, {})[architecture] = found._asdict()
            BUDGETS.write_text(json.dumps(budgets, indent=1, sort_keys=True) + "\n")
        elif not options.launch and architecture in budgets.get(name, {}):
            failures += [f"{name} on {architecture}: {what}" for what in exceeded(found, budgets[name][architecture])]
    if options.output:
        Path(options.output).write_text(json.dumps(everything, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    for failure in failures:
        print(f"over budget: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _launch(text: str) -> tuple[str, tuple[int, ...]]:
    from deco_kernels.backends.triton import table

    kernel, _, numbers = text.partition("=")
    if kernel not in table.KERNELS:
        raise argparse.ArgumentTypeError(f"expected a kernel of {', '.join(table.KERNELS)}, got {kernel!r}")
    parts = numbers.split(",")
    if len(parts) != 4 or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"expected four numbers after {kernel}=, got {numbers!r}")
    return kernel, tuple(int(part) for part in parts)


def _examined(
    backend: str | None,
    cases: list[tuple[str, int, str]],
    kernel: str,
    launch: tuple[str, tuple[int, ...]] | None,
) -> Iterator[tuple[str, str, Figures]]:
    """Figures of the requested backend; without --backend, of every backend that this machine can compile."""
    if backend != "cuda":
        from deco_kernels.backends.triton import table

        other = table.replaced(launch[0], table.Launch(*launch[1])) if launch else contextlib.nullcontext()
        with other:
            yield from triton_kernels.all_figures(cases, kernel)
    if backend != "triton":
        reason = cuda_kernels.unavailable_reason()
        if reason is None:
            yield from cuda_kernels.all_figures(cases)
        elif backend == "cuda":
            raise SystemExit(f"benchmarks static: the CUDA kernels cannot be examined: {reason}")
        else:
            print(f"Skipping the CUDA kernels: {reason}", file=sys.stderr)


def _with_traffic(name: str, found: Figures, budgets: dict[str, Any], count: bool) -> Figures:
    """The figures of a kernel with a loop over pixels with its bytes of global memory: counted, or from any record."""
    if found.cycles_per_16_px is None:
        return found
    if not count:
        records = [record for record in budgets.get(name, {}).values() if record["cycles_per_16_px"]]
        return found._replace(bytes_per_px=records[0]["bytes_per_px"] if records else None)
    if not name.startswith(CUDA_PREFIX):
        kernel, width, dtype = name.split("/")
        return found._replace(bytes_per_px=triton_traffic.bytes_per_pixel(int(width.removeprefix("D")), dtype)[kernel])
    return found._replace(bytes_per_px=round(cuda_traffic.bytes_per_pixel(name), 2))


def _cells(found: Figures, architecture: str) -> tuple[str, ...]:
    fixed = str(found.registers), str(found.spill_bytes), str(found.shared_bytes)
    bound = found.bound(architecture)
    if bound is None or found.cycles_per_16_px is None:
        return *fixed, "-", "-", "-", ""
    cycles = [f"{pipe} {count:.0f}" for pipe, count in found.cycles_per_16_px.items() if pipe != "issue"]
    if found.bytes_per_px is not None:
        cycles.append(f"{found.bytes_per_px:.0f} B per pixel")
    return *fixed, f"{found.issue_slots_per_16_px:.0f}", f"{bound.milliseconds:.3f}", bound.name, ", ".join(cycles)


def _row(
    name: str,
    architecture: str,
    registers: str,
    spills: str,
    shared: str,
    slots: str,
    time: str,
    bound: str,
    cycles: str,
):
    return (
        f"{name:58} {architecture:12} {registers:>9} {spills:>6} {shared:>7} {slots:>6} {time:>6} {bound:>7}  {cycles}"
    )
