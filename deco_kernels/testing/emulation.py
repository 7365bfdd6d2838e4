"""Builds the CUDA kernels for the host and registers them as backend "cuda_emulated".

Needs the sources in csrc, which a checkout has and an installed wheel does not.
"""

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from deco_kernels import native
from deco_kernels.ops import registry

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "emulation"
LIBRARY = "_native_cuda_emulated*.so"
BACKEND = "cuda_emulated"
MULTIPROCESSORS = 2
LARGE_SHARED, SMALL_SHARED = 227 << 10, 99 << 10  # bytes of shared memory per block: sm_90, small devices


def unavailable_reason() -> str | None:
    """Reason, with remedy, why the kernels cannot be emulated on this machine, or None."""
    if not (ROOT / "csrc" / "emulation").is_dir():
        return (
            f"the emulator is built from csrc/emulation, which is missing in {ROOT}; run in a checkout, or install the "
            "package from one with `pip install -e .`"
        )
    if platform.machine() not in ("x86_64", "AMD64") or sys.platform != "linux":
        return f"the emulator runs on x86-64 Linux, not on {platform.machine()} {sys.platform}"
    if "f16c" not in Path("/proc/cpuinfo").read_text():
        return "the emulator needs a processor with F16C"
    if shutil.which("g++") is None:
        return "the emulator is built with g++, which is not on PATH; install it"
    return None


def build(sources: Path, folder: Path) -> ModuleType:
    """The emulated module of `sources` (a csrc folder), built in `folder` unless the build there has the same contents.

    Modification times do not count.
    """
    written, contents = folder / "contents.sha256", contents_of(sources)
    with alone_in(folder):
        if not written.exists() or written.read_text() != contents:
            for stale in (written, *folder.glob(LIBRARY)):  # the library of another Python has another name
                stale.unlink(missing_ok=True)
            compile_tree(sources, folder)
            written.write_text(contents)
        (library,) = folder.glob(LIBRARY)
        return load(library)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Lock on a build folder: one process builds at a time, the others wait."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def contents_of(sources: Path) -> str:
    """SHA-256 of the inputs of a build: names and contents of the files, compiler, processor, Python, pybind11."""
    import pybind11

    compiler = os.environ.get("CXX", "g++")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    flags = [os.environ.get(name) for name in ("CXXFLAGS", "LDFLAGS")]
    processor = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    digest = hashlib.sha256(repr((compiler, version, flags, processor, sys.version, pybind11.__version__)).encode())
    for path in sorted(path for path in sources.rglob("*") if path.is_file()):
        digest.update(repr((str(path.relative_to(sources)), path.read_bytes())).encode())
    return digest.hexdigest()


def compile_tree(sources: Path, folder: Path, *options: str) -> None:
    """Compile csrc/emulation of `sources` incrementally in `folder`, with further options of CMake.

    Raises RuntimeError if the build fails.
    """
    import pybind11

    beside = Path(sys.executable).parent
    cmake = shutil.which("cmake") or str(beside / "cmake")
    ninja = shutil.which("ninja") or str(beside / "ninja")
    configure = [
        *(cmake, f"-S{sources / 'emulation'}", f"-B{folder}", "-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"),
        *(f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"),
        *options,
    ]
    for command in (configure, [cmake, "--build", str(folder)]):
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(f"building the emulator failed:\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}")


def compile_command(*arguments: str | Path) -> list[str]:
    """The compiler command of this tree's emulated module, which must be built, with -O1 and other arguments."""
    command = shlex.split(json.loads((BUILD / "compile_commands.json").read_text())[0]["command"])
    return [*command[: command.index("-o")], "-O1", "-xc++", *map(str, arguments)]


def load(library: Path) -> ModuleType:
    """Import the module in a shared library."""
    # Python returns the first module of a name for every path, so each folder gets its own name.
    name = f"emulation_{abs(hash(library.parent))}._native_cuda_emulated"
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.lru_cache(maxsize=1)
def emulated_module() -> ModuleType:
    """The emulated module of this tree, rebuilt if its sources have changed. Registers the backend that uses it.

    Raises RuntimeError if `unavailable_reason` gives a reason or the build fails.
    """
    reason = unavailable_reason()
    if reason is not None:
        raise RuntimeError(reason)
    module = build(ROOT / "csrc", BUILD)
    use(module)
    return module


def use(module: ModuleType) -> None:
    """Register the backend that uses an emulated module."""
    module.set_device_limits(MULTIPROCESSORS, LARGE_SHARED)
    native.emulate_cuda(module)
    registry.register_backend(BACKEND, "deco_kernels.testing.emulated_cuda")


# ------------------------------------------------------------------------------------------------------------- accesses


class Traffic(NamedTuple):
    """Bytes that a launch reads from a buffer in global memory, or writes to it."""

    requested: int  # summed over threads
    sectors: int  # of whole 32-byte sectors, each once per access of a warp: between L1 and L2, if L1 never hits
    distinct: int  # each byte once: the least that moves between L2 and memory


class BufferTraffic(NamedTuple):
    """Accesses of one buffer that the launch declares; buffers have the order of the kernel's `visit`."""

    address: int
    bytes: int
    read: Traffic
    written: Traffic


class SharedTraffic(NamedTuple):
    """Accesses of warps to shared memory, which has 32 banks of 4 bytes.

    Lanes of 8 bytes access it in two phases of 16 lanes, lanes of 16 bytes and rows of matrices in four of 8. A phase
    takes one wavefront per distinct word in its busiest bank; all but the first are conflicts.
    """

    accesses: int
    wavefronts: int
    conflicts: int


class RecordedLaunch(NamedTuple):
    name: str
    blocks: int
    threads: int  # per block
    shared_bytes: int  # per block
    buffers: list[BufferTraffic]
    shared: SharedTraffic

    @property
    def read(self) -> Traffic:
        """Sum over the buffers."""
        return _sum_of([buffer.read for buffer in self.buffers])

    @property
    def written(self) -> Traffic:
        """Sum over the buffers."""
        return _sum_of([buffer.written for buffer in self.buffers])


def _sum_of(parts: list[Traffic]) -> Traffic:
    return Traffic(*(sum(values) for values in zip(*parts, strict=True))) if parts else Traffic(0, 0, 0)


def record_accesses(call: Callable[[], object]) -> list[RecordedLaunch]:
    """The emulated launches of `call()` in order, with the accesses of every buffer and of shared memory.

    PyTorch's own operators are not recorded. Overlapping buffers count as the first that a launch declares.
    """
    return [
        RecordedLaunch(
            name,
            blocks,
            threads,
            shared_bytes,
            [
                BufferTraffic(address, size, Traffic(*read), Traffic(*written))
                for address, size, read, written in buffers
            ],
            SharedTraffic(*shared),
        )
        for name, blocks, threads, shared_bytes, buffers, shared in emulated_module().record_accesses(call)
    ]


@contextlib.contextmanager
def checked_for_races(module: ModuleType) -> Iterator[None]:
    """Inside, the launches of an emulated module raise Fault for accesses of shared memory that no barrier orders."""
    module.check_races(True)
    try:
        yield
    finally:
        module.check_races(False)


@contextlib.contextmanager
def truncating(module: ModuleType) -> Iterator[None]:
    """Inside, an emulated module cuts toward zero what it rounds to nearest otherwise: the sums of matrix products, as
    tensor cores do, and tanh."""
    module.set_truncating(True)
    try:
        yield
    finally:
        module.set_truncating(False)
