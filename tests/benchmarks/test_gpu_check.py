"""make gpu-check: its message without a GPU, its stages with pretended steps, and time limits with slow ones."""

import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main as benchmarks_main
from benchmarks.gpu_check import __main__ as gpu_check
from benchmarks.gpu_check import running, stages
from benchmarks.gpu_check.running import Journal
from benchmarks.names import OPS
from benchmarks.static.figures import BUDGETS
from benchmarks.static.machines import MACHINES, largest_bound


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_one_line_without_gpu():
    command = [sys.executable, "-m", "benchmarks.gpu_check"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=running.ROOT)
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
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, cwd=running.ROOT)


def test_gpu_tests_need_no_other_packages():
    """All tests marked gpu are in the files that are run, and these files can be collected."""
    files = [str(path) for path in stages.gpu_tests()]
    marked = [str(path) for path in running.ROOT.glob("tests/**/test_*.py") if "pytest.mark.gpu" in path.read_text()]
    assert sorted({*marked} - {__file__}) == sorted(files) and "cuda" in files[0]
    program = "import pytest; raise SystemExit(pytest.main(sys.argv[1:]))"
    result = without_other_packages(program, "-q", "-m", "gpu", "--collect-only", *files)
    assert result.returncode == 0, result.stdout[-2000:]
    assert all(f"{Path(file).name}::" in result.stdout for file in files)


def test_benchmarks_need_no_other_packages(tmp_path):
    """A small run, which streams its rows; all modules can be imported."""
    program = (
        "import importlib, pkgutil, runpy, benchmarks\n"
        "for module in pkgutil.walk_packages(benchmarks.__path__, 'benchmarks.'):\n"
        "    if not module.name.endswith(('__main__', 'conftest', 'test_ops', 'plots')):\n"
        "        importlib.import_module(module.name)\n"
        "runpy.run_module('benchmarks', run_name='__main__', alter_sys=True)"
    )
    arguments = ["flow_matching_loss", "--size", "H=16,W=16", "--dtype", "float32", "--pass", "forward", "--quick"]
    result = without_other_packages(program, *arguments, "--stream", "--output", str(tmp_path / "result.json"))
    assert result.returncode == 0, result.stderr[-2000:]
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    streamed = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert rows and streamed == [{"benchmark": "rows", **row} for row in rows]


@pytest.fixture
def toolkit(monkeypatch):
    """Every program and package of the steps is found."""
    monkeypatch.setattr(stages, "cuda_tool", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(stages.importlib.util, "find_spec", lambda name: object())


@pytest.fixture
def pretended_gpu(monkeypatch, tmp_path, toolkit):
    """A GPU and the CUDA toolkit.

    Steps exit with the statuses, print the lines and run the programs that are set by name; benchmarks write a stored
    result if `measured` is set.
    """
    pretended = types.SimpleNamespace(statuses={}, lines={}, programs={}, measured=False)
    result = running.ROOT / "tests" / "benchmarks" / "result.json"

    def run_step(step, *arguments):
        program = f"print('said by {step.name}'); print({pretended.lines.get(step.name, '')!r})\n"
        program += pretended.programs.get(step.name, "") + "\n"
        if pretended.measured and "--output" in step.command:
            output = step.command[step.command.index("--output") + 1]
            program += f"import shutil; shutil.copy({str(result)!r}, {output!r})\n"
        program += f"raise SystemExit({pretended.statuses.get(step.name, 0)})"
        return real(step._replace(command=[sys.executable, "-S", "-c", program]), *arguments)

    real = running.run_step
    about = {"device": "pretended", "compute_capability": "9.0", "multiprocessors": 132}
    monkeypatch.setattr(gpu_check, "missing_gpu", lambda: None)
    monkeypatch.setattr(gpu_check, "about_machine", lambda: about)
    monkeypatch.setattr(running, "run_step", run_step)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(gpu_check, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(stages.probes, "FOLDER", tmp_path / "programs")
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    return pretended


@pytest.fixture
def out(tmp_path):
    """Folder of the results."""
    return tmp_path / "out"


def read(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "gpu-check.jsonl").read_text().splitlines()]


def ended(folder: Path) -> dict[str, dict]:
    return {entry["ended"]: entry for entry in read(folder) if "ended" in entry}


def names_of(*stage_names: str) -> list[str]:
    machine = stages.Machine("9.0", Path())
    steps = [stages.setup(machine), *(stages.STAGES[name](machine) for name in stage_names)]
    return [step.name for part in steps for step in part]


def test_all_stages_run_and_the_report_is_written_and_printed(pretended_gpu, out, capsys):
    pretended_gpu.measured = True
    pretended_gpu.lines["probes"] = json.dumps({"probe": "FFMA", "cycles": 1.05, "modeled": 1.0})
    timed = {"kernel": "sums_kernel", "architecture": "sm_90", "modeled_ms": None, "measured_ms": 1.0}
    pretended_gpu.lines["kernels"] = json.dumps({"benchmark": "kernels", **timed})
    sampled = {"preset": "deco-xl/16", "size": 256, "batch": 1, "steps": 100, "dtype": "bfloat16", "decoder": "fused"}
    sampled |= {"graphs": True, "trunk_steps": 100, "least_ms": 250.0, "ms": 251.0}
    pretended_gpu.lines["sampling"] = json.dumps({"benchmark": "reuse"} | sampled)
    pretended_gpu.lines["compiled_trunk"] = json.dumps({"benchmark": "reuse"} | sampled | {"compiled": True})
    assert gpu_check.main([]) == 0
    assert list(ended(out)) == names_of("first", "second", "third")
    assert "said by tests" in ended(out)["tests"]["output"]
    written = {path.name: path.stat().st_size for path in out.iterdir()}
    pictures = {f"{name}.png" for name in ("speedups", "roofline", "scaling", "memory", "end_to_end")}
    assert set(written) == {"gpu-check.jsonl", "benchmarks.json", "report.md"} | pictures
    assert len(written) <= 8 and max(written.values()) < 16e6
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "| kernels | passed |" in text and "measured / modeled" in text and "## pixel_decoder, float32" in text
    assert "| FFMA | 1.05 | 1.00 | 1.05 |" in text
    assert "fused in CUDA graphs | 100 | 0.25 s |" in text and "fused in CUDA graphs, compiled trunk | 100 |" in text
    output = capsys.readouterr().out
    assert text in output
    assert output.index("  racecheck ") < output.index("gpu-check: memcheck: small calls")  # listed before it starts


def test_a_failing_step_fails_the_check_and_the_others_still_run(pretended_gpu, out, capsys):
    pretended_gpu.statuses["tests"] = 3
    assert gpu_check.main(["first"]) == 1
    found = ended(out)
    assert {name: entry["passed"] for name, entry in found.items()} == {
        name: name != "tests" for name in names_of("first")
    }
    output = capsys.readouterr().out
    assert "tests FAILED (3)" in output and "said by tests" in output
    assert "| tests | 3 |" in (out / "report.md").read_text(encoding="utf-8")


def test_results_are_kept_by_test_and_failed_tests_run_again(pretended_gpu, out):
    line = {"test": "tests/test_x.py::test_y", "outcome": "failed", "seconds": 1.0, "message": "AssertionError: 1\n2"}
    pretended_gpu.lines["tests"] = json.dumps(line)
    assert gpu_check.main(["first", "third"]) == 0
    assert [entry for entry in read(out) if "test" in entry] == [{"step": "tests", **line}]
    assert ended(out)["failures"]["status"] == 0
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "0 passed, 1 failed" in text and "- tests/test_x.py::test_y: failed: AssertionError: 1 2" in text
    gpu_check.main(["third"])
    pretended_gpu.lines.clear()
    assert ended(out)["failures"]["status"] == "left out: no test has failed"


def test_missing_tools_and_packages_leave_steps_out_by_name(pretended_gpu, out, capsys, monkeypatch):
    monkeypatch.setattr(stages, "cuda_tool", lambda name: None)
    monkeypatch.setattr(stages.importlib.util, "find_spec", lambda name: None)
    assert gpu_check.main(["first", "second"]) == 0
    left_out = {name: entry["status"] for name, entry in ended(out).items() if entry["status"] != 0}
    tool, package = "left out: no {} on PATH or in $CUDA_HOME/bin", "left out: the package {} is not installed"
    sanitizer, ncu = tool.format("compute-sanitizer"), tool.format("ncu")
    assert left_out == {
        "build": tool.format("nvcc"),
        "compile": package.format("triton"),
        "probes": tool.format("nvcc"),
        "tests": package.format("pytest"),
        **dict.fromkeys(["memcheck", "racecheck"], sanitizer),
        **dict.fromkeys(["ncu pixel_decoder", "ncu adaln_block", "ncu flow_matching_loss"], ncu),
    }
    assert f"gpu-check: memcheck {sanitizer}" in capsys.readouterr().out


def test_a_prepared_archive_replaces_the_build(pretended_gpu, out, monkeypatch, tmp_path):
    unpacked = []
    monkeypatch.setattr(gpu_check.prepared, "unpack", lambda *arguments: unpacked.append(arguments))
    assert gpu_check.main(["second", "--prepared", "archive"]) == 0
    assert unpacked == [(Path("archive"), "90a", tmp_path / "cache")]
    assert list(ended(out)) == [name for name in names_of("second") if name != "build"]


def test_an_archive_that_does_not_fit_is_refused(pretended_gpu, out, capsys):
    assert gpu_check.main(["--prepared", "absent"]) == 2
    assert "gpu-check: --prepared absent: not an archive of" in capsys.readouterr().err and not out.exists()


def test_kernels_that_a_step_compiles_are_recorded(pretended_gpu, out, tmp_path):
    kernel = tmp_path / "cache" / "KEY" / "forward_kernel.cubin"
    kernel.parent.mkdir(parents=True)
    pretended_gpu.programs["loss"] = f"open({str(kernel)!r}, 'w')"
    pretended_gpu.lines["compile"] = json.dumps({"kernel": "sums_kernel", "cache": "hit", "seconds": 0.1})
    gpu_check.main(["first"])
    assert [entry for entry in read(out) if "kernel" in entry] == [
        {"step": "compile", "kernel": "sums_kernel", "cache": "hit", "seconds": 0.1},
        {"step": "loss", "kernel": "KEY/forward_kernel", "cache": "compiled"},
    ]
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "1 of 2 found in the cache\n\n- compiled in the step loss: KEY/forward_kernel" in text


@pytest.mark.parametrize(
    ("kernel", "architecture", "probe"),
    [
        ("pixel_decoder.forward_kernel/D32/bfloat16", "sm_90", "wgmma m64n96k16"),
        ("cuda.pixel_decoder.forward_kernel/D32/bfloat16", "sm_90a", "mma.sync m16n8k16"),
    ],
)
@pytest.mark.parametrize("slowdown", [1.0, 20.0])
def test_kernels_are_modeled_again_with_the_measured_cycles(pretended_gpu, out, kernel, architecture, probe, slowdown):
    """At the clock of the device; the other probes agree with the model, and the tensor cores are as slow as given."""
    record = json.loads(BUDGETS.read_text())[kernel][architecture]
    device = MACHINES[architecture]._replace(multiprocessors=100, clock=1.2e9, bytes_per_second=4e12)
    modeled = largest_bound(device, record["cycles_per_16_px"], record["bytes_per_px"])
    cycles = record["cycles_per_16_px"] | {"tensor": slowdown * record["cycles_per_16_px"]["tensor"]}
    expected = largest_bound(device, cycles, record["bytes_per_px"])
    others = {"mma.sync m16n8k16": 1.0} if probe != "mma.sync m16n8k16" else {}
    probes = others | {"ldmatrix.x4": 1.0, "tanh": 1.0, "FFMA": 1.0, probe: slowdown}
    rows = [{"probe": name, "cycles": 4 * ratio, "modeled": 4.0} for name, ratio in probes.items()]
    pretended_gpu.lines["probes"] = "\n".join(map(json.dumps, rows))
    found = {"kernel": kernel, "architecture": architecture, "modeled_ms": modeled.milliseconds, "measured_ms": 0.5}
    found |= {"multiprocessors": device.multiprocessors, "clock": device.clock}
    found |= {"bytes_per_second": device.bytes_per_second}
    pretended_gpu.lines["kernels"] = json.dumps({"benchmark": "kernels", **found})
    gpu_check.main(["first"])
    assert (modeled == expected) == (slowdown == 1)
    text = (out / "report.md").read_text(encoding="utf-8")
    row = f"| {kernel} | {modeled.milliseconds:.3f} | {expected.milliseconds:.3f} | 0.500 | {expected.name} |"
    assert row in text


def test_help_names_the_stages(capsys):
    with pytest.raises(SystemExit, match="0"):
        gpu_check.main(["--help"])
    assert "first, second, third" in capsys.readouterr().out


def test_an_unknown_stage_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu_check.main(["fourth"])
    assert "unknown stage 'fourth'; use first, second, third" in capsys.readouterr().err


@pytest.mark.parametrize("name", stages.STAGES)
def test_the_limits_of_a_stage_fit_its_time(toolkit, name):
    """With the end of a step that ran out of time; for the first stage also with the build."""
    machine = stages.Machine("9.0", Path(), ready=name != "first", failed=("tests/test_x.py::test_y",))
    steps = [*stages.setup(machine), *stages.STAGES[name](machine)]
    assert sum(step.seconds for step in steps) + running.GRACE_SECONDS <= stages.STAGE_SECONDS == 9 * 60
    assert len({step.name for step in steps}) == len(steps) and not any(step.missing for step in steps)


def test_the_cuda_module_is_built_for_the_present_architecture(toolkit):
    for capability, architecture in {"9.0": "90a", "8.0": "80", "10.0": "100"}.items():
        build, _ = stages.setup(stages.Machine(capability, Path()))
        assert build.environment["DECO_KERNELS_CUDA_ARCHS"] == architecture


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_options_of_the_benchmarks_are_accepted(toolkit, tmp_path, capsys):
    """They are refused only for lack of a GPU, after they have been checked. All ops are timed."""
    steps = [step for stage in stages.STAGES.values() for step in stage(stages.Machine("9.0", tmp_path))]
    commands = {step.name: step.command[3:] for step in steps if step.command[1:3] == ["-m", "benchmarks"]}
    for name, arguments in commands.items():
        with pytest.raises(SystemExit, match="2"):
            sys.exit(benchmarks_main(arguments))
        assert "PyTorch sees no CUDA device here" in capsys.readouterr().err, name
    assert {*OPS} <= {argument for arguments in commands.values() for argument in arguments}


# --- one step -----------------------------------------------------------------------------------------------------


def run_until_it_says(tmp_path: Path, command: list[str], said: str, grace: float = 3600) -> Journal:
    """Runs a step that would sleep for an hour. A busy machine may need a higher limit just to start it."""
    for limit in (1, 10, 100, 1000):
        journal = Journal(tmp_path / "journal.jsonl")
        step = running.Step("slow", "sleeps", command, limit)
        running.run_step(step, time.monotonic() + 3600, journal, {}, grace)
        assert journal.entries[-1]["status"] == f"stopped after {limit} s" and not journal.entries[-1]["passed"]
        if said in (tmp_path / "journal.jsonl").read_text():
            break
    return journal


def test_a_step_past_its_limit_may_still_report(tmp_path):
    program = """
import json, signal, time
def report(*_):
    print(json.dumps({"probe": "last words"}), flush=True)
    raise SystemExit
signal.signal(signal.SIGINT, report)
print(json.dumps({"probe": "first"}), flush=True)
time.sleep(3600)
"""
    journal = run_until_it_says(tmp_path, [sys.executable, "-S", "-c", program], "last words")
    assert [entry["probe"] for entry in journal.having("probe")] == ["first", "last words"]


def test_a_step_that_ignores_the_interrupt_is_killed_with_its_children(tmp_path):
    program = """
import signal, subprocess, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "3600"])
print("child", child.pid, "begun", flush=True)
time.sleep(3600)
"""
    journal = run_until_it_says(tmp_path, [sys.executable, "-S", "-c", program], "begun", grace=0.1)
    child = Path("/proc") / journal.entries[-1]["output"].split()[1] / "stat"

    def ended() -> bool:
        try:
            return child.read_text().rpartition(")")[2].split()[0] == "Z"
        except (FileNotFoundError, ProcessLookupError):
            return True

    for _ in range(6000):  # a killed process ends when it is next scheduled
        if ended():
            break
        time.sleep(0.01)
    assert ended()


def test_tests_in_several_processes_are_recorded_once(tmp_path):
    path = tmp_path / "test_two.py"
    path.write_text("def test_right(): pass\ndef test_wrong(): assert 1 == 2\n")
    (step,) = (step for step in stages.first(stages.Machine("9.0", tmp_path)) if step.name == "tests")
    options = step.command[: step.command.index(str(stages.gpu_tests()[0]))]
    assert "-n" in options
    command = [*options, "-p", "xdist", "-m", "", f"--rootdir={tmp_path}", str(path)]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, cwd=running.ROOT)
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    found = {line["test"].split("::")[-1]: line["outcome"] for line in lines}
    assert len(lines) == 2 and found == {"test_right": "passed", "test_wrong": "failed"}


def test_tests_before_one_that_hangs_are_recorded(tmp_path):
    (tmp_path / "test_slow.py").write_text(
        "import pytest, time\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='not here')\ndef test_left_out(): pass\n"
        "@pytest.fixture\ndef broken(): raise ValueError('setup')\n"
        "def test_broken(broken): pass\n"
        "def test_slow(): time.sleep(3600)\n"
    )
    plugin = ["-p", "benchmarks.gpu_check.streamed_tests", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-q", *plugin, f"--rootdir={tmp_path}", str(tmp_path / "test_slow.py")]
    journal = run_until_it_says(tmp_path, command, "test_broken")
    found = {
        entry["test"].split("::")[-1]: (entry["outcome"], entry.get("message")) for entry in journal.having("test")
    }
    assert found == {
        "test_right": ("passed", None),
        "test_wrong": ("failed", "assert 1 == 2"),
        "test_left_out": ("skipped", "not here"),
        "test_broken": ("error", "ValueError: setup"),
    }


def test_without_time_left_a_step_is_left_out_by_name(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    step = running.Step("late", "does nothing", [sys.executable, "-S", "-c", ""], 60)
    running.run_step(step, time.monotonic() + 0.5, journal, {}, 15)
    (entry,) = journal.entries
    assert entry["status"] == "left out: no time is left in this stage" and entry["passed"]
