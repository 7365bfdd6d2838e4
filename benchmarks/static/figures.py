"""What is known of a compiled kernel, the model of its time, and the budgets it must keep."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.static import sass

BUDGETS = Path(__file__).resolve().parents[1] / "budgets.json"
SMALL_SHARED = "sm_86"  # stands for GPUs with 99 kB of shared memory; only what fits is looked at
# What one program may use, without which a kernel cannot be launched.
SHARED_LIMIT = {"sm_80": 166_912, SMALL_SHARED: 101_376, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
TOLERANCE = 1.03
COLOR_CHANNELS = 3  # Y, Cb and Cr: trips of the loops inside a tile's loop of the loss
# The model's machine: an H200 at 1.755 GHz, and its work: 32 images of 256x256.
SCHEDULERS, CLOCK, PIXELS = 132 * 4, 1.755e9, 32 * 256 * 256

CUDA_PREFIX = "cuda."
"""Sets the names of the CUDA kernels apart from Triton's in budgets.json."""


class Figures(NamedTuple):
    """What one compiled kernel uses; issue_slots_per_16_px is None where nothing loops over pixels and on AMD."""

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
    """Time of a pipe that is busy for so many cycles per 16 pixels, on the model's machine and work."""
    return cycles_per_16_px * PIXELS / 16 / SCHEDULERS / CLOCK * 1e3


def modelled_milliseconds(pipes: dict[str, float], tensor_cycles: float) -> float:
    """Time of the busiest pipe, from warp instructions and tensor-pipe cycles per 16 pixels."""
    cycles = {pipe: count * sass.PIPE_CYCLES[pipe] for pipe, count in pipes.items() if pipe not in ("other", "tensor")}
    return milliseconds(max(tensor_cycles, *cycles.values()))


def recorded_budgets(backend: str) -> dict[str, dict[str, Any]]:
    """Kernel -> architecture -> record, of the kernels of one backend."""
    budgets = json.loads(BUDGETS.read_text())
    is_cuda = backend == "cuda"
    return {name: entry for name, entry in budgets.items() if name.startswith(CUDA_PREFIX) == is_cuda}


def exceeded(figures: Figures, budget: dict[str, Any]) -> Iterator[str]:
    """What lies more than 3 % above the record; nothing if the toolchain is another one."""
    if figures.toolchain != budget["toolchain"]:
        return
    for name, recorded in budget.items():
        actual = getattr(figures, name)
        if name != "toolchain" and recorded is not None and actual > recorded * TOLERANCE:
            yield f"{name} {actual:g}, recorded {recorded:g}"
