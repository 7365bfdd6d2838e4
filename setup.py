"""Builds the native modules with CMake and Ninja; everything else is declared in pyproject.toml.

DECO_KERNELS_BUILD chooses what is built:
  auto  (default) the modules for which this machine has the tools; if a build fails, the pure-Python package is
        installed, and the reason and the log file are printed
  cpu   the CPU module; a failure is an error
  cuda  the CPU and CUDA modules; a failure is an error
  cuda-only  the CUDA module; a failure is an error
  none  no native module, only Python
DECO_KERNELS_BUILD_DIR names a folder for the objects, which later builds reuse, those of other Pythons too.
Needs neither PyTorch nor a GPU. DECO_KERNELS_CUDA_ARCHS selects the architectures of the CUDA module, by default
"80+PTX,90a,100,120"; +PTX adds code that newer GPUs compile when they first load it.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CHOICES = ("auto", "cpu", "cuda", "cuda-only", "none")


def build_choice() -> str:
    choice = os.environ.get("DECO_KERNELS_BUILD", "auto").strip().lower() or "auto"
    if choice not in CHOICES:
        raise SystemExit(f"DECO_KERNELS_BUILD: expected one of {', '.join(CHOICES)}, got {choice!r}")
    return choice


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(home, "bin"))


def cuda_options() -> list[str]:
    """CMake options of the CUDA module."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("nvcc was not found; install the CUDA toolkit, put nvcc on PATH or set CUDA_HOME")
    options = ["-DDECO_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}"]
    architectures = os.environ.get("DECO_KERNELS_CUDA_ARCHS", "").replace(",", ";").replace(" ", "")
    # Without a choice, drop the cached one of an earlier build in the same folder.
    return options + [f"-DDECO_CUDA_ARCHS={architectures}" if architectures else "-UDECO_CUDA_ARCHS"]


class NativeModule(Extension):
    """A Python module built by the CMake target of the same name; builds of `optional` modules may fail."""

    def __init__(self, name: str, target: str, optional: bool):
        super().__init__(name, sources=[], optional=optional)
        self.target = target


def find_tool(name: str) -> str | None:
    """An executable on PATH or next to the current Python (a virtual environment that is not activated)."""
    beside_python = os.path.dirname(sys.executable)
    return shutil.which(name) or shutil.which(name, path=beside_python)


class CMakeBuild(build_ext):
    def build_extension(self, ext: NativeModule) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = Path(os.environ.get("DECO_KERNELS_BUILD_DIR") or self.build_temp).resolve() / ext.target
        build_dir.mkdir(parents=True, exist_ok=True)
        log = build_dir / "build.log"
        try:
            self.run_cmake(ext.target, output.parent, build_dir, log)
            if not output.exists():
                raise RuntimeError(f"the build finished without writing {output}")
        except Exception as error:
            message = f"deco_kernels: building {ext.target} failed: {error}\n  log: {log}\n"
            if not ext.optional:
                raise SystemExit(message) from error
            sys.stderr.write(
                f"{message}  Installing without it: the ops use the other backends, at least the reference backend. "
                "Install the missing tools (a C++17 compiler, cmake, ninja, pybind11) and build again; "
                f"DECO_KERNELS_BUILD={ext.target.removeprefix('_native_')} makes this an error.\n"
            )

    def run_cmake(self, target: str, output_dir: Path, build_dir: Path, log: Path) -> None:
        log.write_text("")
        try:
            import pybind11
        except ImportError:
            raise RuntimeError("pybind11 is not installed for this Python (pip install pybind11)") from None
        cmake = find_tool("cmake")
        if cmake is None:
            raise RuntimeError("cmake was not found (pip install cmake)")
        configure = [
            cmake,
            f"-S{ROOT}",
            f"-B{build_dir}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output_dir}",
            # Forget the Python of an earlier build in the same folder.
            *("-UPython*", "-U_Python*", "-UPYTHON*", "-Upybind11*"),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DPYTHON_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        if target == "_native_cuda":
            configure += cuda_options()
        ninja = find_tool("ninja")
        if ninja is not None:
            configure += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        with log.open("a") as stream:
            for command in (configure, [cmake, "--build", str(build_dir), "--target", target, "--parallel", jobs]):
                stream.write(f"$ {' '.join(command)}\n")
                stream.flush()
                if subprocess.call(command, stdout=stream, stderr=subprocess.STDOUT) != 0:
                    stream.flush()
                    tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
                    raise RuntimeError(f"{command[0]} returned an error; the end of its output:\n{tail}")


def native_modules() -> list[NativeModule]:
    choice = build_choice()
    if choice == "none":
        return []
    targets = [] if choice == "cuda-only" else ["_native_cpu"]
    if choice in ("cuda", "cuda-only") or (choice == "auto" and find_nvcc() is not None):
        targets.append("_native_cuda")
    return [NativeModule(f"deco_kernels.{target}", target, optional=choice == "auto") for target in targets]


setup(ext_modules=native_modules(), cmdclass={"build_ext": CMakeBuild})
