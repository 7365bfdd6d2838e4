"""What only a GPU can show: the self-test, the tests marked gpu and the benchmarks there. Run by `make gpu-check`.

Uses the Python that runs it (with PyTorch, pytest and NumPy) and no network. Where nvcc is on PATH or under CUDA_HOME,
the native modules are first built in place. Results are written to $OUT, or out/gpu-check:

    gpu-check.json   device, versions, every step with command, seconds and result, every test with its outcome
    benchmarks.json  what `python -m benchmarks --device cuda` measured
    STEP.log         the output of each step

Exit status: 0 if every step passed, 1 if one failed or there is no GPU.
"""

import json
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOTAL_SECONDS = 470  # what is still running then is stopped and counts as failed


def missing_gpu() -> str | None:
    """Why nothing can be checked here, or None."""
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


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(home, "bin"))


def run_step(name: str, command: list[str], out: Path, deadline: float) -> dict:
    """Runs a command from the root of the tree until `deadline` (time.perf_counter()); its output goes to NAME.log."""
    print(f"gpu-check: {name} ...", flush=True)
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    started = time.perf_counter()
    limit = max(deadline - started, 1)
    with open(out / f"{name}.log", "w") as log:
        try:
            status = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=limit
            ).returncode
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit:.0f} s"
    seconds = round(time.perf_counter() - started, 1)
    passed = status == 0
    print(f"gpu-check: {name} {'passed' if passed else f'FAILED (exit status {status})'} in {seconds} s", flush=True)
    if not passed:
        print("\n".join((out / f"{name}.log").read_text(errors="replace").splitlines()[-20:]), flush=True)
    return {"name": name, "command": command, "seconds": seconds, "exit_status": status, "passed": passed}


def test_outcomes(report: Path) -> list[dict]:
    """Every test of a JUnit XML report: its name, its outcome, and what it said if it did not pass."""
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
    report.unlink()
    return outcomes


def main() -> int:
    reason = missing_gpu()
    if reason is not None:
        print(f"gpu-check: nothing was checked: {reason}", file=sys.stderr)
        return 1
    out = Path(os.environ.get("OUT") or ROOT / "out" / "gpu-check")
    out.mkdir(parents=True, exist_ok=True)
    python, junit = sys.executable, out / "tests.xml"
    commands = {
        "selftest": [python, "-m", "deco_kernels", "--selftest"],
        "tests": [python, "-m", "pytest", "-q", "-m", "gpu", f"--junitxml={junit}"],
        "benchmarks": [python, "-m", "benchmarks", "--device", "cuda", "--output", str(out / "benchmarks.json")],
    }
    if nvcc():
        commands = {"build": [python, "setup.py", "build_ext", "--inplace"], **commands}
    deadline = time.perf_counter() + TOTAL_SECONDS
    steps = [run_step(name, command, out, deadline) for name, command in commands.items()]
    passed = all(step["passed"] for step in steps)
    report = {"passed": passed, "machine": machine(), "steps": steps, "tests": test_outcomes(junit)}
    (out / "gpu-check.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"gpu-check: {'passed' if passed else 'FAILED'}; results in {out}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
