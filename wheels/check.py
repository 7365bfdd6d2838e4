"""Checks a wheel in a bare virtual environment: tag, size, contents, import without PyTorch and driver, self-test."""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

LARGEST = 60_000_000  # bytes

IMPORT = """
import importlib, sys
import deco_kernels
assert deco_kernels.__file__.startswith(sys.prefix), deco_kernels.__file__
for name in sys.argv[1:]:
    importlib.import_module(f"deco_kernels.{name}")
assert "torch" not in sys.modules
assert "libcuda" not in open("/proc/self/maps").read()
"""

LOAD = "import ctypes, sys\nfor path in sys.argv[1:]: ctypes.CDLL(path, ctypes.RTLD_GLOBAL)"

PLACE_OF_PYTORCH = """
import importlib.metadata, importlib.util, os, sys
spec = importlib.util.find_spec("torch")
if spec:
    packages = os.path.dirname(os.path.dirname(spec.origin))
    print("%d.%d" % sys.version_info[:2], importlib.metadata.version("torch"), packages)
"""


class WheelError(SystemExit):
    def __init__(self, wheel: Path, message: str):
        super().__init__(f"{wheel.name}: {message}")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--torch",
        action="append",
        default=[],
        metavar="PYTHON",
        help="interpreter whose PyTorch the self-test of its version borrows, in addition to .venv's; repeatable",
    )
    parser.add_argument("--chroot", type=Path, help="root folder of an older distribution with python3 to load in")


def check_wheel(wheel: Path, python: Path, tag: str, cuda: bool, options: argparse.Namespace) -> str:
    """Check the wheel of `python`; what was checked. SystemExit that names the first fault."""
    modules = ["_native_cpu", "_native_cuda"] if cuda else ["_native_cpu"]
    check_name(wheel, tag)
    with tempfile.TemporaryDirectory() as folder:
        paths = unpack_modules(wheel, Path(folder))
        if sorted(path.name.split(".")[0] for path in paths) != modules:
            raise WheelError(wheel, f"expected {' and '.join(modules)}, got {[path.name for path in paths]}")
        for path in paths:
            check_symbols(wheel, path)
        said = ["imports"]
        if options.chroot:
            load_in_chroot(wheel, paths, options.chroot)
            said.append("loads in the chroot")
    with tempfile.TemporaryDirectory() as folder:
        bare = Path(folder) / "bin" / "python"
        call(wheel, python, "-m", "venv", folder)
        call(wheel, bare, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel)
        call(wheel, bare, "-c", IMPORT, *modules)
        said.append(selftest(wheel, bare, [sys.executable, *options.torch]))
    return ", ".join(said)


def call(wheel: Path, *command: str | Path) -> str:
    """Output of a command outside this tree; WheelError if it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True)
    if result.returncode != 0:
        raise WheelError(wheel, f"{' '.join(map(str, command))} failed:\n{result.stdout}{result.stderr}")
    return result.stdout


def check_name(wheel: Path, tag: str) -> None:
    """The platform tag and the size."""
    tags = wheel.stem.split("-")[-1].split(".")
    if tag not in tags:
        raise WheelError(wheel, f"expected the platform tag {tag}, got {', '.join(tags)}")
    if wheel.stat().st_size > LARGEST:
        raise WheelError(wheel, f"expected at most {LARGEST} bytes, got {wheel.stat().st_size}")


def unpack_modules(wheel: Path, folder: Path) -> list[Path]:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".so")]
        return [Path(archive.extract(name, folder)) for name in names]


def symbols_without_version(wheel: Path, module: Path) -> list[str]:
    """Symbols that a module needs and that have no version: those of Python, or of no library that it names."""
    listed = call(wheel, "nm", "--dynamic", "--undefined-only", module)
    return [name for name in re.findall(r" U (\S+)$", listed, re.M) if "@" not in name]


def check_symbols(wheel: Path, module: Path) -> None:
    unknown = [name for name in symbols_without_version(wheel, module) if not name.startswith(("Py", "_Py"))]
    if unknown:
        raise WheelError(wheel, f"{module.name} needs symbols of no library: {', '.join(unknown)}")


def write_placeholders(wheel: Path, modules: list[Path], path: Path) -> None:
    """Write a library with Python's symbols that modules need, without code: an older Python may lack some."""
    names = {name for module in modules for name in symbols_without_version(wheel, module)}
    source = path.with_suffix(".c")
    source.write_text("".join(f"char {name};\n" for name in sorted(names)))
    call(wheel, "gcc", "-shared", "-nostdlib", "-fPIC", source, "-o", path)


def load_in_chroot(wheel: Path, modules: list[Path], root: Path) -> None:
    """Load the modules in the distribution under `root`, whose Python may have another version."""
    with tempfile.TemporaryDirectory(dir=root / "tmp") as folder:
        placeholders = Path(folder) / "placeholders.so"
        write_placeholders(wheel, modules, placeholders)
        copies = [Path(shutil.copy(module, folder)) for module in modules]
        loaded = (f"/{path.relative_to(root)}" for path in (placeholders, *copies))
        call(wheel, "chroot", root, "python3", "-c", LOAD, *loaded)


def selftest(wheel: Path, bare: Path, pythons_with_torch: list[str]) -> str:
    """Run `python -m deco_kernels --selftest` with the PyTorch of an interpreter of the same version."""
    version = call(wheel, bare, "-c", "import sys; print('%d.%d' % sys.version_info[:2])").strip()
    for lender in pythons_with_torch:
        offered, *pytorch = call(wheel, lender, "-c", PLACE_OF_PYTORCH).split(maxsplit=2) or [None]
        if offered == version:
            place = call(wheel, bare, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
            Path(place, "borrowed.pth").write_text(pytorch[1])
            output = call(wheel, bare, "-m", "deco_kernels", "--selftest", "--backend", "cpu")
            passed = re.findall(r"\d+ of \d+ checks passed", output)[0]
            return f"self-test with PyTorch {pytorch[0]}: {passed}"
    return f"self-test not run: no PyTorch for CPython {version}, name one by --torch"
