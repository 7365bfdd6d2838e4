"""`make wheels`: libraries of an older glibc, checks of a wheel, settings that it shares with cibuildwheel."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from tests.test_install import ROOT
from wheels import __main__ as wheels
from wheels import check, old_glibc

needs_tools = pytest.mark.skipif(
    sys.platform != "linux" or not all(map(shutil.which, ("gcc", "g++", "readelf", "nm"))), reason="no GCC or binutils"
)

USES_NEW_SYMBOLS = """
#include <dlfcn.h>
#include <exception>
#include <thread>
extern "C" void *use(const char *name, std::exception_ptr *error) {
  std::exception_ptr copy = *error;
  std::thread([] {}).join();
  return dlsym(nullptr, name);
}
extern "C" void later();
extern "C" void call_later() { later(); }
"""


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    """A library that needs glibc 2.34 and a libstdc++ of GCC 11 where it is linked as usual."""
    folder = tmp_path_factory.mktemp("glibc")
    (folder / "module.cpp").write_text(USES_NEW_SYMBOLS)
    flags = old_glibc.linker_flags(wheels.GLIBC, folder / "libraries").split()
    compile_ = ["g++", "-std=c++17", "-shared", "-fPIC", "module.cpp", "-o", "module.so", *flags]
    subprocess.run(compile_, cwd=folder, check=True)
    return folder / "module.so"


@needs_tools
def test_a_module_needs_the_older_glibc_alone(module):
    listed = subprocess.run(["nm", "-D", "-u", module], check=True, capture_output=True, text=True).stdout
    versions = {old_glibc.version_number(found) for found in re.findall(r"@GLIBC_([\d.]+)", listed)}
    needed = subprocess.run(["readelf", "-d", module], check=True, capture_output=True, text=True).stdout
    assert all(f"[{name}]" in needed for name in ("libc.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1"))
    assert versions and max(versions) <= old_glibc.version_number(wheels.GLIBC)
    assert "dlsym@" in listed and "pthread_create@" in listed and "GLIBCXX" not in listed and "CXXABI" not in listed


@needs_tools
def test_a_symbol_of_no_library_is_found(module):
    with pytest.raises(SystemExit, match=r"a\.whl: module\.so needs symbols of no library: later$"):
        check.check_symbols(Path("a.whl"), module)


@needs_tools
def test_a_module_loads_in_a_python_that_lacks_symbols(module, tmp_path):
    load = [sys.executable, "-c", check.LOAD]
    missing = subprocess.run([*load, module], capture_output=True, text=True)
    assert missing.returncode != 0 and "undefined symbol: later" in missing.stderr
    check.write_placeholders(Path("a.whl"), [module], tmp_path / "placeholders.so")
    subprocess.run([*load, tmp_path / "placeholders.so", module], check=True)


@needs_tools
def test_the_newest_version_up_to_the_limit_is_chosen():
    symbols = old_glibc.symbols_of(old_glibc.file_of("libc.so.6"), "2.14")
    assert symbols["memcpy"]["version"] == "2.14"  # also 2.2.5
    assert "aligned_alloc" not in symbols  # since 2.16


def wheel_of(folder, tag, content=b""):
    path = folder / f"deco_kernels-0-cp311-cp311-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("deco_kernels/_native_cpu.cpython-311-x86_64-linux-gnu.so", content)
    return path


@pytest.mark.parametrize(
    ("tag", "content", "said"),
    [
        ("manylinux_2_34_x86_64", b"", "expected the platform tag manylinux_2_28_x86_64, got manylinux_2_34_x86_64"),
        ("manylinux_2_28_x86_64", bytes(check.LARGEST), "expected at most 60000000 bytes, got 60000"),
        ("manylinux_2_27_x86_64.manylinux_2_28_x86_64", b"", "expected _native_cpu and _native_cuda, got ['_native_c"),
    ],
)
def test_a_wheel_with_a_fault_is_refused(tmp_path, tag, content, said):
    wheel = wheel_of(tmp_path, tag, content)
    with pytest.raises(SystemExit, match=re.escape(f"{wheel.name}: {said}")):
        check.check_wheel(wheel, Path(sys.executable), wheels.PLATFORM, True, wheels.parse([]))


def test_what_is_not_a_wheel_or_has_no_python_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(wheels, "find_pythons", lambda: {"3.10": Path(sys.executable)})
    monkeypatch.chdir(tmp_path)
    Path("a-0-cp311-cp311-y.whl").touch()
    for name, said in {
        "x.zip": "expected a wheel of a CPython 3, got x.zip",
        "a-0-cp311-cp311-y.whl": "no CPython 3.11",
        "b-0-cp310-cp310-y.whl": "expected the file of a wheel, found none at b-0-cp310-cp310-y.whl",
    }.items():
        with pytest.raises(SystemExit, match=said):
            wheels.main(["--check", name])


def test_the_pythons_are_the_same_everywhere():
    """cibuildwheel's, the workflow's, the classifiers' and those of make wheels."""
    minors = {f"3.{minor}" for minor in wheels.MINORS}
    settings = (ROOT / "pyproject.toml").read_text()
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "wheels.yml").read_text())
    assert set(workflow["jobs"]["check"]["strategy"]["matrix"]["python"]) == minors
    assert set(re.findall(r'"Programming Language :: Python :: (3\.\d+)"', settings)) == minors
    built = re.search(r'^build = "(cp.*)"$', settings, re.M)[1].split()
    assert built == [f"cp3{minor}-manylinux_x86_64" for minor in wheels.MINORS]
    assert wheels.PLATFORM.startswith(re.search(r'^manylinux-x86_64-image = "(.*)"$', settings, re.M)[1])


def test_the_page_shows_the_committed_results():
    page = (ROOT / "docs" / "wheels.md").read_text(encoding="utf-8")
    record = json.loads((ROOT / "benchmarks" / "results" / "wheels_epyc_zen4.json").read_text(encoding="utf-8"))
    compiler = record["compiler"].split()[-1]
    assert f"g++ {compiler}, glibc {record['glibc']}, CUDA {record['cuda']};" in page
    assert [wheels.version_of(Path(row["wheel"])) for row in record["wheels"]] == [f"3.{m}" for m in wheels.MINORS]
    for row in record["wheels"]:
        place, torch, passed = re.search(r"imports, (.*), self-test with PyTorch (.*): (.*)", row["checked"]).groups()
        assert place == "loads in the chroot"
        cells = (wheels.version_of(Path(row["wheel"])), f"{row['bytes'] / 1e6:.1f} MB", f"{row['cpu_seconds']} s")
        assert f"| {' | '.join(cells)} | PyTorch {torch}: {passed} |" in page
