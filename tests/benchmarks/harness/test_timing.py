"""Interleaving, cold buffers, sizes."""

import dataclasses
import platform
import shutil
import statistics

import pytest

from benchmarks.harness.ceilings import fma_peak
from benchmarks.harness.measure import statistics_of
from benchmarks.harness.results import best_of
from benchmarks.harness.timing import COLD_FACTOR, buffer_count, interleaved
from benchmarks.names import OPS
from benchmarks.ops.sizes import PRESETS, STANDARD, Size, size_of
from deco_kernels.machine import last_level_cache


def test_contenders_take_turns_and_buffers_rotate(monkeypatch):
    log = []
    monkeypatch.setattr("benchmarks.harness.timing.milliseconds", lambda call, device, asleep_s=0.0: (call(), 5.0)[1])
    calls = [lambda count, name=name: log.append((name, count)) for name in "ab"]
    times = interleaved(calls, "cpu", budget_s=0.02, min_rounds=3, max_rounds=3)
    assert times == [[5.0] * 3] * 2
    assert "".join(name for name, _ in log) == "abab" + "ab" + "ba" + "ab"
    assert [count for _, count in log] == list(range(len(log)))


def test_short_calls_are_repeated(monkeypatch):
    counts = []
    monkeypatch.setattr("benchmarks.harness.timing.milliseconds", lambda call, device, asleep_s=0.0: (call(), 0.25)[1])
    times = interleaved([counts.append], "cpu", budget_s=0.02, min_rounds=1, max_rounds=1)
    assert times == [[0.25 / 4]] and len(counts) == 2 + 4


def test_long_calls_warm_up_once(monkeypatch):
    counts = []
    monkeypatch.setattr("benchmarks.harness.timing.milliseconds", lambda call, device, asleep_s=0.0: (call(), 5.0)[1])
    interleaved([counts.append], "cpu", budget_s=0.001, min_rounds=2, max_rounds=2)
    assert len(counts) == 1 + 2


def test_as_many_rounds_as_asked_for(monkeypatch):
    monkeypatch.setattr("benchmarks.harness.timing.milliseconds", lambda call, device, asleep_s=0.0: 5.0)
    assert len(interleaved([print], "cpu", budget_s=0.0, min_rounds=120)[0]) == 120


@pytest.mark.parametrize(
    ("times", "unstable"),
    [([0.3, 0.1, 0.2], True), ([10.0, 10.2] * 5, False), ([10.0, 11.2] * 5, True), ([10.0] * 9 + [10.6] * 9, True)],
)
def test_median_spread_and_drift(times, unstable):
    found = statistics_of(times)
    assert found["ms"] == pytest.approx(statistics.median(times), rel=1e-15) and found["rounds"] == len(times)
    assert min(times) <= found["ms_p20"] <= found["ms"] <= found["ms_p80"] <= max(times)
    assert found["unstable"] == unstable


def test_rotating_buffers_exceed_the_cache():
    cache = last_level_cache("cpu")
    for bytes_each in (1000, cache // 5, cache, 10 * cache):
        assert buffer_count(bytes_each, "cpu") * bytes_each >= COLD_FACTOR * cache
    assert buffer_count(10 * cache, "cpu") == 1


@pytest.mark.parametrize("op", OPS)
def test_sizes(op):
    for preset in PRESETS:
        assert size_of(preset, op).tokens > 0
    assert size_of(STANDARD, op) == Size(batch=32 if op == "flow_matching_loss" else 1)
    by_hand = size_of("B=2,H=32,W=48,D=16,N=1,p=8,Z=64", op)
    assert by_hand == Size(2, 32, 48, 3, 8, 16, 1, 64)
    assert size_of(str(by_hand), op) == by_hand
    assert (by_hand.pixels, by_hand.tokens, by_hand.patch_pixels) == (3072, 48, 64)
    assert dataclasses.replace(by_hand, batch=1).tokens == 24


def test_the_higher_ceiling_stands():
    first = {"bytes_per_s": 3.0, "flops": {"float32": 1.0, "bfloat16": 5.0}}
    second = {"bytes_per_s": 2.0, "flops": {"float32": 4.0, "bfloat16": 2.0}}
    assert best_of(first, second) == {"bytes_per_s": 3.0, "flops": {"float32": 4.0, "bfloat16": 5.0}}


@pytest.mark.skipif(platform.machine() != "x86_64" or shutil.which("cc") is None, reason="no x86-64 or no C compiler")
def test_the_peak_is_that_of_the_instructions_in_use(monkeypatch):
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    assert set(fma_peak(1)) == {"float32"}  # no bfloat16 products
