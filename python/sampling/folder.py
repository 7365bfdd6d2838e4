"""The output folder of sample.py: images, animations, and the grid and archive assembled from them.

    run.json                      all settings that the images depend on
    images/000000.png             image 0, and so on
    animations/000000.gif         (or .png) its trajectory from noise
    grid_16.png                   the first 16 images
    trunk_steps.json              calibrated steps at which the trunk ran
    samples_50000x256x256x3.npz   all images, uint8 [n, H, W, 3] under arr_0

A file gets its name when it is complete and is never rewritten.
"""

import contextlib
import json
import os
import reprlib
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from deco_kernels import flow
from deco_kernels.model.checkpoint_file import complete_or_absent
from deco_kernels.training.images import as_grid, open_image

FRAME_MS, LAST_FRAME_MS = 80, 1500
ANIMATIONS = {"gif": "GIF", "png": "PNG"}  # file extension → Pillow format


class SampleFolder:
    """Opens or creates a folder of samples.

    Args:
        folder: created if it does not exist; otherwise it must be empty or have a run.json with the same settings.
        settings: JSON-serializable settings that the images depend on; "size" is (height, width).
        count: total number of images.
        animated: number of images, from the first, with an animation. ending: of animations, "gif" or "png".

    Raises ValueError if the folder contains other files or samples with other settings.
    """

    IMAGES = "images"  # folder of the images

    def __init__(self, folder: Path, settings: Mapping[str, Any], count: int, animated: int, ending: str):
        self.folder, self.count, self.animated, self.ending = folder, count, animated, ending
        self.run, self.images, self.animations = folder / "run.json", folder / self.IMAGES, folder / "animations"
        self.shape = (*settings["size"], 3)
        recorded_settings(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"--out: {folder} cannot be created ({error.strerror}); choose another folder") from error
        self._claim(settings)
        for each in (self.images, self.animations) if animated else (self.images,):
            each.mkdir(exist_ok=True)

    def _claim(self, settings: Mapping[str, Any]) -> None:
        """Writes run.json, or compares with the existing one of another process or an earlier run."""
        content = json.dumps(settings, indent=1) + "\n"
        write_once(self.run, lambda temporary: temporary.write_text(content, encoding="utf-8"))
        found = _read_settings(self.run)
        wanted = json.loads(json.dumps(settings))
        for name in wanted:
            if found.get(name) != wanted[name]:
                raise ValueError(
                    f"--out: {self.folder} holds samples with {name} {reprlib.repr(found.get(name))}, not "
                    f"{reprlib.repr(wanted[name])}; choose another folder, or the same settings to continue"
                )

    def write_trunk_steps(self, trunk_steps: Sequence[int], **settings: Any) -> None:
        """Writes the steps at which the trunk runs as `flow.write_trunk_steps` does, unless the file exists."""
        path = self.folder / "trunk_steps.json"
        write_once(path, lambda temporary: flow.write_trunk_steps(temporary, trunk_steps, **settings))

    def image(self, index: int) -> Path:
        return self.images / f"{index:06d}.png"

    def animation(self, index: int) -> Path:
        return self.animations / f"{index:06d}.{self.ending}"

    def missing(self, indices: Sequence[int]) -> list[int]:
        """The indices below `count` whose image or animation is missing."""
        return [
            index
            for index in indices
            if index < self.count
            and not (self.image(index).exists() and (index >= self.animated or self.animation(index).exists()))
        ]

    def write(self, index: int, pixels: np.ndarray, frames: np.ndarray | None) -> None:
        """Writes the image, uint8 [H, W, 3], and its animation from frames [n, H, W, 3], unless they exist."""
        write_once(self.image(index), lambda temporary: Image.fromarray(pixels).save(temporary, format="PNG"))
        if frames is not None:
            first, *rest = map(Image.fromarray, frames)
            options = dict(save_all=True, append_images=rest, loop=0)
            options["duration"] = [FRAME_MS] * len(rest) + [LAST_FRAME_MS]
            form = ANIMATIONS[self.ending]
            write_once(self.animation(index), lambda temporary: first.save(temporary, format=form, **options))

    def assemble(self, grid: int, npz: bool) -> list[Path]:
        """Writes grid and archive of a complete folder unless they exist; returns the paths written."""
        grid, made = min(grid, self.count), []
        path = self.folder / f"grid_{grid}.png"
        if grid:
            pixels = np.stack([self.read(index) for index in range(grid)])
            picture = Image.fromarray(as_grid(pixels))
            made += write_once(path, lambda temporary: picture.save(temporary, format="PNG"))
        if npz:
            shape = (self.count, *self.shape)
            path = self.folder / f"samples_{'x'.join(map(str, shape))}.npz"
            made += write_once(path, lambda temporary: self._write_npz(temporary, shape))
        return made

    def _write_npz(self, path: Path, shape: tuple[int, ...]) -> None:
        """Writes the layout of numpy.savez, one image at a time to limit memory."""
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as array:
            np.lib.format.write_array_header_1_0(array, header)
            for index in tqdm(range(self.count), desc="writing the archive", unit="image"):
                array.write(self.read(index).tobytes())

    def read(self, index: int) -> np.ndarray:
        """Reads an image, uint8 [H, W, 3]. Raises ValueError if another program damaged or replaced it."""
        path = self.image(index)
        try:
            with open_image(path) as image:
                pixels = np.asarray(image)
        except Exception as error:  # Pillow raises many unrelated types
            raise ValueError(f"--out: {path} cannot be read ({error}); remove it and run the command again") from error
        if pixels.shape != self.shape or pixels.dtype != np.uint8:
            raise ValueError(
                f"--out: {path} was not written by this program: expected uint8 {self.shape}, got {pixels.dtype} "
                f"{pixels.shape}; remove it and run the command again"
            )
        return pixels


def recorded_settings(folder: Path) -> dict[str, Any] | None:
    """The settings in run.json of a folder of samples; None if the folder is empty or does not exist.

    Raises ValueError if it is a file or contains other files and no run.json, or if run.json is damaged.
    """
    run = folder / "run.json"
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out: expected a folder, {folder} is a file; choose another name")
    # Concurrent processes write run.json first; list the folder before checking for run.json.
    names = os.listdir(folder) if folder.exists() else []
    if run.exists():
        return _read_settings(run)
    if any(not name.startswith(".") for name in names):
        raise ValueError(f"--out: {folder} holds other files and no run.json; choose another folder")
    return None


def _read_settings(run: Path) -> dict[str, Any]:
    try:
        found = json.loads(run.read_text(encoding="utf-8")) if run.is_file() else None
        if not isinstance(found, dict):
            raise ValueError
    except ValueError:
        raise ValueError(f"--out: {run} is damaged; choose another folder") from None
    return found


def write_once(path: Path, write: Callable[[Path], Any]) -> list[Path]:
    """Writes a file atomically with `write`; returns [path], or [] if it exists.

    If another process has written it in the meantime, its file has the same content and is kept or replaced.
    """
    if path.exists():
        return []
    with contextlib.suppress(FileExistsError), complete_or_absent(path, overwrite=False) as temporary:
        write(temporary)
    return [path]
