"""The header of a result: machine, date, software and settings."""

import importlib.metadata
import sys
from pathlib import Path

import torch

from benchmarks.harness import gpu_state
from deco_kernels import machine


def header(device: str) -> dict:
    """Machine, software and settings of this process."""
    found = machine.description(device, Path(__file__).parent) | {"command": command(sys.argv[1:])}
    return found | (_gpu() if device == "cuda" else {})


def command(arguments: list[str]) -> str:
    """Command line that repeats the measurement, without the files that it read and wrote."""
    kept: list[str] = []
    words = iter(arguments)
    for word in words:
        option, given, _ = word.partition("=")
        if option not in ("--output", "--csv", "--compare"):
            kept.append(word)
        elif not given:
            next(words)
    return " ".join(["python -m benchmarks", *kept])


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
