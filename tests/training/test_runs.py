"""Whole runs: damaged images, alignment with rectangles in bfloat16, captions, samples, programs and their errors."""

import subprocess
import sys

import pytest
import torch
from PIL import Image

from deco_kernels import model
from tests.tiny_dinov2 import save_tiny_dinov2
from tests.tiny_qwen3 import HIDDEN, save_tiny_qwen3
from tests.training.conftest import ROOT, log, losses, metrics, write_images


def test_a_thousand_images_with_corrupt_ones(trainer, tmp_path):
    folder = write_images(tmp_path / "images" / "ant", 1000, size=(36, 32))
    corrupt = sorted(folder.iterdir())[::20]
    for path in corrupt:
        path.write_bytes(path.read_bytes()[:100])
    out = tmp_path / "run"
    arguments = [f"data.path={tmp_path / 'images'}", "image_size=16", "batch_size=50", "log_every=5"]
    arguments += ["data.min_side=16"]
    assert trainer.run(out, *arguments, "steps=20") == 0, log(out)
    named = [line.split(": ")[0].removeprefix("skipped ") for line in log(out).splitlines() if "skipped" in line]
    assert sorted(named) == [str(path) for path in corrupt]
    assert list(losses(out)) == [5, 10, 15, 20]
    # A second pass over the images, in a resumed run, reports none of them again.
    assert trainer.run(out, *arguments, "steps=30", resume=True) == 0, log(out)
    assert sum("skipped" in line for line in log(out).splitlines()) == len(corrupt)


def test_alignment_and_rectangles_in_bfloat16(trainer, tmp_path):
    teacher = save_tiny_dinov2(tmp_path / "teacher")
    write_images(tmp_path / "images" / "wide", 12, size=(64, 32))
    write_images(tmp_path / "images" / "tall", 12, size=(32, 64))
    (tmp_path / "images" / "tall" / "broken.jpg").write_bytes(b"")
    out = tmp_path / "run"
    arguments = [f"data.path={tmp_path / 'images'}", "data.buckets=true", "repa.weight=0.5", "repa.block=1"]
    arguments += [f"repa.teacher={teacher}", "precision=bf16-mixed", "optimizer.clip_norm=1", "steps=12"]
    assert trainer.run(out, *arguments, "sample.every=12", "sample.guidance=2") == 0, log(out)
    found = metrics(out)
    assert found[-1]["total"] < found[0]["total"] and found[-1]["repa"] < found[0]["repa"]
    assert all(abs(each["pixel"] + each["frequency"] + 0.5 * each["repa"] - each["total"]) < 1e-4 for each in found)
    assert "broken.jpg" in log(out)
    with Image.open(out / "samples" / "step_000000012.png") as grid:
        assert grid.size == (64, 64)
    content = torch.load(out / "checkpoints" / "step_000000012.ckpt", weights_only=True)
    head = {name for name in content["state_dict"] if name.startswith("diffusion_trainer.proj.0.")}
    assert head == {f"diffusion_trainer.proj.0.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
    averaged, raw = (
        model.load_model(out / "checkpoints" / "step_000000012.ckpt", weights=weights) for weights in ("ema", "raw")
    )
    assert type(averaged) is model.DeCo and averaged.trunk.num_classes == 2
    assert any(not torch.equal(a, b) for a, b in zip(averaged.parameters(), raw.parameters(), strict=True))
    (out / "checkpoints" / "step_000000012.ckpt").rename(tmp_path / "weights.ckpt")
    start = [f"init_from={tmp_path / 'weights.ckpt'}", "data.buckets=false"]
    assert trainer.run(tmp_path / "next", *arguments, *start, "steps=1") == 0, log(tmp_path / "next")
    assert losses(tmp_path / "next")[1] < losses(out)[1]


def test_captions(trainer, tmp_path):
    encoder = save_tiny_qwen3(tmp_path / "encoder")
    write_images(tmp_path / "images", 8)
    rows = [f"{i:05d}.jpg,{caption}" for i, caption in enumerate(["a red cat", "the blue sea", "", "a mat"] * 2)]
    (tmp_path / "images" / "table.csv").write_text("\n".join(["image,caption", *rows]))
    out = tmp_path / "run"
    config = tmp_path / "captions.yaml"
    config.write_text(f"""
model: {{name: deco-text-tiny, options: {{text_width: {HIDDEN}}}}}
data: {{kind: table, path: {tmp_path / "images" / "table.csv"}, cache_dir: {tmp_path / "cache"}}}
text: {{encoder: {encoder}}}
objective: {{label_dropout: 0.5}}
repa: {{weight: 0}}
sample: {{solver: adams2, steps: 3, guidance: 2.0, count: 2}}
precision: 32-true
accelerator: cpu
""")
    assert trainer.run(out, "sample.every=10", config=config) == 0, log(out)
    assert losses(out)[10] < losses(out)[1]
    assert [line for line in log(out).splitlines() if "no caption" in line and "skipped" in line] == [
        f"skipped row {row} of {tmp_path / 'images' / 'table.csv'}: no caption" for row in (2, 6)
    ]
    content = torch.load(out / "checkpoints" / "step_000000010.ckpt", weights_only=True)
    assert type(model.from_published(content)) is model.DeCoTextToImage


def test_backend_reference_gives_the_same_run(trainer, class_folders, tmp_path):
    found = []
    for name in ("reference", "cpu"):
        assert trainer.run(tmp_path / name, f"data.path={class_folders}", "--backend", name) == 0, log(tmp_path / name)
        found.append(losses(tmp_path / name))
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert found[0] != found[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["batch_size=9", "accumulate=2"], "batch_size: expected a multiple"),
        (["image_size=40"], "image_size: expected a multiple of the patch size 16"),
        (["data.path=/nowhere"], "data.path: expected a folder"),
        (["model.name=deco-huge"], "name: expected one of"),
        (["model.options.depht=1"], "unknown options ['depht']"),
        (["repa.weight=0.5"], "repa.block: expected a block from 1 to 2, got 8"),
        (
            ["repa.weight=0.5", "repa.block=1", "repa.teacher=/nowhere"],
            "repa.teacher: expected a folder",
        ),
        (["init_from=/nowhere.ckpt"], "init_from: expected a checkpoint file at /nowhere.ckpt, found nothing"),
        (["accelerator=mps"], "accelerator, devices, precision: mps, 1, 32-true cannot be used: `MPSAcc"),
        (["sample.every=10", "sample.solver=rk4"], "error: sample.solver: expected one of"),
        (["sample.every=10", "sample.labels=[1,2]"], "sample.labels: expected classes of the model, from 0"),
        (["optimizer.lr=1e30", "steps=3"], "the loss of step"),
        (["data.min_side=1000"], "error: data.path: 100 consecutive images cannot be used, such as "),
        (["--backend", "abacus"], "abacus"),
        (["--resume", "/nowhere.ckpt"], "--resume: expected a checkpoint file at /nowhere.ckpt, found nothing"),
    ],
)
def test_errors_say_what_to_do(arguments, said, trainer, class_folders, tmp_path):
    out = tmp_path / "run"
    assert trainer.run(out, f"data.path={class_folders}", *arguments) == 2, log(out)
    assert "error: " in log(out) and said in log(out) and "Traceback" not in log(out)


def test_output_that_is_no_terminal_gets_lines(trainer, class_folders, tmp_path):
    """One line at the start, one per line of metrics.jsonl, one at the end; the same after resuming."""
    out = tmp_path / "run"
    assert trainer.run(out, f"data.path={class_folders}", "log_every=4", "save_every=6", "steps=6") == 0, log(out)
    start, *steps, end = log(out).splitlines()
    data = f"23 images of {class_folders} at 32 pixels"
    told = f"training deco-tiny on cpu with {data}, steps 1 to 6 of 8 images, into {out}"
    assert start == told and end == f"finished 6 steps; the model is in {out / 'checkpoints'}"
    for line, recorded in zip(steps, metrics(out), strict=True):
        assert line.startswith(f"step {recorded['step']} of 6: loss {recorded['total']:.4f}, ")
    assert [recorded["step"] for recorded in metrics(out)] == [4, 6]
    assert trainer.run(out, f"data.path={class_folders}", "log_every=4", "steps=9", resume=True) == 0, log(out)
    assert f"at 32 pixels, steps 7 to 9 of 8 images, into {out}\nstep 8 of 9: loss" in log(out)


@pytest.mark.parametrize(
    ("arguments", "said", "not_imported"),
    [
        (["nothing.yaml"], "expected a YAML file, found nothing at nothing.yaml", "torch"),
        (["small.yaml", "data.path=/nowhere", "optimizer.lr=nan"], "optimizer.lr: expected a finite number", "torch"),
        (["small.yaml", "data.path=/nowhere"], "data.path: expected a folder", "torch"),
    ],
)
def test_mistakes_are_said_before_what_takes_seconds_is_imported(arguments, said, not_imported):
    program = [sys.executable, "-X", "importtime", str(ROOT / "python" / "train.py")]
    found = subprocess.run([*program, *arguments], cwd=ROOT / "python" / "configs", capture_output=True, text=True)
    timed, others = [], []
    for line in found.stderr.splitlines():
        (timed if line.startswith("import time:") else others).append(line)
    assert found.returncode == 2 and len(others) == 1 and others[0].startswith("error: ") and said in others[0]
    imported = {line.split("|")[-1].strip() for line in timed}
    assert "omegaconf" in imported and not_imported not in imported
