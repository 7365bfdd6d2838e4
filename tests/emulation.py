"""Builds the CUDA kernels for the host (csrc/emulation) and registers them as backend "cuda_emulated"."""

import functools
import importlib.util
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from deco_kernels import native
from deco_kernels.ops import registry

ROOT = Path(__file__).resolve().parents[1]
BACKEND = "cuda_emulated"
MULTIPROCESSORS = 2
LARGE_SHARED, SMALL_SHARED = 227 << 10, 99 << 10  # bytes one block may use on sm_90, and on small devices


def unavailable_reason() -> str | None:
    """Why the kernels cannot be emulated on this machine, or None."""
    if platform.machine() not in ("x86_64", "AMD64") or sys.platform != "linux":
        return f"the emulator runs on x86-64 Linux, this is {platform.machine()} {sys.platform}"
    if "f16c" not in Path("/proc/cpuinfo").read_text():
        return "the emulator needs a processor with F16C"
    if shutil.which("g++") is None:
        return "no g++ to build the emulator with"
    return None


def build(sources: Path, folder: Path):
    """The emulated module, built in `folder` from the tree of `sources` (a csrc folder)."""
    import pybind11

    beside = Path(sys.executable).parent
    cmake = shutil.which("cmake") or str(beside / "cmake")
    ninja = shutil.which("ninja") or str(beside / "ninja")
    configure = [
        *(cmake, f"-S{sources / 'emulation'}", f"-B{folder}", "-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"),
        *(f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"),
    ]
    for command in (configure, [cmake, "--build", str(folder)]):
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(f"building the emulator failed:\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}")
    (library,) = folder.glob("_native_cuda_emulated*.so")
    # Python would hand out the module of the same name again, wherever it lies.
    name = f"emulation_{abs(hash(folder))}._native_cuda_emulated"
    spec = importlib.util.spec_from_file_location(name, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.lru_cache(maxsize=1)
def emulated_module():
    """The emulated module of this tree, built when its sources have changed, and the backend that uses it."""
    module = build(ROOT / "csrc", ROOT / "build" / "emulation")
    module.set_device_limits(MULTIPROCESSORS, LARGE_SHARED)
    native.emulate_cuda(module)
    registry.register_backend(BACKEND, "tests.emulated_cuda")
    return module
