"""Measured GPU times of all kernels with a budget vs. their modeled times.

The modeled time is that of the largest bound of machines.py, with the number of multiprocessors, the highest clock and
the copy bandwidth of the device at hand, for a training batch. It is an estimate: latency and the other bounds may add
to it. Fields of a row: `kernel` (the name in benchmarks/budgets.json), `architecture`, `modeled_ms` and `bound` (None
for kernels without a loop over pixels), `status`, `measured_ms` (None with a `reason`), `launches` of one forward and
backward, their registers and spilled bytes, and the recorded ones.
"""

import re
from collections.abc import Iterator

import torch

from benchmarks.harness import gpu_state
from benchmarks.harness.ceilings import copy_bandwidth
from benchmarks.harness.timing import kernel_milliseconds
from benchmarks.static import profiled_kernels, triton_kernels
from benchmarks.static.figures import recorded_budgets
from benchmarks.static.machines import Machine, largest_bound, machine_of
from deco_kernels import testing

IMAGE = (32, 256, 256)  # a training batch with as many pixels as in the model
_TOKEN_WIDTH = 1152
REPEATS = 7


def measure_kernels(full: bool) -> list[dict]:
    """Rows of the kernels of width 32 in bfloat16, or with `full` of all with a budget here, slowest first.

    Raises:
        ValueError: no budget is recorded for the architecture.
    """
    properties = torch.cuda.get_device_properties(0)
    architecture = f"sm_{properties.major}{properties.minor}"
    names = {"triton": architecture, "cuda": {"sm_90": "sm_90a"}.get(architecture, architecture)}
    budgets = {
        (backend, name): figures[names[backend]]
        for backend in names
        for name, figures in recorded_budgets(backend).items()
        if names[backend] in figures and (full or not {_width(name), _dtype(name)} - {None, 32, "bfloat16"})
    }
    if not budgets:
        raise ValueError(f"no kernel has a budget on {architecture}; leave the part kernels out")
    cases = {(_width(name), _dtype(name)) for _, name in budgets if _width(name) and _dtype(name)}
    measured: dict[str, dict] = {}
    failures = []
    for width, dtype in sorted(cases, key=lambda case: case != (32, "bfloat16")):
        for op in triton_kernels.OPS:
            try:
                for name, found in measure_op(op, width, dtype, architecture):
                    measured.setdefault(name, found)
            except Exception as error:  # one failing op does not hide the others
                failures.append(f"{op}, D {width}, {dtype} failed: {type(error).__name__}: {error}".splitlines()[0])
    device = (properties.multi_processor_count, _clock_hz(), copy_bandwidth("cuda"))
    machines = {name: machine_of(name, *device) for name in names.values()}
    missing = {"status": "unavailable", "measured_ms": None, "reason": "not launched by any op here"}
    if failures:
        missing |= {"status": "failed", "reason": "; ".join(failures)}
    rows = [
        _row(name, names[backend], budget, machines[names[backend]]) | measured.get(name, missing)
        for (backend, name), budget in budgets.items()
    ]
    return sorted(rows, key=lambda row: -(row["measured_ms"] or 0))


def measure_op(op: str, width: int, dtype: str, architecture: str) -> Iterator[tuple[str, dict]]:
    """(budget's name, figures) of the kernels that forward and backward of an op launch in both backends."""
    storage = triton_kernels.DTYPES[dtype]
    sizes = dict(width=width, image_size=IMAGE, token_width=_TOKEN_WIDTH)
    inputs = testing.random_inputs(op, dtype=storage, other_dtype=storage, device="cuda", **sizes)
    for name, found in triton_times(inputs, architecture).items():
        yield f"{name}/D{width}/{dtype}", found
    yield from profiled_kernels.of_op(inputs, width, dtype)


def triton_times(inputs: testing.Inputs, architecture: str) -> dict[str, dict]:
    """Figures of the Triton kernels by name. Each launch is timed separately with the arguments that the op passes;
    launches with the same name are chunks of one call and are added up."""
    found: dict[str, dict] = {}
    for launch in triton_kernels.launches_of(inputs, architecture):
        entry = found.setdefault(triton_kernels.kernel_name(launch), {"measured_ms": 0.0, "launches": 0})
        compiled = run_launch(launch)
        times = [kernel_milliseconds(lambda launch=launch: run_launch(launch)) for _ in range(REPEATS)]
        entry["measured_ms"] += min(times)
        entry["launches"] += 1
        entry["registers"] = getattr(compiled, "n_regs", None)
        entry["spill_bytes"] = getattr(compiled, "n_spills", None)
    return found


def run_launch(launch):
    return launch.kernel[launch.grid](**launch.args, **launch.options)


def _width(name: str) -> int | None:
    """D of a budget's name, "module.kernel+flags/D32/bfloat16"; None where the kernel does not depend on it."""
    found = re.search(r"/D(\d+)", name)
    return int(found[1]) if found else None


def _dtype(name: str) -> str | None:
    found = re.search(r"/([a-z]\w+)$", name)
    return found[1] if found else None


def _clock_hz() -> float | None:
    """Highest clock of the multiprocessors; None without NVML."""
    megahertz = gpu_state.header().get("sm_clock_max_mhz")
    return 1e6 * megahertz if megahertz else None


def _row(name: str, architecture: str, budget: dict, machine: Machine) -> dict:
    """The unmeasured fields of a row."""
    bound = largest_bound(machine, budget["cycles_per_16_px"], budget["bytes_per_px"])
    return {
        "kernel": name,
        "status": "ok",
        "architecture": architecture,
        "modeled_ms": bound and bound.milliseconds,
        "bound": bound and bound.name,
        "multiprocessors": machine.multiprocessors,
        "clock": machine.clock,
        "bytes_per_second": machine.bytes_per_second,
        "recorded_registers": budget["registers"],
        "recorded_spill_bytes": budget["spill_bytes"],
    }
