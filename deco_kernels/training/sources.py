"""Sources of training images: class folders, tables of images, WebDataset shards; all read through `datasets`.

Tables and shards are converted once to Arrow files, which processes memory-map, so that every image of every source has
random access by index.
"""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc

from deco_kernels.files import kind_at
from deco_kernels.training.config import DataConfig
from deco_kernels.training.images import open_image, upright_size

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
IMAGE_COLUMNS = ("image", "img", *(suffix[1:] for suffix in IMAGE_SUFFIXES))
TABLE_FORMATS = {".csv": "csv", ".parquet": "parquet"}
SCAN_PROCESSES_FROM = 10_000  # images; for fewer, starting processes takes longer than it saves


@dataclass
class Source:
    """Undecoded images, each with a label or a caption.

    rows: dataset with the image column and, for captions, the caption column.
    base: folder of relative paths in the image column.
    labels: int64 [n], or None for captions.
    left_out: images found to be unusable before decoding, name → reason.
    """

    rows: datasets.Dataset
    image_column: str
    base: Path
    labels: np.ndarray | None = None
    caption_column: str | None = None
    left_out: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> tuple[str | bytes | None, int | str]:
        """(absolute path or bytes of an image file, label or caption)."""
        row = self.rows[index]
        stored = row[self.image_column]
        if isinstance(stored, dict):
            stored = stored.get("bytes") or stored.get("path")
        if isinstance(stored, str):
            stored = str(self.base / stored)
        if self.labels is not None:
            return stored, int(self.labels[index])
        assert self.caption_column is not None
        return stored, _field(row, self.caption_column)

    def name(self, index: int) -> str:
        """Name of an image in messages."""
        row = self.rows[index]
        stored = row[self.image_column]
        path = stored.get("path") if isinstance(stored, dict) else stored
        if isinstance(row.get("__url__"), str):
            return f"{row['__url__']}: {row['__key__']}"
        return str(self.base / path) if isinstance(path, str) else f"row {index} of {self.base}"

    def sizes(self, processes: int) -> np.ndarray:
        """(height, width) in pixels of every image, read from the header, [n, 2]; (0, 0) if it cannot be read."""

        def read(index: int) -> dict[str, Any]:
            try:
                with open_image(self.read(index)[0]) as image:
                    return {"size": list(upright_size(image)), "reason": ""}
            except Exception as error:  # Pillow raises many unrelated types
                return {"size": [0, 0], "reason": str(error) or type(error).__name__}

        numbers = datasets.Dataset.from_dict({"index": range(len(self))})
        many = processes if len(self) >= SCAN_PROCESSES_FROM and processes > 1 else None
        with _quiet():
            found = numbers.map(read, input_columns="index", num_proc=many)
        sizes = np.array(found["size"]).reshape(-1, 2)
        for index in np.flatnonzero(sizes.min(axis=1) == 0).tolist():
            self.left_out[self.name(index)] = found[index]["reason"]
        return sizes


def open_source(config: DataConfig, target: str, num_classes: int | None = None) -> Source:
    """Open the images that the configuration names.

    Args:
        config: the data configuration.
        target: "label" or "caption".
        num_classes: upper bound (exclusive) of labels, or None.

    Raises:
        FileNotFoundError: no such folder, table or shard.
        ValueError: no image, an empty class folder, a missing column, or more classes than the model has.
    """
    with _quiet():
        source = _open_folder(config, target) if config.kind == "folder" else _open_files(config, target)
    if not len(source):
        raise ValueError(f"data.path: no image with a {target} in {config.path}")
    if source.labels is not None:
        _check_labels(config, int(source.labels.min()), int(source.labels.max()), num_classes)
    return source


def check_source(config: DataConfig, target: str = "label", num_classes: int | None = None) -> None:
    """Raise the errors of `open_source` for the path and the number of classes, without opening a file."""
    if config.kind == "folder":
        _check_labels(config, 0, len(_class_folders(config, target)) - 1, num_classes)
    else:
        _data_files(config)


def _check_labels(config: DataConfig, least: int, most: int, num_classes: int | None) -> None:
    if least < 0 or most >= (num_classes or np.inf):
        raise ValueError(
            f"data.path: {config.path} has labels from {least} to {most}, the model has {num_classes} classes; see "
            "model.options.num_classes"
        )


def _class_folders(config: DataConfig, target: str) -> list[Path]:
    """One folder per class, sorted by name; the position is the label."""
    if target == "caption":
        raise ValueError("data.kind: folders hold classes, not captions; a text model needs a table or shards")
    root = Path(config.path)
    if not root.is_dir():
        raise FileNotFoundError(f"data.path: expected a folder with one folder per class, found none at {root}")
    classes = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise _not_class_folders(root, "no class folder")
    return classes


def _not_class_folders(root: Path, what: str) -> ValueError:
    return ValueError(f"data.path: {what} in {root}; expected {root}/CLASS/IMAGE with suffixes {IMAGE_SUFFIXES}")


def _open_folder(config: DataConfig, target: str) -> Source:
    root, classes = Path(config.path), _class_folders(config, target)
    left_out: dict[str, str] = {}
    files = [_images_in(folder, root, left_out) for folder in classes]
    empty = [folder.name for folder, found in zip(classes, files, strict=True) if not found]
    if empty:
        raise _not_class_folders(root, f"class folders without an image: {', '.join(empty)}")
    rows = datasets.Dataset.from_dict({"image": [file for found in files for file in found]})
    labels = np.repeat(np.arange(len(classes)), [len(found) for found in files])
    return Source(rows, "image", root, labels, left_out=left_out)


def _images_in(folder: Path, root: Path, left_out: dict[str, str]) -> list[str]:
    """Sorted paths of the images below a class folder, relative to the root, without hidden ones.

    Names that are not UTF-8, which Arrow cannot hold, are added to `left_out`.
    """
    found = []
    for file in folder.rglob("*"):
        path = file.relative_to(root)
        if file.suffix.lower() not in IMAGE_SUFFIXES or any(part.startswith(".") for part in path.parts):
            continue
        try:
            str(path).encode()
            found.append(str(path))
        except UnicodeEncodeError:
            name = os.fsencode(file).decode("utf-8", "backslashreplace")
            left_out[name] = "its name is not UTF-8; rename it"
    return sorted(found)


def _data_files(config: DataConfig) -> list[str]:
    """The tables or shards that the path or its wildcards match."""
    files = sorted(glob.glob(config.path, recursive=True))
    if not files:
        raise FileNotFoundError(f"data.path: expected a file, found none at {config.path}")
    for file in files:
        if (found := kind_at(file)) != "a file":
            raise ValueError(
                f"data.path: expected files, found {found} at {file}; name the files, with wildcards if there are many"
            )
    if config.kind == "table" and Path(files[0]).suffix.lower() not in TABLE_FORMATS:
        raise ValueError(f"data.path: expected a table {list(TABLE_FORMATS)}, got {files[0]}")
    return files


def _open_files(config: DataConfig, target: str) -> Source:
    """Open one or more tables or shards."""
    files = _data_files(config)
    builder = "webdataset" if config.kind == "webdataset" else TABLE_FORMATS[Path(files[0]).suffix.lower()]
    try:
        rows = datasets.load_dataset(builder, data_files=files, split="train", cache_dir=config.cache_dir)
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        raise ValueError(f"data.path: {config.path} is not readable: {error.__cause__ or error}") from error
    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    image_column = _image_column(rows, config)
    wanted = config.label_column if target == "label" else config.caption_column
    values = _values(rows, wanted, f"data.{target}_column")
    usable = values.notna() & (values.astype(str).str.strip() != "")
    left_out = {f"row {row} of {config.path}": f"no {target}" for row in np.flatnonzero(~usable)}
    if left_out:
        rows, values = rows.select(np.flatnonzero(usable)), values[usable]
    base = Path(files[0]).resolve().parent
    if target == "caption":
        return Source(rows, image_column, base, caption_column=wanted, left_out=left_out)
    labels = values.to_numpy()
    if labels.dtype.kind not in "iuf":  # class names; the labels are their sorted positions
        labels = np.unique(labels.astype(str), return_inverse=True)[1]
    return Source(rows, image_column, base, labels.astype(np.int64), left_out=left_out)


def _image_column(rows: datasets.Dataset, config: DataConfig) -> str:
    if config.image_column is not None:
        candidates = [config.image_column]
    else:
        images = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
        candidates = [*images, *IMAGE_COLUMNS]
    found = next((name for name in candidates if name in rows.column_names), None)
    if found is None:
        raise ValueError(f"data.image_column: none of {candidates} in {config.path}; it has {rows.column_names}")
    return found


def _field(row: dict[str, Any], column: str) -> Any:
    """The value of a column; a dot selects a field of a structured column, as in json.caption."""
    outer, _, inner = column.partition(".")
    return row[column] if column in row else row[outer][inner]


def _values(rows: datasets.Dataset, column: str, key: str) -> Any:
    """A whole column, or a field of a structured column as in `_field`, as a pandas series."""
    outer, _, inner = column.partition(".")
    table = rows.data
    if column in rows.column_names:
        return table.column(column).to_pandas()
    if outer in rows.column_names and inner in (rows.features[outer] if inner else ()):
        return pc.struct_field(table.column(outer), inner).to_pandas()
    raise ValueError(f"{key}: no column {column!r}; there are {rows.column_names}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Context without the progress bars of `datasets`."""
    shown = datasets.utils.is_progress_bar_enabled()
    datasets.utils.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.utils.enable_progress_bars()
