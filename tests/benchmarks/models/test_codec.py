"""`python -m benchmarks codec`: contenders agree, memory is measured in a process of its own, docs show the result."""

import argparse
import json
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks.models import codec

ROOT = Path(__file__).parents[3]
RESULTS = [f"benchmarks/results/codec_{name}epyc_zen4_2_threads.json" for name in ("", "3840x2160_")]


@pytest.fixture(autouse=True)
def small(monkeypatch, one_thread):
    """keep_heap would start the test process anew."""
    monkeypatch.setattr(codec, "keep_heap", lambda *_: None)
    monkeypatch.setattr(codec, "SIZES", {"1920x1024": (40, 48)})


def test_a_result_has_every_contender(tmp_path, capsys, monkeypatch):
    path = tmp_path / "result.json"
    options = ["--dtype", "float32", "--no-compile", "--rounds", "1", "--threads", "1", "--output", str(path)]
    monkeypatch.setattr(codec, "elsewhere", lambda *_: str(7 * codec.MIB))
    assert codec.main(options) == 0
    result = json.loads(path.read_text())
    assert [row["contender"] for row in result["rows"]] == ["published", "best_eager", "deco_kernels"]
    assert all(row["ms"] > 0 for row in result["rows"])
    assert codec.report(result) in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_contenders_agree(dtype):
    codec.verify(dtype, [codec.PUBLISHED, codec.BEST_EAGER, codec.OURS])


def test_sides_are_rounded_up_to_whole_patches():
    assert codec.Frame(40, 50).image.shape == (1, 3, 48, 64)


def test_a_wrong_decoder_is_refused(monkeypatch):
    right = codec.decoder_of

    def wrong(published):
        decoder = right(published)
        decoder.feature_bias += 0.1
        return decoder

    monkeypatch.setattr(codec, "decoder_of", wrong)
    with pytest.raises(ValueError, match="codec: deco_kernels: expected a relative error"):
        codec.verify(torch.float32, [codec.PUBLISHED, codec.OURS])


def test_a_wrong_compiled_decoder_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module, dynamic: lambda *inputs: 1.01 * module(*inputs))
    with pytest.raises(ValueError, match=r"codec: torch\.compile: expected a relative error"):
        codec.verify(torch.float32, list(codec.CONTENDERS))


def test_compilation_is_not_in_the_memory(monkeypatch):
    frames, events = [], []

    def compiled(module, dynamic):
        return lambda image, *inputs: frames.append(image.shape[-2:]) or events.append("call") or image

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(codec, "reset_peak", lambda device: events.append("reset") or 0)
    monkeypatch.setattr(codec, "peak_bytes", lambda device: 5)
    assert codec.growth(codec.COMPILED, 48, 64, torch.float32) == 5
    assert frames == [(32, 32), (48, 64), (48, 64)] and events == ["call", "call", "reset", "call"]


def test_memory_of_a_contender_is_printed(capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(codec, "growth", lambda *arguments: asked.append(arguments) or 7)
    assert codec.main(["--growth", "deco_kernels", "--dtype", "float32", "--threads", "1"]) == 0
    assert capsys.readouterr().out == "7\n" and asked == [(codec.OURS, 40, 48, torch.float32)]


def test_times_are_printed(capsys):
    assert codec.main(["--times", "best_eager", "--dtype", "float32", "--rounds", "3", "--threads", "1"]) == 0
    times = json.loads(capsys.readouterr().out)
    assert len(times) == 3 and min(times) > 0


def test_large_frames_are_timed_in_processes_of_their_own(monkeypatch):
    def run(command, **_):
        assert command[command.index("--rounds") + 1] == "2"
        return subprocess.CompletedProcess(command, 0, "[4.0, 2.0]" if "--times" in command else "8", "")

    monkeypatch.setattr(codec, "ALONE", {"1920x1024"})
    monkeypatch.setattr(codec.subprocess, "run", run)
    options = argparse.Namespace(rounds=2, threads=1)
    _, row = codec.measure("1920x1024", "float32", ["published", "deco_kernels"], options)
    assert (row["least_ms"], row["ms"], row["growth_bytes"]) == (2.0, 3.0, 8)


def test_large_frames_come_first(monkeypatch, capsys):
    """The heap of this process does not shrink, and those of its children need the memory."""
    sizes = []
    row = {"contender": "published", "ms": 1.0, "growth_bytes": 1}
    monkeypatch.setattr(codec, "SIZES", {"1920x1024": (40, 48), "3840x2160": (48, 64)})
    monkeypatch.setattr(
        codec, "measure", lambda size, dtype, *_: sizes.append(size) or [row | {"size": size, "dtype": dtype}]
    )
    assert codec.main(["--dtype", "float32", "--threads", "1"]) == 0
    assert sizes == ["3840x2160", "1920x1024"]


def test_a_failed_process_is_named(monkeypatch):
    monkeypatch.setattr(codec.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, -9, "", ""))
    with pytest.raises(OSError, match="codec: times of published: not measured: it was killed"):
        codec.elsewhere("times", "published", "1920x1024", "float32", argparse.Namespace(rounds=1, threads=1))


@pytest.mark.parametrize("path", RESULTS)
def test_the_page_shows_the_committed_result(path):
    result = json.loads((ROOT / path).read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "codec.md").read_text(encoding="utf-8")
    assert codec.report(result) in page and path in page
