"""The native CPU module under AddressSanitizer and UndefinedBehaviorSanitizer; `make sanitize` runs this."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "sanitize" / "address"

pytestmark = pytest.mark.sanitize


@pytest.fixture(scope="module")
def module() -> Path:
    """The instrumented module, rebuilt where its sources have changed."""
    pybind11 = pytest.importorskip("pybind11")
    if shutil.which("g++") is None:
        pytest.skip("no g++ to build with")
    cmake, ninja = (str(Path(sys.executable).with_name(name)) for name in ("cmake", "ninja"))
    configure = [
        *(cmake, f"-S{ROOT}", f"-B{BUILD}", "-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}", "-DCMAKE_CXX_COMPILER=g++"),
        *(f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"),
        "-DDECO_SANITIZE=address",
    ]
    for command in (configure, [cmake, "--build", str(BUILD), "--target", "_native_cpu"]):
        finished = subprocess.run(command, capture_output=True, text=True)
        assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]
    (library,) = BUILD.glob("_native_cpu*.so")
    return library


def run(module: Path, *options: str) -> subprocess.CompletedProcess:
    """The short list in a process that loads the sanitizer first, without its search for leaks."""
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout
    environment = {**os.environ, "LD_PRELOAD": runtime.strip(), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-m", "tests.sanitize.short_list", str(module), *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def test_the_short_list_has_no_errors(module):
    finished = run(module)
    assert finished.returncode == 0, finished.stderr[-8000:]


def test_a_planted_overflow_is_found(module):
    finished = run(module, "--plant")
    assert finished.returncode != 0 and "heap-buffer-overflow" in finished.stderr, finished.stderr[-8000:]
