"""Checks and measurements that need a GPU, in stages of at most nine minutes. Run by `make gpu-check`.

Uses the current Python (with PyTorch; steps that need another package or tool are left out by name) and no network.
`python -m benchmarks.gpu_check prepare` builds what a check needs on a machine without a GPU; --prepared uses it.
Without it, the first stage builds the CUDA module and compiles the Triton kernels on all cores.
`python -m benchmarks.gpu_check sweep` compares chunk sizes and launch parameters.

Every step runs in a separate process with a time limit; a failed step does not stop the others. Results are printed
and written as soon as they are known, to $OUT or out/gpu-check, at most 8 files:

    gpu-check.jsonl  one JSON object per line: the machine, every test, benchmark row and kernel, every step as it ends
    benchmarks.json  results of the benchmarks
    report.md        all of it as tables, with modeled and measured times of the budgeted kernels; also printed
    *.png            plots of the benchmarks, if matplotlib is installed

Exit status: 0 if every step passed or was left out, 1 if one failed or if there is no GPU, 2 for bad arguments.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.gpu_check import prepare, prepared, running, stages, summary
from benchmarks.gpu_check.running import ROOT, Journal, say

CACHE = ROOT / "build" / "gpu_check" / "triton"
"""Triton's cache during a check."""


def missing_gpu() -> str | None:
    """Reason why nothing can be checked on this machine, or None."""
    try:
        import torch
    except ImportError as error:
        return f"{sys.executable} cannot import PyTorch ({error}); choose another with make gpu-check GPU_PYTHON=..."
    if not torch.cuda.is_available():
        return f"PyTorch {torch.__version__} finds no GPU on this machine"
    return None


def about_machine() -> dict[str, str | int | None]:
    import torch

    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "driver": first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": first_line(["git", "-C", str(ROOT), "rev-parse", "HEAD"]),
    }


def first_line(command: list[str]) -> str | None:
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    return output.splitlines()[0].strip() if output.strip() else None


def run_stage(name: str, machine: stages.Machine, journal: Journal, with_setup: bool) -> None:
    """Prints what the stage will do, then runs its steps until its time is over."""
    steps = [*(stages.setup(machine) if with_setup else ()), *stages.STAGES[name](machine)]
    seconds = stages.STAGE_SECONDS
    say(f"stage {name}, at most {seconds} s: {(stages.STAGES[name].__doc__ or '').strip()}")
    for step in steps:
        print(f"  {step.name:<20}{step.seconds:>4} s  {step.missing or step.purpose}", flush=True)
    deadline = time.monotonic() + seconds - running.GRACE_SECONDS
    for step in steps:
        before = cached_kernels()
        running.run_step(step, deadline, journal, {"TRITON_CACHE_DIR": str(CACHE)}, running.GRACE_SECONDS)
        if step.name != "compile":  # which lists its kernels
            for kernel in sorted(cached_kernels() - before):
                journal.add(step=step.name, kernel=kernel, cache="compiled")


def cached_kernels() -> set[str]:
    """This package's kernels in Triton's cache, as KEY/NAME; torch.compile keeps its own there, too."""
    return {f"{path.parent.name}/{path.stem}" for path in CACHE.glob("*/*_kernel.cubin")}


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["prepare"]:
        return prepare.main(arguments[1:])
    if arguments[:1] == ["sweep"]:
        from benchmarks.gpu_check import sweep

        return sweep.main(arguments[1:])
    parser = argparse.ArgumentParser(prog="make gpu-check", description="Checks and benchmarks that need a GPU.")
    parser.add_argument(
        "stages", nargs="*", metavar="STAGE", help=f"{', '.join(stages.STAGES)} (default: all, in this order)"
    )
    parser.add_argument("--prepared", type=Path, metavar="FILE", help="archive of `gpu_check prepare` for this machine")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.stages if name not in stages.STAGES]
    if unknown:
        parser.error(f"unknown stage {unknown[0]!r}; use {', '.join(stages.STAGES)}")
    reason = missing_gpu()
    if reason is not None:
        print(f"gpu-check: nothing was checked: {reason}", file=sys.stderr)
        return 1
    about = about_machine()
    machine = stages.Machine(about["compute_capability"], Path(), about["multiprocessors"], bool(options.prepared))
    if options.prepared:
        try:
            prepared.unpack(options.prepared, machine.architecture, CACHE)
        except ValueError as error:
            print(f"gpu-check: {error}", file=sys.stderr)
            return 2
    out = Path(os.environ.get("OUT") or ROOT / "out" / "gpu-check")
    out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    journal = Journal(out / "gpu-check.jsonl")
    journal.add(machine=about)
    with tempfile.TemporaryDirectory() as folder:
        machine = machine._replace(folder=Path(folder))
        chosen = options.stages or list(stages.STAGES)
        try:
            for name in chosen:
                machine = machine._replace(failed=summary.failed_tests(journal))
                run_stage(name, machine, journal, with_setup=name == chosen[0])
        except KeyboardInterrupt:
            journal.add(ended="interrupted", status="by a signal", seconds=0.0, passed=False, output="")
        text = summary.report(journal, Path(folder), out)
    (out / "report.md").write_text(text, encoding="utf-8")
    passed = all(entry["passed"] for entry in journal.having("ended"))
    print(text, flush=True)
    say(f"{'passed' if passed else 'FAILED'}; results in {out}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
