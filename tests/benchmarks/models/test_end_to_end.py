"""Whole training steps and sampling, at sizes too small for meaningful times."""

import math

import pytest
import torch

from benchmarks.harness.measure import Options
from benchmarks.models import end_to_end
from benchmarks.models.end_to_end import Case, Workload, measure_end_to_end
from benchmarks.names import LIMIT, PUBLISHED, SAMPLING, TRAINING_STEP, TWO_OPS

OPTIONS = Options("cpu", ("reference",), compiled=(), budget_s=0.0, min_rounds=2)
TRAIN = Case("deco-tiny", TRAINING_STEP, batch=2, image_size=32)
SAMPLE = Case("deco-tiny", SAMPLING, batch=1, image_size=32, steps=3)
TRAINING_PARTS = ["draw", "trunk", "decoder", "loss", "backward of decoder and loss", "backward of trunk"]
TRAINING_PARTS += ["optimizer", "average"]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("case", (TRAIN, SAMPLE), ids=lambda case: case.pass_)
def test_rows_and_parts(case, dtype):
    rows = {row["contender"]: row for row in measure_end_to_end(case, dtype, OPTIONS)}
    two_ops = ["reference" + TWO_OPS] * (case is TRAIN)
    assert list(rows) == [PUBLISHED, "reference", *two_ops, LIMIT]
    assert all(row["status"] == "ok" and row["preset"] == "deco-tiny" for row in rows.values())
    parts = {name: list(row["parts"]) for name, row in rows.items()}
    if case is TRAIN:
        assert all(parts[name] == TRAINING_PARTS for name in ("reference", *two_ops, PUBLISHED))
        assert parts[LIMIT] == [name for name in TRAINING_PARTS if name != "loss"]
    else:
        assert set(parts["reference"]) == set(parts[LIMIT]) == {"solver", "trunk", "decoder"}
        assert rows[PUBLISHED]["steps"] == 3
    for row in rows.values():
        assert min(row["parts"].values()) >= 0 and row["parts"]["trunk"] > 0 and row["ms"] > 0


def test_a_wrong_decoder_is_refused(monkeypatch):
    def off(decoder, backend):
        view = backend_view(decoder, backend)
        view._parameters = {**decoder._parameters, "head_bias": torch.nn.Parameter(decoder.head_bias + 0.01)}
        return view

    backend_view = end_to_end.backend_view
    monkeypatch.setattr(end_to_end, "backend_view", off)
    rows = {row["contender"]: row for row in measure_end_to_end(SAMPLE, torch.float32, OPTIONS)}
    assert rows["reference"]["status"] == "wrong" and "samples:" in rows["reference"]["reason"]
    assert rows["reference"]["ms"] > 0 and rows[PUBLISHED]["ms"] > 0


def test_a_wrong_loss_is_refused(monkeypatch):
    monkeypatch.setattr(Workload, "fused_loss", lambda self, backend: lambda pred, v: ((pred - v) ** 2).mean())
    rows = {row["contender"]: row for row in measure_end_to_end(TRAIN, torch.float32, OPTIONS)}
    assert rows["reference"]["status"] == "ok"
    row = rows["reference" + TWO_OPS]
    assert row["status"] == "wrong" and row["reason"].startswith("loss:") and "gradients:" in row["reason"]


def test_a_published_formulation_that_is_not_finite_allows_nothing(monkeypatch):
    monkeypatch.setattr(end_to_end, "relative_error", lambda *_: math.inf)
    rows = measure_end_to_end(SAMPLE, torch.float32, OPTIONS)
    assert {row["contender"] for row in rows if row["status"] == "wrong"} == {PUBLISHED, "reference"}


def test_a_published_formulation_that_fails_allows_nothing(monkeypatch):
    def sample(workload, contender):
        if contender.name == PUBLISHED and workload.autocast_dtype:
            raise RuntimeError("not in bfloat16")
        return whole(workload, contender)

    whole = Workload.sample
    monkeypatch.setattr(Workload, "sample", sample)
    rows = measure_end_to_end(SAMPLE, torch.bfloat16, OPTIONS)
    assert {row["contender"]: row["status"] for row in rows} == {PUBLISHED: "failed", "reference": "wrong", LIMIT: "ok"}


def test_the_contenders_share_one_set_of_parameters():
    workload = Workload(TRAIN, torch.float32, "cpu")
    contenders = workload.contenders(("reference",), compiled=False)
    before = {id(parameter) for parameter in workload.model.parameters()}
    assert all(parameter.any() for parameter in workload.model.decoder.parameters())
    for contender in contenders[:2]:
        assert {id(parameter) for parameter in contender.network.parameters()} == before


def test_a_training_step_moves_weights_and_average():
    workload = Workload(TRAIN, torch.float32, "cpu")
    (contender, *_) = workload.contenders((), compiled=False)
    weight, averaged = workload.model.decoder.up_weight, workload.averaged.module.decoder.up_weight
    before = weight.clone(), averaged.clone()
    for _ in range(2):  # the first update of the average copies the weights
        workload.training_step(contender)
    assert not torch.equal(weight, before[0])
    assert not torch.equal(averaged, before[1]) and not torch.equal(averaged, weight)
