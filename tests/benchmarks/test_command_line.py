"""`python -m benchmarks`: help, bad input, one small run and its report."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from torch._inductor.runtime import cache_dir_utils

from benchmarks import __main__ as command_line
from benchmarks import run

ROOT = pathlib.Path(__file__).parents[2]


def benchmarks(*arguments):
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture
def called(capsys, monkeypatch):
    """A function that runs the command line in this process, with its own heap; returns status, output and errors."""
    monkeypatch.setattr(command_line, "keep_heap", lambda *_, **__: None)

    def call(*arguments):
        try:
            status = command_line.main(list(arguments))
        except SystemExit as stopped:
            status = stopped.code
        return status, *capsys.readouterr()

    return call


@pytest.mark.parametrize("command", ("", *command_line.COMMANDS))
def test_help(command, called):
    status, output, _ = called(*command.split(), "--help")
    assert status == 0 and output.startswith("usage: python -m benchmarks")


@pytest.mark.parametrize(
    "arguments, expected",
    (
        (["pixel_encoder"], "unknown part 'pixel_encoder'; use pixel_decoder, "),
        (["--threads", "2", "codec"], "unknown part 'codec'; use pixel_decoder"),
        (["--device", "tpu"], "unknown device 'tpu'; use cpu or cuda"),
        (["--dtype", "int8"], "unknown dtype 'int8'; use float32"),
        (["--pass", "sideways"], "unknown pass 'sideways'; use forward, backward, both"),
        (["--backend", "metal"], "unknown backend 'metal'; use reference"),
        (["--size", "huge"], "unknown size 'huge'; use one of standard"),
        (["--size", "B=0"], "expected SYMBOL=positive integer"),
        (["--size", "Q=3"], "expected SYMBOL=positive integer"),
        (["--size", "H=60,W=60"], "H and W must be divisible by p=16"),
        (["flow_matching_loss", "--size", "C=4"], "the losses are for C=3 channels"),
        (["--threads", "0"], "--threads: expected a positive integer, got '0'"),
        (["--threads", "100000"], "--threads: expected at most 1024 threads, got '100000'"),
        (["avx2", "--device", "cuda"], "part avx2 belongs to the device cpu"),
        (["kernels"], "part kernels belongs to the device cuda"),
        (["--avx2", "--device", "cuda"], "--avx2 is for the device cpu"),
        (["--avx2", "--default-heap"], "--avx2 and --default-heap exclude each other"),
        (["--quick", "--full"], "--quick and --full exclude each other"),
        (["--stop-after", "-1"], "--stop-after must be positive"),
        (["--stop-after", "nan"], "--stop-after must be positive, got nan"),
        (["--compare", "no_such_file.json"], "No such file"),
        (["pixel_decoder", "--size", "B=100000"], "choose a smaller B, H or W"),
        (["--output", "no/such/folder/result.json"], "does not exist"),
        (["--csv", "."], "--csv: expected the name of a file, got the name of a folder: .; name a file"),
        (["adaln_block", "--trace", "trace.json"], "--trace takes one group, these options select 4"),
        (["adaln_block", "--size", "standard", "--size", "sample-256", "--trace", "trace.json"], "options select 4"),
        (["memory", "--profile"], "--profile and --trace run one op, not the part memory; leave it out"),
        (["adaln_block", "--trace", "trace.json", "--csv", "rows.csv"], "--csv does not go with --profile or --trace"),
        (["adaln_block", "--profile", "gpu"], "--profile: unknown contender 'gpu' of adaln_block; use published"),
        (["adaln_block", "--profile", "cuda"], "its kernels run on NVIDIA GPUs"),
        (["report", "no_such_file.json"], "No such file"),
        (["report", "pyproject.toml"], "not a JSON file"),
    ),
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(arguments, expected, called):
    status, output, errors = called(*arguments)
    assert status == 2
    assert output == "" and len(errors.splitlines()) == 1
    assert expected in errors


@pytest.mark.parametrize("options", ("report", "import --quick --compare", "swap --show", "fused_losses --show"))
@pytest.mark.parametrize("content", (b'{"format": 1, "header": {}, "recipe": {}, "times": {}, "losses": {}}', b"\xff"))
def test_a_file_of_another_form_is_named(options, content, tmp_path, called):
    path = tmp_path / "result.json"
    path.write_bytes(content)
    status, output, errors = called(*options.split(), str(path))
    assert status == 2 and output == "" and errors.startswith(f"benchmarks: {path}: not a ")


def test_a_locale_that_lacks_characters_gets_others():
    command = [sys.executable, "-m", "benchmarks", "report", "tests/benchmarks/result.json"]
    answer = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONIOENCODING": "latin-1"}, capture_output=True)
    assert answer.returncode == 0 and b"| ? 3.6 x |" in answer.stdout


COMMANDS_WITH_OUTPUT = [name for name in command_line.COMMANDS if name not in ("host_time", "report")]


@pytest.mark.parametrize("command", COMMANDS_WITH_OUTPUT)
def test_a_command_checks_its_file_before_it_measures(command, called):
    for path, said in (("no/such/folder/a.json", "does not exist; create it first"), (".", "; name a file")):
        status, output, errors = called(command, "--output", path)
        assert status == 2 and output == "" and said in errors


@pytest.mark.parametrize(
    ("arguments", "said"),
    (
        (["codec", "--threads", "0"], "argument --threads: expected a positive integer, got '0'"),
        (["trunk", "--rounds", "-1"], "argument --rounds: expected a positive integer, got '-1'"),
        (["fused_losses", "--steps", "0"], "argument --steps: expected a positive integer, got '0'"),
        (["host_time", "no/such/checkout"], "expected a checkout with a folder deco_kernels, found none in no/such"),
        (["reuse", "--preset", "deco-xxl/16"], "--preset: expected one of ['deco-l/16', 'deco-xl/16', 'deco-demo'"),
    ),
)
def test_a_wrong_argument_of_a_command_is_named(arguments, said, called):
    status, output, errors = called(*arguments)
    assert status == 2 and output == "" and said in errors


def test_avx2_is_set_before_the_libraries_read_it(called, monkeypatch):
    asked = {}
    monkeypatch.setattr(command_line, "keep_heap", lambda *_, **environment: asked.update(environment))
    monkeypatch.setattr(run, "run", lambda _: 0)
    assert called("--avx2")[0] == 0 and asked["DECO_KERNELS_CPU_ISA"] == asked["ATEN_CPU_CAPABILITY"] == "avx2"
    default = cache_dir_utils.default_cache_dir()  # it has loops for the vectors of the processor
    assert pathlib.Path(asked["TORCHINDUCTOR_CACHE_DIR"]) != pathlib.Path(default)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_gpu_is_one_line(called):
    status, _, errors = called("--device", "cuda")
    assert status == 2
    assert errors == "benchmarks: no GPU: PyTorch sees no CUDA device here; use --device cpu\n"


def test_the_program_ends_with_the_status():
    answer = benchmarks("--device", "tpu")
    assert answer.returncode == 2 and answer.stderr.startswith("benchmarks: unknown device 'tpu'")


def test_what_no_time_is_left_for_is_said(tmp_path, called, monkeypatch):
    ceilings = {"bytes_per_s": 1e10, "matmul_flops_per_s": {"float32": 1e11}, "fma_flops_per_s": {}}
    monkeypatch.setattr(run, "measure_ceilings", lambda *_: ceilings | {"flops": ceilings["matmul_flops_per_s"]})
    path = tmp_path / "result.json"
    small = ["--quick", "--size", "H=32,W=32", "--backend", "reference", "--dtype", "float32", "--threads", "1"]
    status, output, errors = called("adaln_block", *small, "--stop-after", "0.01", "--output", str(path))
    assert status == 0, errors
    assert errors.splitlines()[-1].startswith("benchmarks: left out, for lack of time: adaln_block")
    result = json.loads(path.read_text())
    assert {row["pass"] for row in result["rows"]} == {"forward"}  # the first part is always measured
    assert len(result["left_out"]) == 1 and "## Skipped for lack of time" in output


@pytest.mark.skipif(importlib.util.find_spec("pytest_benchmark") is None, reason="needs pytest-benchmark")
def test_through_pytest_benchmark(tmp_path):
    path = tmp_path / "result.json"
    one = ["-k", "adaln_block and float32 and forward and published and not backward", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "--benchmark-max-time=0.01", "-q"]
    command += [*one, f"--benchmark-json={path}"]
    # pytest-benchmark measures nothing in pytest-xdist workers.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout
    (found,) = json.loads(path.read_text())["benchmarks"]
    assert found["group"] == "adaln_block float32 forward" and found["stats"]["median"] > 0
    assert found["extra_info"]["flops"] == 2 * 5 * 32**2 * 256**2


def test_small_run_and_its_report(tmp_path, called):
    path = tmp_path / "result.json"
    small = ["--quick", "--size", "H=32,W=32", "--backend", "reference", "--dtype", "float32", "--threads", "1"]
    answer = benchmarks("adaln_block", "overhead", *small, "--output", str(path))
    assert answer.returncode == 0, answer.stderr
    result = json.loads(path.read_text())
    assert result["header"]["kept_heap"] and result["header"]["threads"] == 1
    assert {row["pass"] for row in result["rows"]} == {"forward", "forward_backward"}
    assert {row["contender"] for row in result["rows"]} == {"published", "reference"}
    assert all(row["status"] == "ok" and row["ms_p20"] <= row["ms"] <= row["ms_p80"] for row in result["rows"])
    assert {(row["contender"], row["pass"]) for row in result["overhead"] if row["us"] > 0} == {
        (contender, pass_)
        for contender in ("published", "best_eager", "reference")
        for pass_ in ("forward", "forward_backward")
    }
    assert called("report", str(path))[1].strip() == answer.stdout.strip()
    assert "- 0 of 4 rows moved beyond the spread" in called("report", str(path), "--compare", str(path))[1]
