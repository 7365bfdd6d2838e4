"""`python -m benchmarks`: help, bad input, one small run and its report."""

import json
import pathlib
import subprocess
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).parents[2]


def benchmarks(*arguments):
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", (["--help"], ["report", "--help"]), ids=" ".join)
def test_help(arguments):
    answer = benchmarks(*arguments)
    assert answer.returncode == 0 and answer.stdout.startswith("usage: python -m benchmarks")


@pytest.mark.parametrize(
    "arguments, expected",
    (
        (["pixel_encoder"], "unknown part 'pixel_encoder'; use pixel_decoder, "),
        (["--device", "tpu"], "unknown device 'tpu'; use cpu or cuda"),
        (["--dtype", "int8"], "unknown dtype 'int8'; use float32"),
        (["--pass", "sideways"], "unknown pass 'sideways'; use forward, backward, both"),
        (["--backend", "metal"], "unknown backend 'metal'; use reference"),
        (["--size", "huge"], "unknown size 'huge'; use one of standard"),
        (["--size", "B=0"], "expected SYMBOL=positive integer"),
        (["--size", "Q=3"], "expected SYMBOL=positive integer"),
        (["--size", "H=60,W=60"], "H and W must be divisible by p=16"),
        (["flow_matching_loss", "--size", "C=4"], "the losses are for C=3 channels"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["avx2", "--device", "cuda"], "part avx2 belongs to the device cpu"),
        (["--output", "no/such/folder/result.json"], "does not exist"),
        (["report", "no_such_file.json"], "No such file"),
        (["report", "pyproject.toml"], "not a JSON file"),
    ),
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(arguments, expected):
    answer = benchmarks(*arguments)
    assert answer.returncode == 2
    assert answer.stdout == "" and len(answer.stderr.splitlines()) == 1
    assert expected in answer.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_gpu_is_one_line():
    answer = benchmarks("--device", "cuda")
    assert answer.returncode == 2
    assert answer.stderr == "benchmarks: no GPU: PyTorch sees no CUDA device here; use --device cpu\n"


def test_small_run_and_its_report(tmp_path):
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
    assert benchmarks("report", str(path)).stdout.strip() == answer.stdout.strip()
