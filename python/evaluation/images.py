"""Sets of images to evaluate, and reference statistics."""

import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from deco_kernels.files import kind_at
from deco_kernels.training.images import open_image, to_uint8, upright_rgb, upright_size

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
STATISTICS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
"""Features → names of their mean and covariance in a file of the ADM evaluation suite."""


class FolderImages:
    """The images of a folder and its subfolders, in the order of their paths, all of one size.

    Raises ValueError for a folder without images.
    """

    def __init__(self, folder: Path):
        if (folder / "run.json").is_file() and (folder / "images").is_dir():  # a folder of sample.py
            folder = folder / "images"
        self.path = folder
        self.files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        if not self.files:
            raise ValueError(f"{folder}: expected images ({', '.join(SUFFIXES)}), found none; check the folder")
        with _opened(self.files[0]) as image:
            self.size = upright_size(image)

    def __len__(self) -> int:
        return len(self.files)

    def fingerprint(self) -> list:
        """Names, sizes and times of the files."""
        found = [(path, path.stat()) for path in self.files]
        return [[str(path.relative_to(self.path)), stat.st_size, stat.st_mtime_ns] for path, stat in found]

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Images `start` to `stop` - 1, uint8 [n, 3, H, W]. Raises ValueError for one of another size or damaged."""
        return torch.stack([self._read(path) for path in self.files[start:stop]])

    def _read(self, path: Path) -> torch.Tensor:
        try:
            with _opened(path) as image:
                pixels = to_uint8(upright_rgb(image))
        except OSError as error:
            raise ValueError(f"{path}: the image is damaged ({error}); remove or replace it") from error
        if pixels.shape[1:] != self.size:
            raise ValueError(
                f"{path}: expected {_written(self.size)} like {self.files[0].name}, got {_written(pixels.shape[1:])}; "
                "give images of one size"
            )
        return pixels


def _opened(path: Path):
    try:
        return open_image(path)
    except Exception as error:  # Pillow raises many unrelated types
        raise ValueError(f"{path}: expected an image, got {error}; remove or replace it") from error


class NpzImages:
    """The images uint8 [n, H, W, 3] under `arr_0` of an .npz file, read one part at a time."""

    def __init__(self, path: Path):
        self.path = path
        self.file = zipfile.ZipFile(path).open("arr_0.npy")
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        try:
            self.shape, fortran, dtype = read_header[np.lib.format.read_magic(self.file)](self.file)
        except ValueError as error:
            raise ValueError(
                f"{path}: expected an array of NumPy under arr_0, got another content ({error}); write it again"
            ) from None
        if dtype != np.uint8 or len(self.shape) != 4 or self.shape[3] != 3 or fortran or not self.shape[0]:
            raise ValueError(
                f"{path}: expected images uint8 [n, H, W, 3] under arr_0, got {dtype} {list(self.shape)}; "
                "convert the array"
            )
        self.start = self.file.tell()
        self.size = self.shape[1:3]

    def __len__(self) -> int:
        return self.shape[0]

    def fingerprint(self) -> list:
        """Name, size and time of the file."""
        stat = self.path.stat()
        return [self.path.name, stat.st_size, stat.st_mtime_ns]

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Images `start` to `stop` - 1, uint8 [n, 3, H, W]. Raises ValueError for a damaged file."""
        shape = (min(stop, len(self)) - start, *self.shape[1:])
        size = int(np.prod(shape[1:]))
        try:
            self.file.seek(self.start + start * size)
            content = self.file.read(shape[0] * size)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise ValueError(f"{self.path}: the file is damaged ({error}); copy it again") from error
        if len(content) != shape[0] * size:
            raise ValueError(
                f"{self.path}: expected {len(self)} images under arr_0, the file ends before; copy the file again"
            )
        return torch.from_numpy(np.frombuffer(content, np.uint8).reshape(shape).copy()).permute(0, 3, 1, 2).contiguous()


@dataclass
class Reference:
    """What the samples are compared with: images, statistics (features → mean [F], covariance [F, F]), or both."""

    path: Path
    images: FolderImages | NpzImages | None
    statistics: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)


def open_images(path: Path) -> FolderImages | NpzImages:
    """The images of a folder or an .npz. Raises OSError or ValueError that names the path."""
    reference = open_reference(path)
    if reference.images is None:
        raise ValueError(f"{path}: expected images under arr_0, found only statistics; they can be the reference alone")
    return reference.images


def open_reference(path: Path) -> Reference:
    """Images or statistics of a folder or an .npz. Raises OSError or ValueError that names the path."""
    kind = kind_at(path)
    if kind == "a folder":
        return Reference(path, FolderImages(path))
    if kind != "a file":
        raise FileNotFoundError(f"{path}: expected a folder of images or an .npz file, found {kind}; check the path")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: expected an .npz file, got one that is damaged or of another form; write it again")
    try:
        with np.load(path) as archive:
            names = archive.files
            statistics = {
                features: (_read(path, archive, mean, 1), _read(path, archive, covariance, 2))
                for features, (mean, covariance) in STATISTICS.items()
                if mean in names and covariance in names
            }
        images = NpzImages(path) if "arr_0" in names else None
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise ValueError(f"{path}: expected an .npz file, got one that is damaged ({error}); copy it again") from error
    if images is None and not statistics:
        raise ValueError(
            f"{path}: expected images under arr_0, or statistics under mu and sigma, found {names or 'nothing'}; "
            "store one of both"
        )
    return Reference(path, images, statistics)


def _read(path: Path, archive: Mapping[str, np.ndarray], name: str, dimensions: int) -> np.ndarray:
    try:
        array = np.asarray(archive[name])
    except ValueError as error:  # objects, which NumPy would unpickle
        raise ValueError(
            f"{path}: {name}: expected an array of numbers, got another content ({error}); write it again"
        ) from None
    if array.ndim != dimensions or not np.issubdtype(array.dtype, np.floating):
        raise ValueError(
            f"{path}: {name}: expected floating-point numbers of rank {dimensions}, got {array.dtype} "
            f"{list(array.shape)}; give statistics as the ADM evaluation suite stores them"
        )
    if not np.isfinite(array).all():
        raise ValueError(f"{path}: {name}: expected finite numbers, got infinity or NaN; compute the statistics again")
    return array.astype(np.float64)


def require_same_size(samples: FolderImages | NpzImages, reference: Reference) -> None:
    """Raise ValueError unless the images of both have one resolution."""
    images = reference.images
    if images is not None and tuple(images.size) != tuple(samples.size):
        raise ValueError(
            f"{os.fspath(reference.path)}: expected a reference of {_written(samples.size)} like the samples, got "
            f"{_written(images.size)}; give the reference of this resolution"
        )


def _written(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))
