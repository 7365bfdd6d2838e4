"""Ceilings of the machine, measured in the same run: copy bandwidth, matmul rate, multiply-add peak."""

import ctypes
import os
import shutil
import subprocess
import tempfile
import threading
import time

import torch

from benchmarks.harness.timing import milliseconds
from deco_kernels.machine import last_level_cache

_REPEATS = 7
_FMA_ROUNDS = 5_000_000


def measure_ceilings(device: str, dtypes: tuple[torch.dtype, ...]) -> dict:
    """Bytes per second, and FLOPs per second by dtype name.

    `flops` is the ceiling that rows are compared with: on a CPU the multiply-add peak of all threads (the matmul rate
    if there is no compiler), on a GPU the matmul rate. A CPU without instructions for a 16-bit dtype computes it in
    float32.
    """
    names = {str(dtype).removeprefix("torch.") for dtype in (torch.float32, *dtypes)}
    matmul = {name: matmul_rate(device, getattr(torch, name)) for name in sorted(names)}
    peak = fma_peak(torch.get_num_threads()) if device == "cpu" else {}
    if peak:
        flops = {name: peak.get(name, peak["float32"]) for name in matmul}
    else:
        flops = dict(matmul)
    return {
        "bytes_per_s": copy_bandwidth(device),
        "matmul_flops_per_s": matmul,
        "fma_flops_per_s": peak,
        "flops": flops,
    }


def copy_bandwidth(device: str) -> float:
    """Bytes read and written per second by a copy of four times the last-level cache; best of all repeats."""
    count = max(4 * last_level_cache(device), 64 << 20)
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = min(milliseconds(lambda: target.copy_(source), device) for _ in range(_REPEATS))
    return 2e3 * count / best


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """FLOPs per second of a square matmul in PyTorch; best of all repeats."""
    side = 8192 if device == "cuda" else 1024
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = min(milliseconds(lambda: left @ right, device) for _ in range(_REPEATS))
    return 2e3 * side**3 / best


def fma_peak(threads: int) -> dict[str, float]:
    """FLOPs per second of all threads by dtype name, with the instructions that PyTorch uses; empty without a C
    compiler."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return {}
    source = os.path.join(os.path.dirname(__file__), "fma_peak.c")
    with tempfile.TemporaryDirectory() as folder:
        library = os.path.join(folder, "fma_peak.so")
        processor = "haswell" if torch.backends.cpu.get_cpu_capability() == "AVX2" else "native"
        flags = ["-O2", f"-march={processor}", "-ffp-contract=fast", "-shared", "-fPIC"]
        built = subprocess.run([compiler, *flags, source, "-o", library], capture_output=True, check=False)
        if built.returncode:
            return {}
        module = ctypes.CDLL(library)
    found = {}
    for name in ("float32", "bfloat16"):
        function = getattr(module, f"fma_{name}", None)
        if function is not None:
            function.restype, function.argtypes = ctypes.c_double, [ctypes.c_long, ctypes.POINTER(ctypes.c_float)]
            rate = max(_rate_of_threads(function, threads) for _ in range(_REPEATS))
            if rate > 0:
                found[name] = rate
    return found


def _rate_of_threads(function, threads: int) -> float:
    flops = [0.0] * threads

    def work(index):
        flops[index] = function(_FMA_ROUNDS, ctypes.byref(ctypes.c_float()))

    workers = [threading.Thread(target=work, args=(index,)) for index in range(threads)]
    start = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(flops) / (time.perf_counter() - start)
