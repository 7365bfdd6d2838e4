"""Sources of training images: class folders, tables of images, WebDataset shards; all read through `datasets`.

Tables and shards are converted once to Arrow files, which processes memory-map, so that every image of every source has
random access by index.
"""

from __future__ import annotations

import contextlib
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc

from deco_kernels.training import paths
from deco_kernels.training.config import DataConfig
from deco_kernels.training.images import open_image, upright_size

_PATHS_AND_BYTES = ("string", "large_string", "binary", "large_binary")
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
        raise ValueError(f"data.path: no image with a {target} in {config.path}; fill in the column, or choose another")
    if source.labels is not None:
        _check_labels(config, int(source.labels.min()), int(source.labels.max()), num_classes)
    return source


def check_source(config: DataConfig, target: str, num_classes: int | None) -> None:
    """Raise the errors of `open_source`, as far as names of files and columns show them."""
    if config.kind == "folder":
        _check_labels(config, 0, len(_class_folders(config, target)) - 1, num_classes)
    else:
        paths.check_columns(config, (target,))


def _check_labels(config: DataConfig, least: int, most: int, num_classes: int | None) -> None:
    if least < 0 or most >= (num_classes or np.inf):
        raise ValueError(
            f"data.path: {config.path} has labels from {least} to {most}, the model has {num_classes} classes; see "
            "model.options.num_classes"
        )


def _class_folders(config: DataConfig, target: str) -> list[Path]:
    if target == "caption":
        raise ValueError("data.kind: folders hold classes, not captions; a text model needs a table or shards")
    return paths.class_folders(config)


def _open_folder(config: DataConfig, target: str) -> Source:
    root, classes = Path(config.path), _class_folders(config, target)
    left_out: dict[str, str] = {}
    files = [sorted(paths.images_below(folder, root, left_out)) for folder in classes]
    rows = datasets.Dataset.from_dict({"image": [file for found in files for file in found]})
    labels = np.repeat(np.arange(len(classes)), [len(found) for found in files])
    return Source(rows, "image", root, labels, left_out=left_out)


def _open_files(config: DataConfig, target: str) -> Source:
    """Open one or more tables or shards."""
    files = paths.data_files(config)
    builder = "webdataset" if config.kind == "webdataset" else paths.TABLE_FORMATS[Path(files[0]).suffix.lower()]
    try:
        rows = datasets.load_dataset(builder, data_files=files, split="train", cache_dir=config.cache_dir)
    except (datasets.exceptions.DatasetGenerationError, ValueError, tarfile.TarError) as error:
        raise ValueError(
            f"data.path: {config.path} is not readable or holds no image: {error.__cause__ or error}; check the files"
        ) from error
    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    columns = {name: list(feature) if isinstance(feature, dict) else [] for name, feature in rows.features.items()}
    images = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    image_column = paths.image_column(config, columns, images)
    _check_images(rows.features[image_column], image_column, config)
    wanted = config.label_column if target == "label" else config.caption_column
    if not paths.has_column(columns, wanted):
        raise paths.missing_column({f"data.{target}_column": wanted}, columns)
    values = _values(rows, wanted)
    usable = values.notna() & (values.astype(str).str.strip() != "")
    left_out = {f"row {row} of {config.path}": f"no {target}" for row in np.flatnonzero(~usable)}
    if left_out:
        rows, values = rows.select(np.flatnonzero(usable)), values[usable]
    base = Path(files[0]).resolve().parent
    if target == "caption":
        _check_captions(values, config)
        return Source(rows, image_column, base, caption_column=wanted, left_out=left_out)
    return Source(rows, image_column, base, _labels(values, config), left_out=left_out)


def _check_images(feature: Any, column: str, config: DataConfig) -> None:
    """Raise ValueError unless a column holds paths or bytes: open() takes an integer for an open file."""
    kind = getattr(feature, "dtype", None)
    if not isinstance(feature, datasets.Image | dict) and kind not in _PATHS_AND_BYTES:
        raise ValueError(
            f"data.image_column: expected paths or bytes of images in column {column!r} of {config.path}, got "
            f"{feature}; choose another column"
        )


def _labels(values: Any, config: DataConfig) -> np.ndarray:
    """Labels int64 of a column of whole numbers, or of class names, of which they are the sorted positions."""
    labels = values.to_numpy()
    if labels.dtype.kind == "f":
        wrong = labels[~(np.abs(labels) < 2**53) | (labels != np.floor(labels))]
    else:
        wrong = labels[:1] if len(labels) and isinstance(labels[0], np.ndarray | list | dict) else labels[:0]
    if len(wrong):
        raise ValueError(
            f"data.label_column: expected whole numbers or names in column {config.label_column!r} of {config.path}, "
            f"got {wrong[0]}; choose another column"
        )
    if labels.dtype.kind not in "iuf":
        labels = np.unique(labels.astype(str), return_inverse=True)[1]
    return labels.astype(np.int64)


def _check_captions(values: Any, config: DataConfig) -> None:
    """Raise ValueError unless a column holds texts."""
    if len(values) and not isinstance(values.iloc[0], str):
        raise ValueError(
            f"data.caption_column: expected texts in column {config.caption_column!r} of {config.path}, "
            f"got {values.iloc[0]!r}; choose another column"
        )


def _field(row: dict[str, Any], column: str) -> Any:
    """The value of a column; a dot selects a field of a structured column, as in json.caption."""
    outer, _, inner = column.partition(".")
    return row[column] if column in row else row[outer][inner]


def _values(rows: datasets.Dataset, column: str) -> Any:
    """A whole column, or a field of a structured column as in `_field`, as a pandas series."""
    outer, _, inner = column.partition(".")
    if column in rows.column_names:
        return rows.data.column(column).to_pandas()
    return pc.struct_field(rows.data.column(outer), inner).to_pandas()


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
