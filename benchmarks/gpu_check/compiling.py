"""Compiles the Triton kernels of a check into Triton's cache on all cores, without a GPU: `compiling 90 132`.

Arguments: the architecture and the number of multiprocessors. Prints one JSON line per kernel, with the keys `kernel`,
`cache` (hit, compiled or failed) and `seconds`. The launchers in C are built, too. Exit status: 1 if a kernel failed.
"""

import atexit
import ctypes
import functools
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check.workload import Kernel, kernels


def pretend_device(architecture: str) -> None:
    """Gives Triton a driver for "90" or "90a" for the rest of the process. It can compile, but not launch."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    class Pretended(CudaDriver):
        def __init__(self):
            super().__init__()
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", int(architecture.removesuffix("a")), 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    provide_driver_library()
    driver.set_active(Pretended())


@functools.cache
def provide_driver_library() -> None:
    """On a machine without libcuda.so.1, load an empty one: the launchers are linked to it until the process ends."""
    import triton

    try:
        ctypes.CDLL("libcuda.so.1")
        return
    except OSError:
        pass
    sources = Path(triton.__file__).parent / "backends" / "nvidia"
    text = "".join((sources / name).read_text() for name in ("driver.c", "driver.py"))
    functions = sorted(set(re.findall(r"\bcu[A-Z]\w*", text)))
    folder = tempfile.mkdtemp(prefix="libcuda-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    library = os.path.join(folder, "libcuda.so.1")
    code = "".join(f"int {name}(void) {{ return 1; }}\n" for name in functions)
    command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-xc", "-", "-o", library, "-Wl,-soname,libcuda.so.1"]
    subprocess.run(command, input=code, text=True, check=True)
    ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
    triton.knobs.nvidia.libcuda_path = folder


_kernels: list[Kernel] = []  # inherited by the processes of the pool


def compile_all(found: list[Kernel], processes: int) -> Iterator[dict[str, Any]]:
    """One result per kernel, in the order in which they are done."""
    _kernels[:] = found
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        yield from pool.imap_unordered(_compile, range(len(found)))


def _compile(index: int) -> dict[str, Any]:
    kernel, began = _kernels[index], time.perf_counter()
    try:
        cache = "hit" if is_cached(kernel) else "compiled"
    except Exception as error:  # one broken kernel does not hide the others
        return {"kernel": kernel.name, "cache": "failed", "message": f"{type(error).__name__}: {error}"}
    return {"kernel": kernel.name, "cache": cache, "seconds": round(time.perf_counter() - began, 2)}


def is_cached(kernel: Kernel) -> bool:
    """Compiles a kernel and its launcher unless Triton's cache holds them; says whether it held the kernel."""
    import triton
    from triton.runtime import driver

    hits: list[bool] = []
    triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    compiled = kernel.function.warmup(grid=kernel.grid, **kernel.arguments)
    driver.active.launcher_cls(compiled.src, compiled.metadata)
    return all(hits)


def main(architecture: str, multiprocessors: str) -> int:
    import triton

    if not hasattr(triton, "knobs"):
        print(f"Triton {triton.__version__} does not say what it compiles; kernels are compiled at their first launch")
        return 0
    torch.set_num_threads(1)
    pretend_device(architecture)
    found = kernels(f"sm_{architecture.removesuffix('a')}", int(multiprocessors))
    failed = 0
    for result in compile_all(found, os.cpu_count() or 1):
        print(json.dumps(result), flush=True)
        failed += result["cache"] == "failed"
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
