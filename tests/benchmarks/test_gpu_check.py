"""make gpu-check: its message without a GPU, and that every failing step fails it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_check import __main__ as gpu_check


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_one_line_without_gpu():
    command = [sys.executable, "-m", "benchmarks.gpu_check"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=gpu_check.ROOT)
    assert result.returncode == 1 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert "nothing was checked" in line and "no GPU" in line


# Packages that a GPU machine may lack: all but PyTorch with Triton, NumPy and pytest.
OTHER_PACKAGES = (
    "safetensors transformers lightning lightning_fabric jsonargparse datasets omegaconf tensorboard matplotlib PIL "
    "tqdm sklearn scipy gradio playwright pytest_benchmark"
).split()


def without_other_packages(program: str, *arguments: str) -> subprocess.CompletedProcess:
    hidden = f"import sys; sys.modules.update(dict.fromkeys({OTHER_PACKAGES}))\n"
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-c", hidden + program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, cwd=gpu_check.ROOT)


def test_gpu_tests_need_no_other_packages():
    """All tests marked gpu are in the files that are run, and these files can be collected."""
    files = [str(path) for path in gpu_check.gpu_tests()]
    marked = [str(path) for path in gpu_check.ROOT.glob("tests/**/test_*.py") if "pytest.mark.gpu" in path.read_text()]
    assert sorted({*marked} - {__file__}) == files
    program = "import pytest; raise SystemExit(pytest.main(sys.argv[1:]))"
    result = without_other_packages(program, "-q", "-m", "gpu", "--collect-only", *files)
    assert result.returncode == 0, result.stdout[-2000:]
    assert all(f"{Path(file).name}::" in result.stdout for file in files)


def test_benchmarks_need_no_other_packages(tmp_path):
    """The end-to-end benchmarks use most of the package."""
    arguments = ["end_to_end", "--device", "cpu", "--quick", "--no-compile", "--stop-after", "1"]
    program = "import runpy; runpy.run_module('benchmarks', run_name='__main__', alter_sys=True)"
    result = without_other_packages(program, *arguments, "--output", str(tmp_path / "result.json"))
    assert result.returncode == 0, result.stderr[-2000:]
    assert json.loads((tmp_path / "result.json").read_text())["end_to_end"]


NAMES = ["build", "selftest", "pixel_decoder", "loss", "kernels", "tests", "memcheck"]
NAMES += ["end_to_end", "other_ops", "scaling", "sampling", "racecheck"]


@pytest.fixture
def pretended_gpu(monkeypatch, tmp_path):
    """A GPU and the CUDA toolkit. Steps exit with the returned statuses; benchmarks write a stored result."""
    statuses = {}
    result = gpu_check.ROOT / "tests" / "benchmarks" / "result.json"

    def run_step(step, deadline):
        says = f"print('said by {step.name}')"
        writes = ""
        if "--output" in step.command:
            writes = (
                f"import shutil; shutil.copy({str(result)!r}, {step.command[step.command.index('--output') + 1]!r})"
            )
        program = f"{says}\n{writes}\nraise SystemExit({statuses.get(step.name, 0)})"
        return real(step._replace(command=[sys.executable, "-c", program]), deadline)

    real = gpu_check.run_step
    about = {"device": "pretended", "compute_capability": "9.0"}
    monkeypatch.setattr(gpu_check, "missing_gpu", lambda: None)
    monkeypatch.setattr(gpu_check, "machine", lambda: about)
    monkeypatch.setattr(gpu_check, "cuda_tool", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(gpu_check, "run_step", run_step)
    monkeypatch.setenv("OUT", str(tmp_path))
    return statuses


def read(folder: Path) -> dict:
    return json.loads((folder / "gpu-check.json").read_text())


def test_all_steps_pass(pretended_gpu, tmp_path):
    assert gpu_check.main([]) == 0
    report = read(tmp_path)
    assert report["passed"] and report["machine"]["device"] == "pretended"
    assert [step["name"] for step in report["steps"]] == NAMES
    assert "said by tests" in report["steps"][NAMES.index("tests")]["output"]
    written = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    pictures = {f"{name}.png" for name in ("speedups", "roofline", "scaling", "memory", "end_to_end")}
    assert set(written) == {"gpu-check.json", "benchmarks.json", "report.md"} | pictures
    assert len(written) <= 8 and max(written.values()) < 16e6
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| kernels | passed |" in text and "measured / modeled" in text and "## pixel_decoder, float32" in text


@pytest.mark.parametrize("broken", ["build", "tests", "scaling"])
def test_one_failing_step_fails_the_check_and_the_others_still_run(pretended_gpu, tmp_path, capsys, broken):
    pretended_gpu[broken] = 3
    assert gpu_check.main([]) == 1
    assert {step["name"]: step["passed"] for step in read(tmp_path)["steps"]} == {
        name: name != broken for name in NAMES
    }
    output = capsys.readouterr().out
    assert f"{broken} FAILED (exit status 3)" in output and f"said by {broken}" in output
    assert f"| {broken} | 3 |" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_a_missing_toolkit_is_said(pretended_gpu, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_check, "cuda_tool", lambda name: None)
    monkeypatch.setattr(gpu_check, "steps", lambda folder, capability, full: [])
    assert gpu_check.main([]) == 0
    output = capsys.readouterr().out
    assert "no nvcc on PATH or in $CUDA_HOME/bin: the CUDA module is not built" in output
    assert "no compute-sanitizer" in output
    assert "No benchmark wrote a result." in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        gpu_check.main(["--help"])
    assert "--full" in capsys.readouterr().out


def test_full_adds_steps_and_time(tmp_path):
    short = {step.name: step for step in gpu_check.steps(tmp_path, "9.0", full=False)}
    full = {step.name: step for step in gpu_check.steps(tmp_path, "9.0", full=True)}
    assert "--full" in full["kernels"].command and "--stop-after" in short["kernels"].command
    assert all(full[name].seconds > step.seconds for name, step in short.items())


def test_the_cuda_module_is_built_for_the_present_architecture(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "cuda_tool", lambda name: f"/usr/bin/{name}")
    for capability, architecture in {"9.0": "90a", "8.0": "80", "10.0": "100"}.items():
        build = gpu_check.steps(tmp_path, capability, full=False)[0]
        assert build.environment["DECO_KERNELS_CUDA_ARCHS"] == architecture


def test_step_past_its_limit_is_stopped():
    """The step would sleep for an hour. A busy machine may need a higher limit just to start it."""
    command = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(3600)"]
    for limit in (1, 10, 100, 1000):
        step = gpu_check.run_step(gpu_check.Step("slow", command, limit), time.perf_counter() + 3600)
        assert not step["passed"] and step["seconds"] < 3600 and "stopped" in step["exit_status"]
        if step["output"]:
            break
    assert step["output"] == "begun\n"


@pytest.mark.parametrize("extra", (False, True))
def test_without_time_left_only_extra_steps_may_be_left_out(extra):
    step = gpu_check.Step("late", [sys.executable, "-c", ""], 60, extra=extra)
    record = gpu_check.run_step(step, time.perf_counter() + 0.5)
    assert record["exit_status"] == "left out for lack of time" and record["passed"] == extra


def test_outcomes_of_tests_are_read(tmp_path):
    (tmp_path / "test_one.py").write_text(
        "import pytest\ndef test_right(): pass\ndef test_wrong(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='not here')\ndef test_left_out(): pass\n"
    )
    junit = tmp_path / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={junit}", str(tmp_path)]
    subprocess.run(command, capture_output=True, timeout=600)
    outcomes = {case["test"].split("::")[-1]: case for case in gpu_check.test_outcomes(junit)}
    assert {name: case["outcome"] for name, case in outcomes.items()} == {
        "test_right": "passed",
        "test_wrong": "failure",
        "test_left_out": "skipped",
    }
    assert "1 == 2" in outcomes["test_wrong"]["message"] and outcomes["test_left_out"]["message"] == "not here"
    assert gpu_check.test_outcomes(tmp_path / "absent.xml") == []
