"""Checks that need a GPU: the self-test, the tests marked gpu and the GPU benchmarks. Run by `make gpu-check`.

Uses the current Python (with PyTorch, pytest and NumPy) and no network. If nvcc is on PATH or under CUDA_HOME, the
native modules are first built in place, the CUDA module only for the GPU's architecture. Steps run most valuable first,
each in a separate process with a time limit; a failed step does not stop the others. An extra step is skipped if less
than its time is left of eight minutes. `--full` lifts that limit and measures everything. Results are written to $OUT
or out/gpu-check, at most 8 files:

    gpu-check.json   device, versions, every step with command, seconds, result and output, every test with its outcome
    benchmarks.json  results of the benchmarks
    report.md        both as tables, with modeled and measured times of the budgeted kernels
    *.png            plots of the benchmarks, if matplotlib is installed

Exit status: 0 if every step passed or was skipped as allowed, 1 if one failed or if there is no GPU.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

from benchmarks.harness.toolkit import cuda_tool

ROOT = Path(__file__).resolve().parents[2]

TOTAL_SECONDS, FULL_SECONDS = 450, 3600  # steps that still run then are stopped
_KEPT_OUTPUT = 200_000  # last characters of a step's output
_SEPARATE_ALLOCATIONS = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
_TRAINING = ["--size", "train-xl-256", "--dtype", "bfloat16"]


class Step(NamedTuple):
    """One command and its time limit; an `extra` step starts only if at least `seconds` are left."""

    name: str
    command: list[str]
    seconds: int
    environment: dict[str, str] = {}
    extra: bool = False


def missing_gpu() -> str | None:
    """Reason why nothing can be checked on this machine, or None."""
    try:
        import torch
    except ImportError as error:
        return f"{sys.executable} cannot import PyTorch ({error}); choose another with make gpu-check GPU_PYTHON=..."
    if not torch.cuda.is_available():
        return f"PyTorch {torch.__version__} finds no GPU on this machine"
    return None


def machine() -> dict:
    import torch

    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
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


def gpu_tests() -> list[Path]:
    """Files with tests marked gpu. Other test files may need packages that this program does not require."""
    return sorted(ROOT.glob("tests/*/test_*_gpu.py"))


def steps(folder: Path, capability: str, full: bool) -> list[Step]:
    """All steps, most valuable first. Benchmark steps write NAME.json to the folder, the tests write tests.xml."""
    python = sys.executable
    found = []
    if cuda_tool("nvcc"):
        number = capability.replace(".", "")
        environment = {"DECO_KERNELS_BUILD": "cuda", "DECO_KERNELS_CUDA_ARCHS": {"90": "90a"}.get(number, number)}
        found.append(Step("build", [python, "setup.py", "build_ext", "--inplace"], 150, environment))
    found.append(Step("selftest", [python, "-m", "deco_kernels", "--selftest"], 60))

    def benchmark(name: str, *arguments: str, seconds: int, extra: bool = False) -> Step:
        command = [python, "-m", "benchmarks", *arguments, "--device", "cuda", "--output", str(folder / f"{name}.json")]
        command += ["--full"] if full else ["--stop-after", str(seconds // 2)]
        return Step(name, command, seconds, extra=extra)

    tests = [python, "-m", "pytest", "-q", "-m", "gpu", f"--junitxml={folder / 'tests.xml'}", *map(str, gpu_tests())]
    found += [
        benchmark("pixel_decoder", "pixel_decoder", *_TRAINING, seconds=60),
        benchmark("loss", "flow_matching_loss", *_TRAINING, seconds=45),
        benchmark("kernels", "kernels", "--dtype", "bfloat16", seconds=60),
        Step("tests", tests, 150),
    ]
    sanitizer = cuda_tool("compute-sanitizer")
    sanitized = [python, "-m", "benchmarks.gpu_check.sanitized_ops"]
    memcheck, racecheck = (
        Step(check, [sanitizer, "--tool", check, "--error-exitcode", "9", *sanitized], 90, _SEPARATE_ALLOCATIONS)
        for check in ("memcheck", "racecheck")
    )
    found += [memcheck] if sanitizer else []
    others = ("pixel_decoder_from_tokens", "adaln_block", "upsample_modulate", "memory", "overhead")
    found += [
        benchmark("end_to_end", "end_to_end", "--dtype", "bfloat16", "--no-compile", seconds=70, extra=True),
        benchmark("other_ops", *others, *_TRAINING, "--no-compile", seconds=60, extra=True),
        benchmark("scaling", "scaling", "--dtype", "bfloat16", seconds=60, extra=True),
        benchmark("sampling", "pixel_decoder", "--size", "sample-256", "--quick", seconds=30, extra=True),
    ]
    found += [racecheck._replace(extra=not full)] if sanitizer else []
    return [step._replace(seconds=10 * step.seconds) for step in found] if full else found


def run_step(step: Step, deadline: float) -> dict:
    """Runs a step from the root of the tree, no longer than until `deadline` (in time.perf_counter() seconds)."""
    started = time.perf_counter()
    left = deadline - started
    record = {"name": step.name, "command": step.command, "seconds": 0.0, "passed": step.extra}
    if left < (step.seconds if step.extra else 1):
        print(f"gpu-check: {step.name} left out: {max(left, 0):.0f} s are left", flush=True)
        return record | {"exit_status": "left out for lack of time", "output": ""}
    limit = min(step.seconds, left)
    print(f"gpu-check: {step.name} ...", flush=True)
    environment = dict(os.environ, PYTHONPATH=str(ROOT), **step.environment)
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        try:
            status = subprocess.run(
                step.command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=limit
            ).returncode
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit:.0f} s"
        log.seek(0)
        output = log.read()[-_KEPT_OUTPUT:]
    seconds = round(time.perf_counter() - started, 1)
    passed = status == 0
    ended = "passed" if passed else f"FAILED (exit status {status})"
    print(f"gpu-check: {step.name} {ended} in {seconds} s", flush=True)
    if not passed:
        print("\n".join(output.splitlines()[-20:]), flush=True)
    return record | {"seconds": seconds, "exit_status": status, "passed": passed, "output": output}


def test_outcomes(report: Path) -> list[dict]:
    """Every test of a JUnit XML report: name, seconds, outcome, and the message if it did not pass."""
    if not report.exists():
        return []
    outcomes = []
    for case in ElementTree.parse(report).iter("testcase"):
        problem = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        outcomes.append(
            {
                "test": f"{case.get('classname')}::{case.get('name')}",
                "seconds": float(case.get("time", 0)),
                "outcome": "passed" if problem is None else problem.tag,
                "message": None if problem is None else problem.get("message"),
            }
        )
    return outcomes


def summary(report: dict) -> str:
    """Steps and failed tests as Markdown."""
    from benchmarks.report.markdown import section, table

    lines = [
        [step["name"], "passed" if step["exit_status"] == 0 else str(step["exit_status"]), f"{step['seconds']:.0f}"]
        for step in report["steps"]
    ]
    bad = [test for test in report["tests"] if test["outcome"] in ("failure", "error")]
    counts = {
        outcome: sum(test["outcome"] == outcome for test in report["tests"])
        for outcome in ("passed", "failure", "error", "skipped")
    }
    notes = [f"tests: {', '.join(f'{count} {outcome}' for outcome, count in counts.items())}"]
    notes += [f"{test['test']}: {(test['message'] or '').splitlines()[:1]}" for test in bad[:50]]
    device = report["machine"]["device"]
    return section(f"# GPU check on {device}", table(["step", "result", "s"], lines), notes) + "\n\n"


def write_benchmarks(folder: Path, out: Path) -> str:
    """Merges the results of the benchmark steps, draws the plots, and returns the report as Markdown."""
    from benchmarks.harness import results
    from benchmarks.report import tables

    measured = [results.load(str(path)) for path in sorted(folder.glob("*.json"), key=os.path.getmtime)]
    if not measured:
        return "No benchmark wrote a result.\n"
    merged = results.merge(measured)
    results.save(merged, str(out / "benchmarks.json"))
    try:
        from benchmarks.report import plots

        plots.draw(merged, str(out))
    except ImportError as error:
        print(f"gpu-check: no plots: {error}", flush=True)
    return tables.markdown(merged)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="make gpu-check", description="Checks and benchmarks that need a GPU.")
    parser.add_argument("--full", action="store_true", help="measure everything, without the eight-minute limit")
    options = parser.parse_args(arguments)
    began = time.perf_counter()
    reason = missing_gpu()
    if reason is not None:
        print(f"gpu-check: nothing was checked: {reason}", file=sys.stderr)
        return 1
    out = Path(os.environ.get("OUT") or ROOT / "out" / "gpu-check")
    out.mkdir(parents=True, exist_ok=True)
    for name, what in (
        ("nvcc", "the CUDA module is not built"),
        ("compute-sanitizer", "memory accesses are not checked"),
    ):
        if cuda_tool(name) is None:
            print(f"gpu-check: no {name} on PATH or in $CUDA_HOME/bin: {what}", flush=True)
    deadline = began + (FULL_SECONDS if options.full else TOTAL_SECONDS)
    about = machine()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        records = [run_step(step, deadline) for step in steps(folder, about["compute_capability"], options.full)]
        passed = all(record["passed"] for record in records)
        report = {"passed": passed, "machine": about, "steps": records, "tests": test_outcomes(folder / "tests.xml")}
        (out / "gpu-check.json").write_text(json.dumps(report, indent=2) + "\n")
        (out / "report.md").write_text(summary(report) + write_benchmarks(folder, out), encoding="utf-8")
    print(f"gpu-check: {'passed' if passed else 'FAILED'}; results in {out}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
