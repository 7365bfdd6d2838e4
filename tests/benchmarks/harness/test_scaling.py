"""Time per pixel vs. size."""

import pytest
import torch

from benchmarks.harness import scaling
from benchmarks.harness.measure import Options
from benchmarks.harness.steps import contenders_of
from benchmarks.names import BEST_EAGER, FORWARD, PUBLISHED, TRAINING
from benchmarks.ops.problem import problem_of
from benchmarks.ops.sizes import Size
from benchmarks.report.rows import flatness

OPTIONS = Options("cpu", ("reference",), compiled=(), budget_s=0.0, min_rounds=2)
SIDES = ((16, 16), (16, 32))


@pytest.fixture(autouse=True)
def checked_at_a_small_size(monkeypatch):
    monkeypatch.setattr(scaling, "CHECKED", Size(height=32, width=32))


@pytest.mark.parametrize("op", scaling.OPS)
def test_every_contender_at_every_size(op):
    rows = scaling.measure_scaling(op, torch.float32, FORWARD, OPTIONS, SIDES)
    assert {(row["contender"], row["size"]["width"]) for row in rows if row["ms"] > 0} == {
        (contender, width) for contender in (PUBLISHED, BEST_EAGER, "reference") for width in (16, 32)
    }


def test_a_wrong_contender_is_timed_and_flagged(monkeypatch):
    class Faulty(type(problem_of("pixel_decoder"))):
        def fused(self, tensors, size, backend):
            return tuple(output * 1.01 for output in super().fused(tensors, size, backend))

    monkeypatch.setattr(scaling, "problem_of", lambda op: Faulty())
    rows = scaling.measure_scaling("pixel_decoder", torch.float32, FORWARD, OPTIONS, SIDES)
    wrong = [row for row in rows if row["contender"] == "reference"]
    assert [row["status"] for row in wrong] == ["wrong"] * 2 and all(row["ms"] > 0 for row in wrong)
    assert sum(row["status"] == "ok" for row in rows) == 4


def test_what_does_not_fit_the_memory_is_said_and_the_others_go_on(monkeypatch):
    problem = problem_of("pixel_decoder")
    small, large = (Size(height=height, width=width) for height, width in SIDES)
    eager, *_, ours = contenders_of(problem, large, ("reference",))
    limit = scaling.bytes_needed(problem, large, TRAINING, eager) - 1
    assert scaling.bytes_needed(problem, large, TRAINING, ours) < limit
    assert scaling.bytes_needed(problem, small, TRAINING, eager) < limit
    monkeypatch.setattr(scaling, "available_memory", lambda device: limit)
    rows = scaling.measure_scaling("pixel_decoder", torch.float32, TRAINING, OPTIONS, SIDES)
    assert {(row["contender"], row["size"]["width"]) for row in rows if row["status"] == "unavailable"} == {
        (PUBLISHED, 32),
        (BEST_EAGER, 32),
    }
    assert all("GiB are available" in row["reason"] for row in rows if row["status"] != "ok")
    assert {row["size"]["width"] for row in rows if row["contender"] == "reference"} == {16, 32}


def test_flatness_looks_at_large_images_alone():
    points = [(256, 900.0), (65_536, 100.0), (262_144, 108.0), (4_194_304, 104.0)]
    assert flatness(points, "cpu") == pytest.approx(1.08)
    assert flatness(points, "cuda") is None
