"""Sizes of the chunks that the GPU backends process one after the other.

The kernels of a chunk hand values to each other through global memory. Chunks are large: with chunks whose values stay
in the L2 cache, the kernels take longer on an H200, because each of them starts and ends once per chunk (docs/cuda.md).
"""

from __future__ import annotations

import math

import torch

MOST_PIXELS = 1 << 20
"""Pixels of a chunk at most."""
MOST_BYTES = 400_000_000
"""Bytes between the kernels of a chunk at most."""


def chunk_pixels(bytes_per_pixel: int) -> int:
    """Pixels of a chunk whose kernels hand on `bytes_per_pixel`."""
    return min(MOST_PIXELS, max(1, MOST_BYTES // bytes_per_pixel))


def chunk_of_images(image: torch.Tensor, patch_size: int, pixels: int) -> tuple[int, int]:
    """(images, rows of pixels) of chunks of at most `pixels` pixels: whole images, or whole rows of patches of one.

    All chunks have this size, except the last images and the last rows of an image.
    """
    batch, _, height, width = image.shape
    most_rows, most_images = pixels // width, pixels // (height * width)
    return _parts(batch, most_images, 1), _parts(height, most_rows, patch_size)


def _parts(size: int, most: int, step: int) -> int:
    """Size of equal parts of `size`, at most `most` and multiples of `step`, at least one step."""
    steps = size // step
    parts = math.ceil(steps / max(1, min(most // step, steps)))
    return step * math.ceil(steps / parts)
