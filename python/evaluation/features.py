"""Features of a set of images, kept in parts so that an interrupted run continues."""

import hashlib
import json
import zipfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from deco_kernels.model.checkpoint_file import complete_or_absent
from evaluation.extractor import Extractor
from evaluation.images import FolderImages, NpzImages

PART = 500  # images per file


def features_of(
    images: FolderImages | NpzImages, extractor: Extractor, cache: Path, batch: int, title: str
) -> dict[str, torch.Tensor]:
    """Features float32 [n, F] by name; computed where the cache has none, with a progress bar.

    The cache is a folder with a subfolder per set and extractor. A set whose files have another size or time is new.
    """
    key = json.dumps([images.fingerprint(), extractor.description, extractor.layers])
    folder = cache / hashlib.sha256(key.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    with tqdm(total=len(images), desc=title, unit="image") as bar:
        for start in range(0, len(images), PART):
            stop = min(start + PART, len(images))
            path = folder / f"{start:06d}.npz"
            found = _read(path, stop - start)
            if found is None:
                found = _compute(images, extractor, range(start, stop), batch, bar)
                with complete_or_absent(path, overwrite=True) as temporary, open(temporary, "wb") as file:
                    np.savez(file, **{name: value.numpy() for name, value in found.items()})
            else:
                bar.update(stop - start)
            parts.append(found)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _compute(images, extractor: Extractor, indices: range, batch: int, bar: tqdm) -> dict[str, torch.Tensor]:
    found = []
    for start in range(indices.start, indices.stop, batch):
        stop = min(start + batch, indices.stop)
        found.append(extractor(images.read(start, stop)))
        bar.update(stop - start)
    features = {name: torch.cat([each[name] for each in found]) for name in found[0]}
    for name, value in features.items():
        if not value.isfinite().all():
            raise FloatingPointError(
                f"features {name!r} of {images.path}: expected finite values, got infinity or NaN; "
                "check the weights of the extractor"
            )
    return features


def _read(path: Path, count: int) -> dict[str, torch.Tensor] | None:
    """The features of a part, or None if the file is missing or damaged."""
    try:
        with np.load(path) as archive:
            found = {name: torch.from_numpy(archive[name]) for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    return found if found and all(len(value) == count for value in found.values()) else None
