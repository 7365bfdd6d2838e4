"""Importing, installing with and without a compiler, the source distribution, and `python -m deco_kernels`."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import deco_kernels
from deco_kernels import __main__ as report
from deco_kernels.ops import registry

ROOT = Path(__file__).resolve().parents[1]
NOT_SOURCES = shutil.ignore_patterns(
    ".git", ".venv", "build", "out", "dist", "*.so", "*.egg-info", "__pycache__", ".*_cache"
)


def python(*arguments, cwd=ROOT, **environment):
    """Runs this Python with the tree first on its path; `environment` is added to the inherited one."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def source_tree(tmp_path_factory):
    """A copy of the tree to build in."""
    tree = tmp_path_factory.mktemp("source") / "deco_kernels"
    shutil.copytree(ROOT, tree, ignore=NOT_SOURCES)
    return tree


@pytest.fixture(scope="module")
def no_compiler(tmp_path_factory):
    """Environment variables that hide the system's compiler and cmake."""
    empty = tmp_path_factory.mktemp("empty")
    return {"PATH": str(empty), "CC": str(empty / "cc"), "CXX": str(empty / "c++")}


# --- import ----------------------------------------------------------------------------------------------------------

IMPORT_SECONDS = """
import torch, time
started = time.process_time()
import deco_kernels
from deco_kernels import ops
print(time.process_time() - started)
"""


@pytest.mark.timing
def test_import_adds_little_to_importing_torch():
    """Minimum CPU time of five processes, to be insensitive to other load."""
    seconds = min(float(python("-c", IMPORT_SECONDS).stdout) for _ in range(5))
    assert seconds <= 0.15


def test_import_loads_no_backend_library():
    code = """
import sys, torch
before = set(sys.modules)
import deco_kernels
from deco_kernels import ops, model, flow
new = set(sys.modules) - before
print(*sorted({name.split(".")[0] for name in new}))
print(len(new))
assert not torch.cuda.is_initialized()
"""
    result = python("-c", code)
    assert result.returncode == 0, result.stderr
    packages, count = result.stdout.splitlines()
    assert not {"triton", "numpy", "matplotlib", "tqdm", "sklearn", "diffusers", "huggingface_hub"} & set(
        packages.split()
    )
    assert "deco_kernels._native_cpu" not in result.stdout
    assert int(count) <= 24  # modules of this package; each adds about a millisecond


# --- installation ----------------------------------------------------------------------------------------------------

USE_INSTALLED = """
import runpy, sys, torch
# An editable install of this tree would lend its native module to the copy.
sys.meta_path = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
import deco_kernels
from deco_kernels import native, testing
assert deco_kernels.__file__.startswith(sys.argv[1]), deco_kernels.__file__
assert "Build it" in native.cpu_unavailable_reason()
inputs = testing.random_inputs("pixel_decoder", patch_size=4, image_size=(1, 8, 8))
automatic, reference = testing.run(inputs), testing.run(inputs, "reference")
assert torch.equal(automatic.outputs[0], reference.outputs[0])
for name, gradient in reference.gradients.items():
    assert gradient.abs().max() > 0 and torch.equal(automatic.gradients[name], gradient), name
try:
    testing.run(inputs, "cpu")
except deco_kernels.BackendUnavailable as error:
    print(error)
sys.argv = ["deco_kernels"]
runpy.run_module("deco_kernels", run_name="__main__")
"""


def test_without_compiler_the_pure_python_package_installs_and_works(source_tree, no_compiler, tmp_path):
    install = [*"-m pip install --no-build-isolation --no-deps --no-index -v --target".split(), str(tmp_path)]
    result = python(*install, str(source_tree), cwd=tmp_path, DECO_KERNELS_BUILD="auto", **no_compiler)
    assert result.returncode == 0, result.stdout + result.stderr
    said = result.stdout + result.stderr
    assert "building _native_cpu failed" in said and "build.log" in said and "reference backend" in said
    assert not list(tmp_path.glob("deco_kernels/*.so"))
    used = python("-c", USE_INSTALLED, str(tmp_path), cwd=tmp_path, PYTHONPATH=str(tmp_path), **no_compiler)
    assert used.returncode == 0, used.stderr
    assert used.stdout.startswith("backend 'cpu' cannot serve pixel_decoder")
    assert "CPU instruction set: none in use" in used.stdout


def test_explicit_build_fails_without_compiler(source_tree, no_compiler, tmp_path):
    arguments = ["setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path / "temp")]
    result = python(*arguments, cwd=source_tree, DECO_KERNELS_BUILD="cpu", **no_compiler)
    assert result.returncode != 0
    assert "building _native_cpu failed" in result.stderr and "build.log" in result.stderr
    assert "Traceback" not in result.stderr


def test_unknown_build_choice_is_refused(source_tree):
    result = python("setup.py", "--version", cwd=source_tree, DECO_KERNELS_BUILD="gpu")
    assert result.returncode != 0
    assert "DECO_KERNELS_BUILD" in result.stderr and "'gpu'" in result.stderr and "auto" in result.stderr


def test_source_distribution_holds_everything_a_build_needs(source_tree, tmp_path):
    result = python("setup.py", "-q", "sdist", "-d", str(tmp_path), cwd=source_tree, DECO_KERNELS_BUILD="none")
    assert result.returncode == 0, result.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        held = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    sources = {str(path.relative_to(source_tree)) for path in (source_tree / "csrc").rglob("*") if path.is_file()}
    package = {str(path.relative_to(source_tree)) for path in (source_tree / "deco_kernels").rglob("*.py")}
    needed = sources | package | {"setup.py", "CMakeLists.txt", "pyproject.toml", "LICENSE", "deco_kernels/py.typed"}
    assert len(sources) > 5
    assert needed <= held, sorted(needed - held)


def test_wheel_holds_the_package_alone(source_tree, tmp_path):
    build = [*"-m pip wheel --no-build-isolation --no-deps --no-index -w".split(), str(tmp_path), str(source_tree)]
    result = python(*build, cwd=tmp_path, DECO_KERNELS_BUILD="none")
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata_name,) = [name for name in names if name.endswith("/METADATA")]
        metadata = archive.read(metadata_name).decode()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"deco_kernels"}
    assert "deco_kernels/py.typed" in names and any(name.endswith("/LICENSE") for name in names)
    assert "Requires-Dist: torch>=2.9" in metadata and "Requires-Python: >=3.10" in metadata
    assert "License-Expression: BSD-3-Clause" in metadata
    assert f"Version: {deco_kernels.__version__}\n" in metadata


@pytest.mark.long
def test_isolated_install_builds_the_native_module(source_tree, tmp_path):
    """`pip install .` with build isolation; it fetches the build tools and compiles every instruction set."""
    install = ["-m", "pip", "install", "--no-deps", "--target", str(tmp_path), str(source_tree)]
    result = python(*install, cwd=tmp_path, DECO_KERNELS_BUILD="cpu")
    assert result.returncode == 0, result.stdout + result.stderr
    code = "import deco_kernels.native as native; print(native.cpu().current_isa())"
    used = python("-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert used.returncode == 0, used.stderr


# --- python -m deco_kernels ------------------------------------------------------------------------------------------


def test_report_names_versions_backends_threads_and_instruction_set():
    result = python("-m", "deco_kernels")
    assert result.returncode == 0, result.stderr
    threads = f"{torch.get_num_threads()} threads"
    for part in (torch.__version__, "instruction set", threads, "reference", "cpu", "triton", "cuda"):
        assert part in result.stdout
    assert all("available" in line for line in result.stdout.splitlines() if line.startswith("  cpu "))


@pytest.fixture
def planted_backend(tmp_path, monkeypatch):
    """Registers a backend "planted" that implements adaln_block with the given module source."""

    def plant(source):
        package = tmp_path / "planted_backend"
        package.mkdir()
        (package / "__init__.py").write_text(
            "def unavailable_reason(device): return None\ndef unsupported_reason(request): return None\n"
        )
        (package / "adaln_block.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(registry, "packages", {"reference": registry.packages["reference"]})
        registry.register_backend("planted", "planted_backend")
        monkeypatch.setattr(report, "devices", lambda: [torch.device("cpu")])

    yield plant
    for name in [name for name in sys.modules if name.split(".")[0] == "planted_backend"]:
        del sys.modules[name]
    registry.serving_module.cache_clear()


REFERENCE_COPY = "from deco_kernels.backends.reference.adaln_block import *\n"
WRONG_GRADIENT = """
from deco_kernels.backends.reference import adaln_block as right
forward = right.forward
def backward(*arguments):
    first, second, *others = right.backward(*arguments)
    return first, 1.001 * second, *others
"""
WRONG_MEAN = """
import torch
from deco_kernels.backends.reference import adaln_block as right
backward = right.backward
def forward(h, *others):
    if h.dtype is torch.float32:
        first = h[..., :1]
        h = torch.cat([torch.nextafter(first, first + 1), h[..., 1:]], -1)
    return right.forward(h, *others)
"""
BROKEN = REFERENCE_COPY + "def forward(*arguments): raise RuntimeError('no such kernel')\n"


@pytest.mark.parametrize(
    ("source", "passed", "said"),
    [
        (REFERENCE_COPY, 2, "2 of 2"),
        (WRONG_GRADIENT, 1, "grad cond"),
        (WRONG_MEAN, 1, "FAILED: output 0"),
        (BROKEN, 0, "no such kernel"),
    ],
    ids=["right", "wrong", "wrong mean", "broken"],
)
def test_selftest_finds_a_wrong_backend(planted_backend, capsys, source, passed, said):
    """An error of 0.1 % in one gradient exceeds the float32 bound; in bfloat16 it is below rounding. The last bit
    of one channel matters only in rows of equal channels."""
    planted_backend(source)
    assert report.main(["--selftest", "--dtype", "float32", "--dtype", "bfloat16"]) == (0 if passed == 2 else 1)
    output = capsys.readouterr().out
    assert said in output and f"{passed} of 2 checks passed" in output
    header = output.splitlines()[0]
    assert header.index("dtype") - header.index("op") > max(map(len, report.OPS))


@pytest.mark.parametrize("options", [["--backend", "cpu"], ["--dtype", "bfloat16"]])
def test_options_of_the_selftest_need_it(options, capsys):
    with pytest.raises(SystemExit) as stopped:
        report.main(options)
    assert stopped.value.code == 2 and "got them without; add --selftest" in capsys.readouterr().err
