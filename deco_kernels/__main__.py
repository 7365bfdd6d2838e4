"""Reports the backends that this machine can run and why it cannot run the others; `--selftest` checks them.

The self-test compares every backend of this machine, for every op and dtype, outputs and gradients, with the float64
reference by the rule of error of `deco_kernels.testing`. Exit status: 0, or 1 if a check failed.
"""

import argparse
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Sequence

import torch

from deco_kernels import __version__, native, testing
from deco_kernels.backends.support import Request
from deco_kernels.machine import processor_name
from deco_kernels.ops import registry

OPS = (*testing.OPS, "frequency_loss")
SELFTEST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def devices() -> list[torch.device]:
    return [torch.device("cpu")] + [torch.device("cuda", 0)] * torch.cuda.is_available()


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name} (compute capability {properties.major}.{properties.minor})"
    return f"{processor_name()}, {torch.get_num_threads()} threads of {os.cpu_count()} processors"


def package_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def refusals(backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, str | None]:
    """Op → reason why `backend` cannot run it at the sizes of the published decoder, or None if it can."""
    return {op: registry.refusal(backend, request(op, device, dtype), device) for op in OPS}


def request(op: str, device: torch.device, dtype: torch.dtype) -> Request:
    module = "flow_matching_loss" if op == "frequency_loss" else op
    return Request(module, device.type, (dtype, dtype), width=32, depth=3, patch_size=16, channels=3)


# --- the report ------------------------------------------------------------------------------------------------------


def print_report() -> None:
    print(f"deco_kernels {__version__} in {os.path.dirname(os.path.abspath(__file__))}")
    print(f"Python {platform.python_version()}, torch {torch.__version__}, Triton {package_version('triton')}")
    print(f"CPU instruction set: {instruction_set()}")
    if native.cpu_unavailable_reason() is None:
        print(f"CPU upsamples in bfloat16: {upsample_matmul()}")
    for device in devices():
        print(f"\n{device.type}: {device_name(device)}")
        for backend in registry.backend_names():
            for line in backend_lines(backend, refusals(backend, device)):
                print(f"  {line}")
        automatic = registry.automatic_candidates(request("pixel_decoder", device, torch.float32))
        print(f"  automatic choice: {', else '.join(automatic)}")
    if len(devices()) == 1:
        print("\ncuda: PyTorch finds no GPU")


def instruction_set() -> str:
    reason = native.cpu_unavailable_reason()
    if reason is not None:
        return f"none in use: {reason}"
    module = native.cpu()
    usable = ", ".join(module.usable_isas())
    return f"{module.current_isa()} (this processor supports {usable}; {native.ISA_VARIABLE} selects)"


def upsample_matmul() -> str:
    chosen = "PyTorch's matmul" if native.upsamples_in_pytorch(torch.bfloat16) else "kernel"
    amx = "has" if native.cpu().has_amx_bf16() else "has no"
    return f"{chosen} (this process {amx} AMX for bfloat16; {native.UPSAMPLE_VARIABLE} selects)"


def backend_lines(backend: str, reasons: dict[str, str | None]) -> list[str]:
    """One line for the backend, or one per op that it cannot run if the ops differ."""
    if not any(reasons.values()):
        return [f"{backend:<10} available for every op"]
    if len(set(reasons.values())) == 1:
        return [f"{backend:<10} unavailable: {next(iter(reasons.values()))}"]
    served = ", ".join(op for op, reason in reasons.items() if reason is None) or "no op"
    missing = [f"{'':<10} not {op}: {reason}" for op, reason in reasons.items() if reason is not None]
    return [f"{backend:<10} available for {served}", *missing]


# --- the self-test ---------------------------------------------------------------------------------------------------


def selftest(backends: Sequence[str], dtypes: Sequence[torch.dtype]) -> int:
    """Print one row per device, backend, op and dtype; returns the number of failures."""
    started, failures, checked = time.perf_counter(), 0, 0
    width = max(map(len, OPS)) + 2
    print(f"{'device':<7}{'backend':<11}{'op':<{width}}{'dtype':<10}{'error/bound':>11}  result")
    for device in devices():
        for backend in backends:
            for op in OPS:
                for dtype in dtypes:
                    reason = registry.refusal(backend, request(op, device, dtype), device)
                    if reason is None:
                        ratio, verdict = check(backend, op, device, dtype)
                        checked += 1
                        failures += verdict != "ok"
                        label = f"{device.type:<7}{backend:<11}{op:<{width}}{str(dtype).removeprefix('torch.'):<10}"
                        print(f"{label}{ratio:>11.2f}  {verdict}", flush=True)
            for line in backend_lines(backend, refusals(backend, device)):
                if "available for every op" not in line:
                    print(f"{device.type:<7}{line}")
    print(f"\n{checked - failures} of {checked} checks passed in {time.perf_counter() - started:.1f} s")
    if checked == 0:
        print("This machine runs only the reference backend: there was nothing to compare with it.")
    return failures


def check(backend: str, op: str, device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """(largest error / bound, "ok" or the failures) over the outputs and gradients of a call, and of
    one with equal channels where the op has a LayerNorm."""
    try:
        calls = [testing.random_inputs(op, dtype=dtype, device=device, image_size=(1, 64, 64))]
        if "loss" not in op:
            calls.append(testing.with_equal_rows(calls[0], offset=100.0))
        rows = [row for inputs in calls for row in testing.compare(inputs, testing.run(inputs, backend))]
    except Exception as error:  # reported as a row of the table
        return float("nan"), f"FAILED: {type(error).__name__}: {error}"
    ratio = max(max(ratio_of(row.error, row.bound), ratio_of(row.bias, row.bias_bound)) for row in rows)
    failed = [str(row) for row in rows if not row.passed]
    return ratio, "ok" if not failed else "FAILED: " + "; ".join(failed)


def ratio_of(value: float, bound: float) -> float:
    return 0.0 if value == 0 else value / bound if bound > 0 else float("inf")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deco_kernels", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--selftest", action="store_true", help="compare every backend of this machine with the reference"
    )
    compared = [name for name in registry.backend_names() if name != "reference"]
    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in SELFTEST_DTYPES}
    only = "of the self-test; repeatable (default: all)"
    parser.add_argument("--backend", action="append", choices=compared, help=f"backend {only}")
    parser.add_argument("--dtype", action="append", choices=tuple(dtypes), help=f"dtype {only}")
    options = parser.parse_args(arguments)
    if not options.selftest:
        if options.backend or options.dtype:
            parser.error("--backend, --dtype: expected only with --selftest, got them without; add --selftest")
        print_report()
        return 0
    return 1 if selftest(options.backend or compared, [dtypes[name] for name in options.dtype or dtypes]) else 0


if __name__ == "__main__":
    sys.exit(main())
