"""sample.py: reproducibility under sharding, batches, interruption and out of memory; conditions; bad input."""

import functools
import json
import math
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from deco_kernels import flow, model
from deco_kernels.training.images import to_pixels
from sampling import folder, inputs
from tests.random_models import random_model
from tests.tiny_qwen3 import save_tiny_qwen3

PROGRAMS = Path(__file__).resolve().parents[2] / "python"
SHORT = ["--size", "32", "--steps", "3"]

# Bits depend on the number of threads; use the same number as in other processes.
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def class_checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sample") / "tiny.ckpt"
    model.save_model(random_model(), path, names="published")
    return path


def draw(checkpoint: Path, out: Path, *options: str) -> int:
    return sample.main([str(checkpoint), "--out", str(out), *SHORT, *options])


def start(program: list[str], checkpoint: Path, out: Path, *options: str, **environment: str) -> subprocess.Popen:
    """Starts sample.py in a separate process."""
    command = [sys.executable, *program, str(checkpoint), "--out", str(out), *SHORT, *options, "--threads", "1"]
    return subprocess.Popen(command, env={**os.environ, **environment}, cwd=PROGRAMS, stderr=subprocess.PIPE, text=True)


def files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def pixels(out: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted((out / "images").glob("[0-9]*.png"))])


def read_as_the_adm_suite(path: Path) -> np.ndarray:
    """Reads the member arr_0.npy by header and rows, without numpy.load."""
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        assert np.lib.format.read_magic(file) == (1, 0)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        assert not fortran and dtype == np.uint8
        rows = [np.frombuffer(file.read(int(np.prod(shape[1:]))), dtype).reshape(shape[1:]) for _ in range(shape[0])]
        assert file.read() == b""
    return np.stack(rows)


def test_everything_is_made_and_a_second_run_changes_nothing(class_checkpoint, tmp_path, capsys):
    options = ["--count", "5", "--batch", "2", "--npz", "--animate", "3", "--classes", "3,7-8", "--guidance", "2"]
    assert draw(class_checkpoint, tmp_path / "out", *options) == 0
    made = files(tmp_path / "out")
    singles = [f"images/00000{i}.png" for i in range(5)] + [f"animations/00000{i}.gif" for i in range(3)]
    assert sorted(made) == sorted([*singles, "run.json", "grid_5.png", "samples_5x32x32x3.npz"])
    stored = read_as_the_adm_suite(tmp_path / "out" / "samples_5x32x32x3.npz")
    assert np.array_equal(stored, pixels(tmp_path / "out"))
    assert np.array_equal(stored, np.load(tmp_path / "out" / "samples_5x32x32x3.npz")["arr_0"])
    with Image.open(tmp_path / "out" / "grid_5.png") as grid:
        assert np.array_equal(np.asarray(grid)[32:, :32], stored[3]) and grid.size == (96, 64)
    with Image.open(tmp_path / "out" / "animations" / "000002.gif") as animation:
        assert animation.n_frames == 4
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert draw(class_checkpoint, tmp_path / "out", *options) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == times
    assert "5 images" in capsys.readouterr().out


def test_images_are_those_of_the_sampler(class_checkpoint, tmp_path):
    """Image i has class i % 3 of the list, noise from (seed, i), and guidance in the interval."""
    options = ["--count", "4", "--batch", "4", "--classes", "1,5,9", "--seed", "8", "--animate", "4"]
    assert draw(class_checkpoint, tmp_path, *options, "--animation", "png", "--dtype", "float32") == 0
    network = model.load_model(class_checkpoint)
    noise = torch.stack([inputs.noise_of(i, 8, (32, 32)) for i in range(4)])
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05 and not torch.equal(noise[0], noise[1])
    y = torch.tensor([1, 5, 9, 1])
    settings = dict(steps=3, guidance=3.2, guidance_interval=(0.1, 1.0))
    expected = flow.sample(network, noise, y, torch.full_like(y, 10), **settings)
    expected = ((expected.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(pixels(tmp_path), expected)
    with Image.open(tmp_path / "animations" / "000001.png") as animation:
        animation.seek(3)
        assert np.array_equal(np.asarray(animation.convert("RGB")), expected[1])


@pytest.mark.parametrize("given", ["2", "0, 1", "file"])
def test_trunk_steps(class_checkpoint, tmp_path, given):
    flow.write_trunk_steps(tmp_path / "file.json", [0, 1], steps=3)
    value = str(tmp_path / "file.json") if given == "file" else given
    options = ["--count", "1", "--classes", "4", "--animate", "1", "--trunk-steps", value]
    assert draw(class_checkpoint, tmp_path / "out", *options) == 0
    network, noise = model.load_model(class_checkpoint), inputs.noise_of(0, 0, (32, 32))[None]
    sampler = flow.Sampler(network, steps=3, guidance=3.2, guidance_interval=(0.1, 1.0), trunk_steps=2)
    expected = sampler(noise, torch.tensor([4]), torch.tensor([10]))
    assert np.array_equal(pixels(tmp_path / "out"), to_pixels(expected))
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["trunk_steps"] == [0, 1] and run["calibrate_trunk_steps"] is None


def test_calibrated_trunk_steps(class_checkpoint, tmp_path, monkeypatch, capsys):
    """They are those of flow.choose_trunk_steps; a continued run keeps them; other settings are refused at once."""
    calibrated = ["--calibrate-trunk-steps", "2", "--count", "1", "--classes", "1-5"]
    assert draw(class_checkpoint, tmp_path / "out", *calibrated) == 0
    network = model.load_model(class_checkpoint)
    noise = torch.stack([inputs.noise_of(index, 0, (32, 32)) for index in range(8)])
    cond = torch.tensor([1, 1, 2, 2, 3, 4, 4, 5])
    settings = dict(steps=3, guidance=3.2, guidance_interval=(0.1, 1.0))
    expected = flow.choose_trunk_steps(network, noise, cond, torch.full_like(cond, 10), trunk_steps=2, **settings)
    path = tmp_path / "out" / "trunk_steps.json"
    assert json.loads((tmp_path / "out" / "run.json").read_text())["trunk_steps"] == expected
    assert flow.read_trunk_steps(path, steps=3) == expected
    assert json.loads(path.read_text())["guidance"] == 3.2

    monkeypatch.setattr(flow, "choose_trunk_steps", lambda *_, **__: pytest.fail("calibrated again"))
    path.unlink()
    assert draw(class_checkpoint, tmp_path / "out", *calibrated, "--count", "2") == 0
    assert draw(class_checkpoint, tmp_path / "named", *calibrated[2:], "--count", "2", "--trunk-steps", str(path)) == 0
    assert np.array_equal(pixels(tmp_path / "out"), pixels(tmp_path / "named"))
    capsys.readouterr()
    for out, options, said in (
        ("out", ["--calibrate-trunk-steps", "1"], "holds samples with calibrate_trunk_steps 2, not 1"),
        ("out", [*calibrated, "--steps", "2"], "holds samples with steps 3, not 2"),
        ("named", calibrated, "holds samples with calibrate_trunk_steps None, not 2"),
    ):
        assert draw(class_checkpoint, tmp_path / out, "--classes", "1-5", *options) == 2
        assert said in capsys.readouterr().err


def test_sharded_equals_unsharded(class_checkpoint, tmp_path, capsys):
    """Five groups of two in three shards: by option in this process, by RANK and WORLD_SIZE in another one."""
    options = ["--count", "9", "--batch", "2", "--npz", "--animate", "4"]
    third = start(["sample.py"], class_checkpoint, tmp_path / "sharded", *options, RANK="2", WORLD_SIZE="3")
    assert draw(class_checkpoint, tmp_path / "sharded", *options, "--shard", "1/3") == 0
    assert "are left to other shards" in capsys.readouterr().out
    assert third.wait(timeout=600) == 0, third.stderr.read()
    assert not list((tmp_path / "sharded").glob("*.npz"))
    assert draw(class_checkpoint, tmp_path / "sharded", *options, "--shard", "0/3") == 0
    assert draw(class_checkpoint, tmp_path / "whole", *options) == 0
    assert files(tmp_path / "sharded") == files(tmp_path / "whole")


KILLED_IN_ITS_FIFTH_IMAGE = """
import os, signal, sys
from PIL import Image
import sample
save, saved = Image.Image.save, []
def save_or_die(image, path, **options):
    saved.append(path)
    if len(saved) == 5:
        path.write_bytes(b"cut short")
        os.kill(os.getpid(), signal.SIGKILL)
    save(image, path, **options)
Image.Image.save = save_or_die
sample.main()
"""


def test_killed_run_continues(class_checkpoint, tmp_path):
    """Killed while writing the second image of a group of three: resampling the group keeps existing images."""
    options = ["--count", "7", "--batch", "3"]
    killed = start(["-c", KILLED_IN_ITS_FIFTH_IMAGE], class_checkpoint, tmp_path / "killed", *options)
    assert killed.wait(timeout=600) == -signal.SIGKILL, killed.stderr.read()
    done = sorted((tmp_path / "killed" / "images").glob("[0-9]*.png"))
    assert len(done) == 4
    before = {path: path.stat().st_mtime_ns for path in done}
    assert draw(class_checkpoint, tmp_path / "killed", *options) == 0
    assert all(path.stat().st_mtime_ns == before[path] for path in done)
    assert draw(class_checkpoint, tmp_path / "whole", *options) == 0
    assert pixels(tmp_path / "whole").shape[0] == 7
    assert np.array_equal(pixels(tmp_path / "killed"), pixels(tmp_path / "whole"))


def test_interrupt_says_how_to_continue(class_checkpoint, tmp_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(flow.Sampler, "__call__", interrupt)
    assert draw(class_checkpoint, tmp_path) == 130
    assert "the same command continues" in capsys.readouterr().err


@pytest.mark.parametrize("shortage", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_out_of_memory_halves_the_batch_once(class_checkpoint, tmp_path, monkeypatch, capsys, shortage):
    """Halved groups of 4 equal groups of 2, bit for bit."""
    assert draw(class_checkpoint, tmp_path / "two", "--count", "8", "--batch", "2") == 0
    small = flow.Sampler.__call__

    def limited(sampler, noise, *arguments, **options):
        if len(noise) > 2:
            raise shortage
        return small(sampler, noise, *arguments, **options)

    monkeypatch.setattr(flow.Sampler, "__call__", limited)
    assert draw(class_checkpoint, tmp_path / "four", "--count", "8", "--batch", "4") == 0
    assert capsys.readouterr().err.count("out of memory: 2 images at a time") == 1
    assert np.array_equal(pixels(tmp_path / "two"), pixels(tmp_path / "four"))


def test_one_image_too_large_is_an_error(class_checkpoint, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(flow.Sampler, "__call__", fail)
    assert draw(class_checkpoint, tmp_path, "--batch", "2") == 2
    assert "error: one image of (32, 32) does not fit into memory" in capsys.readouterr().err


def test_other_runtime_errors_are_not_hidden(class_checkpoint, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("device-side assert")

    monkeypatch.setattr(flow.Sampler, "__call__", fail)
    with pytest.raises(RuntimeError, match="device-side assert"):
        draw(class_checkpoint, tmp_path, "--batch", "2")


def test_other_batches_change_few_last_places(class_checkpoint, tmp_path):
    """Matmuls with another number of rows round differently; images of one seed look the same."""
    options = ["--size", "64", "--steps", "25", "--count", "4"]
    for batch in ("1", "4"):
        assert draw(class_checkpoint, tmp_path / batch, *options, "--batch", batch) == 0
    alone, together = pixels(tmp_path / "1").astype(int), pixels(tmp_path / "4").astype(int)
    assert np.abs(alone - together).max() <= 1
    assert np.mean(alone != together) < 1e-3


def test_averaged_weights_are_recorded_and_may_be_named(class_checkpoint, tmp_path):
    assert draw(class_checkpoint, tmp_path / "out", "--count", "1") == 0
    assert json.loads((tmp_path / "out" / "run.json").read_text())["weights"] == "ema"
    assert draw(class_checkpoint, tmp_path / "out", "--count", "2", "--weights", "ema") == 0


def test_default_batch_does_not_depend_on_the_count():
    for count in ("3", "100"):
        options = sample.parse(["a.ckpt", "--out", "out", "--count", count])
        assert sample.batch_of(options, torch.device("cuda")) == 16
        assert sample.batch_of(options, torch.device("cpu")) == 1


def test_processes_that_begin_together_share_a_new_folder(tmp_path, monkeypatch):
    """Another process opens the folder as soon as this one has created a subfolder."""
    settings, make_folder, made = {"size": (32, 32), "seed": 3}, Path.mkdir, []

    def make_folder_and_be_interrupted(path, *arguments, **options):
        make_folder(path, *arguments, **options)
        if path.name == "images" and not made:
            made.append(path)
            folder.SampleFolder(tmp_path / "out", settings, 4, 0, "gif")

    monkeypatch.setattr(Path, "mkdir", make_folder_and_be_interrupted)
    folder.SampleFolder(tmp_path / "out", settings, 4, 0, "gif")
    assert made and json.loads((tmp_path / "out" / "run.json").read_text()) == {"size": [32, 32], "seed": 3}


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut_short, "cannot be read"),
        (lambda path: path.write_text("no image"), "cannot be read"),
        (lambda path: Image.new("RGB", (64, 64)).save(path), "was not written by this program"),
        (lambda path: Image.new("L", (32, 32)).save(path), "was not written by this program"),
    ],
)
def test_images_that_other_programs_damaged_do_not_reach_the_archive(class_checkpoint, tmp_path, capsys, damage, said):
    assert draw(class_checkpoint, tmp_path / "out", "--count", "3") == 0
    assert draw(class_checkpoint, tmp_path / "whole", "--count", "3", "--npz") == 0
    damaged = tmp_path / "out" / "images" / "000001.png"
    damage(damaged)
    assert draw(class_checkpoint, tmp_path / "out", "--count", "3", "--npz") == 2
    message = capsys.readouterr().err
    assert f"error: --out: {damaged} {said}" in message and "remove it and run the command again" in message
    damaged.unlink()
    assert draw(class_checkpoint, tmp_path / "out", "--count", "3", "--npz") == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.parametrize("place", [{"RANK": "1"}, {"WORLD_SIZE": "4"}, {"RANK": "4", "WORLD_SIZE": "4"}])
def test_half_a_place_among_processes_is_refused(class_checkpoint, tmp_path, monkeypatch, capsys, place):
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    assert draw(class_checkpoint, tmp_path / "out") == 2
    assert "error: RANK and WORLD_SIZE: expected both" in capsys.readouterr().err
    assert draw(class_checkpoint, tmp_path / "out", "--count", "1", "--shard", "0/1") == 0


def test_samples_that_are_not_finite_are_refused(tmp_path, capsys):
    network = random_model()
    with torch.no_grad():
        network.decoder.head_bias[0] = math.nan
    model.save_model(network, tmp_path / "corrupted.safetensors")
    assert draw(tmp_path / "corrupted.safetensors", tmp_path / "out", "--count", "1") == 2
    assert "error: images 0 to 0: expected finite values" in capsys.readouterr().err
    assert not list((tmp_path / "out" / "images").iterdir())


def test_tables_as_other_programs_write_them(class_checkpoint, tmp_path):
    """Byte order mark, CRLF, quotes, empty rows, spaces, more fields than columns."""
    table = tmp_path / "labels.csv"
    table.write_bytes(b'\xef\xbb\xbf"name","label"\r\n"a, b","4"\r\n\r\n"c ""d""", 2 ,9\r\n')
    assert draw(class_checkpoint, tmp_path / "out", "--csv", str(table)) == 0
    assert json.loads((tmp_path / "out" / "run.json").read_text())["conditions"] == [4, 2]
    assert len(pixels(tmp_path / "out")) == 2


def test_text_encoders_and_prompts_are_looked_at_first(tmp_path, capsys):
    """A prompt that is too long creates no files; another encoder would give other images and is rejected."""
    model.save_model(random_model("deco-text-tiny"), tmp_path / "text.safetensors")
    for name in ("qwen", "other"):
        save_tiny_qwen3(tmp_path / name)
    encoder = ["--text-encoder", str(tmp_path / "qwen")]
    prompts = ["--prompt", "a cat", "--prompt", "a cat " * 50]
    assert draw(tmp_path / "text.safetensors", tmp_path / "out", *prompts, *encoder) == 2
    assert "expected at most 7 tokens" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert draw(tmp_path / "text.safetensors", tmp_path / "out", *prompts[:2], *encoder) == 0
    encoder = ["--text-encoder", str(tmp_path / "other")]
    assert draw(tmp_path / "text.safetensors", tmp_path / "out", *prompts[:2], *encoder) == 2
    assert "holds samples with text_encoder" in capsys.readouterr().err


def test_prompts_and_tables(class_checkpoint, tmp_path):
    save_tiny_qwen3(tmp_path / "qwen")
    model.save_model(random_model("deco-text-tiny"), tmp_path / "text.safetensors")
    (tmp_path / "prompts.csv").write_text('id,prompt\n1,a cat\n2,"the sea, blue"\n')
    encoder = ["--text-encoder", str(tmp_path / "qwen")]
    for name, options in (("table", ["--csv", str(tmp_path / "prompts.csv")]),
                          ("listed", ["--prompt", "a cat", "--prompt", "the sea, blue"])):  # fmt: skip
        assert draw(tmp_path / "text.safetensors", tmp_path / name, *options, *encoder) == 0
    images = pixels(tmp_path / "table")
    assert len(images) == 2 and np.array_equal(images, pixels(tmp_path / "listed"))
    assert json.loads((tmp_path / "table" / "run.json").read_text())["solver"] == "adams2"
    (tmp_path / "labels.csv").write_text("label\n4\n2\n")
    assert draw(class_checkpoint, tmp_path / "labels", "--csv", str(tmp_path / "labels.csv")) == 0
    assert draw(class_checkpoint, tmp_path / "classes", "--classes", "4,2") == 0
    assert np.array_equal(pixels(tmp_path / "labels"), pixels(tmp_path / "classes"))


@pytest.fixture(scope="module")
def text_model(tmp_path_factory) -> tuple[Path, list[str]]:
    """(checkpoint, options) of a random text-to-image model and its encoder."""
    path = tmp_path_factory.mktemp("text")
    model.save_model(random_model("deco-text-tiny"), path / "text.safetensors")
    return path / "text.safetensors", ["--text-encoder", str(save_tiny_qwen3(path / "qwen"))]


def test_geneval_folders(text_model, tmp_path, monkeypatch):
    """As evaluation/evaluate_images.py reads them, in UTF-8; sample j is that of the seed + j for the prompt alone."""
    checkpoint, encoder = text_model
    lines = ['{"tag": "größe", "prompt": "a red cat"}', '{"tag": "counting", "include": [1], "prompt": "two cats"}']
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    monkeypatch.setattr(Path, "write_text", functools.partialmethod(Path.write_text, encoding="ascii"))  # as a locale
    options = ["--layout", "geneval", "--prompts", str(tmp_path / "metadata.jsonl"), "--per-prompt", "3", *encoder]
    assert draw(checkpoint, tmp_path / "out", *options, "--seed", "5", "--batch", "1") == 0
    names = [f"0000{prompt}/samples/0000{sample}.png" for prompt in range(2) for sample in range(3)]
    metadata = [f"0000{prompt}/metadata.jsonl" for prompt in range(2)]
    assert sorted(files(tmp_path / "out")) == sorted([*names, *metadata, "run.json", "grid_6.png"])
    for path, line in zip(metadata, lines, strict=True):
        assert json.loads((tmp_path / "out" / path).read_text(encoding="utf-8")) == json.loads(line)
    assert draw(checkpoint, tmp_path / "alone", "--prompt", "two cats", "--seed", "7", *encoder) == 0
    alone = (tmp_path / "alone" / "images" / "000000.png").read_bytes()
    made = files(tmp_path / "out")
    assert made["00001/samples/00002.png"] == alone and len({made[name] for name in names}) == 6
    (tmp_path / "out" / names[4]).unlink()
    assert draw(checkpoint, tmp_path / "out", *options, "--seed", "5", "--batch", "1") == 0
    assert files(tmp_path / "out") == made


def test_dpg_grids(text_model, tmp_path, capsys):
    """A grid per prompt, named as its file, with the samples in the order in which compute_dpg_bench.py crops them."""
    checkpoint, encoder = text_model
    (tmp_path / "prompts").mkdir()
    for name, prompt in (("partiprompts5", "a cat\n"), ("12", "the sea")):
        (tmp_path / "prompts" / f"{name}.txt").write_text(prompt)
    options = ["--layout", "dpg", "--prompts", str(tmp_path / "prompts"), *encoder]
    assert draw(checkpoint, tmp_path / "out", *options) == 0
    assert sorted(path.name for path in (tmp_path / "out" / "dpg").iterdir()) == ["12.png", "partiprompts5.png"]
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["conditions"] == ["the sea", "a cat"] and run["records"] == ["12", "partiprompts5"]
    images = pixels(tmp_path / "out")
    grid = np.asarray(Image.open(tmp_path / "out" / "dpg" / "partiprompts5.png"))
    for image, (x, y) in zip(images[4:], ((0, 0), (32, 0), (0, 32), (32, 32)), strict=True):
        assert np.array_equal(grid[y : y + 32, x : x + 32], image)
    (tmp_path / "prompts" / "12.txt").rename(tmp_path / "prompts" / "13.txt")
    assert draw(checkpoint, tmp_path / "out", *options) == 2
    assert "holds samples with records ['12', 'partiprompts5'], not" in capsys.readouterr().err


def test_layouts_that_cannot_be_written_are_refused(class_checkpoint, text_model, tmp_path, capsys):
    checkpoint, _ = text_model
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "a.txt").write_text(" \n")
    (tmp_path / "cut.jsonl").write_text('{"prompt": "a cat"}\n{"prompt"\n')
    (tmp_path / "captions.jsonl").write_text('{"caption": "a cat"}\n')
    (tmp_path / "latin1.jsonl").write_bytes('{"prompt": "caf\xe9"}'.encode("latin-1"))
    geneval, dpg = (["--layout", layout, "--prompts"] for layout in ("geneval", "dpg"))
    cases = [
        (["--prompts", "a.jsonl"], "--prompts: belongs to --layout; add --layout geneval or dpg"),
        (["--prompt", "a cat", "--per-prompt", "2"], "--per-prompt: belongs to --layout"),
        (["--layout", "geneval"], "--layout: expected --prompts with the benchmark's file or folder, got none"),
        ([*geneval, "a.jsonl", "--prompt", "a cat"], "--prompt: --layout takes all prompts of --prompts; leave it out"),
        ([*geneval, "a.jsonl", "--count", "3"], "--count: --layout takes all prompts"),
        ([*geneval, str(tmp_path / "empty")], "--prompts: expected a file such as evaluation_metadata.jsonl at"),
        ([*geneval, str(tmp_path / "cut.jsonl")], "cut.jsonl: expected a JSON object with a prompt, got '{\"prompt\"'"),
        ([*geneval, str(tmp_path / "captions.jsonl")], "--prompts: line 1 of"),
        ([*geneval, str(tmp_path / "latin1.jsonl")], "--prompts: expected UTF-8 in"),
        ([*dpg, str(tmp_path / "cut.jsonl")], "--prompts: expected a folder of .txt files at"),
        ([*dpg, str(tmp_path / "empty")], "--prompts: expected .txt files in"),
        ([*dpg, str(tmp_path / "blank")], "--prompts: expected a prompt in"),
        ([*dpg, str(tmp_path / "blank"), "--per-prompt", "5"], "--per-prompt: a grid of dpg holds at most 4 samples"),
        ([*dpg, str(tmp_path / "blank"), "--size", "32x48"], "--size: dpg reads square samples, got 32x48"),
    ]
    for options, said in cases:
        assert draw(checkpoint, tmp_path / "new", *options) == 2, options
        message = capsys.readouterr().err
        assert message.startswith("error: ") and said in message, message
    assert draw(class_checkpoint, tmp_path / "new", *geneval, "a.jsonl") == 2
    assert "--layout: expected a text-to-image model, got DeCo, which" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_what_cannot_be_used_is_refused(class_checkpoint, tmp_path, capsys, make_fifo):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("kept")
    torch.save({"state_dict": {"encoder.weight": torch.zeros(3)}}, tmp_path / "foreign.ckpt")
    (tmp_path / "captions.csv").write_text("caption\na cat\n")
    (tmp_path / "text.csv").write_text("label\nred\n")
    (tmp_path / "range.csv").write_text("label\n1-3\n")
    (tmp_path / "latin1.csv").write_bytes("label,name\n3,caf\xe9\n".encode("latin-1"))
    (tmp_path / "huge.csv").write_text("label\n" + "9" * 200_000)
    (tmp_path / "damaged").mkdir()
    flow.write_trunk_steps(tmp_path / "of_five.json", [0, 2], steps=5)
    model.save_model(random_model("dit-tiny"), tmp_path / "dit.safetensors")
    (tmp_path / "damaged" / "run.json").write_text("[]")
    assert draw(class_checkpoint, tmp_path / "other", "--count", "1") == 0
    before = files(tmp_path)
    make_fifo(tmp_path / "pipe.ckpt")
    (tmp_path / "piped").mkdir()
    make_fifo(tmp_path / "piped" / "run.json")
    capsys.readouterr()
    cases = [
        (tmp_path / "absent.ckpt", "new", [], "absent.ckpt: expected a checkpoint file, found nothing; check the path"),
        (tmp_path, "new", [], "expected a checkpoint file, found a folder; check the path"),
        (class_checkpoint, "new", ["--csv", str(tmp_path)], "--csv: expected a table"),
        (tmp_path / "foreign.ckpt", "new", [], "expected a published DeCo"),
        (class_checkpoint, "full", [], "holds other files"),
        (class_checkpoint, "text.csv", [], "--out: expected a folder"),
        (class_checkpoint, "text.csv/below", [], "--out: "),
        (class_checkpoint, "damaged", [], "run.json is damaged"),
        (class_checkpoint, "piped", [], "run.json is damaged"),
        (tmp_path / "pipe.ckpt", "new", [], "expected a checkpoint file, found a FIFO"),
        (class_checkpoint, "other", ["--seed", "1"], "holds samples with seed 0, not 1"),
        (class_checkpoint, "other", ["--steps", "4", "--animate", "1"], "holds samples with steps 3, not 4"),
        (class_checkpoint, "new", ["--size", "40"], "--size: expected multiples of 16"),
        (class_checkpoint, "new", ["--classes", "8-10"], "--classes: expected classes from 0 to 9"),
        (class_checkpoint, "new", ["--prompt", "a cat"], "is conditioned on classes, use --classes or --csv"),
        (class_checkpoint, "new", ["--csv", str(tmp_path / "captions.csv")], "expected a column label"),
        (class_checkpoint, "new", ["--csv", str(tmp_path / "text.csv")], "--csv: line 2 of"),
        (class_checkpoint, "new", ["--csv", str(tmp_path / "range.csv")], "expected a class from 0 to 9, got '1-3'"),
        (class_checkpoint, "new", ["--csv", str(tmp_path / "latin1.csv")], "--csv: expected commas"),
        (class_checkpoint, "new", ["--csv", str(tmp_path / "huge.csv")], "--csv: expected commas"),
        (class_checkpoint, "new", ["--csv", str(tmp_path / "text.csv"), "--classes", "1"], "either a table or a list"),
        (class_checkpoint, "new", ["--guidance-interval", "0.5", "0.2"], "guidance_interval: expected (lo, hi)"),
        (class_checkpoint, "new", ["--trunk-steps", "0"], "trunk_steps: expected from 1 to 3, the number of steps"),
        (class_checkpoint, "new", ["--trunk-steps", "4"], "trunk_steps: expected from 1 to 3, the number of steps"),
        (
            class_checkpoint,
            "new",
            ["--trunk-steps", "0,2,1"],
            "trunk_steps: expected increasing indices, got [0, 2, 1]",
        ),
        (class_checkpoint, "new", ["--trunk-steps", "1,2"], "trunk_steps: expected 0 as the first index"),
        (class_checkpoint, "new", ["--trunk-steps", "0,3"], "trunk_steps: expected indices below 3"),
        (
            class_checkpoint,
            "new",
            ["--trunk-steps", "0,x"],
            "--trunk-steps: expected a number of steps, a list such as",
        ),
        (class_checkpoint, "new", ["--trunk-steps", str(tmp_path / "text.csv")], "expected JSON with steps and trunk"),
        (class_checkpoint, "new", ["--trunk-steps", str(tmp_path / "of_five.json")], "got those for 5; choose them"),
        (class_checkpoint, "new", ["--calibrate-trunk-steps", "4"], "trunk_steps: expected from 1 to 3"),
        (class_checkpoint, "full", ["--calibrate-trunk-steps", "2"], "holds other files"),
        (tmp_path / "dit.safetensors", "new", ["--trunk-steps", "2"], "model: expected one with encode and decode"),
        (tmp_path / "dit.safetensors", "new", ["--calibrate-trunk-steps", "2"], "model: expected one with encode"),
        (class_checkpoint, "new", ["--device", "nonsense"], "--device: nonsense cannot be used"),
        (class_checkpoint, "new", ["--device", "meta"], "--device: meta cannot be used"),
    ]
    for checkpoint, out, options, said in cases:
        assert draw(checkpoint, tmp_path / out, *options) == 2, options
        message = capsys.readouterr().err
        assert message.startswith("error: ") and said in message, message
    assert files(tmp_path) == before
    assert not (tmp_path / "other" / "animations").exists() and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--threads", "100000"],
        ["--shard", "2/2"],
        ["--count", "0"],
        ["--size", "0x16"],
        ["--seed", "-1"],
        ["--solver", "best"],
        ["--calibrate-trunk-steps", "0"],
    ],
)
def test_bad_options(options, capsys):
    with pytest.raises(SystemExit) as stopped:
        sample.main(["a.ckpt", "--out", "out", *options])
    assert stopped.value.code == 2 and options[0] in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        sample.main(["--help"])
    assert stopped.value.code == 0 and "--shard I/N" in capsys.readouterr().out
