"""Figures of a compiled kernel, the model of its time, and its budgets."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.static.machines import MACHINES, Bound, Machine, largest_bound

BUDGETS = Path(__file__).resolve().parents[1] / "budgets.json"
# Shared memory available to one block, in bytes; kernels that need more cannot be launched.
SHARED_LIMIT = {
    **{"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448},
    **{"sm_86": 101_376, "sm_89": 101_376, "sm_120": 101_376},  # GPUs outside data centers
    "gfx942": 65_536,
}
CONSUMER = ("sm_89", "sm_120")
"""Recorded architectures outside data centers. sm_86 has the instructions and shared memory of sm_89."""
TOLERANCE = 1.03
_BUDGETED = ("registers", "spill_bytes", "shared_bytes", "issue_slots_per_16_px")
COLOR_CHANNELS = 3  # Y, Cb and Cr: iterations of the inner loop of the loss kernels
CUDA_PREFIX = "cuda."
"""Prefix that distinguishes CUDA kernels from Triton kernels in budgets.json."""


class Figures(NamedTuple):
    """Resources of one compiled kernel. Slots, cycles and bytes are None without a loop over pixels and on AMD."""

    toolchain: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    issue_slots_per_16_px: float | None = None
    cycles_per_16_px: dict[str, float] | None = None  # pipe -> cycles per scheduler; "issue" includes all instructions
    bytes_per_px: float | None = None  # of global memory

    def bound(self, architecture: str) -> Bound | None:
        """The largest bound of the model."""
        return bound_of(self._asdict(), architecture)


def counted_figures(machine: Machine, instructions: Mapping[str, float]) -> dict[str, Any]:
    """Fields of `Figures` from the executed warp instructions per 16 pixels by opcode."""
    cycles = {pipe: round(value, 1) for pipe, value in machine.cycles(instructions).items()}
    return {"issue_slots_per_16_px": cycles["issue"], "cycles_per_16_px": cycles}


def bound_of(record: Mapping[str, Any], architecture: str) -> Bound | None:
    """The largest bound of a record in budgets.json."""
    if architecture not in MACHINES:
        return None
    return largest_bound(MACHINES[architecture], record["cycles_per_16_px"], record["bytes_per_px"])


def recorded_budgets(backend: str) -> dict[str, dict[str, Any]]:
    """Kernel -> architecture -> record, for the kernels of one backend."""
    budgets = json.loads(BUDGETS.read_text())
    is_cuda = backend == "cuda"
    return {name: entry for name, entry in budgets.items() if name.startswith(CUDA_PREFIX) == is_cuda}


def exceeded(figures: Figures, budget: dict[str, Any]) -> Iterator[str]:
    """Figures more than 3 % above the record; none if the toolchain differs."""
    if figures.toolchain != budget["toolchain"]:
        return
    for name in _BUDGETED:
        recorded, actual = budget[name], getattr(figures, name)
        if recorded is not None and actual > recorded * TOLERANCE:
            yield f"{name} {actual:g}, recorded {recorded:g}"
