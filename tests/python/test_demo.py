"""The demo: photographs, eager contender, comparison, report, exit statuses, and the PSNR of the recipe."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import demo
from demonstration import contenders
from images.photographs import center_crop, load_photographs, shipped_photographs, to_tensor
from images.spectra import diagonal_energies
from tests.random_models import randomize

PROGRAMS = Path(__file__).resolve().parents[2] / "python"


def write_image(path: Path, width: int, height: int, mode: str = "RGB") -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


# --- photographs -----------------------------------------------------------------------------------------------------


def test_shipped_photographs_are_found_and_decoded():
    names, images = load_photographs(shipped_photographs(), 64)
    assert names == ["china.jpg", "flower.jpg"]
    assert images.shape == (2, 3, 64, 64) and images.dtype is torch.float32
    assert -1 <= images.min() < -0.5 and 0.5 < images.max() <= 1
    assert images.flatten(1).std(1).min() > 0.3


@pytest.mark.parametrize(
    ("width", "height", "mode"), [(64, 64, "RGB"), (300, 77, "RGB"), (65, 400, "L"), (20, 30, "P")]
)
def test_any_readable_image_is_cropped_to_the_size(tmp_path, width, height, mode):
    path = write_image(tmp_path / "image.png", width, height, mode)
    names, images = load_photographs([path], 64)
    assert names == ["image.png"] and images.shape == (1, 3, 64, 64)


def test_crop_is_centered_and_keeps_values(tmp_path):
    pixels = np.zeros((64, 128, 3), dtype=np.uint8)
    pixels[:, 32:96] = 255
    image = to_tensor(center_crop(Image.fromarray(pixels), 64, 64))
    assert torch.equal(image, torch.ones(3, 64, 64))


def test_unreadable_images_are_named_and_left_out(tmp_path):
    text, missing = tmp_path / "text.jpg", tmp_path / "missing.png"
    text.write_text("no image")
    truncated = tmp_path / "truncated.jpg"
    truncated.write_bytes(shipped_photographs()[0].read_bytes()[:5000])
    good = write_image(tmp_path / "good.png", 64, 64)
    with pytest.warns(UserWarning) as said:
        names, images = load_photographs([text, good, missing, truncated, tmp_path], 64)
    assert names == ["good.png"] and len(images) == 1
    for path, warning in zip((text, missing, truncated, tmp_path), said, strict=True):
        assert str(path) in str(warning.message)


def test_psnr():
    reference = torch.zeros(2, 3, 8, 8)
    images = torch.stack([torch.full((3, 8, 8), 0.02), torch.full((3, 8, 8), -5.0)])
    assert contenders.psnr(images, reference) == pytest.approx([40.0, -10 * math.log10(0.25)], abs=1e-4)


def test_guesses_without_a_model_are_far_from_the_required_psnr():
    """The mean color of each photograph, and the mean of both, as docs/demo.md says."""
    _, photographs = load_photographs(shipped_photographs(), contenders.SHORT.image_size)
    for guess in (photographs.mean((2, 3), keepdim=True), photographs.mean(0, keepdim=True)):
        assert max(contenders.psnr(guess.expand_as(photographs), photographs)) < 12 < contenders.SHORT.required_psnr


def test_energy_spectrum_holds_the_whole_luminance_energy():
    images = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    luminance = torch.einsum("c,bchw->bhw", torch.tensor([0.299, 0.587, 0.114]), images)
    entries = torch.tensor([min(index, 14 - index) + 1 for index in range(15)])
    total = (torch.tensor(diagonal_energies(images)) * entries).sum() / 64
    torch.testing.assert_close(total, luminance.square().mean())


# --- the eager contender ---------------------------------------------------------------------------------------------


def test_gradient_errors_find_a_wrong_gradient(monkeypatch):
    """Random weights, because gradients vanish in a new model; the injected fault scales one gradient by 1.001."""
    contender = contenders.Contender(contenders.FULL, torch.rand(1, 3, 32, 32) * 2 - 1, seed=0, eager=False)
    randomize(contender.model)
    errors = contenders.gradient_errors(contender, seed=0)
    assert errors.keys() == dict(contender.model.named_parameters()).keys()
    assert max(max(pair) for pair in errors.values()) < demo.GRADIENT_ERROR
    contender.model.decoder.fc2_weight.register_hook(lambda gradient: 1.001 * gradient)
    wrong = contenders.gradient_errors(contender, seed=0)
    assert wrong["decoder.fc2_weight"][0] > 5e-4 and wrong["decoder.fc2_weight"][1] < demo.GRADIENT_ERROR


# --- the program -----------------------------------------------------------------------------------------------------


def test_demo_writes_the_report(tmp_path):
    """End to end in a separate process, peak memory included; one of two images cannot be read."""
    image, out = write_image(tmp_path / "own.png", 200, 100), tmp_path / "out"
    images = ["--image", str(tmp_path / "missing.jpg"), "--image", str(image)]
    command = [sys.executable, str(PROGRAMS / "demo.py"), "--steps", "3", "--out", str(out), *images]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "missing.jpg is skipped" in result.stderr and "training" in result.stderr
    assert result.stdout.index(f"wrote a first {out / 'report.png'}") < result.stdout.index("report.json after")
    report = json.loads((out / "report.json").read_text())
    assert report["photographs"] == ["own.png"] and report["steps"] == 3
    assert len(report["losses_fused"]) == len(report["losses_eager"]) == 3
    assert report["losses_fused"] == pytest.approx(report["losses_eager"], rel=1e-4)
    assert report["speedup"] == pytest.approx(report["step_ms_eager"] / report["step_ms_fused"])
    assert report["peak_mb_eager"] > report["peak_mb_fused"] > 0
    assert 0 < report["max_gradient_error"] <= demo.GRADIENT_ERROR
    assert report["machine"]["threads"] >= 1 and report["machine"]["kept_heap"]
    with Image.open(out / "report.png") as picture:
        assert picture.width > 1000 and picture.height > 600


QUICK = dataclasses.replace(contenders.FULL, sample_steps=2)


@pytest.fixture
def quick(monkeypatch):
    """Two steps per sample, without memory and picture, which the test above measures and draws."""
    monkeypatch.setattr(demo, "FULL", QUICK)
    monkeypatch.setattr(demo, "measure", lambda *_: 1.0)
    monkeypatch.setattr(demo, "write_picture", lambda *_: None)


@pytest.mark.parametrize("broken", ["GRADIENT_ERROR", "LOSS_DIFFERENCE"])
def test_broken_promise_fails_the_demo(tmp_path, monkeypatch, quick, broken, capsys):
    monkeypatch.setattr(demo, broken, -1.0)
    assert demo.main(["--steps", "2", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().out.count("BROKEN") == 1


def test_too_low_psnr_fails_the_demo(tmp_path, monkeypatch, quick):
    monkeypatch.setattr(demo, "SHORT", dataclasses.replace(QUICK.shortened(2), required_psnr=25.0))
    assert demo.main(["--short", "--out", str(tmp_path)]) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert not report["promises"]["psnr"]["kept"] and report["psnr"] < 25


def test_no_readable_image(tmp_path, capsys):
    assert demo.main(["--image", str(tmp_path / "missing.png"), "--out", str(tmp_path / "out")]) == 2
    assert "no readable image" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_no_folder_takes_one_line(tmp_path, capsys):
    file = write_image(tmp_path / "image.png", 64, 64)
    assert demo.main(["--image", str(file), "--out", str(file)]) == 2
    assert capsys.readouterr().err == f"error: [Errno 17] File exists: '{file}'\n"


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--steps", "many"], ["--seed", "x"], ["--unknown"]])
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        demo.main(arguments)
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_training_from_the_first_step():
    recipe = dataclasses.replace(contenders.SHORT, steps=2, psnr_every=1)
    _, photographs = load_photographs(shipped_photographs(), recipe.image_size)
    contender = contenders.Contender(recipe, photographs, 0, eager=False)
    curve, samples = contenders.train(contender, 0)
    assert [step for step, _ in curve] == [0, 1, 2] and len(contender.losses) == 2
    assert samples.shape == photographs.shape and samples.isfinite().all()


@pytest.mark.long
@pytest.mark.parametrize("recipe", [contenders.SHORT, contenders.FULL], ids=["short", "full"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_recipe_reaches_its_psnr(recipe, seed):
    _, photographs = load_photographs(shipped_photographs(), recipe.image_size)
    contender = contenders.Contender(recipe, photographs, seed, eager=False)
    _, samples = contenders.train(contender, seed)
    assert min(contenders.psnr(samples, photographs)) >= recipe.required_psnr
