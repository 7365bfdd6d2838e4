"""Figures of a compiled kernel, the model of its time, and its budgets."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.static import sass

BUDGETS = Path(__file__).resolve().parents[1] / "budgets.json"
SMALL_SHARED = "sm_86"  # represents GPUs with 99 kB of shared memory; only the shared-memory limit is checked
# Shared memory available to one block, in bytes; kernels that need more cannot be launched.
SHARED_LIMIT = {"sm_80": 166_912, SMALL_SHARED: 101_376, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
TOLERANCE = 1.03
COLOR_CHANNELS = 3  # Y, Cb and Cr: iterations of the inner loop of the loss kernels
# The model's machine is an H200 at 1.755 GHz; its workload is 32 images of 256x256.
SCHEDULERS, CLOCK, PIXELS = 132 * 4, 1.755e9, 32 * 256 * 256

CUDA_PREFIX = "cuda."
"""Prefix that distinguishes CUDA kernels from Triton kernels in budgets.json."""


class Figures(NamedTuple):
    """Resources of one compiled kernel; issue_slots_per_16_px is None without a loop over pixels and on AMD."""

    toolchain: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    issue_slots_per_16_px: float | None
    pipes_per_16_px: dict[str, float]
    modelled_ms: float | None

    def record(self) -> dict[str, Any]:
        """The fields kept in budgets.json."""
        fields = ("toolchain", "registers", "spill_bytes", "shared_bytes", "issue_slots_per_16_px")
        return {name: getattr(self, name) for name in fields}


def milliseconds(cycles_per_16_px: float) -> float:
    """Time of a pipe that is busy for the given cycles per 16 pixels, on the model's machine and workload."""
    return cycles_per_16_px * PIXELS / 16 / SCHEDULERS / CLOCK * 1e3


def modelled_milliseconds(pipes: dict[str, float], tensor_cycles: float) -> float:
    """Time of the busiest pipe, from warp instructions and tensor-pipe cycles per 16 pixels."""
    cycles = {pipe: count * sass.PIPE_CYCLES[pipe] for pipe, count in pipes.items() if pipe not in ("other", "tensor")}
    return milliseconds(max(tensor_cycles, *cycles.values()))


def recorded_budgets(backend: str) -> dict[str, dict[str, Any]]:
    """Kernel -> architecture -> record, for the kernels of one backend."""
    budgets = json.loads(BUDGETS.read_text())
    is_cuda = backend == "cuda"
    return {name: entry for name, entry in budgets.items() if name.startswith(CUDA_PREFIX) == is_cuda}


def exceeded(figures: Figures, budget: dict[str, Any]) -> Iterator[str]:
    """Figures more than 3 % above the record; none if the toolchain differs."""
    if figures.toolchain != budget["toolchain"]:
        return
    for name, recorded in budget.items():
        actual = getattr(figures, name)
        if name != "toolchain" and recorded is not None and actual > recorded * TOLERANCE:
            yield f"{name} {actual:g}, recorded {recorded:g}"
