"""The Triton kernels of a GPU check: their number, and that a prepared archive is used on another machine."""

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from benchmarks.gpu_check import prepare, prepared
from benchmarks.gpu_check.running import ROOT
from tests.installed import installed

installed("triton")
pytestmark = pytest.mark.skipif(bool(os.environ.get("TRITON_INTERPRET")), reason="about compiled kernels")

MOST_KERNELS = 313

# Triton and a pretended device are set up in a separate process, since they cannot be reset. Prints the number of
# kernels, and those that calls of the public functions would launch in addition.
COUNT = """
import importlib, pkgutil
from triton.runtime.jit import JITFunction
from benchmarks.gpu_check import compiling, workload
from deco_kernels import testing
from deco_kernels.backends import triton
from deco_kernels.backends.triton import launching
from tests.backends import triton_calls
from tests.ops.cases import BF16, OPS, small_inputs
names = [module.name for module in pkgutil.iter_modules(triton.__path__)]
modules = [importlib.import_module(f"{triton.__name__}.{name}") for name in names]
functions = [value for module in modules for value in vars(module).values() if isinstance(value, JITFunction)]
with launching.record_launches("sm_90"):
    assert functions and all(function.hash for function in functions), "keys depend on the order of launches"
compiling.pretend_device("90a")
found = workload.kernels("sm_90", 132)
triton.unavailable_reason = lambda device: None
def public_calls():
    for op in OPS:
        for inputs in (small_inputs(op, BF16), triton_calls.with_views(small_inputs(op, BF16))):
            with launching.record_launches("sm_90", 132) as recorded:
                testing.run(inputs, "triton")
            assert recorded
            yield from recorded
known = {kernel.key for kernel in found}
print(len(found), [kernel.name for kernel in workload.distinct(public_calls()) if kernel.key not in known])
"""

# Compiles the kernels of a small call; prints one line per kernel.
COMPILE = """
import json, torch
from benchmarks.gpu_check import compiling, workload
from deco_kernels import testing
compiling.pretend_device("90a")
def calls():
    sizes = dict(width=16, patch_size=4, image_size=(1, 8, 8))
    yield workload.Call(testing.random_inputs("adaln_block", dtype=torch.bfloat16, **sizes), None)
for result in compiling.compile_all(workload.kernels("sm_90", 132, calls()), 2):
    print(json.dumps(result))
"""


def run_program(program: str, cache: Path, home: Path) -> list[str]:
    folders = {"TRITON_CACHE_DIR": str(cache), "HOME": str(home), "TMPDIR": str(home), "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=600, cwd=home, env=os.environ | folders
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert not list(home.glob("libcuda-*")), "its empty library remains"
    return result.stdout.splitlines()


def test_the_number_of_kernels_stays_within_its_budget(tmp_path):
    """Every kernel costs seconds of compilation; a call with new strides or sizes must not add many. The list is
    complete for calls of the public functions with real tensors."""
    (line,) = run_program(COUNT, tmp_path / "cache", tmp_path)
    number, missing = line.split(maxsplit=1)
    assert 200 <= int(number) <= MOST_KERNELS and missing == "[]"


def test_nothing_is_compiled_with_a_prepared_archive(tmp_path, monkeypatch):
    """Compiled, packed, unpacked under another root with an empty cache and another home, and compiled again."""
    machines = [tmp_path / "here", tmp_path / "there"]
    for machine in machines:
        machine.mkdir()
    results = [json.loads(line) for line in run_program(COMPILE, machines[0] / "cache", machines[0])]
    assert results and {result["cache"] for result in results} == {"compiled"}
    archive, module = tmp_path / "prepared.tar.xz", tmp_path / "_native_cuda.so"
    module.write_bytes(b"module")
    prepared.write(archive, "90a", [result["kernel"] for result in results], machines[0] / "cache", {"module": module})
    monkeypatch.setitem(prepared.FOLDERS, "module", machines[1])
    (machines[0] / "cache").rename(tmp_path / "gone")  # its paths must not be used
    manifest = prepared.unpack(archive, "90a", machines[1] / "cache")
    assert manifest["kernels"] == [result["kernel"] for result in results]
    assert (machines[1] / module.name).read_bytes() == b"module"
    again = [json.loads(line) for line in run_program(COMPILE, machines[1] / "cache", machines[1])]
    assert {result["kernel"]: result["cache"] for result in again} == dict.fromkeys(manifest["kernels"], "hit")


@pytest.fixture
def archive(tmp_path):
    (tmp_path / "cache" / "KEY").mkdir(parents=True)
    (tmp_path / "cache" / "KEY" / "kernel.cubin").write_bytes(os.urandom(1000))
    (tmp_path / "_native_cuda.so").write_bytes(b"module")
    path = tmp_path / "prepared.tar.xz"
    prepared.write(path, "90a", ["kernel"], tmp_path / "cache", {"module": tmp_path / "_native_cuda.so"})
    return path


@pytest.mark.parametrize(
    ("function", "value", "said"),
    [
        ("python_version", "3.99", r"python .*, here 3\.99; prepare another with --python 3\.99 --triton"),
        ("triton_version", "0.1", r"triton .*, here 0\.1; prepare another with --python .* --triton 0\.1 --arch 90a"),
        ("sources_digest", "other", "other sources; prepare another from this tree"),
    ],
)
def test_an_archive_for_another_machine_is_refused(tmp_path, monkeypatch, archive, function, value, said):
    monkeypatch.setattr(prepared, function, lambda: value)
    with pytest.raises(ValueError, match=f"--prepared {re.escape(str(archive))}: .*{said}"):
        prepared.unpack(archive, "90a", tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_an_archive_for_another_architecture_is_refused(tmp_path, archive):
    with pytest.raises(ValueError, match="architecture 90a, here 80; .* --arch 80"):
        prepared.unpack(archive, "80", tmp_path / "there")


@pytest.mark.parametrize("content", [None, b"no archive"])
def test_a_file_that_is_no_archive_is_refused(tmp_path, content):
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="not an archive of `gpu_check prepare`"):
        prepared.unpack(path, "90a", tmp_path / "there")


def test_a_truncated_archive_is_refused(tmp_path, monkeypatch, archive):
    """Wherever it ends."""
    monkeypatch.setitem(prepared.FOLDERS, "module", tmp_path / "there")
    content = archive.read_bytes()
    for size in range(0, len(content) - 100, 20):
        archive.write_bytes(content[:size])
        with pytest.raises(ValueError, match="--prepared .*: (not an archive of|the archive is damaged)"):
            prepared.unpack(archive, "90a", tmp_path / "cache")


def test_an_archive_holds_no_texts_of_the_compiler(tmp_path):
    """The files are there, because Triton reads all files that a kernel's list names."""
    (tmp_path / "cache" / "KEY").mkdir(parents=True)
    for suffix in ("source", "ttir", "ttgir", "llir", "ptx", "cubin", "json"):
        (tmp_path / "cache" / "KEY" / f"kernel.{suffix}").write_text("text")
    prepared.write(tmp_path / "archive", "90a", ["kernel"], tmp_path / "cache", {})
    with tarfile.open(tmp_path / "archive") as files:
        sizes = {Path(entry.name).suffix: entry.size for entry in files if entry.name != "manifest.json"}
    assert sizes == {".source": 0, ".ttir": 0, ".ttgir": 0, ".llir": 0, ".ptx": 0, ".cubin": 4, ".json": 4}


def test_prepare_names_what_is_missing(capsys):
    assert prepare.main(["--python", "3.99", "--triton", "0.1", "--arch", "90a"]) == 2
    assert "no Python 3.99 with PyTorch and Triton 0.1 was found; create one with" in capsys.readouterr().err


def test_prepare_packs_what_it_builds(tmp_path, monkeypatch):
    """With pretended compilers."""
    built = tmp_path / "built"
    built.write_bytes(b"code")

    def compile_kernels(architecture, multiprocessors, cache):
        (cache / "KEY").mkdir(parents=True)
        (cache / "KEY" / f"{architecture}_{multiprocessors}.cubin").write_bytes(b"code")
        return ["kernel"]

    monkeypatch.setattr(prepare, "ROOT", tmp_path)
    monkeypatch.setattr(prepare, "build_module", lambda architecture, folder: built)
    monkeypatch.setattr(prepare, "compile_kernels", compile_kernels)
    monkeypatch.setattr(prepare.probes, "compile_source", lambda architecture, output: built)
    versions = ["--python", prepared.python_version(), "--triton", prepared.triton_version()]
    archive = tmp_path / "archive"
    assert prepare.main([*versions, "--arch", "90a", "--output", str(archive)]) == 0
    assert prepared.read_manifest(archive)["kernels"] == ["kernel"]
    with tarfile.open(archive) as files:
        assert set(files.getnames()) == {"manifest.json", "module/built", "programs/built", "triton/KEY/90a_132.cubin"}


def test_a_kernel_that_fails_ends_the_preparation(tmp_path, monkeypatch):
    line = '{"kernel": "sums_kernel", "cache": "failed", "message": "out of shared memory"}'
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\necho '{line}'\n")
    program.chmod(0o755)
    monkeypatch.setattr(prepare.sys, "executable", str(program))
    with pytest.raises(RuntimeError, match="sums_kernel: out of shared memory"):
        prepare.compile_kernels("90a", 132, tmp_path / "cache")
