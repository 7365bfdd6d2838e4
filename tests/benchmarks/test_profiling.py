"""One contender alone: counters, a trace, the table of kernels; rows as CSV."""

import csv
import json
from types import SimpleNamespace

import pytest
from torch.autograd import DeviceType

from benchmarks import __main__ as command
from benchmarks import profiling
from benchmarks.harness import perf_events, results

TASK_CLOCK = {"task clock": (1, 1)}  # software event, in ns: needs no counters of the processor


def profiled(capsys, *arguments):
    small = ["--default-heap", "--dtype", "float32", "--pass", "backward", "--size", "B=1,H=64,W=64"]
    assert command.main(["adaln_block", *small, *arguments]) == 0
    return capsys.readouterr().out


def test_counters_count_every_thread():
    with perf_events.Counters(TASK_CLOCK) as counters:
        sum(range(100_000))
    assert counters.counts["task clock"] > 0


@pytest.mark.parametrize("contender", [[], ["published"]])
def test_a_profile_tells_the_time_and_whether_cycles_are_counted(contender, capsys):
    text = profiled(capsys, "--profile", *contender)
    assert text.startswith(f"## adaln_block {(contender or ['cpu'])[0]} forward_backward, float32")
    assert "ms per call, mean of 10" in text and "cycles and instructions" in text


def test_cycles_that_cannot_be_counted_are_named(monkeypatch, capsys):
    def refuse(event, thread):
        raise OSError(2, "perf events: none")

    monkeypatch.setattr(perf_events, "opened", refuse)
    assert "cycles and instructions are not counted here: [Errno 2] perf events: none" in profiled(capsys, "--profile")


def test_a_trace_has_the_calls_and_the_table_the_operators(tmp_path, capsys):
    text = profiled(capsys, "--trace", str(tmp_path / "trace.json"))
    assert "| deco_kernels::adaln_block_backward | 1 |" in text
    names = [event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]]
    assert names.count("adaln_block cpu forward_backward") == profiling.CALLS


def test_the_table_of_a_gpu_has_kernels_with_cycles_by_time():
    def event(key, us, device):
        return SimpleNamespace(
            key=key, count=20, self_device_time_total=us, self_cpu_time_total=1.0, device_type=device
        )

    events = [event("short", 10.0, DeviceType.CUDA), event("long", 500.0, DeviceType.CUDA)]
    events += [event("cudaLaunchKernel", 0.0, DeviceType.CPU), event("the call", 510.0, DeviceType.CUDA)]
    lines = profiling.time_table(events, "the call", "cuda", 1500).splitlines()
    assert lines[2:] == ["| long | 2 | 50.0 | 75,000 |", "| short | 2 | 1.0 | 1,500 |"]
    assert profiling.clock_of({"sm_clock_mhz": [1200, 1500]}) == 1500


def test_rows_as_csv(tmp_path):
    result = results.empty({}, {})
    result["rows"] = [{"op": "a", "size": {"batch": 1}, "ms": 2.5}]
    result["memory"] = [{"contender": "b", "reason": 'with, comma "and quotes"'}]
    results.save_csv(result, str(tmp_path / "rows.csv"))
    with open(tmp_path / "rows.csv", newline="") as file:
        first, second = csv.DictReader(file)
    assert first == {"part": "rows", "op": "a", "size.batch": "1", "ms": "2.5", "contender": "", "reason": ""}
    assert second["part"] == "memory" and second["reason"] == 'with, comma "and quotes"'
