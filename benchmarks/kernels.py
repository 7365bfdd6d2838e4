"""Every Triton kernel that has a budget, timed by itself on a GPU, beside what its recorded issue slots allow.

The model's figure is the time in which the device's schedulers can issue the recorded instructions of a training batch,
at the highest clock: a bound, which memory, shared memory or latency may keep out of reach. A row: `kernel` (the name
in benchmarks/budgets.json), `architecture`, `modelled_ms` (None for kernels that do not walk over pixels),
`measured_ms` (None with a `reason`), `launches` of one forward and backward, their registers and spilled bytes and the
recorded ones.
"""

from collections.abc import Iterator

import torch

from benchmarks import gpu_state, static, static_tables
from benchmarks.timing import milliseconds
from deco_kernels import testing

IMAGE = (32, 256, 256)  # a training batch: as many pixels as the recorded model's
_TOKEN_WIDTH = 1152
_REPEATS = 7
_SCHEDULERS_PER_MULTIPROCESSOR = 4


def measure_kernels(full: bool) -> list[dict]:
    """The kernels of width 32 in bfloat16, or all that have a budget on this architecture, slowest first."""
    properties = torch.cuda.get_device_properties(0)
    architecture = f"sm_{properties.major}{properties.minor}"
    budgets = {
        name: figures[architecture]
        for name, figures in static.recorded_budgets("triton").items()
        if architecture in figures and (full or name.endswith("/D32/bfloat16"))
    }
    measured = {}
    for width, dtype in sorted({_case(name) for name in budgets}, key=lambda case: case != (32, "bfloat16")):
        for op in testing.OPS:
            for name, found in measure_op(op, width, dtype, architecture):
                measured.setdefault(name, found)
    rate = properties.multi_processor_count * _SCHEDULERS_PER_MULTIPROCESSOR * _clock_hz()
    rows = [_row(name, architecture, budget, rate, measured.get(name)) for name, budget in budgets.items()]
    return sorted(rows, key=lambda row: -(row["measured_ms"] or 0))


def measure_op(op: str, width: int, dtype: str, architecture: str) -> Iterator[tuple[str, dict]]:
    """(budget's name, figures) of the Triton kernels that forward and backward of an op launch, each launch timed alone
    with the arguments the op gives it. Launches of one name are added up: chunks of one call."""
    inputs = testing.random_inputs(
        op, dtype=static.DTYPES[dtype], width=width, image_size=IMAGE, token_width=_TOKEN_WIDTH, device="cuda"
    )
    found: dict[str, dict] = {}
    for launch in static.launches_of(inputs, architecture):
        entry = found.setdefault(f"{static.kernel_name(launch)}/D{width}/{dtype}", {"measured_ms": 0.0, "launches": 0})
        compiled = _run(launch)
        entry["measured_ms"] += min(milliseconds(lambda launch=launch: _run(launch), "cuda") for _ in range(_REPEATS))
        entry["launches"] += 1
        entry["registers"] = getattr(compiled, "n_regs", None)
        entry["spill_bytes"] = getattr(compiled, "n_spills", None)
    yield from found.items()


def _run(launch):
    return launch.kernel[launch.grid](**launch.args, **launch.options)


def _case(name: str) -> tuple[int, str]:
    """(width, dtype) of a budget's name, "module.kernel+flags/D32/bfloat16"."""
    _, width, dtype = name.split("/")
    return int(width.removeprefix("D")), dtype


def _clock_hz() -> float:
    """The highest clock of the multiprocessors; without NVML that of the recorded model's machine."""
    megahertz = gpu_state.header().get("sm_clock_max_mhz")
    return 1e6 * megahertz if megahertz else static_tables.CLOCK


def _row(name: str, architecture: str, budget: dict, rate: float, found: dict | None) -> dict:
    slots = budget["issue_slots_per_16_px"]
    row = {
        "kernel": name,
        "architecture": architecture,
        "modelled_ms": None if slots is None else 1e3 * slots * static_tables.PIXELS / 16 / rate,
        "recorded_registers": budget["registers"],
        "recorded_spill_bytes": budget["spill_bytes"],
    }
    if found is None:
        return row | {"measured_ms": None, "reason": "not launched by any op here"}
    return row | found
