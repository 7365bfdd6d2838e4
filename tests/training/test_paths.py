"""Mistakes in the paths of a configuration, each named before anything slow is imported."""

import os
import re
from pathlib import Path

import pytest

from deco_kernels.training import config, paths
from tests.training.conftest import ROOT, write_images
from tests.training.test_sources import write_table


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with something of everything."""
    monkeypatch.chdir(tmp_path)
    write_images(Path("images/ant"), 1)
    write_images(Path("with_empty/ant"), 1)
    for folder in ("with_empty/bee", "teacher", "run/checkpoints", "no_classes"):
        Path(folder).mkdir(parents=True)
    for file in ("file", "note.txt", "run/checkpoints/step_000000005.ckpt", "shards.tar"):
        Path(file).write_text("text")
    write_table(Path("table.csv"), {"path": ["a.jpg"], "label": [1]})
    write_table(Path("images.csv"), {"image": ["a.jpg"], "text": ["a"]})
    write_table(Path("table.parquet"), {"image": [b""], "json": [{"text": "a"}]})
    Path("damaged.parquet").write_text("PAR1")
    Path("bytes.csv").write_bytes(b"\xff\xfe,label\n")
    return tmp_path


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.path=nowhere"], "data.path: expected a folder with one folder per class, found nothing at nowhere"),
        (["data.path=file"], "data.path: expected a folder with one folder per class, found a file at file"),
        (
            ["data.path=with_empty"],
            "data.path: class folders without an image: bee in with_empty; expected",
        ),
        (["data.path=no_classes"], "data.path: no class folder in no_classes; expected no_classes/CLASS/IMAGE"),
        (["data.kind=table", "data.path='*.tsv'"], "data.path: expected a file, found none at *.tsv"),
        (
            ["data.kind=table", "data.path=note.txt"],
            "tables of one format of ['.csv', '.parquet'], got ['.txt']",
        ),
        (["data.kind=table", "data.path=table.*"], "got ['.csv', '.parquet']"),
        (
            ["data.kind=table", "data.path=images"],
            "data.path: expected files, found a folder at images; name the",
        ),
        (["data.kind=table", "data.path=table.csv"], "data.image_column: none of ['image', 'img', "),
        (
            ["data.kind=table", "data.path=table.csv", "data.image_column=file"],
            "data.image_column: none of ['file'] in table.csv; it has ['path', 'label']",
        ),
        (
            ["data.kind=table", "data.path=images.csv"],
            "data.label_column or data.caption_column: no column 'label' or 'caption'; there are ['image', 'text']",
        ),
        (
            ["data.kind=table", "data.path=table.parquet", "data.caption_column=json.caption"],
            "no column 'label' or 'json.caption'; there are ['image', 'json']",
        ),
        (["data.kind=table", "data.path=damaged.parquet"], "data.path: damaged.parquet is not readable: "),
        (["data.kind=table", "data.path=bytes.csv"], "data.path: bytes.csv is not readable: "),
        (
            ["data.kind=webdataset", "data.path=shards.tar"],
            "data.path: expected tar files, got shards.tar, which is not one",
        ),
        (["data.cache_dir=file"], "data.cache_dir: expected a folder, found a file at "),
        (["out=file"], "out: expected a folder, found a file at file; choose another name"),
        (["out=file/run"], "out: expected a folder, found a file at "),
        (["out=/dev/null"], "out: expected a folder, found a device at /dev/null; choose another name"),
        (["out=run"], "out: run/checkpoints already holds checkpoints; resume with --resume auto or choose another"),
        (["init_from=weights.ckpt"], "init_from: expected a checkpoint file at weights.ckpt, found nothing; check"),
        (["init_from=images"], "init_from: expected a checkpoint file at images, found a folder; check the path"),
        (
            ["repa.weight=1", "repa.teacher=./nowhere"],
            "repa.teacher: expected a folder with a model of transformers",
        ),
        (["repa.weight=1", "repa.teacher=a/b/c"], "found nothing at a/b/c"),
        (["repa.weight=1", "repa.teacher=teacher"], "found no config.json in teacher"),
        (["repa.weight=1", "repa.teacher=file"], "found a file at file"),
    ],
)
def test_mistakes_are_named(overrides, said, place):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(said)):
        paths.check(loaded(*overrides), "never")


def loaded(*overrides):
    given = ["data.path=images", "out=new", "repa.weight=0", *overrides]
    return config.load(ROOT / "python" / "configs" / "small.yaml", given)


@pytest.mark.parametrize(("resume", "found"), [("images", "a folder"), ("weights.ckpt", "nothing"), ("pipe", "a FIFO")])
def test_what_cannot_be_resumed_is_named(resume, found, place):
    os.mkfifo("pipe")
    said = f"--resume: expected a checkpoint file at {resume}, found {found}; check the path"
    with pytest.raises(FileNotFoundError, match=said):
        paths.check(loaded(), resume)


def test_a_folder_without_permission_is_named(place, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(ValueError, match=f"out: expected a folder to write to, found {place} without that permission"):
        paths.check(loaded(), "never")


@pytest.mark.parametrize(
    ("overrides", "resume"),
    [
        ([], "never"),
        (["out=run", "init_from=weights.ckpt"], "auto"),
        (["init_from=weights.ckpt"], "run/checkpoints/step_000000005.ckpt"),
        (["data.kind=table", "data.path=table.csv", "data.image_column=path"], "never"),
        (["data.kind=table", "data.path=table.parquet", "data.caption_column=json.text"], "auto"),
        (["repa.weight=1", "repa.teacher=facebook/dinov2-base"], "never"),
    ],
)
def test_what_may_be_right_passes(overrides, resume, place):
    paths.check(loaded(*overrides), resume)
