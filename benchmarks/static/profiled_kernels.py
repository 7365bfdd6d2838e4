"""Times of the CUDA kernels by name, from PyTorch's profiler; Python cannot launch them individually."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch

from benchmarks.static.cuda_kernels import DEPTH, KERNELS
from benchmarks.static.figures import CUDA_PREFIX
from deco_kernels import BackendUnavailable, testing

_STEPS = {"first", "last"}  # variant flags for the position of the launch in a call
_OTHER_CALLS = {"float32_target", "padded", "general", "extended"}  # variant flags that the timed calls do not launch
_REPEATS = 5

Event = tuple[str, float]  # demangled kernel name, milliseconds


def of_op(inputs: testing.Inputs, width: int, dtype: str) -> Iterator[tuple[str, dict]]:
    """(budget's name, figures) of the kernels that forward and backward of an op launch; nothing if the backend does
    not support the case."""
    try:
        testing.run(inputs, "cuda")
    except BackendUnavailable:
        return
    repeats = [by_variant(inputs.op, profile(inputs)) for _ in range(_REPEATS)]
    for variant, times in repeats[0].items():
        totals = [sum(each[variant]) for each in repeats if variant in each]
        figures = {"measured_ms": min(totals), "launches": len(times), "registers": None, "spill_bytes": None}
        for suffix in (f"/D{width}/{dtype}", f"/D{width}", f"/{dtype}", ""):
            yield f"{CUDA_PREFIX}{variant}{suffix}", figures


def profile(inputs: testing.Inputs) -> list[Event]:
    """The kernels of one forward and backward, in execution order."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        testing.run(inputs, "cuda")
        torch.cuda.synchronize()
    on_device = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    on_device.sort(key=lambda event: event.time_range.start)
    return [(event.name, event.time_range.elapsed_us() / 1e3) for event in on_device]


def by_variant(op: str, events: Iterable[Event]) -> dict[str, list[float]]:
    """Milliseconds of every launch by the variant's name in `KERNELS`; of the variants with and without AHEAD, of which
    a device runs one, by both names."""
    launches: dict[str, list[float]] = defaultdict(list)
    for name, milliseconds in events:
        function = re.search(r"\bdeco::cuda::.*?(\w+_kernel)\b", name)
        if function:
            launches[function[1]].append(milliseconds)
    depth = DEPTH if op.startswith("pixel_decoder") else 1  # launches of the block backward in a chunk
    variants = {variant: _parts(variant) for variant, kernel in KERNELS.items() if kernel.op == op}
    in_steps = {function for function, flags in variants.values() if flags & _STEPS}
    found: dict[str, list[float]] = defaultdict(list)
    for variant, (function, flags) in variants.items():
        times = launches[function] if not flags & _OTHER_CALLS else []
        for index, milliseconds in enumerate(times):
            position = (("first", index % depth == 0), ("last", index % depth == depth - 1))
            if function not in in_steps or {step for step, holds in position if holds} == flags & _STEPS:
                found[variant].append(milliseconds)
    return dict(found)


def _parts(variant: str) -> tuple[str, set[str]]:
    """("kernel", flags) of "source.kernel+flag+flag"."""
    function, *flags = variant.partition(".")[2].split("+")
    return function, set(flags)
