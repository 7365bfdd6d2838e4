"""Parts of rows, and of a batch of images, that are processed one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch


def slices(count: int, size: int) -> Iterator[slice]:
    """Consecutive parts of `count` rows, of `size` rows each; the last one may have fewer."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def multiplied(part: slice, factor: int) -> slice:
    """The rows of a part, of which each holds `factor` rows."""
    return slice(part.start * factor, part.stop * factor)


class ImageChunk(NamedTuple):
    """Part of a batch of images: whole images, or whole rows of patches of one image, and their tokens."""

    images: slice
    rows: slice
    """Of pixels."""
    tokens: slice

    @property
    def token_count(self) -> int:
        count: int = self.tokens.stop - self.tokens.start
        return count

    def of(self, images: torch.Tensor) -> torch.Tensor:
        """The part of [B, C, H, W]."""
        return images[self.images, :, self.rows]


def image_chunks(shape: torch.Size, patch_size: int, images: int, rows: int) -> Iterator[ImageChunk]:
    """Chunks of `images` images and `rows` rows of pixels of a batch [B, C, H, W], in the order of their tokens.

    `rows` is a multiple of the patch size, and the height if `images` is more than one. The last chunk of an image or
    of the batch may be smaller. Yields nothing if there are no tokens.
    """
    batch, _, height, width = shape
    columns = width // patch_size
    per_image = height // patch_size * columns
    if per_image == 0:
        return
    for first in range(0, batch, images):
        last = min(first + images, batch)
        for row in range(0, height, rows):
            end = min(row + rows, height)
            start = first * per_image + row // patch_size * columns
            stop = (last - 1) * per_image + end // patch_size * columns
            yield ImageChunk(slice(first, last), slice(row, end), slice(start, stop))
