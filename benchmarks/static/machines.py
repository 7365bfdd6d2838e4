"""GPUs of the static model: rates of their pipes, and the time in which a kernel's instructions occupy each.

Rates are cycles per scheduler (a quarter of a multiprocessor) in which one warp instruction occupies its pipe. Those of
the tensor cores and special functions of H100, its clock under load and its bandwidth, and the tensor cores of B200 and
RTX 5090 follow arXiv 2501.12084 and public micro-benchmarks; all others follow from documented throughput, with boost
clocks. Shared memory is counted without bank conflicts. The probes of this package (benchmarks/gpu_check/probes.cu)
agree within 9 % on an H100 and an H200, except for wgmma of 32 columns; no other device has been probed.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from benchmarks.static import sass

PIXELS = 32 * 256 * 256
"""Pixels of the model's workload, a training batch of 32 images of 256x256."""

SCHEDULERS_PER_MULTIPROCESSOR = 4
BYTES = "bytes"
"""Name of the bound by global memory."""

_MMA_PRODUCTS = 16 * 8 * 16  # multiply-adds of mma.sync m16n8k16
_WGMMA_ROWS, _WGMMA_DEPTH = 64, 16


class Machine(NamedTuple):
    """A GPU: size, clock under load, and cycles of warp instructions per scheduler."""

    device: str
    multiprocessors: int
    clock: float  # Hz
    bytes_per_second: float  # reads of global memory
    mma_cycles: float  # mma.sync m16n8k16 with float32 accumulation, at least four independent
    fp32_cycles: float
    special_cycles: float  # tanh, rsqrt, exp
    wgmma_cycles: tuple[tuple[int, float], ...] = ()  # N -> m64nNk16
    mma_excludes_fp32: bool = False  # mma.sync and float32 instructions do not issue at the same time
    alu_cycles: float = 2  # 64 lanes per multiprocessor: integer, logic, compare, convert
    shared_cycles: float = 4  # 128 bytes per clock and multiprocessor

    def cycles(self, instructions: Mapping[str, float]) -> dict[str, float]:
        """Pipe -> cycles per scheduler, for the executed warp instructions by opcode."""
        total = dict.fromkeys(("issue", "tensor", "shared", "special", "fp32", "alu"), 0.0)
        for opcode, count in instructions.items():
            pipe = sass.pipe_of(opcode)
            total["issue"] += count
            if pipe in total:
                total[pipe] += count * self._instruction_cycles(opcode, pipe)
            if sass.copies_to_shared(opcode):
                total["shared"] += count * self._instruction_cycles(opcode, "shared")
        return total

    def _instruction_cycles(self, opcode: str, pipe: str) -> float:
        if pipe == "tensor":
            return self._tensor_cycles(opcode)
        if pipe == "shared":
            return self.shared_cycles * sass.shared_passes(opcode)
        return {"special": self.special_cycles, "fp32": self.fp32_cycles, "alu": self.alu_cycles}[pipe]

    def _tensor_cycles(self, opcode: str) -> float:
        # A TF32 product takes the time of two 16-bit products.
        weight = 2 if "TF32" in opcode else 1
        if shape := re.search(r"\.(\d+)x(\d+)x(\d+)", opcode):
            rows, columns, depth = (int(size) for size in shape.groups())
            return weight * self._wgmma(columns) * rows * depth / (_WGMMA_ROWS * _WGMMA_DEPTH)
        products = {"1684": 512, "1688": 1024}.get(sass.mma_shape(opcode), _MMA_PRODUCTS)
        return weight * self.mma_cycles * products / _MMA_PRODUCTS

    def _wgmma(self, columns: int) -> float:
        """Cycles of m64nNk16: the measured N, linear between them, proportional to N beyond the largest."""
        if not self.wgmma_cycles:
            return self.mma_cycles * columns / 8  # a warp's share is one m16n8k16 per 8 columns
        smaller = [known for known in self.wgmma_cycles if known[0] <= columns]
        larger = [known for known in self.wgmma_cycles if known[0] >= columns]
        if not smaller:
            return larger[0][1]
        (n0, c0) = smaller[-1]
        if not larger:
            return c0 * columns / n0
        (n1, c1) = larger[0]
        return c0 if n1 == n0 else c0 + (c1 - c0) * (columns - n0) / (n1 - n0)

    def occupied(self, cycles: Mapping[str, float]) -> dict[str, float]:
        """Pipe -> cycles for which it is not free, from the result of `cycles`."""
        excluded = cycles.get("fp32", 0.0) if self.mma_excludes_fp32 and cycles.get("tensor") else 0.0
        return {**cycles, "tensor": cycles["tensor"] + excluded} if excluded else dict(cycles)

    def milliseconds(self, cycles_per_16_px: Mapping[str, float], bytes_per_px: float | None) -> dict[str, float]:
        """Bound -> time in which the workload occupies it."""
        schedulers = self.multiprocessors * SCHEDULERS_PER_MULTIPROCESSOR
        cycles = self.occupied(cycles_per_16_px)
        times = {pipe: 1e3 * c * PIXELS / 16 / schedulers / self.clock for pipe, c in cycles.items()}
        if bytes_per_px is not None:
            times[BYTES] = 1e3 * bytes_per_px * PIXELS / self.bytes_per_second
        return times


_H100 = Machine(
    "H100 SXM", 132, 1.55e9, 2.77e12, mma_cycles=6.26, fp32_cycles=1,
    wgmma_cycles=((32, 24.7), (64, 32.8), (96, 48.7)), special_cycles=8.75,
)  # fmt: skip
MACHINES = {
    "sm_80": Machine("A100 SXM 80 GB", 108, 1.41e9, 2.04e12, mma_cycles=8, fp32_cycles=2, special_cycles=8),
    "sm_90": _H100,
    "sm_90a": _H100._replace(mma_excludes_fp32=True),  # of the CUDA kernels; Triton's on sm_90 use wgmma
    "sm_100": Machine("B200", 148, 1.85e9, 7.7e12, mma_cycles=8.5, fp32_cycles=1, special_cycles=8.75),
    "sm_86": Machine("RTX 3090", 82, 1.7e9, 0.94e12, mma_cycles=32, fp32_cycles=1, special_cycles=8),
    "sm_89": Machine("RTX 4090", 128, 2.52e9, 1.01e12, mma_cycles=32, fp32_cycles=1, special_cycles=8),
    "sm_120": Machine("RTX 5090", 170, 2.41e9, 1.79e12, mma_cycles=32, fp32_cycles=1, special_cycles=8),
}
"""Architecture -> its model."""


def machine_of(architecture: str, multiprocessors: int, clock: float | None, bytes_per_second: float) -> Machine:
    """The model of an architecture as a device of this size with this clock, in Hz (None: that of the model), and
    bandwidth of global memory."""
    machine = MACHINES[architecture]
    clock = clock or machine.clock
    return machine._replace(multiprocessors=multiprocessors, clock=clock, bytes_per_second=bytes_per_second)


class Bound(NamedTuple):
    """The largest bound of a kernel on one architecture."""

    name: str
    milliseconds: float


def largest_bound(
    machine: Machine, cycles_per_16_px: Mapping[str, float] | None, bytes_per_px: float | None
) -> Bound | None:
    """None for kernels whose instructions are not counted."""
    if not cycles_per_16_px:
        return None
    times = machine.milliseconds(cycles_per_16_px, bytes_per_px)
    name = max(times, key=lambda bound: times[bound])
    return Bound(name, times[name])
