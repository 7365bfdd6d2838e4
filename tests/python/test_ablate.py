"""The studies: crops, learned weights, resumed runs, and every study in its smallest form."""

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ablate
from deco_kernels import flow, model
from deco_kernels.backends.reference.flow_matching_loss import block_dct_ycbcr
from deco_kernels.training.images import to_signed
from studies import catalog
from studies import report as study_report
from studies import run as study_run
from studies.crops import Images, at_own_shape, at_square, cut, native_shapes
from studies.learned_weight import LearnedWeightObjective

PROGRAMS = Path(__file__).resolve().parents[2] / "python"
COMMITTED = PROGRAMS.parent / "benchmarks" / "results" / "ablations"

SMALLEST = ["--preset", "deco-tiny", "--image-size", "48", "--batch-size", "2", "--steps", "2", "--seeds", "1"]


# --- crops -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def half_and_half():
    """A photograph, black where training crops come from and white where held-out ones do."""
    pixels = np.zeros((200, 400, 3), dtype=np.uint8)
    pixels[:, 300:] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize(("held_out", "value"), [(False, 0), (True, 255)])
def test_held_out_crops_share_no_pixel_with_training_crops(half_and_half, held_out, value):
    shapes = native_shapes(48, 16)
    assert len(shapes) > 2
    crops = cut([half_and_half, half_and_half], shapes, 20, seed=3, held_out=held_out)
    groups = at_own_shape(crops)
    assert sorted(groups) == sorted(shapes) and sum(len(images.labels) for images in groups.values()) == 40
    for shape, images in groups.items():
        assert images.pixels.shape[2:] == shape and set(images.labels.tolist()) == {0, 1}
        assert (images.pixels == value).all()
    square = at_square(crops, 48)[48, 48]
    assert square.pixels.shape == (40, 3, 48, 48)


def test_crops_follow_the_seed(half_and_half):
    noisy = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 400, 3), dtype=np.uint8))
    first, again, other = (
        at_square(cut([noisy], [(48, 48)], 3, seed, held_out=False), 48)[48, 48].pixels for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


# --- learned frequency weights ---------------------------------------------------------------------------------------


def losses_at_fixed_error(objective, error):
    """Losses of the objective for a model whose velocity is off by `error` [1, 3, 8, 8]."""
    x, noise = torch.zeros_like(error), torch.ones_like(error)
    return objective.losses(lambda x_t, t, y: (x - noise) + error, x, torch.zeros(1), torch.full((1,), 0.5), noise)


@pytest.fixture(scope="module")
def fixed_error():
    return torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rule", ["loss", "likelihood"])
def test_learned_weights_stay_positive_with_mean_one_in_each_plane(rule, fixed_error):
    objective = LearnedWeightObjective(rule)
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        losses_at_fixed_error(objective, fixed_error)["total"].backward()
        optimizer.step()
    weight = objective.weight().detach()
    assert weight.min() > 0 and weight.std() > 0.1
    torch.testing.assert_close(weight.mean((1, 2)), torch.ones(3))


def test_likelihood_weights_become_the_inverse_error(fixed_error):
    """At the constrained minimum 1/weight - error is one constant per plane."""
    objective = LearnedWeightObjective("likelihood")
    optimizer = torch.optim.LBFGS(objective.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        total = losses_at_fixed_error(objective, fixed_error)["total"]
        total.backward()
        return total

    optimizer.step(closure)
    energy = block_dct_ycbcr(fixed_error)[0, :, 0, 0].square()
    constant = (1 / objective.weight().detach() - energy).flatten(1)
    assert (constant.std(1) < 1e-2 * energy.flatten(1).std(1)).all()


def test_weights_that_descend_on_the_loss_leave_the_largest_error(fixed_error):
    objective = LearnedWeightObjective("loss")
    losses_at_fixed_error(objective, fixed_error)["total"].backward()
    energy = block_dct_ycbcr(fixed_error)[0, :, 0, 0].square().flatten(1)
    steepest = objective.logits.grad.flatten(1).argmax(1)
    assert torch.equal(steepest, energy.argmax(1))


def test_unknown_rule():
    with pytest.raises(ValueError, match="rule: expected one of"):
        LearnedWeightObjective("other")


# --- one run ---------------------------------------------------------------------------------------------------------


def test_velocity_errors_are_means_over_all_images():
    pixels = torch.randint(0, 256, (3, 3, 32, 48), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    groups = {(32, 48): Images(pixels, torch.tensor([0, 1, 1]))}
    seen = []

    def network(x_t, t, y):
        seen.append((x_t, t))
        return x_t

    errors = study_run.velocity_errors(network, groups)
    x_t, t = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert sorted(t.tolist()) == pytest.approx([1 / 6, 3 / 6, 5 / 6])
    x = to_signed(pixels)
    noise = (x_t - t[:, None, None, None] * x) / (1 - t)[:, None, None, None]
    error = x_t - (x - noise)
    assert errors["pixel"] == pytest.approx(error.square().mean().item(), rel=1e-4)
    luminance = torch.einsum("c,bchw->bhw", torch.tensor([0.299, 0.587, 0.114]), error).square().mean().item()
    assert (10 * errors["low"] + 54 * errors["high"]) / 64 == pytest.approx(luminance, rel=1e-4)


def tiny_run(folder, variant, **recipe):
    recipe = study_run.Recipe(**{"steps": 6, "batch_size": 2, "image_size": 32, "preset": "deco-tiny"} | recipe)
    pixels = torch.randint(0, 256, (5, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    training = {(32, 32): Images(pixels, torch.arange(5) % 2)}
    folder.mkdir(exist_ok=True)
    return study_run.Run(variant, recipe, 0, training, 2, folder)


@pytest.mark.parametrize("learned", [None, "likelihood"])
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(learned, tmp_path):
    variant = study_run.Variant("plain", learned=learned)
    straight = tiny_run(tmp_path / "straight", variant)
    straight.train(lambda count: None)

    def interrupt(count):
        if len(broken.losses) == 5:
            raise KeyboardInterrupt

    broken = tiny_run(tmp_path / "broken", variant, save_every=2)
    with pytest.raises(KeyboardInterrupt):
        broken.train(interrupt)
    told = []
    resumed = tiny_run(tmp_path / "broken", variant, save_every=2)
    resumed.train(told.append)
    assert told == [4, 1, 1] and resumed.losses == straight.losses
    for name, average in straight.average.averages.items():
        assert torch.equal(resumed.average.averages[name], average)
    weights = [each.objective.frequency_weight.detach() for each in (resumed, straight)]
    assert torch.equal(*weights)


def test_variants_of_a_seed_see_the_same_noise_and_images(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(flow.Objective, "losses", lambda self, m, x, y, t, noise: seen.append((x, y, t, noise)) or {
        "total": sum(p.sum() for p in m.parameters()), "pixel": torch.zeros(())})  # fmt: skip
    for name, options in (("adaln", {}), ("add", {"interaction": "add"})):
        tiny_run(tmp_path / name, study_run.Variant(name, options), steps=2).train(lambda count: None)
    assert len(seen) == 4
    for one, other in zip(seen[:2], seen[2:], strict=True):
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))
    assert not torch.equal(seen[0][3], seen[1][3])


# --- the program -----------------------------------------------------------------------------------------------------


def test_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        ablate.main(["--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert all(name in said for name in catalog.STUDIES) and "--resume" in said


def test_names_of_the_studies():
    assert ablate.STUDY_NAMES == (*catalog.STUDIES, ablate.REUSE)


@pytest.mark.parametrize("name", catalog.STUDIES)
def test_smallest_run_of_every_study(name, tmp_path, monkeypatch, capsys):
    """Only the smallest decoder of the capacity study, because measuring the cost of each takes seconds."""
    monkeypatch.setattr(ablate, "CROPS", 12)
    monkeypatch.setattr(ablate, "HELD_OUT_CROPS", 10)
    study = catalog.STUDIES[name]
    if name == "capacity":
        study = dataclasses.replace(study, variants=study.variants[:1])
        monkeypatch.setitem(catalog.STUDIES, name, study)
    out = tmp_path / "out"
    assert ablate.main([name, *SMALLEST, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "Shows: " in said and "Cannot show: " in said
    assert (out / "table.md").read_text() in said
    with open(out / "table.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["variant"] for line in lines] == [variant.name for variant in study.variants]
    assert all(0 < float(line["pixel, squares"]) < 3 for line in lines)
    if name == "capacity":
        # Work per pixel is that of the committed study, whose images are larger.
        with open(COMMITTED / "capacity.csv", newline="") as file:
            committed = next(line for line in csv.DictReader(file) if line["variant"] == study.variants[0].name)
        assert float(lines[0]["kFLOP per pixel"]) == pytest.approx(float(committed["kFLOP per pixel"]), rel=1e-3)
        assert float(lines[0]["decoder, ms"]) > 0
    if name == "aspect":
        assert all(float(line["pixel, rectangles"]) > 0 for line in lines)
    assert (out / "weights.json").exists() == (name == "frequency")
    if name == "frequency":
        weights = json.loads((out / "weights.json").read_text())
        assert sorted(weights) == ["learned by likelihood", "learned by loss"]
        np.testing.assert_allclose(np.mean(list(weights.values()), axis=(2, 3)), 1, rtol=1e-5)
    with Image.open(out / "study.png") as picture:
        assert picture.width > 800
    folder = out / "runs" / f"{study.variants[0].name.replace(' ', '-')}-seed0"
    assert isinstance(model.load_model(folder / "model.safetensors"), model.DeCo)
    assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors", "result.json"]


KILLED_AFTER_ITS_FIRST_SAVE = """
import os, signal
import ablate
from studies import run
write = run.write_atomically
def write_and_die(*arguments, **options):
    write(*arguments, **options)
    os.kill(os.getpid(), signal.SIGKILL)
run.write_atomically = write_and_die
ablate.main()
"""


def test_a_killed_study_resumes_and_grows(tmp_path, monkeypatch, capsys):
    """Killed by SIGKILL after a saved state, resumed, then continued with another seed; nothing runs twice."""
    out = tmp_path / "out"
    arguments = ["interaction", *SMALLEST, "--image-size", "32", "--steps", "120", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", KILLED_AFTER_ITS_FIRST_SAVE, *arguments]
    killed = subprocess.run(command, cwd=PROGRAMS, env=environment, capture_output=True, text=True, timeout=600)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    saved = torch.load(out / "runs" / "adaln-seed0" / "state.pt", weights_only=True)["losses"]
    assert len(saved) == 100 and not (out / "table.md").exists()

    assert ablate.main(arguments) == 2
    assert "--resume" in capsys.readouterr().err
    assert ablate.main([*arguments, "--resume"]) == 0
    result = json.loads((out / "runs" / "adaln-seed0" / "result.json").read_text())
    assert result["pixel_losses"][:100] == saved and len(result["pixel_losses"]) == 120

    monkeypatch.setattr(study_run.Run, "train", lambda *_: pytest.fail("a finished run was started again"))
    assert ablate.main([*arguments, "--resume"]) == 0
    assert ablate.main([*arguments, "--resume", "--steps", "121"]) == 2
    assert "steps 120 -> 121" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image-size", "40"], "multiple of the patch size 16"),
        (["--image", "missing.jpg"], "missing.jpg"),
        (["--preset", "unknown"], "unknown"),
        (["--checkpoint", "a.ckpt"], "--checkpoint: not an option of interaction; leave it out"),
        (["--out", "{foreign}"], "not empty"),
        (["--out", "{foreign}", "--resume"], "holds no study"),
    ],
)
def test_bad_input_is_named(arguments, message, tmp_path, capsys):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    arguments = [argument.format(foreign=foreign) for argument in arguments]
    options = ["interaction", *SMALLEST, "--out", str(tmp_path / "out"), *arguments]
    assert ablate.main(options) == 2
    said = capsys.readouterr().err
    assert "error: " in said and message in said
    assert [path.name for path in foreign.iterdir()] == ["notes.txt"] and not (tmp_path / "out").exists()


def test_a_folder_belongs_to_one_process(tmp_path):
    with ablate.alone_in(tmp_path / "out"):
        with pytest.raises(ValueError, match="another process works in"), ablate.alone_in(tmp_path / "out"):
            pass
    with ablate.alone_in(tmp_path / "out"):
        pass
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="--out: expected a folder"), ablate.alone_in(tmp_path / "file"):
        pass


def test_tables_never_leave_out_seeds_that_the_folder_holds(tmp_path):
    assert ablate.number_of_seeds(None, 3, tmp_path) == 3 and ablate.number_of_seeds(1, 3, tmp_path) == 1
    for folder in ("adaln-seed4", "add-seed0", "notes"):
        (tmp_path / "runs" / folder).mkdir(parents=True)
        (tmp_path / "runs" / folder / "result.json").write_text("{}")
    assert ablate.number_of_seeds(None, 3, tmp_path) == 5 and ablate.number_of_seeds(7, 3, tmp_path) == 7
    with pytest.raises(ValueError, match="--seeds: .* holds runs of 5 seeds, expected at least as many, got 2"):
        ablate.number_of_seeds(2, 3, tmp_path)


def test_files_that_other_programs_damaged_are_named(tmp_path):
    for content in ("", "{", "[]", "\x00"):
        (tmp_path / "settings.json").write_text(content)
        with pytest.raises(ValueError, match="settings.json is damaged; choose another folder"):
            ablate.claim(tmp_path, {"study": "interaction"}, resume=True)
    variant = study_run.Variant("plain")
    tiny_run(tmp_path / "run", variant, steps=2, save_every=2).train(lambda count: None)
    state = tmp_path / "run" / "state.pt"
    state.write_bytes(state.read_bytes()[:2000])
    with pytest.raises(ValueError, match="state.pt is damaged .* remove it to restart the run"):
        tiny_run(tmp_path / "run", variant).train(lambda count: None)


def test_a_claimed_folder_is_cleared_of_what_was_half_written(tmp_path):
    """A kill while settings.json, the first file, is written leaves a folder that counts as empty."""
    (tmp_path / ".settings.json.1.part").write_text("{")
    ablate.claim(tmp_path, {"study": "interaction"}, resume=False)
    (tmp_path / "runs" / "adaln-seed0").mkdir(parents=True)
    (tmp_path / "runs" / "adaln-seed0" / ".state.pt.1.part").write_text("half")
    ablate.claim(tmp_path, {"study": "interaction"}, resume=True)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["settings.json"]


def test_a_report_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    def fail(results, costs, path):
        path.write_text("half")
        raise OSError("no space left")

    (tmp_path / "table.csv").write_text("before")
    monkeypatch.setattr(study_report, "write_csv", fail)
    monkeypatch.setattr(study_report, "summary", lambda *_: "text")
    with pytest.raises(OSError, match="no space left"):
        study_report.write_report(catalog.STUDIES["interaction"], None, [], {}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]
    assert (tmp_path / "table.csv").read_text() == "before"


def test_too_small_a_photograph_is_named(tmp_path, capsys):
    Image.new("RGB", (100, 100)).save(tmp_path / "small.png")
    options = ["aspect", *SMALLEST, "--out", str(tmp_path / "out"), "--image", str(tmp_path / "small.png")]
    assert ablate.main(options) == 2
    assert "100x100 pixels are too few" in capsys.readouterr().err
