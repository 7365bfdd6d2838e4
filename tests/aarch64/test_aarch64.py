"""The CPU module for 64-bit Arm, cross-compiled and run under qemu-user; `make aarch64` runs this.

Needs root on Debian with the packages debootstrap, g++-aarch64-linux-gnu and qemu-user-static. The Python of Debian 12
for arm64 and the packages that it imports are downloaded into build/aarch64; DEBIAN_MIRROR names another mirror than
debootstrap's own.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "aarch64"
SYSTEM, PACKAGES, OBJECTS = BUILD / "system", BUILD / "packages", BUILD / "objects"

TOOLS = ("debootstrap", "dpkg-deb", "aarch64-linux-gnu-g++", "qemu-aarch64-static")
DEBIAN_PACKAGES = "python3.11,libpython3.11-dev,libgomp1,libstdc++6"
WHEELS = (
    *("torch==2.9.1", "numpy==2.4.6", "safetensors==0.8.0", "pytest==9.2.0"),
    *("typing-extensions", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "fsspec", "filelock"),
    *("iniconfig", "pluggy", "packaging", "pygments"),
)
WHEEL_OPTIONS = ("--no-deps", "--only-binary=:all:", "--python-version=3.11", "--implementation=cp")
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64")

ISAS = ("neonbf16", "neon", "portable")  # as the module lists them
GOLDEN = ("tests/model/test_golden_models.py", "tests/ops/test_flow_matching_loss.py")

pytestmark = pytest.mark.aarch64


def run(*command: str | Path, **environment: str) -> str:
    """Output of a command in the root folder, which must succeed."""
    finished = subprocess.run(
        [*map(str, command)], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert finished.returncode == 0, f"{command}:\n{finished.stdout[-8000:]}{finished.stderr[-8000:]}"
    return finished.stdout


def unpack_system() -> None:
    """Debian's Python for arm64; nothing of it runs while it is unpacked."""
    mirror = filter(None, [os.environ.get("DEBIAN_MIRROR")])
    options = ("--arch=arm64", "--foreign", "--variant=minbase", f"--include={DEBIAN_PACKAGES}")
    run("debootstrap", *options, "bookworm", SYSTEM, *mirror)
    for archive in sorted(SYSTEM.glob("var/cache/apt/archives/*.deb")):
        subprocess.run(["dpkg-deb", "--fsys-tarfile", archive], check=True, stdout=(BUILD / "data.tar").open("wb"))
        run("tar", "-x", "--keep-directory-symlink", "-C", SYSTEM, "-f", BUILD / "data.tar")


def build_module() -> None:
    """Cross-compile the CPU module into the package."""
    import pybind11  # processes that collect other tests lack it

    beside = Path(sys.executable).parent
    headers = SYSTEM / "usr" / "include"
    run(
        *(beside / "cmake", f"-S{ROOT}", f"-B{OBJECTS}", "-GNinja", f"-DCMAKE_MAKE_PROGRAM={beside / 'ninja'}"),
        *("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", "-DCMAKE_BUILD_TYPE=Release"),
        *("-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++", f"-DCMAKE_CXX_FLAGS=-idirafter {headers}"),
        *(f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"),
        *(
            f"-DPython_INCLUDE_DIR={headers / 'python3.11'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={ROOT / 'deco_kernels'}",
        ),
        "-DPYTHON_MODULE_EXTENSION=.cpython-311-aarch64-linux-gnu.so",
    )
    run(beside / "cmake", "--build", OBJECTS, "--target", "_native_cpu")


@pytest.fixture(scope="module")
def python():
    """Runs the emulated Python with arguments and environment variables."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    assert not missing, f"not found: {', '.join(missing)}"
    complete = BUILD / "complete"
    if not complete.exists():
        shutil.rmtree(BUILD, ignore_errors=True)
        BUILD.mkdir(parents=True)
        unpack_system()
        platforms = [f"--platform={platform}" for platform in PLATFORMS]
        run(sys.executable, "-m", "pip", "install", *WHEEL_OPTIONS, *platforms, f"--target={PACKAGES}", *WHEELS)
        complete.touch()
    build_module()
    emulator = ("qemu-aarch64-static", "-cpu", "max", "-L", SYSTEM, SYSTEM / "usr" / "bin" / "python3.11")
    path = f"{ROOT}{os.pathsep}{PACKAGES}"
    return lambda *arguments, **environment: run(*emulator, *arguments, PYTHONPATH=path, **environment)


def test_the_module_has_every_instruction_set(python):
    code = "from deco_kernels import native as n; print(*n.cpu().usable_isas()); print(n.cpu().__file__)"
    isas, file = python("-c", code).splitlines()
    assert isas.split() == list(ISAS) and "aarch64" in file


@pytest.mark.parametrize("isa", ISAS)
def test_golden_cases(python, isa):
    output = python("-m", "pytest", "-q", "-k", "golden", *GOLDEN, DECO_KERNELS_CPU_ISA=isa)
    assert " passed" in output and "skipped" not in output, output


@pytest.mark.parametrize("isa", ISAS)
def test_every_op_follows_the_rule_of_error(python, isa):
    output = python("-m", "deco_kernels", "--selftest", "--backend", "cpu", DECO_KERNELS_CPU_ISA=isa)
    passed, _, checks = output.split("\n")[-2].split()[:3]
    assert passed == checks and int(checks) >= 20, output


def test_the_short_list_runs_in_every_instruction_set(python):
    (module,) = (ROOT / "deco_kernels").glob("_native_cpu*-aarch64-linux-gnu.so")
    output = python("-m", "tests.sanitize.short_list", "cpu", module)
    assert output.split("\n")[:-1] == [f"passed: {isa}" for isa in ISAS]
