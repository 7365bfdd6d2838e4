"""Description of the machine and process of a measurement, heap settings and peak memory.

Shared by benchmarks and programs. PyTorch is imported at first use, so that reading KEPT_HEAP is cheap.
"""

import datetime
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from deco_kernels import __version__

# glibc settings that keep freed memory in the process, so that no contender's time includes page faults
KEPT_HEAP = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "1000000000000",
    "MALLOC_TOP_PAD_": "268435456",
}


def keep_heap(*command: str, **environment: str) -> None:
    """Restart this process as `python command...` unless KEPT_HEAP and `environment` are already set.

    glibc reads these settings only when a process starts.
    """
    wanted = {**KEPT_HEAP, **environment}
    if not wanted.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *command], {**os.environ, **wanted})


def default_heap() -> dict[str, str]:
    """The environment without KEPT_HEAP: a process started with it returns large freed blocks to the system, so that
    its peak is the memory in use at once."""
    return {name: value for name, value in os.environ.items() if name not in KEPT_HEAP}


def description(device: str, checkout: Path) -> dict[str, Any]:
    """Machine, software and settings of this process, as JSON values.

    Args:
        device: "cpu" or "cuda".
        checkout: a folder of the source tree whose commit is recorded.
    """
    import torch

    from deco_kernels import native

    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": load(),
        "last_level_cache_bytes": last_level_cache(device),
        "instruction_set": native.cpu().current_isa() if native.cpu_unavailable_reason() is None else None,
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "kept_heap": KEPT_HEAP.items() <= os.environ.items(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deco_kernels": __version__,
        "commit": commit(checkout),
    }


def load() -> float | None:
    """Mean number of runnable processes in the last minute; None if the system does not report it."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def processor_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def last_level_cache(device: str) -> int:
    """Size of the device's last-level cache in bytes; 32 MiB if the system does not report it."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("*/size")
    return max((int(path.read_text().strip().rstrip("K")) * 1024 for path in sizes), default=32 << 20)


def commit(checkout: Path) -> str | None:
    """The commit of a checkout, with the suffix -dirty if files differ from it; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        answer = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def reset_peak(device: str) -> int:
    """Reset the peak memory if the system allows it; returns the bytes in use now."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass  # the peak then counts from the start of the process
    return _status_bytes("VmRSS")


def peak_bytes(device: str) -> int:
    """Peak bytes since `reset_peak`: resident memory of this process, or PyTorch's allocations on a GPU."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
