"""Photographs: finding, decoding and cropping."""

import importlib.util
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from PIL import Image

from deco_kernels.training.images import center_crop, open_image, to_signed, to_uint8, upright_rgb


def shipped_photographs() -> list[Path]:
    """The two photographs inside scikit-learn's wheel; the package is located, not imported."""
    spec = importlib.util.find_spec("sklearn")
    if spec is None or not spec.submodule_search_locations:
        return []
    folder = Path(spec.submodule_search_locations[0]) / "datasets" / "images"
    return [folder / "china.jpg", folder / "flower.jpg"]


def readable(paths: Iterable[Path]) -> Iterator[tuple[Path, Image.Image]]:
    """Every readable file with its photograph, RGB and upright; other files are reported in a warning and skipped."""
    for path in paths:
        try:
            with open_image(path) as opened:
                photograph = upright_rgb(opened)
        except Exception as error:  # Pillow raises many unrelated types for damaged files
            warnings.warn(f"{path} is skipped: it cannot be read as an image ({error})", stacklevel=2)
        else:
            yield path, photograph


def load_photographs(paths: list[Path], size: int) -> tuple[list[str], torch.Tensor]:
    """Decodes and crops every readable file.

    Returns:
        (file names, images [n, 3, size, size] float32 RGB in [-1, 1]); both are empty if no file is readable.
    """
    found = [(path.name, to_tensor(center_crop(photograph, size, size))) for path, photograph in readable(paths)]
    names, images = [name for name, _ in found], [image for _, image in found]
    return names, torch.stack(images) if images else torch.empty(0, 3, size, size)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """RGB image -> [3, H, W] float32 in [-1, 1]."""
    return to_signed(to_uint8(image))
