"""The header of a result: where, when and with what it was measured."""

import datetime
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys

import torch

import deco_kernels
from benchmarks import gpu_state
from benchmarks.names import KEPT_HEAP
from benchmarks.timing import last_level_cache


def header(device: str) -> dict:
    """Machine, software and settings of this process."""
    found = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": load(),
        "last_level_cache_bytes": last_level_cache(device),
        "instruction_set": instruction_set(),
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "kept_heap": all(os.environ.get(name) == value for name, value in KEPT_HEAP.items()),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deco_kernels": deco_kernels.__version__,
        "commit": commit(),
        "command": command(sys.argv[1:]),
    }
    return found | (_gpu() if device == "cuda" else {})


def command(arguments: list[str]) -> str:
    """What repeats the measurement: the command line without the files that it read and wrote."""
    kept = list(arguments)
    for option in ("--output", "--compare"):
        while option in kept:
            index = kept.index(option)
            del kept[index : index + 2]
    return " ".join(["python -m benchmarks", *kept])


def load() -> float | None:
    """Mean number of running processes in the last minute."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def processor_name() -> str:
    if os.path.isfile("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def instruction_set() -> str | None:
    """The one in use by the cpu backend; None where its module is not built."""
    if importlib.util.find_spec("deco_kernels.native") is None:
        return None
    from deco_kernels import native

    return native.cpu().current_isa() if native.cpu_unavailable_reason() is None else None


def commit() -> str | None:
    """The checkout's commit, marked when files differ from it; None outside a checkout."""
    folder = os.path.dirname(os.path.abspath(__file__))
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def _gpu() -> dict:
    properties = torch.cuda.get_device_properties(0)
    found = {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "gpu_memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "liger_kernel": _version("liger-kernel"),
    }
    return found | gpu_state.header()


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
