"""Decoding and cropping of training images, and sample grids.

Source of the crop: Dhariwal and Nichol (arXiv 2105.05233), as used for DeCo (arXiv 2511.19365), section 4.
"""

from __future__ import annotations

import io
import os

import numpy as np
import torch
from PIL import Image, ImageOps

from deco_kernels.files import kind_at

ORIENTATION_TAG = 274
QUARTER_TURNS = (5, 6, 7, 8)  # values of the orientation tag that swap width and height


def open_image(stored: str | os.PathLike[str] | bytes | None) -> Image.Image:
    """Open an image file given by its path or its bytes; reads only the header.

    Raises ValueError if there is no file, and Pillow's errors if it is not an image.
    """
    if stored is None:
        raise ValueError("no image is stored")
    if isinstance(stored, bytes):
        return Image.open(io.BytesIO(stored))
    if (found := kind_at(stored)) != "a file":
        raise ValueError(f"expected an image file, found {found}")
    return Image.open(stored)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) in pixels after EXIF orientation, read from the header."""
    turned = image.getexif().get(ORIENTATION_TAG) in QUARTER_TURNS
    return (image.width, image.height) if turned else (image.height, image.width)


def upright_rgb(image: Image.Image) -> Image.Image:
    """Decode the image, apply its EXIF orientation and convert it to RGB from any mode."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def center_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """Resize and center-crop an image to height x width pixels.

    Halves it with a box filter while both sides are at least twice the target, resizes it bicubically until one side
    matches (this also enlarges small images), and crops around the center.
    """
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def to_uint8(image: Image.Image) -> torch.Tensor:
    """RGB image → uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def to_signed(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 in [0, 255] → float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_pixels(images: torch.Tensor) -> np.ndarray:
    """Clamp images [n, 3, H, W] to [-1, 1] and convert them → uint8 [n, H, W, 3]."""
    pixels = ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def as_grid(pixels: np.ndarray) -> np.ndarray:
    """uint8 [n, H, W, 3] → nearly square grid [rows·H, columns·W, 3]; unused cells are black."""
    count, height, width, _ = pixels.shape
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    cells = np.zeros((rows * columns, height, width, 3), dtype=np.uint8)
    cells[:count] = pixels
    grid = cells.reshape(rows, columns, height, width, 3).swapaxes(1, 2)
    return grid.reshape(rows * height, columns * width, 3)
