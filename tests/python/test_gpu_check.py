"""make gpu-check: the line it prints without a GPU, and that every failing step fails it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAMS = Path(__file__).resolve().parents[2] / "python"
sys.path.insert(0, str(PROGRAMS))

import gpu_check  # noqa: E402


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_one_line_without_gpu():
    command = [sys.executable, str(PROGRAMS / "gpu_check.py")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert "nothing was checked" in line and "no GPU" in line


@pytest.fixture
def pretended_gpu(monkeypatch, tmp_path):
    """A machine with a GPU and nvcc, whose steps end with the given exit statuses."""
    statuses = dict.fromkeys(("build", "selftest", "tests", "benchmarks"), 0)

    def run_step(name, command, out, deadline):
        return real(
            name, [sys.executable, "-c", f"print('said by {name}'); raise SystemExit({statuses[name]})"], out, deadline
        )

    real = gpu_check.run_step
    monkeypatch.setattr(gpu_check, "missing_gpu", lambda: None)
    monkeypatch.setattr(gpu_check, "machine", lambda: {"device": "pretended"})
    monkeypatch.setattr(gpu_check, "nvcc", lambda: "/usr/bin/nvcc")
    monkeypatch.setattr(gpu_check, "run_step", run_step)
    monkeypatch.setenv("OUT", str(tmp_path))
    return statuses


def read(folder: Path) -> dict:
    return json.loads((folder / "gpu-check.json").read_text())


def test_all_steps_pass(pretended_gpu, tmp_path):
    assert gpu_check.main() == 0
    report = read(tmp_path)
    assert report["passed"] and report["machine"] == {"device": "pretended"}
    assert [step["name"] for step in report["steps"]] == list(pretended_gpu)
    assert "said by tests" in (tmp_path / "tests.log").read_text()


@pytest.mark.parametrize("broken", ["build", "selftest", "tests", "benchmarks"])
def test_one_failing_step_fails_the_check_and_the_others_still_run(pretended_gpu, tmp_path, capsys, broken):
    pretended_gpu[broken] = 3
    assert gpu_check.main() == 1
    assert {step["name"]: step["passed"] for step in read(tmp_path)["steps"]} == {
        name: name != broken for name in pretended_gpu
    }
    output = capsys.readouterr().out
    assert f"{broken} FAILED (exit status 3)" in output and f"said by {broken}" in output


def test_step_past_its_deadline_is_stopped(tmp_path):
    step = gpu_check.run_step("slow", [sys.executable, "-c", "import time; time.sleep(60)"], tmp_path, deadline=0.0)
    assert not step["passed"] and step["seconds"] < 30 and "stopped" in step["exit_status"]


def test_outcomes_of_tests_are_read(tmp_path):
    (tmp_path / "test_one.py").write_text(
        "import pytest\ndef test_right(): pass\ndef test_wrong(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='not here')\ndef test_left_out(): pass\n"
    )
    junit = tmp_path / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={junit}", str(tmp_path)]
    subprocess.run(command, capture_output=True, timeout=120)
    outcomes = {case["test"].split("::")[-1]: case for case in gpu_check.test_outcomes(junit)}
    assert {name: case["outcome"] for name, case in outcomes.items()} == {
        "test_right": "passed",
        "test_wrong": "failure",
        "test_left_out": "skipped",
    }
    assert "1 == 2" in outcomes["test_wrong"]["message"] and outcomes["test_left_out"]["message"] == "not here"
    assert gpu_check.test_outcomes(tmp_path / "absent.xml") == []
