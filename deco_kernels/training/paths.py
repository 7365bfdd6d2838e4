"""Paths of a configuration: data, checkpoints, pretrained models. Imports only what takes no time to import."""

from __future__ import annotations

import csv
import glob
import json
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from deco_kernels.files import kind_at
from deco_kernels.training.config import DataConfig, TrainConfig

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
IMAGE_COLUMNS = ("image", "img", *(suffix[1:] for suffix in IMAGE_SUFFIXES))
TABLE_FORMATS = {".csv": "csv", ".parquet": "parquet"}
TARGETS = ("label", "caption")
_CHECKPOINT = re.compile(r"step_(\d+)\.ckpt")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def check(config: TrainConfig, resume: str, pretrained: bool = True) -> None:
    """Check every path of a configuration that can be checked without knowing the model.

    Args:
        resume: as in `loop.train`.
        pretrained: whether the configured teacher is used.

    Raises:
        FileNotFoundError: a path names nothing.
        ValueError: a path names something else than expected, `out` already holds checkpoints, or a table lacks a
            column. The message names the key.
    """
    _check_folder_to_write("out", config.out)
    if config.data.cache_dir is not None:
        _check_folder_to_write("data.cache_dir", config.data.cache_dir)
    folder = checkpoint_folder(config)
    _check_folder_to_write("out", folder)
    held = checkpoints_in(folder)
    if held and resume == "never":
        raise ValueError(f"out: {folder} already holds checkpoints; resume with --resume auto or choose another")
    if resume not in ("never", "auto"):
        _check_checkpoint("--resume", resume)
    elif config.init_from is not None and not held:  # a resumed run does not read it
        _check_checkpoint("init_from", config.init_from)
    if config.data.kind == "folder":
        class_folders(config.data)
    else:
        data_files(config.data)
        check_columns(config.data, TARGETS)
    if pretrained and config.repa.weight:
        check_pretrained("repa.teacher", config.repa.teacher)


# ----------------------------------------------------------------------------------------------------------------- data


def class_folders(config: DataConfig) -> list[Path]:
    """One folder per class, sorted by name; the position is the label.

    Raises FileNotFoundError without a folder, and ValueError without a class or for a class without an image.
    """
    root = Path(config.path)
    if (found := kind_at(root)) != "a folder":
        raise FileNotFoundError(
            f"data.path: expected a folder with one folder per class, found {found} at {root}; check the path"
        )
    classes = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    empty = [folder.name for folder in classes if next(images_below(folder, root, {}), None) is None]
    if not classes or empty:
        what = f"class folders without an image: {', '.join(empty)}" if empty else "no class folder"
        raise ValueError(f"data.path: {what} in {root}; expected {root}/CLASS/IMAGE with suffixes {IMAGE_SUFFIXES}")
    return classes


def images_below(folder: Path, root: Path, left_out: dict[str, str]) -> Iterator[str]:
    """Paths of the images below a class folder, relative to the root, without hidden ones; in no order.

    Names that are not UTF-8, which Arrow cannot hold, are added to `left_out`.
    """
    for file in folder.rglob("*"):
        path = file.relative_to(root)
        if file.suffix.lower() not in IMAGE_SUFFIXES or any(part.startswith(".") for part in path.parts):
            continue
        try:
            str(path).encode()
            yield str(path)
        except UnicodeEncodeError:
            name = os.fsencode(file).decode("utf-8", "backslashreplace")
            left_out[name] = "its name is not UTF-8; rename it"


def data_files(config: DataConfig) -> list[str]:
    """The tables or shards that the path or its wildcards match.

    Raises FileNotFoundError without a file, and ValueError for what is neither a table nor a shard.
    """
    files = sorted(glob.glob(config.path, recursive=True))
    if not files:
        raise FileNotFoundError(f"data.path: expected a file, found none at {config.path}; check the path")
    for file in files:
        if (found := kind_at(file)) != "a file":
            raise ValueError(
                f"data.path: expected files, found {found} at {file}; name the files, with wildcards if there are many"
            )
    suffixes = {Path(file).suffix.lower() for file in files}
    if config.kind == "table" and (len(suffixes) > 1 or not suffixes <= set(TABLE_FORMATS)):
        raise ValueError(
            f"data.path: expected tables of one format of {list(TABLE_FORMATS)}, got {sorted(suffixes)}; "
            "give tables of one of them"
        )
    if config.kind == "webdataset" and not tarfile.is_tarfile(files[0]):
        raise ValueError(f"data.path: expected tar files, got {files[0]}, which is not one; leave out other files")
    return files


def check_columns(config: DataConfig, targets: tuple[str, ...]) -> None:
    """Raise ValueError unless the first table has the column of images and that of one of the targets.

    Does nothing for shards, whose columns are known only after the first images.
    """
    if config.kind != "table":
        return
    file = data_files(config)[0]
    columns, images = _csv_columns(file) if file.lower().endswith(".csv") else _parquet_columns(file)
    image_column(config, columns, images)
    wanted = {f"data.{target}_column": getattr(config, f"{target}_column") for target in targets}
    if not any(has_column(columns, column) for column in wanted.values()):
        raise missing_column(wanted, columns)


def image_column(config: DataConfig, columns: dict[str, list[str]], images: list[str]) -> str:
    """The configured column of images, or else the first of `images` or of the usual names. ValueError without one."""
    candidates = [*images, *IMAGE_COLUMNS] if config.image_column is None else [config.image_column]
    found = next((name for name in candidates if name in columns), None)
    if found is None:
        raise ValueError(
            f"data.image_column: none of {candidates} in {config.path}; it has {list(columns)}; "
            "name one of them as data.image_column"
        )
    return found


def has_column(columns: dict[str, list[str]], column: str) -> bool:
    """Whether there is such a column, or for OUTER.INNER such a field of a structured column."""
    outer, _, inner = column.partition(".")
    return column in columns or inner in columns.get(outer, ())


def missing_column(wanted: dict[str, str], columns: dict[str, list[str]]) -> ValueError:
    """The error for a table that has none of the columns `wanted`, which maps keys to them."""
    names = " or ".join(repr(column) for column in wanted.values())
    return ValueError(f"{' or '.join(wanted)}: no column {names}; there are {list(columns)}")


def _csv_columns(file: str) -> tuple[dict[str, list[str]], list[str]]:
    """(column → names of its fields, columns of images as far as known) of a CSV file, from its first line."""
    try:
        with open(file, newline="", encoding="utf-8-sig") as lines:
            return {name: [] for name in next((row for row in csv.reader(lines) if row), [])}, []
    except (ValueError, csv.Error) as error:
        raise ValueError(f"data.path: {file} is not readable: {error}; write it again as CSV in UTF-8") from error


def _parquet_columns(file: str) -> tuple[dict[str, list[str]], list[str]]:
    """As `_csv_columns`, of a parquet file, from its schema."""
    import pyarrow as pa
    import pyarrow.parquet

    try:
        schema = pyarrow.parquet.read_schema(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"data.path: {file} is not readable: {error}; copy it again") from error
    columns = {
        field.name: [each.name for each in field.type] if pa.types.is_struct(field.type) else [] for field in schema
    }
    written = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))  # by the package datasets
    features = written.get("info", {}).get("features", {})
    return columns, [name for name, feature in features.items() if feature.get("_type") == "Image"]


# --------------------------------------------------------------------------------------- checkpoints, pretrained models


def checkpoint_folder(config: TrainConfig) -> Path:
    return Path(config.out) / "checkpoints"


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    return sorted((path for path in folder.glob("step_*.ckpt") if _CHECKPOINT.fullmatch(path.name)), reverse=True)


def check_pretrained(key: str, name: str) -> None:
    """Raise FileNotFoundError unless `name` is a folder that holds a model of transformers, or may be an
    id of the Hugging Face hub."""
    found = kind_at(name)
    expected = f"{key}: expected a folder with a model of transformers, or an id of the Hugging Face hub"
    if found == "a folder" and kind_at(Path(name) / "config.json") == "nothing":
        raise FileNotFoundError(f"{expected}; found no config.json in {name}; give the folder that holds it")
    if found not in ("a folder", "nothing") or (found == "nothing" and not _HUB_ID.fullmatch(name)):
        raise FileNotFoundError(f"{expected}; found {found} at {name}; check the path")


def _check_checkpoint(key: str, path: str) -> None:
    if (found := kind_at(path)) != "a file":
        raise FileNotFoundError(f"{key}: expected a checkpoint file at {path}, found {found}; check the path")


def _check_folder_to_write(key: str, path: str | Path) -> None:
    """Raise ValueError unless the path is a folder or can become one."""
    place = next(each for each in (Path(path), *Path(path).absolute().parents) if kind_at(each) != "nothing")
    if (found := kind_at(place)) != "a folder":
        raise ValueError(f"{key}: expected a folder, found {found} at {place}; choose another name")
    if not os.access(place, os.W_OK):
        raise ValueError(
            f"{key}: expected a folder to write to, found {place} without that permission; allow it, or choose another"
        )
