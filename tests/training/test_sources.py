"""Class folders, tables and shards; missing, empty or unusable sources."""

import csv
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from deco_kernels.training.batches import BatchPlan
from deco_kernels.training.config import DataConfig
from deco_kernels.training.loading import Images
from deco_kernels.training.sources import open_source
from tests.training.conftest import write_images


def configure(tmp_path, kind, path, **options):
    return DataConfig(kind=kind, path=str(path), cache_dir=str(tmp_path / "cache"), **options)


def gray_levels(source):
    """Mean level of every image, which identifies it."""
    return [int(np.asarray(Image.open(io.BytesIO(s) if isinstance(s, bytes) else s)).mean()) for s, _ in read(source)]


def read(source):
    return [source.read(index) for index in range(len(source))]


def flat_image(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 40), (level,) * 3).save(file, "PNG")
    return file.getvalue()


def write_table(path: Path, columns: dict) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.table(columns), path)
    else:
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))
    return path


def test_class_folders(tmp_path):
    for name, count in (("wasp", 2), ("ant", 3)):
        write_images(tmp_path / name, count)
    (tmp_path / "ant" / "notes.txt").write_text("not an image")
    source = open_source(configure(tmp_path, "folder", tmp_path), "label", num_classes=2)
    assert [target for _, target in read(source)] == [0, 0, 0, 1, 1]
    assert [Path(stored).parent.name for stored, _ in read(source)] == ["ant"] * 3 + ["wasp"] * 2
    (tmp_path / "ant" / ".trash").mkdir()
    for hidden in (".trash/0.png", "._0.png"):
        (tmp_path / "ant" / hidden).write_bytes(flat_image(0))
    (tmp_path / "ant" / os.fsdecode(b"caf\xe9.png")).write_bytes(flat_image(0))
    source = open_source(configure(tmp_path, "folder", tmp_path), "label", num_classes=2)
    assert [target for _, target in read(source)] == [0, 0, 0, 1, 1]
    assert source.left_out == {f"{tmp_path}/ant/caf\\xe9.png": "its name is not UTF-8; rename it"}
    with pytest.raises(ValueError, match="labels from 0 to 1, the model has 1 classes"):
        open_source(configure(tmp_path, "folder", tmp_path), "label", num_classes=1)
    (tmp_path / "bee").mkdir()
    with pytest.raises(ValueError, match="without an image: bee"):
        open_source(configure(tmp_path, "folder", tmp_path), "label", num_classes=3)


def test_missing_and_empty(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no class folder"):
        open_source(configure(tmp_path, "folder", tmp_path / "empty"), "label")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_source(configure(tmp_path, "folder", tmp_path / "nowhere"), "label")
    with pytest.raises(FileNotFoundError, match="nothing"):
        open_source(configure(tmp_path, "webdataset", tmp_path / "nothing-*.tar"), "label")
    with pytest.raises(ValueError, match="captions"):
        open_source(configure(tmp_path, "folder", tmp_path), "caption")
    (tmp_path / "table.txt").write_text("image,label\n")
    with pytest.raises(ValueError, match="expected tables"):
        open_source(configure(tmp_path, "table", tmp_path / "table.txt"), "label")


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_tables_of_paths(tmp_path, suffix):
    for level in (10, 90, 200):
        (tmp_path / f"{level}.png").write_bytes(flat_image(level))
    columns = {"image": ["90.png", "10.png", "200.png"], "label": ["wasp", "ant", "wasp"], "caption": ["b", "a", "c"]}
    path = write_table(tmp_path / f"table{suffix}", columns)
    source = open_source(configure(tmp_path, "table", path), "label")
    assert gray_levels(source) == [90, 10, 200] and [target for _, target in read(source)] == [1, 0, 1]
    captions = open_source(configure(tmp_path, "table", path), "caption")
    assert [target for _, target in read(captions)] == ["b", "a", "c"]
    assert captions.name(1) == str(tmp_path / "10.png")
    with pytest.raises(ValueError, match="data.label_column: no column 'kind'"):
        open_source(configure(tmp_path, "table", path, label_column="kind"), "label")
    with pytest.raises(ValueError, match="data.image_column"):
        open_source(configure(tmp_path, "table", path, image_column="photo"), "label")


@pytest.mark.parametrize("structured", [False, True])
def test_tables_of_bytes(tmp_path, structured):
    files = [flat_image(level) for level in (10, 90)]
    stored = [{"bytes": each, "path": None} for each in files] if structured else files
    path = write_table(tmp_path / "table.parquet", {"image": stored, "label": [1, 0]})
    source = open_source(configure(tmp_path, "table", path), "label")
    assert gray_levels(source) == [10, 90] and [target for _, target in read(source)] == [1, 0]


def test_rows_without_a_caption_are_left_out_by_name(tmp_path):
    write_images(tmp_path, 4)
    columns = {"image": [f"0000{i}.jpg" for i in range(4)], "caption": ["one", None, "  ", "four"]}
    path = write_table(tmp_path / "table.parquet", columns)
    source = open_source(configure(tmp_path, "table", path), "caption")
    assert [target for _, target in read(source)] == ["one", "four"]
    assert source.left_out == {f"row {row} of {path}": "no caption" for row in (1, 2)}
    assert source.name(1) == str(tmp_path / "00003.jpg")
    path = write_table(tmp_path / "none.csv", {"image": ["00000.jpg"], "caption": [""]})
    with pytest.raises(ValueError, match="no image with a caption"):
        open_source(configure(tmp_path, "table", path), "caption")


def test_shards(tmp_path):
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for number in range(3):
                level = 100 * shard + 10 * number
                described = json.dumps({"caption": f"gray {level}", "label": number}).encode()
                files = {"png": flat_image(level), "cls": str(number).encode(), "json": described}
                for suffix, content in files.items():
                    entry = tarfile.TarInfo(f"{shard}{number}.{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    given = configure(tmp_path, "webdataset", tmp_path / "*.tar", label_column="cls", caption_column="json.caption")
    source = open_source(given, "label", num_classes=3)
    assert gray_levels(source) == [0, 10, 20, 100, 110, 120]
    assert [target for _, target in read(source)] == [0, 1, 2] * 2
    assert source.name(4) == f"{tmp_path / '1.tar'}: 11"
    assert read(open_source(given, "caption"))[4][1] == "gray 110"


@pytest.mark.parametrize(
    ("columns", "target", "said"),
    [
        ({"image": ["a.jpg"], "label": [0.5]}, "label", "data.label_column: expected whole numbers or names in column"),
        ({"image": ["a.jpg"], "label": [np.inf]}, "label", "got inf"),
        ({"image": ["a.jpg"], "label": [1e20]}, "label", r"got 1e\+20"),
        ({"image": ["a.jpg"], "label": [[1]]}, "label", r"got \[1\]"),
        ({"image": ["a.jpg"], "caption": [3]}, "caption", "data.caption_column: expected texts in column 'caption'"),
        ({"image": ["a.jpg"], "caption": [["a"]]}, "caption", r"got array\(\['a'\]"),
        ({"image": [5], "label": [1]}, "label", "data.image_column: expected paths or bytes of images in column"),
    ],
)
def test_columns_of_another_kind(tmp_path, columns, target, said):
    """Numbers are no paths: open() would read the open file of that number."""
    table = write_table(tmp_path / "table.parquet", columns)
    with pytest.raises(ValueError, match=said):
        open_source(configure(tmp_path, "table", table), target)


def test_whole_numbers_as_floats_are_labels(tmp_path):
    table = write_table(tmp_path / "table.csv", {"image": ["a.jpg", "b.jpg", "c.jpg"], "label": [1, "", 0]})
    assert open_source(configure(tmp_path, "table", table), "label").labels.tolist() == [1, 0]


def test_a_cut_shard_is_not_readable(tmp_path):
    shard = tmp_path / "0.tar"
    with tarfile.open(shard, "w") as tar:
        info = tarfile.TarInfo("0.png")
        info.size = len(flat_image(0))
        tar.addfile(info, io.BytesIO(flat_image(0)))
    shard.write_bytes(shard.read_bytes()[:600])
    with pytest.raises(
        ValueError, match="data.path: .*0.tar is not readable or holds no image: unexpected end of data"
    ):
        open_source(configure(tmp_path, "webdataset", shard), "label")


def test_sizes_from_headers(tmp_path):
    write_images(tmp_path / "ant", 1, size=(50, 30))
    (tmp_path / "ant" / "broken.jpg").write_bytes(b"\xff\xd8 no more")
    source = open_source(configure(tmp_path, "folder", tmp_path), "label")
    assert source.sizes(processes=2).tolist() == [[30, 50], [0, 0]]
    assert list(source.left_out) == [str(tmp_path / "ant" / "broken.jpg")]


def test_unusable_images_are_named_and_replaced(tmp_path):
    folder = write_images(tmp_path / "ant", 6)
    (folder / "00001.jpg").write_bytes((folder / "00001.jpg").read_bytes()[:300])
    (folder / "00002.jpg").write_bytes(b"")
    write_images(tmp_path / "small", 1, size=(8, 80))
    (tmp_path / "small" / "00000.jpg").rename(folder / "00003.jpg")
    (tmp_path / "small").rmdir()
    source = open_source(configure(tmp_path, "folder", tmp_path), "label")
    plan = BatchPlan({(32, 32): np.arange(6)}, batch_size=6, seed=0)
    given, again = (Images(source, plan, min_side=16) for _ in range(2))
    for number in range(6):
        pixels, label, sample, skipped = given[0, 40 + number, number]
        assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.uint8 and (label, sample) == (0, 40 + number)
        assert torch.equal(pixels, again[0, 40 + number, number][0])
        assert (str(folder / f"0000{number}.jpg") in skipped) == (number in (1, 2, 3))
    assert "8x80 pixels, below data.min_side=16" in given[0, 43, 3][3].values()
    with pytest.raises(ValueError, match="100 consecutive images cannot be used"):
        Images(source, plan, min_side=1000)[0, 0, 0]


def test_what_is_no_file_is_named_and_not_waited_for(tmp_path, make_fifo):
    """Opening a FIFO without a writer would never return."""
    folder = write_images(tmp_path / "ant", 2, size=(50, 30))
    make_fifo(folder / "pipe.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "absent.png").symlink_to(tmp_path / "nowhere.png")
    source = open_source(configure(tmp_path, "folder", tmp_path), "label")
    reasons = {"pipe": "a FIFO", "zero": "a device", "absent": "nothing"}
    expected = {str(folder / f"{name}.png"): f"expected an image file, found {kind}" for name, kind in reasons.items()}
    images = Images(source, BatchPlan({(32, 32): np.arange(5)}, batch_size=5, seed=0), min_side=16)
    skipped = {}
    for number in range(5):
        pixels, _, _, met = images[0, number, number]
        assert pixels.shape == (3, 32, 32)
        skipped |= met
    assert skipped == expected
    assert source.sizes(processes=1).tolist() == [[30, 50]] * 2 + [[0, 0]] * 3 and source.left_out == expected
    make_fifo(tmp_path / "table.csv")
    with pytest.raises(ValueError, match="data.path: expected files, found a FIFO at .*table.csv"):
        open_source(configure(tmp_path, "table", tmp_path / "*.csv"), "label")
    with pytest.raises(ValueError, match="data.path: expected files, found a folder at .*ant; name the files"):
        open_source(configure(tmp_path, "webdataset", tmp_path / "ant"), "label")
