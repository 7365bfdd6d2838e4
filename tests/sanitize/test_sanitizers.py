"""The native modules under sanitizers; `make sanitize` runs this.

The CPU module and the emulated CUDA module run under AddressSanitizer and UndefinedBehaviorSanitizer, the threads of
the CPU module under ThreadSanitizer. Each must also find a planted fault.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from deco_kernels.testing import emulation
from tests.installed import installed

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "sanitize"

pytestmark = pytest.mark.sanitize


class Part(NamedTuple):
    runtime: str  # library of the sanitizer, which Python must load first
    options: dict[str, str]  # environment variables of the sanitizer
    found: str  # what the report of the planted fault says


ADDRESS = Part("libasan.so", {"ASAN_OPTIONS": "detect_leaks=0"}, "heap-buffer-overflow")
THREAD = Part(
    "libtsan.so", {"TSAN_OPTIONS": "halt_on_error=1 exitcode=66 ignore_noninstrumented_modules=1"}, "data race"
)
PARTS = {"cpu": ADDRESS, "threads": THREAD, "emulated": ADDRESS}


def build_cpu(sanitizer: str) -> Path:
    pybind11 = installed("pybind11")
    folder = BUILD / sanitizer
    cmake, ninja = (str(Path(sys.executable).with_name(name)) for name in ("cmake", "ninja"))
    configure = [
        *(cmake, f"-S{ROOT}", f"-B{folder}", "-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}", "-DCMAKE_CXX_COMPILER=g++"),
        *(f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"),
        f"-DDECO_SANITIZE={sanitizer}",
    ]
    for command in (configure, [cmake, "--build", str(folder), "--target", "_native_cpu"]):
        finished = subprocess.run(command, capture_output=True, text=True)
        assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]
    (library,) = folder.glob("_native_cpu*.so")
    return library


def build_emulated() -> Path:
    reason = emulation.unavailable_reason()
    if reason is not None:
        pytest.skip(reason)
    folder = BUILD / "emulated"
    emulation.compile_tree(ROOT / "csrc", folder, "-DDECO_SANITIZE=address", "-DCMAKE_CXX_COMPILER=g++")
    (library,) = folder.glob("_native_cuda_emulated*.so")
    return library


@pytest.fixture(scope="module", params=PARTS)
def part(request) -> tuple[str, Path]:
    """A part of the short list and its instrumented module, rebuilt where its sources have changed."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to build with")
    if request.param == "emulated":
        return request.param, build_emulated()
    return request.param, build_cpu("address" if request.param == "cpu" else "thread")


def run(part: tuple[str, Path], *options: str) -> subprocess.CompletedProcess:
    """The short list in a process that loads the sanitizer first, without its search for leaks."""
    name, module = part
    command = ["g++", f"-print-file-name={PARTS[name].runtime}"]
    runtime = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    environment = {**os.environ, "LD_PRELOAD": runtime, **PARTS[name].options}
    command = [sys.executable, "-m", "tests.sanitize.short_list", name, str(module), *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def test_the_short_list_has_no_errors(part):
    finished = run(part)
    assert finished.returncode == 0, finished.stderr[-8000:]


def test_a_planted_fault_is_found(part):
    finished = run(part, "--plant")
    assert finished.returncode != 0 and PARTS[part[0]].found in finished.stderr, finished.stderr[-8000:]
