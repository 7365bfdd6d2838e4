"""ablate.py reuse: its figures against flow.Sampler, resumed runs, report, bad input."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

import ablate
from deco_kernels import flow, model
from deco_kernels.training.images import to_pixels
from sampling.inputs import noise_of
from studies import reuse
from tests.conftest import threads
from tests.random_models import random_model

SMALL = ["--steps", "4", "--samples", "3", "--image-size", "32", "--seeds", "1"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("reuse") / "tiny.safetensors"
    model.save_model(random_model(num_classes=2), path)
    return path


@pytest.fixture(scope="module")
def study(checkpoint, tmp_path_factory):
    """The folder of a finished study."""
    out = tmp_path_factory.mktemp("reuse") / "out"
    with threads(1):
        assert ablate.main(["reuse", "--checkpoint", str(checkpoint), "--out", str(out), *SMALL]) == 0
    return out


def result_of(study, name):
    return json.loads((study / "runs" / name / "result.json").read_text())


def test_contenders_of_the_published_study():
    found = reuse.contenders(50)
    assert [each.count for each in found if each.kind == "even"] == [50, 40, 30, 25, 20, 15, 10, 5]
    assert [each.count for each in found if each.kind == "chosen"] == [40, 30, 25, 20, 15, 10, 5]
    assert len(found) == len({each.name for each in found}) == 22


def test_figures_are_those_of_the_sampler(checkpoint, study):
    network, noise = model.load_model(checkpoint), torch.stack([noise_of(index, 0, (32, 32)) for index in range(3)])
    labels, null = torch.tensor([0, 1, 0]), torch.tensor([2, 2, 2])

    def sampled(steps=4, **options):
        return flow.Sampler(network, steps=steps, guidance=1.5, **options)(noise, labels, null, trajectory=True)[1]

    def velocities(states):
        return [(after - before) * 4 for before, after in zip(states, states[1:], strict=False)]

    exact, even, fewer = sampled(), sampled(trunk_steps=2), sampled(steps=2)
    for found, name in ((even, "even-2-seed0"), (fewer, "fewer-2-seed0")):
        result = result_of(study, name)
        error = found[-1] - exact[-1]
        assert result["sample_error"] == pytest.approx((error.norm() / exact[-1].norm()).item(), rel=1e-5)
        clamped = found[-1].clamp(-1, 1) - exact[-1].clamp(-1, 1)
        psnr = [10 * np.log10(4 / each.square().mean().item()) for each in clamped]
        assert result["psnr"] == pytest.approx(np.mean(psnr), rel=1e-5)
        luminance = torch.einsum("c,bchw->bhw", torch.tensor([0.299, 0.587, 0.114]), error)
        coefficients = np.array([*range(1, 9), *range(7, 0, -1)])  # on each diagonal
        energy = np.dot(result["difference"], coefficients) / 64
        assert energy == pytest.approx(luminance.square().mean().item(), rel=1e-4)
    assert result["velocity_error"] is None and result["trunk_steps"] is None
    pairs = zip(velocities(even), velocities(exact), strict=True)
    expected = np.mean([((v - v_exact).norm() / v_exact.norm()).item() for v, v_exact in pairs])
    assert result_of(study, "even-2-seed0")["velocity_error"] == pytest.approx(expected, rel=1e-4)
    with Image.open(study / "runs" / "even-2-seed0" / "samples.png") as image:
        assert np.array_equal(np.asarray(image)[:, 32:64], to_pixels(even[-1])[1])


def test_every_step_is_exact_and_fewer_are_not(study):
    every = result_of(study, "even-4-seed0")
    assert every["sample_error"] == 0 and every["velocity_error"] == 0 and every["psnr"] is None
    assert every["trunk_steps"] == [0, 1, 2, 3]
    chosen = json.loads((study / "chosen.json").read_text())
    for count in (1, 2, 3):
        result = result_of(study, f"chosen-{count}-seed0")
        assert result["trunk_steps"] == chosen[str(count)] and len(chosen[str(count)]) == count
        assert result["sample_error"] > 0 and result_of(study, f"even-{count}-seed0")["sample_error"] > 0


def test_report(study):
    with open(study / "table.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    names = [f"{line['kind']} {line['count']}" for line in lines]
    assert names == [each.name for each in reuse.contenders(4)]
    assert all(float(line["seconds"]) > 0 for line in lines)
    text = (study / "table.md").read_text()
    assert text.count("| even trunk steps |") == 4 and "Shows: " in text and "Cannot show: " in text
    for name in ("study.png", "samples.jpg"):
        with Image.open(study / name) as picture:
            assert picture.width > 1000


def test_a_continued_study_repeats_nothing_and_grows(checkpoint, study, monkeypatch, capsys):
    """A lost run is measured again with the same figures; another seed is added."""
    lost = study / "runs" / "chosen-2-seed0" / "result.json"
    before = lost.read_text()
    lost.unlink()
    monkeypatch.setattr(flow, "choose_trunk_steps", lambda *_, **__: pytest.fail("chosen again"))
    calls, trajectory = [], reuse.Measurement.trajectory
    monkeypatch.setattr(
        reuse.Measurement, "trajectory", lambda self, *given: calls.append(given) or trajectory(self, *given)
    )
    arguments = ["reuse", "--checkpoint", str(checkpoint), "--out", str(study), *SMALL, "--resume"]
    assert ablate.main([*arguments, "--seeds", "2"]) == 0
    again = [(each.name, seed) for each, seed in calls]
    assert again[:2] == [("fewer 4", 0), ("chosen 2", 0)] and {seed for _, seed in again[2:]} == {1}
    assert lost.read_text() == before and len(list(study.glob("runs/*/result.json"))) == 20
    assert "2 seed(s)" in capsys.readouterr().out
    assert ablate.main([*arguments, "--guidance", "2"]) == 2
    assert "guidance 1.5 -> 2.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--checkpoint: expected the file of a trained class-to-image model, got none"),
        (["--checkpoint", "missing.ckpt"], "missing.ckpt: expected a checkpoint file, found nothing"),
        (["--checkpoint", "{dit}"], "--checkpoint: expected a class-to-image DeCo model, got DiT"),
        (["--checkpoint", "{deco}", "--image-size", "40"], "--image-size: expected a multiple of the patch size 16"),
        (["--checkpoint", "{deco}", "--guidance", "nan"], "guidance: expected a finite number, got nan"),
        (["--checkpoint", "{deco}", "--preset", "deco-tiny"], "--preset: not an option of reuse; leave it out"),
        (["--checkpoint", "{deco}", "--batch-size", "2"], "--batch-size: not an option of reuse; leave it out"),
    ],
)
def test_bad_input_is_named(checkpoint, arguments, message, tmp_path, capsys):
    dit = tmp_path / "dit.safetensors"
    if "{dit}" in arguments:
        model.save_model(random_model("dit-tiny"), dit)
    arguments = [argument.format(dit=dit, deco=checkpoint) for argument in arguments]
    assert ablate.main(["reuse", "--out", str(tmp_path / "out"), *arguments]) == 2
    assert f"error: {message}" in capsys.readouterr().err.replace(f"{tmp_path}/", "")
    assert not (tmp_path / "out").exists()
